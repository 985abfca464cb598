"""Attention maps of the class token in a ViT's last block, as DINO's authors draw them (Caron et
al. 2021).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from contract.errors import UserError
from distill.evaluate.encoder import Encoder
from distill.figures import save_figure
from distill.models.student import patch_size


def attention_maps(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the last block to every patch: [B, heads, h, w] for uint8 images [B, 3, H, W].

    The class token's, or the mean of all patches' for networks without a class token. Attention to
    class and register tokens is left out, so a map sums to 1 at most. Raises UserError as
    `last_attention` does.
    """
    attention = last_attention(encoder, images)
    net, patch = encoder.net, patch_size(encoder.net)
    prefix = net.num_prefix_tokens
    has_class_token = getattr(net, "cls_token", None) is not None
    rows = attention[:, :, 0] if has_class_token else attention[:, :, prefix:].mean(dim=2)
    return rows[..., prefix:].unflatten(-1, (images.shape[-2] // patch, images.shape[-1] // patch))


def has_attention(encoder: Encoder) -> bool:
    """Whether the network is a plain ViT whose last block's attention can be read."""
    side = encoder.stride * 2
    try:
        last_attention(
            encoder, torch.zeros(1, 3, side, side, dtype=torch.uint8, device=encoder.device)
        )
    except (UserError, AssertionError):  # timm asserts that fixed-size networks get their size
        return False
    return True


@torch.no_grad()
def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention [B, heads, N, N] of the last block, N the prefix tokens and the h*w patches; every
    row sums to 1.

    Raises UserError for networks without it (CNNs, windowed transformers), and sides that the patch
    does not divide.
    """
    net, patch = encoder.net, patch_size(encoder.net)
    attention = getattr(net.blocks[-1], "attn", None) if len(getattr(net, "blocks", ())) else None
    if (
        not patch
        or not hasattr(attention, "fused_attn")
        or not isinstance(getattr(attention, "attn_drop", None), nn.Module)
    ):
        raise UserError(
            f"{encoder.name} has no global attention in its last block: choose a plain ViT"
        )
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise UserError(
            f"images of {height}x{width} pixels do not fit {encoder.name}: use multiples of {patch}"
        )
    # Fused kernels never hold the map. timm's AttentionExtract would leave its hooks in the
    # network.
    fused, result = attention.fused_attn, []
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_hook(
        lambda module, inputs, output: result.append(output)
    )
    try:
        net.forward_features(encoder.normalize(images))
    finally:
        hook.remove()
        attention.fused_attn = fused
    tokens = net.num_prefix_tokens + (height // patch) * (width // patch)
    if not result or result[0].shape != (len(images), attention.num_heads, tokens, tokens):
        raise UserError(
            f"{encoder.name}'s last block does not attend from all patches to all: choose a plain "
            "ViT"
        )
    return result[0].float()


def attention_figure(path: Path, photos: list[np.ndarray], maps: Tensor) -> Path:
    """Write a row per photograph [H, W, 3]: the photograph, the mean of its maps [B, heads, h, w],
    and every head's map.
    """
    heads = maps.shape[1]
    figure, axes = plt.subplots(
        len(photos),
        2 + heads,
        figsize=(1.8 * (2 + heads), 1.9 * len(photos)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for title, axis in zip(
        ("photo", "mean", *(f"head {head}" for head in range(heads))), axes[0], strict=True
    ):
        axis.set_title(title, fontsize=9)
    for row, photo, result in zip(axes, photos, maps.cpu().numpy(), strict=True):
        row[0].imshow(photo)
        for axis, attention in zip(row[1:], (result.mean(axis=0), *result), strict=True):
            axis.imshow(attention, interpolation="nearest", cmap="inferno")
    return save_figure(figure, path)
