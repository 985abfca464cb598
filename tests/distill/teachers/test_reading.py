"""Conformance: a teacher's summary and patches against what its authors read, written here from
their published code on the parts of the network, without the code under test.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.config import TeacherConfig, TeacherRuntime
from distill.models.meta import building
from distill.models.student import create_timm, patch_size
from distill.recipe_files import shipped_recipes
from distill.recipe_io import load_recipe
from distill.teachers import Teacher, build_teacher
from distill.teachers.reading import MAPS, PROJECTED, TOKENS, reading_of
from distill.tiny import shrink

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
EVA = VIT | {"ref_feat_shape": (4, 4)}


def build(name: str, size: int, kwargs: dict, role: str = "dino", **settings: object) -> Teacher:
    config = TeacherConfig(
        name=name, role=role, pretrained=False, image_size=size, kwargs=kwargs, **settings
    )
    teacher = build_teacher(config, TeacherRuntime(), 0)
    torch.manual_seed(0)
    for parameter in teacher.net.parameters():  # a norm must be seen: fresh ones scale by one
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.3, 0.5)
    return teacher


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm over the last axis."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def attention_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """SigLIP's head: a learnt query attends to the tokens, then an MLP with a residual."""
    batch, _, width = x.shape
    heads = pool.num_heads

    def split(values: Tensor) -> Tensor:
        return values.unflatten(-1, (heads, -1)).transpose(1, 2)

    query = split(pool.q(pool.latent.expand(batch, -1, -1)))
    key, value = (split(part) for part in pool.kv(x).split(width, dim=-1))
    weights = (query @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(dim=-1)
    pooled = pool.proj((weights @ value).transpose(1, 2).flatten(2))
    return (pooled + pool.mlp(normed(pool.norm, pooled)))[:, 0]


def class_token(prefix: int = 1) -> Callable:
    """DINO, DINOv2 and DINOv3: `x_norm_clstoken` and `x_norm_patchtokens`; MAE and ViT too."""
    return lambda net, x: (normed(net.norm, x)[:, 0], normed(net.norm, x)[:, prefix:])


def beit(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """BEiT's `forward_features` with mean pooling, and EVA-02's: fc_norm(mean of patches)."""
    return normed(net.fc_norm, x[:, 1:].mean(1)), normed(net.fc_norm, x[:, 1:])


def clip(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's image tower: `ln_post(x[:, 0]) @ proj`."""
    x = normed(net.norm, x)
    return x[:, 0] @ net.head.weight.T + net.head.bias, x[:, 1:]


def siglip(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = normed(net.norm, x)
    return attention_pool(net.attn_pool, x), x


def perception_encoder(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = normed(net.norm, x)
    return attention_pool(net.attn_pool, x), x[:, 1:]


def convnext(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """DINOv3's ConvNeXt: `norm(cat([x.mean(spatial), x]))`, the first row and the others."""
    tokens = x.flatten(2).transpose(1, 2)
    both = torch.cat((tokens.mean(1, keepdim=True), tokens), dim=1)
    both = normed(net.head.norm, both)
    return both[:, 0], both[:, 1:]


def swin(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = normed(net.norm, x).flatten(1, 2)
    return x.mean(1), x


def plain_map(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.flatten(2).transpose(1, 2)
    return tokens.mean(1), tokens


def hidden_map(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """InceptionNeXt's head up to its classifier, whose norm is that of the hidden layer."""
    _, tokens = plain_map(net, x)
    head = net.head
    return normed(head.norm, head.act(head.fc1(tokens.mean(1)))), tokens


# name: (side, kwargs, role, the last part before pooling and norms, the authors' way, kind)
FAMILIES = {
    "vit_tiny_patch16_224": (64, VIT, "mae", "blocks.1", class_token(), "class token"),
    "vit_small_patch14_dinov2": (56, VIT, "dino", "blocks.1", class_token(), "class token"),
    "vit_small_patch14_reg4_dinov2": (56, VIT, "dino", "blocks.1", class_token(5), "class token"),
    "vit_small_patch16_dinov3": (64, VIT, "dino", "blocks.1", class_token(5), "class token"),
    "vit_base_patch16_clip_quickgelu_224": (64, VIT, "clip", "blocks.1", clip, "class token"),
    "eva02_base_patch16_clip_224": (
        64,
        EVA | {"num_classes": 24},
        "clip",
        "blocks.1",
        clip,
        "class token",
    ),
    "vit_base_patch16_siglip_224": (64, VIT, "clip", "blocks.1", siglip, "attention pool"),
    "vit_pe_core_tiny_patch16_384": (
        64,
        EVA | {"attn_pool_num_heads": 2, "num_classes": 0},
        "clip",
        "blocks.1",
        perception_encoder,
        "attention pool",
    ),
    "beit_base_patch16_224": (64, VIT, "dino", "blocks.1", beit, "normed mean"),
    "beitv2_base_patch16_224": (64, VIT, "classification", "blocks.1", beit, "normed mean"),
    "eva02_tiny_patch14_224": (56, EVA, "mae", "blocks.1", beit, "normed mean"),
    "vit_huge_patch14_gap_224": (
        56,
        VIT,
        "dino",
        "blocks.1",
        lambda net, x: (normed(net.norm, x).mean(1), normed(net.norm, x)),
        "mean",
    ),
    "deit_tiny_distilled_patch16_224": (
        64,
        VIT,
        "classification",
        "blocks.1",
        lambda net, x: (normed(net.norm, x)[:, :2].mean(1), normed(net.norm, x)[:, 2:]),
        "two tokens",
    ),
    "convnext_tiny": (
        64,
        {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
        "dino",
        "stages.3",
        convnext,
        "norm in the head",
    ),
    "davit_tiny": (
        64,
        {
            "depths": [1, 1, 1, 1],
            "embed_dims": [8, 16, 24, 32],
            "num_heads": [1, 1, 1, 1],
            "window_size": 2,
        },
        "classification",
        "stages.3",
        convnext,
        "norm in the head",
    ),
    "caformer_s18": (64, {}, "classification", "stages.3", convnext, "norm in the head"),
    "mambaout_femto": (
        64,
        {"depths": [1] * 4, "dims": [8, 16, 24, 32]},
        "classification",
        "stages.3",
        lambda net, x: convnext(net, x.permute(0, 3, 1, 2)),
        "norm in the head",
    ),
    # CLIP's, whose hidden layer is of its projection
    "convnext_large_mlp": (
        64,
        {"depths": [1] * 4, "dims": [8, 16, 24, 32], "head_hidden_size": 40, "num_classes": 24},
        "classification",
        "stages.3",
        convnext,
        "norm in the head",
    ),
    "inception_next_atto": (64, {}, "classification", "stages.3", hidden_map, "map"),
    "swin_tiny_patch4_window7_224": (
        64,
        {"embed_dim": 12, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2},
        "classification",
        "layers.3",
        swin,
        "map",
    ),
    "resnet10t": (64, {}, "classification", "layer4", plain_map, "map"),
    "mobilenetv2_100": (64, {}, "classification", "bn2", plain_map, "map"),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_summary_and_patches_are_what_the_authors_read(name):
    size, kwargs, role, last, authors, kind = FAMILIES[name]
    teacher = build(name, size, kwargs, role)
    seen = []
    teacher.net.get_submodule(last).register_forward_hook(lambda *call: seen.append(call[2]))
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    features = teacher(images)
    summary, patches = authors(teacher.net, seen[0])
    torch.testing.assert_close(features.summary, summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.patches.flatten(1, 2), patches, rtol=1e-4, atol=1e-5)
    assert reading_of(teacher.net, tokens=last.startswith("blocks")).kind == kind


@torch.no_grad()
def test_a_hidden_layer_in_the_head_is_part_of_the_projection():
    size, kwargs, *_ = FAMILIES["convnext_large_mlp"]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    teacher = build("convnext_large_mlp", size, kwargs, "clip")
    expected = teacher.net(teacher.preprocess(images))
    torch.testing.assert_close(teacher(images).summary, expected)
    assert expected.shape == (2, 24)


_HEADS = ("convnext_large_mlp", "coatnet_0_224", "maxvit_tiny_tf_224", "mambaout_small_rw")


@pytest.mark.slow
def test_every_norm_that_runs_in_the_head_alone_is_in_a_row():
    """Of every family of timm's: which module is the first after the pooling."""
    large = ("large", "huge", "giant", "base", "_l", "xl", "so400m")
    modules = (timm.list_models(module=module) for module in timm.list_modules())
    names = [
        min(found, key=lambda name: (any(word in name for word in large), len(name)))
        for found in modules
        if found
    ]
    kinds = set()
    for name in (*names, *_HEADS):
        with building():
            net = create_timm(name).eval()
        tokens = patch_size(net) is not None
        shape = [1, 2, 2, net.num_features]
        if tokens:
            shape = [1, getattr(net, "num_prefix_tokens", 0) + 4, net.num_features]
        elif getattr(net, "output_fmt", "NCHW") != "NHWC":
            shape = [1, net.num_features, 2, 2]
        ran: list[nn.Module] = []
        for module in net.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, *_, ran=ran: ran.append(module))
        try:
            net.forward_head(torch.empty(shape, device="meta"), pre_logits=True)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue  # no head, or features of other shapes, which are refused
        passed = (nn.Identity, nn.Dropout, nn.Flatten, nn.AdaptiveAvgPool2d)
        first = next((m for m in ran if not isinstance(m, passed)), None)
        kind = reading_of(net, tokens).kind
        normed_in_head = "Norm" in type(first).__name__
        assert (kind in ("norm in the head", "normed mean")) == normed_in_head, (name, kind)
        kinds.add(kind)
    assert {"norm in the head", "normed mean", "map"} <= kinds


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    "name",
    ["vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224"],
)
@torch.no_grad()
def test_a_block_is_read_with_the_final_norm_and_without_the_projection(name, block):
    size, kwargs, role, _, authors, _ = FAMILIES[name]
    teacher = build(name, size, kwargs, role, block=block)
    seen = []
    hooked = teacher.net.blocks[block]
    hooked.register_forward_hook(lambda *call: seen.append(call[2]))
    features = teacher(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    if name.startswith("beit"):
        summary, patches = beit(teacher.net, seen[0])
    elif "siglip" in name:
        x = normed(teacher.net.norm, seen[0])
        summary, patches = (attention_pool(teacher.net.attn_pool, x) if block else x.mean(1)), x
    else:
        summary, patches = class_token()(teacher.net, seen[0])
    torch.testing.assert_close(features.summary, summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.patches.flatten(1, 2), patches, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_last_stage_of_a_convnext_is_normed_and_an_earlier_one_is_not():
    size, kwargs, *_ = FAMILIES["convnext_tiny"]
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    whole = build("convnext_tiny", size, kwargs)(images)
    last = build("convnext_tiny", size, kwargs, block=3)(images)
    torch.testing.assert_close(last.patches, whole.patches)
    torch.testing.assert_close(last.summary, whole.summary)
    earlier = build("convnext_tiny", size, kwargs, block=2)(images)
    assert earlier.patches.shape[-1] == 24
    torch.testing.assert_close(earlier.summary, earlier.patches.mean((1, 2)))


def test_the_document_has_every_row_of_the_table():
    text = Path("docs/teachers.md").read_text()
    for row in (*TOKENS, *MAPS):
        assert f"| {row.kind} | {row.families} | {row.summary} | {row.patches} |" in text
    assert PROJECTED in text


@cache
def kind_of(name: str) -> str:
    """The kind of an architecture, by a small network of it."""
    with building():
        net = create_timm(name, **shrink(name, {})["kwargs"])
    return reading_of(net, tokens=patch_size(net) is not None).kind


@pytest.mark.slow
def test_every_recipes_header_says_what_is_read_of_its_teachers():
    for name, text in shipped_recipes().items():
        words = " ".join(line.lstrip("# ") for line in text.splitlines())
        for config in load_recipe(name, []).teachers:
            if config.role == "detector":
                kind = "its maps"
            elif config.role == "clip":
                kind = "projected"
            elif "convnextB_1kpretrained" in (config.checkpoint or ""):  # SparK's has no norm
                kind = "map"
            else:
                kind = kind_of(config.name)
            assert f"{config.label} ({kind})" in words, name
