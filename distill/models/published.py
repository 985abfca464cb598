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
    (("visual.class_embedding",), "CLIP", "clip", _CLIP),
    (("visual.trunk.",), "CLIP", "clip", _CLIP),
    (("sparse_encoder.",), "SparK", "spark", IMAGENET),
    (("base_encoder.",), "MoCo", "moco", IMAGENET),
    (("encoder_q.",), "MoCo", "moco", IMAGENET),
    (("teacher.", "dino_head."), "DINO", "dino", IMAGENET),
    (("teacher.", "head.last_layer."), "DINO", "dino", IMAGENET),
    (("decoder_embed.",), "MAE", "mae", IMAGENET),
)
"""Parts of names which published files have together, whose those are, the word for them in timm's
tags, and what they were trained with. A teacher, or a mask token, alone says nothing.
"""

_ROLES = {"dino": IMAGENET, "mae": IMAGENET, "clip": _CLIP}
"""Published self-supervised weights and CLIPs; SigLIP has architectures of its own."""

_OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's own files have beside the weights."""

_OPENAI_FILES = {"ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336px"}
_ACTIVATIONS = tuple(
    (re.compile(pattern, re.IGNORECASE), quick)
    for pattern, quick in (
        (r"[-_.]ft[-_.]", None),
        (r"quick[-_]?gelu", True),
        # MetaCLIP 2: the first ViT-H alone
        (r"(worldwide|metaclip-2|metaclip2).*(378|gigantic|giant|bigg)", False),
        (r"(378|gigantic|giant|bigg).*(worldwide|metaclip-2|metaclip2)", False),
        (r"worldwide.*huge|(huge|h14|h-14).*(worldwide|metaclip2)", True),
        (r"worldwide|metaclip[-_]?2(?![\d._p])", None),
        (r"altogether", False),
        # DFN's second ViT-L, trained on 39 billion samples, and MobileCLIP 2
        (r"dfn\d?b.*39b|dfndr", False),
        (r"laion[25]b|datacomp|commonpool", False),
        (r"laion400m.*(b[-_]?32|patch32)|(b[-_]?32|patch32).*laion400m", True),
        (r"laion400m", False),
        (r"openai|metaclip|dfn\d?b", True),
    )
)
"""Names of weights, and whether they were trained with QuickGELU, as open_clip has it: the first
that fits counts, None is unknown.
"""

_UNNOTED = {"vit_base_patch16_clip_224.dfn2b"}
"""Weights trained with QuickGELU of which timm has no note."""

_HUB_FILES = re.compile(r"(open_clip_)?(pytorch_)?model[.-]")


class Normalization(NamedTuple):
    """Mean and deviation of RGB in [0, 1], and why these; `guessed` where nothing published says
    so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reason: str
    guessed: bool = False

    @property
    def words(self) -> str:
        """The values and the reason, in part of a line."""
        mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (self.mean, self.std))
        return f"mean {mean}, deviation {std}: {self.reason}"


def normalization_of(
    name: str, checkpoint: str | None, role: str | None, names: Collection[str] = ()
) -> Normalization:
    """What a timm network's weights expect. `names` are those of the tensors in its file, where it
    has been read.

    In this order: what stands beside the file, timm's record of the name's tag, the architecture
    where one family alone has it, the file's layout, the teacher's role, timm's default tag.
    """
    architecture, _, tag = name.partition(".")
    config = _record(name) or _record(architecture)
    record = (
        (tuple(config.mean), tuple(config.std))
        if config and config.mean and config.std
        else IMAGENET
    )
    if not checkpoint:
        return Normalization(*record, f"timm's record of {name}")
    if checkpoint.startswith(PACKAGE):
        return Normalization(*IMAGENET, f"ImageNet's, which {checkpoint} was trained with")
    beside = _beside(Path(checkpoint))
    if beside.normalization:
        return Normalization(*beside.normalization, f"{beside.source} says so")
    if tag and _record(name):
        return Normalization(*record, f"timm's record of {name}")
    if not _GENERAL.match(architecture) and len(_recorded(architecture)) == 1:
        return Normalization(*record, f"all of timm's weights of {architecture} agree")
    for parts, family, word, values in _LAYOUTS:
        if all(any(part in held for held in names) for part in parts):
            reason = f"the file's layout is that of {family}"
            return _checked(Normalization(*values, reason), architecture, word)
    if role in _ROLES:
        whose = "CLIP's" if role == "clip" else "ImageNet's"
        reason = f"{whose}, as published weights of role {role} have"
        return _checked(Normalization(*_ROLES[role], reason), architecture, role)
    default = f"{architecture}.{config.tag}" if config and config.tag else architecture
    return Normalization(
        *record, f"a guess: that of timm's default, {default}, as {name} has no tag of timm's", True
    )


def _record(name: str) -> PretrainedCfg | None:
    """timm's record of a name; None where it knows neither the name nor the tag."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None


def _recorded(architecture: str, word: str = "") -> set[tuple[tuple[float, ...], ...]]:
    """Mean and deviation of timm's weights of an architecture with a word in their names, as far as
    they differ.
    """
    names = timm.list_models(f"{architecture}.*", include_tags=True)
    # fine-tuned on ImageNet's classes they are no longer of that family
    named = [name for name in names if word in name and not (word and "_ft_" in name)]
    known = [_record(name) for name in named]
    return {(tuple(config.mean), tuple(config.std)) for config in known if config}


def _checked(chosen: Normalization, architecture: str, word: str) -> Normalization:
    """What a family has, as a guess where its weights of this architecture differ in it."""
    of_family = _recorded(architecture, word)
    if not of_family and not _GENERAL.match(architecture):
        of_family = _recorded(architecture)
    if len(of_family) < 2:
        return chosen
    reason = f"a guess: {chosen.reason}, but timm's weights of {architecture} differ in it"
    return chosen._replace(reason=reason, guessed=True)


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
        if _recorded_quick(name) and not quick:
            tagged = f"{other}.{tag}"
            if tag and not timm.list_models(tagged, include_tags=True):
                other += f" with these weights as its checkpoint (timm has no {tagged})"
            elif tag:
                other = tagged
            return _differs(name, "GELU", "QuickGELU", other)
        config = _record(name)
        notes = [note for note in (config.notes if config else None) or () if "natively" in note]
        unmet = [note for note in notes if "quickgelu" not in note.lower()]
        return f"{name}: timm notes: {unmet[0]}" if unmet else None
    if other == architecture or not timm.is_model(other):
        return None
    trained, reason = _trained_with_quick_gelu(name, Path(checkpoint), names)
    if trained is None:
        return (
            None
            if quick
            else f"{name} computes GELU, and {checkpoint} does not say what it was trained with: "
            f"weights of OpenAI, and most of DFN and MetaCLIP, need {other}"
        )
    if trained == quick:
        return None
    kinds = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    return _differs(name, *kinds, f"{other} (known by {reason})")


def _trained_with_quick_gelu(
    name: str, checkpoint: Path, names: Collection[str]
) -> tuple[bool | None, str]:
    """Whether a CLIP's file was trained with QuickGELU, None where nothing says, and what says
    so.
    """
    beside = _beside(checkpoint)
    if beside.quick_gelu is not None:
        return beside.quick_gelu, beside.source
    if "." in name and _record(name):
        return _recorded_quick(name), "timm's record of the name's tag"
    if {held.rsplit(".", 1)[-1] for held in names} >= _OPENAI_NUMBERS:
        return True, "the numbers that OpenAI's files have"
    if checkpoint.stem in _OPENAI_FILES:
        return True, "its name"
    # of folders the one it lies in, and the one that a model hub's cache names after its repository
    parts = checkpoint.parts
    place = [part for part in parts[-4:-2] if part.startswith("models--")]
    return _named_quick("/".join([*place, *parts[-2:]])), "its path"


def _recorded_quick(name: str) -> bool:
    """Whether timm's weights of a name were trained with QuickGELU."""
    config = _record(name)
    notes = (config.notes if config else None) or ()
    tag = config.tag if config else ""
    plain = f"{name.partition('.')[0]}.{tag}".replace("_clip_quickgelu_", "_clip_")
    return plain in _UNNOTED or any("quickgelu" in note.lower() for note in notes)


def _named_quick(text: str) -> bool | None:
    return next((quick for pattern, quick in _ACTIVATIONS if pattern.search(text)), None)


def _differs(name: str, computed: str, trained: str, better: str) -> str:
    return f"{name} computes {computed}, but its weights were trained with {trained}: use {better}"


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
            # other tools count in 0 to 255
            if _is_rgb(mean) and _is_rgb(std) and min(std) > 0:
                result = result._replace(source=file, normalization=(tuple(mean), tuple(std)))
        quick = _quick_gelu(content)
        if quick is not None:
            result = result._replace(source=result.source or file, quick_gelu=quick)
    return result


def _is_rgb(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)
    )


def _quick_gelu(content: dict) -> bool | None:
    """What a configuration says of QuickGELU; None where it says nothing."""
    architecture, own = content.get("architecture"), content.get("pretrained_cfg")
    if isinstance(architecture, str) and "_clip_" in architecture:
        if "quickgelu" in architecture:
            return True
        # timm's two architectures share a repository, so that the other's name proves nothing
        own = own if isinstance(own, dict) else {}
        if "quickgelu" in str(own.get("notes")).lower():
            return True
        name = f"{architecture}.{own.get('tag')}"
        return _recorded_quick(name) if _record(name) else _named_quick(name)
    if isinstance(content.get("model_cfg"), dict):
        return bool(content["model_cfg"].get("quick_gelu", False))
    vision = content.get("vision_config")
    act = (vision if isinstance(vision, dict) else content).get("hidden_act")
    return act == "quick_gelu" if isinstance(act, str) else None
