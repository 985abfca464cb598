"""Networks on the meta device: shapes and costs without memory or arithmetic."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = frozenset({"normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})
"""In-place operations that initialise weights."""


class _WithoutFills(TorchFunctionMode):
    """Leaves parameters on the meta device as they are.

    They hold no numbers to fill, and torch works out in Python what each operation would give: most
    of the time that a large network takes to build.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")  # torch.nn.init gives it by name
            # parameters alone: a forward pass adds to its activations in place too
            if isinstance(filled, nn.Parameter) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Context in which networks are built on the meta device; for forward passes
    `torch.device("meta")` is enough.
    """
    with torch.device("meta"), _WithoutFills():
        yield
