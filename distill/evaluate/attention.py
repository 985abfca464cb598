"""Attention maps of the class token in a ViT's last block, as DINO's authors draw them (Caron et
al. 2021), beside clusters of that block's tokens (SeFA, Figures 3 to 7).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from contract.errors import UserError
from contract.views import ViewPolicy
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import seen
from distill.figures import save_figure
from distill.models.layout import patch_size

CLUSTERS = 6
"""Clusters of a picture's tokens; the paper does not say how many it draws."""


class AttentionRow(NamedTuple):
    """What is drawn of one picture by one network: `photo` uint8 [H, W, 3], `clusters` [h, w] from
    0, and `maps` [heads, h, w].
    """

    title: str
    photo: np.ndarray
    clusters: np.ndarray
    maps: np.ndarray


def attention_maps(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention of the last block to every patch: [B, heads, h, w] for uint8 images [B, 3, H, W].

    The class token's, or the mean of all patches' for networks without a class token. Attention to
    class and register tokens is left out, so a map sums to 1 at most. Raises UserError as
    `last_attention` does.
    """
    return _to_patches(encoder, last_attention(encoder, images), images)


def _to_patches(encoder: Encoder, attention: Tensor, images: Tensor) -> Tensor:
    """`attention_maps` of the last block's attention [B, heads, N, N]."""
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


def last_attention(encoder: Encoder, images: Tensor) -> Tensor:
    """Attention [B, heads, N, N] of the last block; every row sums to 1. Raises as `last_block`."""
    return last_block(encoder, images)[0]


@torch.no_grad()
def last_block(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, N, N] of the last block, and the tokens [B, N, d] that it gives, after
    the final norm; N are the prefix tokens and the h*w patches.

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
    normed: list[Tensor] = []
    try:
        if encoder.is_bare:
            output = net.forward_features(encoder.normalize(images))
        else:  # an adapter changes the tokens between the blocks
            kept = net.norm.register_forward_hook(lambda *call: normed.append(call[-1]))
            try:
                encoder(images)
            finally:
                kept.remove()
            (output,) = normed
    finally:
        hook.remove()
        attention.fused_attn = fused
    tokens = net.num_prefix_tokens + (height // patch) * (width // patch)
    if not result or result[0].shape != (len(images), attention.num_heads, tokens, tokens):
        raise UserError(
            f"{encoder.name}'s last block does not attend from all patches to all: choose a plain "
            "ViT"
        )
    return result[0].float(), output.float()


def token_clusters(tokens: np.ndarray, attention: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Clusters [n] of tokens [n, d] by k-means of their directions: `count`, or as many as there
    are different tokens.

    They are numbered by the mean of `attention` [n] that their tokens get, from the largest, so
    that 0 is what the network looks at most.
    """
    directions = normalize(tokens)
    count = min(count, len(np.unique(directions.round(5), axis=0)))
    found = KMeans(count, n_init=3, random_state=seed).fit_predict(directions)
    means = [attention[found == cluster].mean() for cluster in range(count)]
    return np.argsort(np.argsort(means)[::-1])[found]


def attention_rows(
    encoder: Encoder, photos: Sequence[Image.Image], title: str, seed: int, size: int | None = None
) -> list[AttentionRow]:
    """A row per photograph: its centred square of `size` pixels (default: the network's own),
    clusters of its tokens, the attention of every head.

    Raises UserError as `last_block` does.
    """
    square = ViewPolicy("centre-crop", 1.0)
    views = torch.stack([seen(photo, size or encoder.image_size, square) for photo in photos])
    images = views.to(encoder.device)
    attention, tokens = last_block(encoder, images)
    maps = _to_patches(encoder, attention, images).cpu().numpy()
    patches = tokens[:, encoder.net.num_prefix_tokens :].cpu().numpy()
    rows = []
    for view, its_maps, its_tokens in zip(views, maps, patches, strict=True):
        clusters = token_clusters(its_tokens, its_maps.mean(axis=0).ravel(), CLUSTERS, seed)
        photo = view.permute(1, 2, 0).numpy()
        rows.append(AttentionRow(title, photo, clusters.reshape(its_maps.shape[1:]), its_maps))
    return rows


def attention_figure(path: Path, rows: Sequence[AttentionRow]) -> Path:
    """Write a line per row: the photograph, its clusters (the most looked at first in the colours'
    order), and every head's map on a scale of its own.
    """
    heads = max(len(row.maps) for row in rows)
    figure, axes = plt.subplots(
        len(rows),
        2 + heads,
        figsize=(1.8 * (2 + heads), 2.05 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row.photo)
        line[0].set_title(row.title, fontsize=9)
        line[1].imshow(row.clusters, interpolation="nearest", cmap="tab10", vmin=0, vmax=9)
        line[1].set_title(f"clusters, {'x'.join(map(str, row.clusters.shape))}", fontsize=9)
        for head, attention in enumerate(row.maps):
            line[2 + head].imshow(attention, interpolation="nearest", cmap="inferno")
            line[2 + head].set_title(f"head {head}", fontsize=9)
    return save_figure(figure, path)
