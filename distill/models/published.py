"""What published weights were trained with, where timm's name does not say it: the activation of
CLIPs, and the mean and deviation of pictures.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import timm
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from timm.layers.activations import QuickGELU
from timm.models import PretrainedCfg
from torch import nn

from distill.models.packaged import PACKAGE

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)

_GENERAL = re.compile(r"vit_[a-z0-9]+_patch\d+_\d+$|convnext(v2)?_[a-z]+$|swin_")
"""Architectures that many families share, so that their name says nothing of the weights."""

_LAYOUTS = (
    (("visual.class_embedding", "visual.trunk."), "CLIP", _CLIP),
    (("sparse_encoder.",), "SparK", IMAGENET),
    (("base_encoder.", "encoder_q."), "MoCo", IMAGENET),
    (("teacher.", "dino_head"), "DINO", IMAGENET),
    (("decoder_embed.", "mask_token"), "masked image modelling", IMAGENET),
)
"""Parts of names in published files, whose they are, and what those were trained with."""

_ROLES = {"dino": IMAGENET, "mae": IMAGENET, "clip": _CLIP}
"""Published self-supervised weights and CLIPs; SigLIP has architectures of its own."""

_OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's own files have beside the weights."""

_OPENAI_FILES = {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336px"}
_QUICK = re.compile(r"openai(?!_ft)|metaclip|dfn\d?b|quickgelu|quick_gelu", re.IGNORECASE)
"""In a path, weights of OpenAI, MetaCLIP or DFN: all QuickGELU, unless fine-tuned by timm."""

_HUB_FILES = re.compile(r"(open_clip_)?(pytorch_)?model[.-]")


class Normalization(NamedTuple):
    """Mean and deviation of RGB in [0, 1], and why these; `guessed` where nothing published says
    so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reason: str
    guessed: bool = False


def normalization_of(
    name: str, checkpoint: str | None, role: str | None, names: Collection[str] = ()
) -> Normalization:
    """What a timm network's weights expect. `names` are those of the tensors in its file, where it
    has been read.

    In this order: what stands beside the file, timm's record of the name's tag, the architecture
    where one family alone has it, the file's layout, the teacher's role, timm's default tag.
    """
    config = _record(name)
    record = (
        (tuple(config.mean), tuple(config.std))
        if config and config.mean and config.std
        else IMAGENET
    )
    architecture, _, tag = name.partition(".")
    if not checkpoint:
        return Normalization(*record, f"timm's record of {name}")
    if checkpoint.startswith(PACKAGE):
        return Normalization(*IMAGENET, f"ImageNet's, which {checkpoint} was trained with")
    beside = _beside(Path(checkpoint))
    if beside.normalization:
        return Normalization(*beside.normalization, f"{beside.source} says so")
    if tag:
        return Normalization(*record, f"timm's record of {name}")
    if not _GENERAL.match(architecture) and _agrees(architecture):
        return Normalization(*record, f"all of timm's weights of {architecture} agree")
    for parts, family, values in _LAYOUTS:
        if any(part in held for part in parts for held in names):
            return Normalization(*values, f"the file's layout is that of {family}")
    if role in _ROLES:
        whose = "CLIP's" if role == "clip" else "ImageNet's"
        return Normalization(*_ROLES[role], f"{whose}, as published weights of role {role} have")
    default = f"{architecture}.{config.tag}" if config and config.tag else architecture
    return Normalization(
        *record, f"a guess: that of timm's default, {default}, as {architecture} has no tag", True
    )


def _record(name: str) -> PretrainedCfg | None:
    """timm's record of a name; None where it knows neither the name nor the tag."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None


def _agrees(architecture: str) -> bool:
    known = [_record(name) for name in timm.list_models(f"{architecture}.*", include_tags=True)]
    return len({(tuple(config.mean), tuple(config.std)) for config in known if config}) == 1


def activation_note(
    name: str, net: nn.Module, checkpoint: str | None, names: Collection[str] = ()
) -> str | None:
    """What is wrong, or cannot be known, about the activation of a CLIP in timm; None where it is
    right. `names` as in `normalization_of`.

    timm has two architectures of one CLIP, with GELU and with QuickGELU, and loads either's weights
    into both without an error: the features differ.
    """
    quick = any(isinstance(module, QuickGELU) for module in net.modules())
    architecture, _, tag = name.partition(".")
    other = (
        architecture.replace("_quickgelu", "")
        if quick
        else architecture.replace("_clip_", "_clip_quickgelu_")
    )
    if not checkpoint:
        config = _record(name)
        notes = [note for note in (config.notes if config else None) or () if "natively" in note]
        unmet = [note for note in notes if not ("quickgelu" in note.lower() and quick)]
        if not unmet:
            return None
        if "quickgelu" in unmet[0].lower():
            return _differs(name, "GELU", "QuickGELU", f"{other}.{tag}" if tag else other)
        return f"{name}: timm notes: {unmet[0]}"
    if other == architecture or not timm.is_model(other):
        return None
    beside = _beside(Path(checkpoint))
    place = "/".join(Path(checkpoint).parts[-4:])
    marked = {held.rsplit(".", 1)[-1] for held in names} >= _OPENAI_NUMBERS
    openai = marked or Path(checkpoint).stem in _OPENAI_FILES or _QUICK.search(place) is not None
    trained = beside.quick_gelu if beside.quick_gelu is not None else openai or None
    if trained is None:
        return (
            None
            if quick
            else f"{name} computes GELU, and {checkpoint} does not say what it was trained with: "
            f"weights of OpenAI, DFN and MetaCLIP need {other}"
        )
    if trained == quick:
        return None
    kinds = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    return _differs(name, *kinds, other, f" (by {beside.source})" if beside.source else "")


def _differs(name: str, computed: str, trained: str, better: str, reason: str = "") -> str:
    return (
        f"{name} computes {computed}, but its weights were trained with {trained}{reason}: use "
        f"{better}"
    )


class _Beside(NamedTuple):
    """What a model hub's files beside the weights say."""

    source: str = ""
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    quick_gelu: bool | None = None


def _beside(checkpoint: Path) -> _Beside:
    """Read config.json (timm's and transformers'), open_clip_config.json and
    preprocessor_config.json beside a file that has a hub's name: beside another it may be any
    other network's.
    """
    if not _HUB_FILES.match(checkpoint.name):
        return _Beside()
    result = _Beside()
    for file in ("config.json", "open_clip_config.json", "preprocessor_config.json"):
        try:
            content = json.loads((checkpoint.parent / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict):
            continue
        places = [content, *(content.get(k) for k in ("pretrained_cfg", "preprocess_cfg"))]
        for place in places:
            if not isinstance(place, dict):
                continue
            mean, std = (place.get(k, place.get(f"image_{k}")) for k in ("mean", "std"))
            if _is_rgb(mean) and _is_rgb(std):
                result = result._replace(source=file, normalization=(tuple(mean), tuple(std)))
        quick = _quick_gelu(content)
        if quick is not None:
            result = result._replace(source=result.source or file, quick_gelu=quick)
    return result


def _is_rgb(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) for v in value)
    )


def _quick_gelu(content: dict) -> bool | None:
    """What a configuration says of QuickGELU; None where it says nothing."""
    if isinstance(content.get("architecture"), str) and "_clip_" in content["architecture"]:
        return "quickgelu" in content["architecture"]
    if isinstance(content.get("model_cfg"), dict):
        return bool(content["model_cfg"].get("quick_gelu", False))
    vision = content.get("vision_config")
    act = (vision if isinstance(vision, dict) else content).get("hidden_act")
    return act == "quick_gelu" if isinstance(act, str) else None
