"""What timm's networks call, in a form that torch.export and the ONNX translation can follow.

SAME padding: timm works it out from the picture's size in every convolution. With symbolic sizes
each of these is a further rounding inside the next, and tracing a network of 30 of them does not
end. A side that the stride divides needs the same padding whatever it is, and sides are multiples
of the student's stride, which is that of all its layers together.

Attention: ONNX's takes [B, heads, N, d] alone, and some networks attend inside windows that have an
axis of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor

# By name: timm.layers has functions called as two of its modules are. Each module has a name of its
# own for `pad_same`.
_PADDED = [
    import_module(f"timm.layers.{name}") for name in ("conv2d_same", "pool2d_same", "std_conv")
]

_ATTENTION = F.scaled_dot_product_attention


def pad_divisible(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    value: float = 0,
) -> Tensor:
    """Pad [B, C, h, w] as timm's `pad_same`, for which it stands in; where h or w is symbolic, as
    if `stride` divided them.
    """
    if all(isinstance(side, int) for side in x.shape[-2:]):
        return pad_same(x, kernel_size, stride, dilation, value)
    high, wide = (
        max((k - 1) * d + 1 - s, 0) for k, s, d in zip(kernel_size, stride, dilation, strict=True)
    )
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2), value=value)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *arguments: object,
    **options: object,
) -> Tensor:
    """torch's attention, which the exporter translates for four axes alone: [B, N, d] as
    [B, 1, N, d], and [B, heads, windows, N, d] as [B * heads, windows, N, d].
    """
    if query.ndim == 3:
        query, key, value = (part[:, None] for part in (query, key, value))
        mask = attn_mask[:, None] if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
        return _ATTENTION(query, key, value, mask, *arguments, **options)[:, 0]
    if query.ndim != 5 or arguments or attn_mask is not None:
        return _ATTENTION(query, key, value, attn_mask, *arguments, **options)
    flat = (part.flatten(0, 1) for part in (query, key, value))
    return _ATTENTION(*flat, **options).unflatten(0, query.shape[:2])


@contextmanager
def traceable() -> Iterator[None]:
    """While entered, timm's SAME convolutions and poolings pad by `pad_divisible`, and attention
    has four axes.
    """
    for module in _PADDED:
        module.pad_same = pad_divisible
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _ATTENTION
        for module in _PADDED:
            module.pad_same = pad_same
