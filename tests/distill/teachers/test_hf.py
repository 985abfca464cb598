"""Teachers of transformers, from folders with small random networks: what is read of each kind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from contract.errors import UserError
from distill.config import TeacherConfig, TeacherRuntime
from distill.evaluate.encoder import named_encoder, parse_model
from distill.features import FeatureDims, Features
from distill.models.meta import building
from distill.teachers import Teacher, build_teacher, hf, weights_source

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 8}
CNN = {"hidden_sizes": [4, 4, 8, 16], "depths": [1, 1, 1, 1], "image_size": 64}
DINOV2 = {name: value for name, value in VIT.items() if name != "intermediate_size"}
PICTURES = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def reads_tokens(prefix: int) -> Callable:
    """Class token, and the tokens behind `prefix` others."""

    def read(net: nn.Module, pixels: torch.Tensor) -> Features:
        state = net(pixels).last_hidden_state
        return Features(state[:, 0], state[:, prefix:].unflatten(1, (4, 4)))

    return read


def reads_clip(net: nn.Module, pixels: torch.Tensor) -> Features:
    vision = getattr(net, "vision_model", net)
    normed = vision.post_layernorm(vision(pixels).last_hidden_state)
    return Features(normed[:, 0], normed[:, 1:].unflatten(1, (4, 4)))


def reads_beit(net: nn.Module, pixels: torch.Tensor) -> Features:
    output = net(pixels)
    normed = net.pooler.layernorm(output.last_hidden_state[:, 1:])
    return Features(output.pooler_output, normed.unflatten(1, (4, 4)))


def reads_siglip(net: nn.Module, pixels: torch.Tensor) -> Features:
    output = getattr(net, "vision_model", net)(pixels)
    return Features(output.pooler_output, output.last_hidden_state.unflatten(1, (4, 4)))


def reads_map(net: nn.Module, pixels: torch.Tensor) -> Features:
    map_ = net(pixels).last_hidden_state.permute(0, 2, 3, 1)
    norm = getattr(net, "layernorm", nn.Identity())
    return Features(norm(map_.mean(dim=(1, 2))), norm(map_))


def reads_swin(net: nn.Module, pixels: torch.Tensor) -> Features:
    state = net(pixels).last_hidden_state
    return Features(state.mean(dim=1), state.unflatten(1, (4, 4)))


T = transformers
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable, int]] = {
    "vit": (lambda: T.ViTModel(T.ViTConfig(**VIT)), reads_tokens(1), 32),
    "dinov2": (lambda: T.Dinov2Model(T.Dinov2Config(**DINOV2)), reads_tokens(1), 32),
    "registers": (
        lambda: T.Dinov2WithRegistersModel(
            T.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=3)
        ),
        reads_tokens(4),
        32,
    ),
    "clip-vision": (lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VIT)), reads_clip, 32),
    "clip": (
        lambda: T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=VIT, projection_dim=12)),
        reads_clip,
        32,
    ),
    "projected": (
        lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**VIT, projection_dim=12)),
        reads_clip,
        32,
    ),
    "siglip": (
        lambda: T.SiglipModel(
            T.SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VIT)
        ),
        reads_siglip,
        32,
    ),
    "beit": (lambda: T.BeitModel(T.BeitConfig(**VIT)), reads_beit, 32),
    "beit-token": (
        lambda: T.BeitModel(T.BeitConfig(**VIT, use_mean_pooling=False)),
        reads_tokens(1),
        32,
    ),
    "convnext": (lambda: T.ConvNextModel(T.ConvNextConfig(**CNN)), reads_map, 64),
    "resnet": (
        lambda: T.ResNetModel(
            T.ResNetConfig(
                embedding_size=4,
                hidden_sizes=CNN["hidden_sizes"],
                depths=CNN["depths"],
                layer_type="basic",
            )
        ),
        reads_map,
        64,
    ),
    "swin": (
        lambda: T.SwinModel(
            T.SwinConfig(
                embed_dim=4,
                depths=[1, 1, 1],
                num_heads=[1, 2, 2],
                window_size=2,
                image_size=64,
                patch_size=4,
            )
        ),
        reads_swin,
        64,
    ),
}


@pytest.fixture(scope="module")
def folders(made_once) -> Path:
    """A folder for each kind, as `save_pretrained` writes it."""

    def make(root: Path) -> None:
        transformers.utils.logging.disable_progress_bar()
        for number, (name, (kind, _, side)) in enumerate(KINDS.items()):
            torch.manual_seed(number)
            net = kind().eval()
            with torch.no_grad():  # norms that do nothing would not be missed
                for parameter in net.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            net.save_pretrained(root / name)
            state = PICTURES | {"size": {"height": side, "width": side}}
            (root / name / "preprocessor_config.json").write_text(json.dumps(state))

    return made_once("transformers", make)


@pytest.fixture
def copied(folders, tmp_path) -> Callable[..., Path]:
    """A function that copies a kind's folder, for a test to change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


def build(folder: object, role: str = "dino", **settings: object) -> Teacher:
    config = TeacherConfig(name=f"hf:{folder}", role=role, alias="own", **settings)
    return build_teacher(config, TeacherRuntime(), 0)


@pytest.mark.parametrize("name", KINDS)
def test_summary_and_patches_are_what_the_authors_read(folders, name):
    kind, read, side = KINDS[name]
    teacher = build(folders / name)
    assert teacher.image_size == side
    assert teacher.preprocess.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert teacher.preprocess.std.flatten().tolist() == pytest.approx([0.2, 0.3, 0.4])
    pixels = torch.randn(2, 3, side, side)
    net = kind().eval()
    net = type(net).from_pretrained(folders / name).eval()
    with torch.no_grad():
        expected, features = read(net, pixels), teacher.encode(pixels)
    torch.testing.assert_close(features.patches, expected.patches)
    torch.testing.assert_close(features.summary, expected.summary)
    dims = FeatureDims(expected.summary.shape[-1], expected.patches.shape[-1])
    assert teacher.dims == dims and teacher.grid == tuple(expected.patches.shape[1:3])


@pytest.mark.parametrize(("mean", "pools"), [(True, True), (True, False), (False, False)])
def test_data2vec_has_the_norm_of_its_pooler_or_is_refused(tmp_path, mean, pools):
    config = T.Data2VecVisionConfig(**VIT, use_mean_pooling=mean)
    net = T.Data2VecVisionModel(config, add_pooling_layer=pools).eval()
    net.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    if mean and not pools:
        with pytest.raises(UserError, match="missing from its weights, .*'pooler.layernorm"):
            build(tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
        return
    with torch.no_grad():
        expected = (reads_beit if pools else reads_tokens(1))(net, pixels)
        features = build(tmp_path, mean=[0.5] * 3, std=[0.5] * 3).encode(pixels)
    torch.testing.assert_close(features.patches, expected.patches)
    torch.testing.assert_close(features.summary, expected.summary)


def _unapplied(kind: str) -> set[str]:
    """Norms of a kind's tower, as its configuration is by default, that patches do not pass: what
    they depend on is asked of autograd, without memory or arithmetic.
    """
    config = T.AutoConfig.for_model(kind)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:  # none of the layers but the last ones is of interest
        if isinstance(getattr(part, "num_hidden_layers", None), int):
            part.num_hidden_layers = 2
    with torch.device("meta"):
        net = hf._build(T.AutoModel, config, {"trust_remote_code": False})
        tower = getattr(net, "vision_model", net).eval()
        if getattr(tower, "main_input_name", "") != "pixel_values":
            raise UserError("refused, as in build_hf_teacher")
        network = hf.TransformersNet(tower, None, kind).requires_grad_(True)
        side = network.size or 224
        patches = network(torch.zeros(1, 3, side, side)).patches
    norms = {
        name: part.weight
        for name, part in tower.named_modules()
        if type(part).__name__.endswith(("Norm", "Norm2d")) and hasattr(part, "weight")
    }
    if not norms:
        return set()
    grads = torch.autograd.grad(patches.sum(), list(norms.values()), allow_unused=True)
    missed = {name for name, grad in zip(norms, grads, strict=True) if grad is None}
    # those inside a head that pools by attention are no norms of the map
    return {name for name in missed if not name.startswith("head.")}


@pytest.mark.parametrize("kind", ["clipseg", "data2vec-vision", "kosmos-2", "mlcd_vision_model"])
def test_patches_have_passed_every_norm(kind):
    assert _unapplied(kind) == set()


@pytest.mark.long
def test_patches_of_every_accepted_kind_have_passed_every_norm():
    """A kind of a later transformers may have its final norm behind its pooling too."""
    accepted, wrong = set(), {}
    root = Path(T.models.__file__).parent
    for kind in T.models.auto.modeling_auto.MODEL_MAPPING_NAMES:
        folder = root / T.models.auto.configuration_auto.model_type_to_module_name(kind)
        if not any("pixel_values" in p.read_text() for p in folder.glob("modeling_*.py")):
            continue
        try:
            missed = _unapplied(kind)
        except Exception:  # cannot be built without arguments, or is refused
            continue
        accepted.add(kind)
        if missed:
            wrong[kind] = missed
    assert accepted >= {"beit", "clip", "clipseg", "dinov2", "dinov3_vit", "siglip", "swin", "vit"}
    assert len(accepted) > 50 and wrong == {}


def test_role_clip_is_the_projected_embedding(folders):
    pixels = torch.randn(2, 3, 32, 32)
    net = T.CLIPModel.from_pretrained(folders / "clip").eval()
    with torch.no_grad():
        expected = net.get_image_features(pixels).pooler_output
        features = build(folders / "clip", "clip").encode(pixels)
    torch.testing.assert_close(features.summary, expected)
    assert build(folders / "projected", "clip").dims == FeatureDims(12, 16)
    assert build(folders / "siglip", "clip").dims == FeatureDims(16, 16)
    with pytest.raises(UserError, match=r"no projection .*: set teachers\.0\.role=classification"):
        build(folders / "clip-vision", "clip")
    assert parse_model(f"hf:{folders / 'clip'}").role == "clip"
    assert parse_model(f"hf:{folders / 'clip-vision'}").role == "classification"


def test_other_sizes_have_other_grids(folders):
    assert build(folders / "vit", image_size=48).grid == (6, 6)
    with pytest.raises(UserError, match=r"does not divide teachers\.0\.image_size = 50"):
        build(folders / "vit", image_size=50)
    encoder = named_encoder(f"hf:{folders / 'dinov2'}")
    assert encoder.stride == 8 and not encoder.is_bare and encoder.takes(48, 32)
    features = encoder(torch.zeros(1, 3, 48, 32, dtype=torch.uint8))
    assert features.patches.shape == (1, 6, 4, 16)


@pytest.mark.parametrize("name", ["vit", "clip", "convnext", "swin"])
def test_the_plan_needs_no_weights(copied, name):
    folder = copied(name)
    (folder / "model.safetensors").unlink()
    with building():
        teacher = build(folder, pretrained=False)
    assert all(parameter.is_meta for parameter in teacher.parameters())
    with pytest.raises(UserError, match=r"cannot be loaded .*: give a downloaded copy as hf:FOLD"):
        build(folder)


def test_random_weights_are_the_same_each_time(folders):
    one = build(folders / "vit", pretrained=False)
    assert one.fingerprint() == build(folders / "vit", pretrained=False).fingerprint()
    assert weights_source(one.config) == "random weights"


def test_the_identity_is_of_what_is_in_the_folder_not_of_its_place(folders, copied):
    here, there = build(folders / "vit"), build(copied("vit"))
    assert here.identity() == there.identity() and here.fingerprint() == there.fingerprint()
    json.dumps(here.identity())
    assert build(folders / "vit", kwargs={"hidden_act": "relu"}).identity() != here.identity()


def changed(folder: Path, file: str, **changes: object) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_the_processor_does_not_state_the_recipe_does(copied):
    folder = copied("vit")
    (folder / "preprocessor_config.json").unlink()
    for name in ("mean", "std"):
        given = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        del given[name]
        with pytest.raises(UserError, match=rf"state its {name}: set teachers\.0\.{name}$"):
            build(folder, **given)
    teacher = build(folder, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert teacher.image_size == 32  # of config.json


def test_crops_and_unnormalised_pictures_of_processors(copied):
    state = {"size": {"shortest_edge": 64}, "crop_size": {"height": 40, "width": 40}}
    folder = changed(copied("vit"), "preprocessor_config.json", do_center_crop=True, **state)
    assert build(folder).image_size == 40
    changed(folder, "preprocessor_config.json", do_center_crop=False, do_normalize=False)
    teacher = build(folder)
    assert teacher.image_size == 64 and teacher.preprocess.std.flatten().tolist() == [1, 1, 1]
    changed(folder, "preprocessor_config.json", rescale_factor=1 / 127.5)
    with pytest.raises(UserError, match="scales by 0.0078"):
        build(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": 1}, "teachers.0.block is for timm models"),
        ({"checkpoint": "a.safetensors"}, "teachers.0.checkpoint is not for hf:"),
        ({"kwargs": {"depth": 3}}, "teachers.0.kwargs.depth is not a key of its config.json"),
        ({"kwargs": {"hidden_size": 24}}, "cannot be loaded"),
        ({"kwargs": {"num_hidden_layers": 3}}, "16 tensors are missing from its weights"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folders, settings, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        build(folders / "vit", **settings)
    assert "\n" not in str(error.value)


def test_networks_without_a_grid_or_that_draw_lots_are_refused(tmp_path, copied):
    net = T.ViTMAEModel(T.ViTMAEConfig(**VIT))
    net.save_pretrained(tmp_path / "mae")
    normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UserError, match="gives 5 tokens for pictures of 32 x 32 px"):
        build(tmp_path / "mae", **normal)
    with pytest.raises(UserError, match="differ between two calls"):
        build(tmp_path / "mae", kwargs={"mask_ratio": 0.0}, **normal)
    stages = ("blocks", "embed_dim", "num_attention_heads", "window_size")
    sizes = zip(stages, ([1, 1], [16, 32], [1, 2], [4, 4]), strict=True)
    config = T.Sam2HieraDetConfig(
        **{f"{name}_per_stage": size for name, size in sizes},
        hidden_size=16,
        image_size=[64, 64],
        num_query_pool_stages=1,
        global_attention_blocks=[],
        window_positional_embedding_background_size=[2, 2],
    )
    T.Sam2HieraDetModel(config).save_pretrained(tmp_path / "sam")  # channels last
    with pytest.raises(UserError, match=r"gives \[2, 8, 8, 32\] for pictures of 64 x 64 px"):
        build(tmp_path / "sam", image_size=64, **normal)


THEIRS = """
print("their code runs")
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class Theirs(PretrainedConfig):
    model_type = "theirs"

class TheirModel(PreTrainedModel):
    config_class = Theirs
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.convolution = nn.Conv2d(3, 6, 8, 8)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=self.convolution(pixel_values))
"""


def test_code_of_a_repository_runs_only_where_it_is_asked_for(tmp_path, capsys):
    places = {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.TheirModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": places}))
    (tmp_path / "theirs.py").write_text(THEIRS)
    state = PICTURES | {"size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(state))
    weights = {"convolution.weight": torch.ones(6, 3, 8, 8), "convolution.bias": torch.ones(6)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"set teachers\.0\.kwargs=\{trust_remote_code: true\}"):
        build(tmp_path)
    assert "their code" not in capsys.readouterr().out
    first = build(tmp_path, kwargs={"trust_remote_code": True})
    assert first.grid == (4, 4)
    assert "their code" in capsys.readouterr().out
    (tmp_path / "theirs.py").write_text(f"{THEIRS}# changed\n")
    second = build(tmp_path, kwargs={"trust_remote_code": True})
    assert second.fingerprint() != first.fingerprint()


def test_attention_code_of_a_hub_is_refused_unless_the_recipe_says_otherwise(copied):
    folder = changed(copied("clip"), "config.json", attn_implementation="someone/kernels")
    wanted = r"\(someone/kernels\): set teachers\.0\.kwargs=\{attn_implementation: sdpa\}"
    with pytest.raises(UserError, match=wanted):
        build(folder)
    assert build(folder, kwargs={"attn_implementation": "sdpa"}).grid == (4, 4)
    with pytest.raises(UserError, match=r"kwargs\.attn_implementation is not a key"):
        build(folder, kwargs={"attn_implementation": "someone/kernels"})


def test_a_folder_of_timms_is_referred_to_timms_prefix(tmp_path):
    config = {"architecture": "resnet10t", "model_type": "timm_wrapper", "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
    with pytest.raises(UserError, match=rf"is timm's: set teachers\.0\.name=local-dir:{tmp_path}"):
        build(tmp_path)


def test_folders_and_repositories_that_are_not_there_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="no such folder$"):
        build(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"cannot be loaded .*: give a downloaded copy as hf:F"):
        build("owner/no-such-network")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        build(tmp_path)
