"""Position embeddings at any grid without ONNX's antialiased Resize, which TensorRT's parser
refuses.

timm resamples a ViT's position embedding by antialiased bicubic interpolation. That is linear and
separable: two small matrices, one a side, do the same (7e-6 from torch's, exact where the grid is
the trained one).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import timm.models.vision_transformer as vision_transformer
import torch
from torch import Tensor

_CUBIC = -0.5
"""Keys' parameter, as torch's antialiased bicubic has it."""


def _cubic_weights(old: int, new: int, like: Tensor) -> Tensor:
    """Weights [new, old] that resample a line of `old` samples to `new`, each row summing to one.
    `new` may be symbolic.
    """
    ratio = old / new
    scale = torch.sym_max(ratio, 1.0)  # shrinking widens the kernel: that is the antialiasing
    centres = (torch.arange(new, device=like.device, dtype=torch.float32) + 0.5) * ratio - 0.5
    places = torch.arange(old, device=like.device, dtype=torch.float32)
    x = ((centres[:, None] - places[None, :]) / scale).abs()
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def resample_grid(
    posemb: Tensor,
    new_size: list[int],
    old_size: list[int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    verbose: bool = False,
) -> Tensor:
    """Resample position embeddings [1, prefix + n, d] to a grid of `new_size`; stands in for timm's
    function.
    """
    tokens = posemb.shape[1] - num_prefix_tokens
    old = tuple(old_size) if old_size else (int(tokens**0.5),) * 2
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[0, num_prefix_tokens:].float()
    rows, columns = (
        _cubic_weights(old[0], new_size[0], grid),
        _cubic_weights(old[1], new_size[1], grid),
    )
    grid = grid.reshape(old[0], old[1] * posemb.shape[2])
    grid = (rows @ grid).reshape(new_size[0], old[1], posemb.shape[2])
    grid = (columns @ grid).flatten(0, 1).unsqueeze(0).to(posemb.dtype)
    return torch.cat((prefix, grid), dim=1)


@contextmanager
def dense_resampling() -> Iterator[None]:
    """While entered, timm's ViTs resample position embeddings by matrices."""
    original = vision_transformer.resample_abs_pos_embed
    vision_transformer.resample_abs_pos_embed = resample_grid
    try:
        yield
    finally:
        vision_transformer.resample_abs_pos_embed = original
