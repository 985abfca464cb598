"""UMT as a whole: shapes, gradients, ablations, widths, and the errors of its dimensions."""

import pytest
import torch

from contract.errors import UserError
from distill.config import Recipe
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.umt import resolve_space_dim, resolve_token_dim
from distill.recipe_io import make_recipe

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 64,
    "kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}
CNN = {"name": "resnet10t", "image_size": 64, "kwargs": {"zero_init_last": False}}
DIMS = {"cls": FeatureDims(24, 24), "mae": FeatureDims(48, 48), "dino": FeatureDims(40, 32)}
GRIDS = {"cls": (2, 2), "mae": (4, 4), "dino": (5, 5)}


def recipe(student: dict = VIT, method: str = "umt", **umt) -> Recipe:
    teachers = [
        {"name": "resnet10t", "role": "classification", "alias": "cls"},
        {"name": "vit", "role": "mae"},
        {"name": "vit", "role": "dino"},
    ]
    small = {"space_dim": 64, "groups": 8} | umt
    return make_recipe(
        {
            "method": method,
            "student": student,
            "teachers": teachers,
            "umt": small,
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1},
        }
    )


def make(student: dict = VIT, **umt) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_method(recipe(student, **umt), DIMS)


def batch() -> tuple[dict[str, torch.Tensor], dict[str, Features]]:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    targets = {
        label: Features(torch.randn(2, dim.summary), torch.randn(2, *GRIDS[label], dim.patches))
        for label, dim in DIMS.items()
    }
    return {"image": images}, targets


STUDENTS = pytest.mark.parametrize("student", [VIT, CNN], ids=["vit", "cnn"])
MODES = pytest.mark.parametrize("mode", ["channel", "token", "axial", "grouped"])


@STUDENTS
@MODES
def test_every_parameter_that_trains_receives_a_gradient_and_the_model_token_too(student, mode):
    method = make(student, cross_space=mode)
    method(*batch())["loss"].backward()
    starved = [
        n
        for n, p in method.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # a key's bias shifts all scores of a query alike, which softmax ignores: its gradient is zero
    # by nature
    assert [
        name for name in starved if "attn.qkv.bias" not in name and "qkv.1.bias" not in name
    ] == []
    assert method.interaction.model_token.grad.abs().sum() > 0


@STUDENTS
def test_the_deployed_student_predicts_in_each_teachers_widths(student):
    method = make(student)
    method.eval()
    predictions = method.deploy()(torch.rand(2, 3, 64, 64))
    side = 64 // method.student.stride
    width = method.student.width
    assert list(predictions) == ["backbone", "cls", "mae", "dino"]
    assert predictions["backbone"].patches.shape == (2, side, side, width)
    assert predictions["backbone"].token.shape == (2, width)
    for label, dim in DIMS.items():
        assert predictions[label].token.shape == (2, dim.summary)
        assert predictions[label].patches.shape == (2, side, side, dim.patches)
        assert predictions[label].summary.shape == (2, dim.patches)


@STUDENTS
def test_the_deployed_student_takes_other_resolutions_and_shapes(student):
    method = make(student).eval()
    patches = method.deploy()(torch.rand(1, 3, 96, 128))["dino"].patches
    assert patches.shape[1:3] == (96 // method.student.stride, 128 // method.student.stride)


def spaces_seen(method: torch.nn.Module) -> torch.Tensor:
    """[M, M]: does the output of space i change when Gamma_j's input alone does?"""
    interaction, count = method.interaction.double(), len(DIMS)
    width, side = method.student.width, 64 // method.student.stride
    features = Features(torch.randn(1, width).double(), torch.randn(1, side, side, width).double())
    before = interaction(features)
    seen = torch.zeros(count, count, dtype=torch.bool)
    for source in range(count):
        rows = slice(source * interaction.space_dim, (source + 1) * interaction.space_dim)
        with torch.no_grad():
            interaction.reproject.weight[rows] += 1.0
            moved = (interaction(features) - before).abs().amax(dim=(0, 1, 3))
            interaction.reproject.weight[rows] -= 1.0
        seen[:, source] = moved > 1e-9
    return seen


@STUDENTS
@MODES
def test_with_cross_space_each_output_space_depends_on_every_input_space(student, mode):
    assert spaces_seen(make(student, cross_space=mode)).all()


@STUDENTS
def test_without_cross_space_each_output_space_depends_on_its_own_input_alone(student):
    assert torch.equal(
        spaces_seen(make(student, cross_space=False)), torch.eye(3, dtype=torch.bool)
    )


@STUDENTS
def test_the_ablations_of_table_3_remove_what_they_name(student):
    assert not any(
        "cross" in name for name, _ in make(student, cross_space=False).named_parameters()
    )
    assert not any(
        "intra" in name for name, _ in make(student, intra_space=False).named_parameters()
    )
    bare = make(student, model_token=False)
    assert not any("token" in n for n, _ in bare.named_parameters() if not n.startswith("student."))
    losses = bare(*batch())
    assert "loss.token" not in losses and torch.isfinite(losses["loss"])


def test_alternations_default_to_two_for_a_cnn_and_one_for_a_vit():
    assert len(make(CNN).interaction.cross) == len(make(CNN).interaction.intra) == 2
    assert len(make(VIT).interaction.cross) == len(make(VIT).interaction.intra) == 1
    assert len(make(VIT, depth=3).interaction.intra) == 3


def test_widths_follow_the_teachers_and_the_students_family():
    umt = recipe().umt.model_copy(update={"space_dim": "auto", "token_dim": "auto"})
    assert resolve_space_dim(umt, 192, list(DIMS.values())) == 192
    assert resolve_space_dim(umt, 192, [FeatureDims(None, 48), FeatureDims(24, 48)]) == 48
    assert (
        resolve_space_dim(umt.model_copy(update={"space_dim": "student"}), 192, list(DIMS.values()))
        == 192
    )
    assert resolve_token_dim(umt, cnn=True, space_dim=768) == 768
    assert resolve_token_dim(umt, cnn=False, space_dim=768) == 64


def test_where_the_space_has_the_teachers_width_the_chunk_itself_is_the_prediction():
    method = make(space_dim=32, token_dim=32)
    heads = method.read_out.feature_heads
    assert isinstance(heads["dino"], torch.nn.Identity) and isinstance(
        heads["mae"], torch.nn.Linear
    )


def test_one_token_head_serves_all_teachers_only_where_their_widths_agree():
    assert list(make().read_out.token_heads) == ["cls", "mae", "dino"]
    equal = {label: FeatureDims(32, 32) for label in DIMS}
    assert list(build_method(recipe(), equal).read_out.token_heads) == ["shared"]
    assert list(build_method(recipe(share_token_head=False), equal).read_out.token_heads) == [
        "cls",
        "mae",
        "dino",
    ]
    with pytest.raises(UserError, match="share_token_head.*cls 24, mae 48, dino 40"):
        make(share_token_head=True)


def test_pooling_the_token_before_and_after_its_head_are_different_readings():
    before, after = make(token_pool="before"), make(token_pool="after")
    after.load_state_dict(before.state_dict())
    views, targets = batch()
    assert before(views, targets)["loss.token"] != after(views, targets)["loss.token"]


def test_groups_that_do_not_divide_name_the_nearest_token_widths():
    with pytest.raises(UserError, match=r"umt.groups = 48 .* = 128: use umt.token_dim=32 or 80"):
        make(CNN, groups=48, token_dim=64)
    assert make(CNN, groups="auto", token_dim=8).interaction.cross[0].block.groups == 8


def test_heads_that_do_not_divide_name_the_nearest_token_widths():
    with pytest.raises(UserError, match=r"umt.heads = 5 .* = 128: use umt.token_dim=61 or 66"):
        make(VIT, heads=5, token_dim=64)


def test_cross_space_attention_has_m_times_the_heads_of_intra_space():
    method = make(heads=4)
    assert method.interaction.intra[0].block.block.attn.num_heads == 4
    assert method.interaction.cross[0].block.block.attn.num_heads == 12


def test_the_plain_baseline_has_one_head_a_teacher_and_no_interaction():
    torch.manual_seed(0)
    method = build_method(recipe(method="plain"), DIMS)
    losses = method(*batch())
    losses["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert set(losses) >= {
        "loss.cls.token",
        "loss.mae.patches",
        "loss.dino.token",
        "loss.token",
        "loss.patches",
    }
    predictions = method.eval().deploy()(torch.rand(1, 3, 64, 64))
    assert predictions["dino"].token.shape == (1, 40) and predictions["dino"].patches.shape == (
        1,
        4,
        4,
        32,
    )


def test_a_patch_that_does_not_divide_the_crop_names_the_nearest_sizes():
    with pytest.raises(
        UserError,
        match=r"patch of 16 pixels does not divide student.image_size = 100 \(use 96 or 112\)",
    ):
        build_method(recipe(VIT | {"image_size": 100}), DIMS)


def test_an_unknown_student_suggests_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        build_method(recipe({"name": "resnet_50", "image_size": 64}), DIMS)


@pytest.mark.parametrize("method", ["umt", "plain"])
def test_a_teacher_without_a_summary_gets_no_token(method):
    dims = DIMS | {"dino": FeatureDims(None, 32)}
    model = build_method(recipe(method=method), dims)
    views, targets = batch()
    targets["dino"] = targets["dino"]._replace(summary=None)
    losses = model(views, targets)
    assert "loss.dino.token" not in losses and "loss.mae.token" in losses
    assert {"loss", *model.describe()["losses"]} == set(losses)
    shipped = model.deploy()
    assert [label for label, head in shipped.shipped.items() if head.has_token] == ["cls", "mae"]
    predictions = shipped(torch.rand(1, 3, 64, 64))
    assert predictions["dino"].token is None and predictions["cls"].token is not None


@pytest.mark.parametrize("method", ["umt", "plain"])
def test_every_parameter_learns_from_teachers_without_a_summary(method):
    dims = {label: dim._replace(summary=None) for label, dim in DIMS.items()}
    model = build_method(recipe(method=method), dims)
    views, targets = batch()
    targets = {label: target._replace(summary=None) for label, target in targets.items()}
    model(views, targets)["loss"].backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    unused = {name for name, grad in trained if grad is None}
    # the class position has no loss of its own where a ViT's tokens have none either
    assert unused == set()
