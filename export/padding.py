"""TensorFlow's SAME padding at sizes that vary.

timm works it out from the picture's size in every convolution. With symbolic sizes each of these is
a further rounding inside the next, and tracing a network of 30 of them does not end. A side that
the stride divides needs the same padding whatever it is, and sides are multiples of the student's
stride, which is that of all its layers together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor

# By name: timm.layers has functions called as two of its modules are. Each module has a name of its
# own for `pad_same`.
_USERS = [
    import_module(f"timm.layers.{name}") for name in ("conv2d_same", "pool2d_same", "std_conv")
]


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


@contextmanager
def static_padding() -> Iterator[None]:
    """While entered, timm's SAME convolutions and poolings pad by `pad_divisible`."""
    for module in _USERS:
        module.pad_same = pad_divisible
    try:
        yield
    finally:
        for module in _USERS:
            module.pad_same = pad_same
