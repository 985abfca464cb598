"""What `summary` and `patches` of a timm teacher are: one table, a row for each kind of network.

Both are what the network's authors use downstream, so that a student learns from features which
somebody has measured. The final norm is always in: some networks keep it behind their pooling, in
the head, and what stands before it has another scale in every channel.
"""

from collections.abc import Callable
from typing import NamedTuple

from timm.layers import NormMlpClassifierHead
from timm.models.deepseek_vit import DeepseekVitClassifier
from timm.models.deit import VisionTransformerDistilled
from timm.models.metaformer import MetaFormer
from timm.models.qwen3_vit import Qwen3VitClassifier
from torch import Tensor, nn

from distill.features import Features


class Reading(NamedTuple):
    """A row of the table: which networks, and what is read of them, in words."""

    kind: str
    families: str
    """Published networks of this kind, for documents."""
    summary: str
    patches: str
    fits: Callable[[nn.Module], bool]


def _has(net: nn.Module, name: str) -> bool:
    part = getattr(net, name, None)
    return part is not None and not isinstance(part, nn.Identity)


def _is_token_pooled(net: nn.Module) -> bool:
    # timm pools DINOv3's ViTs by the mean, its authors read the class token; without a norm before
    # the pooling (PE spatial) nothing says that the class token is of use
    return getattr(net, "cls_token", None) is not None and (
        getattr(net, "global_pool", "token") in ("token", "") or _has(net, "norm")
    )


def _norm_in_head(net: nn.Module) -> nn.Module | None:
    """The norm between a network's pooling and its classifier, where it fits the map too."""
    # these keep it beside the head; the others' `norm` is run before the pooling
    beside = isinstance(net, DeepseekVitClassifier | Qwen3VitClassifier)
    place = net if beside else getattr(net, "head", None)
    if place is None or not _has(place, "norm"):
        return None
    # InceptionNeXt's is after a hidden layer
    width = getattr(place.norm, "normalized_shape", None) or (net.num_features,)
    return place.norm if tuple(width) == (net.num_features,) else None


TOKENS = (
    Reading(
        "attention pool",
        "SigLIP, SigLIP 2, Perception Encoder (core)",
        "what the attention pool gives",
        "tokens after the final norm",
        lambda net: _has(net, "attn_pool"),
    ),
    Reading(
        "normed mean",
        "BEiT, BEiT v2, EVA, EVA-02, and ViTs that timm pools by the mean",
        "the patches' mean after the head's norm",
        "tokens after the head's norm, each by itself",
        lambda net: _has(net, "fc_norm"),
    ),
    Reading(
        "two tokens",
        "distilled DeiT",
        "the mean of class and distillation token after the final norm",
        "tokens after the final norm",
        lambda net: isinstance(net, VisionTransformerDistilled),
    ),
    Reading(
        "class token",
        "ViT, DeiT, DeiT III, AugReg, MAE, DINO, iBOT, MUGS, DINOv2, DINOv3, CLIP, EVA-CLIP",
        "the class token after the final norm",
        "tokens after the final norm",
        _is_token_pooled,
    ),
    Reading(
        "mean",
        "I-JEPA, AIMv2, Perception Encoder (spatial)",
        "the tokens' mean after the final norm, where there is one",
        "tokens after the final norm, where there is one",
        lambda net: True,
    ),
)
"""Networks whose features are tokens. The first row that fits counts."""

MAPS = (
    Reading(
        "norm in the head",
        "ConvNeXt (supervised, CLIP's, DINOv3's), ConvNeXt V2, MaxViT, DaViT, MetaFormer, MambaOut",
        "the map's mean after the head's norm",
        "the last map after the head's norm, each position by itself",
        lambda net: _norm_in_head(net) is not None,
    ),
    Reading(
        "map",
        "ResNet, RegNet, EfficientNet, MobileNet, Swin, SparK's ConvNeXt (no norm)",
        "what the classifier reads of the pooled map",
        "the last map, after the final norm where there is one",
        lambda net: True,
    ),
)
"""Networks whose features are one map. The first row that fits counts."""

PROJECTED = "the image embedding, after the projection into the space shared with text"
"""The summary of role `clip` (UMT A.3), whatever the kind, unless an earlier block is read."""


def reading_of(net: nn.Module, tokens: bool) -> Reading:
    """The row of a timm network whose features are tokens, or a map."""
    return next(reading for reading in (TOKENS if tokens else MAPS) if reading.fits(net))


def read_tokens(
    net: nn.Module, tokens: Tensor, grid: tuple[int, int], projected: bool, last: bool
) -> Features:
    """Features of tokens [B, prefix + h * w, d] as `forward_features`, or a block, gives them.

    `projected` asks for the projection of role `clip`; `last` says that the tokens are those of the
    last block, which alone an attention pool was trained on.
    """
    reading = reading_of(net, tokens=True)
    patches = tokens[:, net.num_prefix_tokens :]
    # some keep a norm before their pooling too
    if reading.kind == "normed mean" and not _has(net, "norm"):
        patches = net.fc_norm(patches)
    patches = patches.unflatten(1, grid)
    if projected:
        summary = net.forward_head(tokens)
    elif reading.kind == "class token":
        summary = tokens[:, 0]
    elif reading.kind == "attention pool" and not last:
        has_class_token = getattr(net, "cls_token", None) is not None
        summary = tokens[:, 0] if has_class_token else patches.mean(dim=(1, 2))
    else:
        summary = net.forward_head(tokens, pre_logits=True)
    return Features(summary, patches)


def read_map(net: nn.Module, output: Tensor, projected: bool, stage: bool, last: bool) -> Features:
    """Features of a map in the network's own layout, [B, d, h, w] or [B, h, w, d].

    `projected` as in `read_tokens`; `stage` says that it is that of a stage, which has no head but
    the last one's norm.
    """
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    patches = output if channels_last else output.permute(0, 2, 3, 1)
    # a hidden layer after the norm is the classifier's, and only the projection goes through it
    hidden = not projected and _norm_in_head(net) is not None and _has(net.head, "pre_logits")
    pooled = None if stage or hidden else net.forward_head(output, pre_logits=not projected)
    if last and _norm_in_head(net) is not None:
        if stage or hidden:
            pooled = _normed(net, patches.mean(dim=(1, 2), keepdim=True)).flatten(1)
        patches = _normed(net, patches)
    return Features(patches.mean(dim=(1, 2)) if pooled is None else pooled, patches)


def _normed(net: nn.Module, patches: Tensor) -> Tensor:
    """A map [B, h, w, d] after the norm in the network's head, which may want channels first."""
    norm = _norm_in_head(net)
    if isinstance(net.head, NormMlpClassifierHead) or isinstance(net, MetaFormer):
        return norm(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return norm(patches)
