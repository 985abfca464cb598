"""Batch normalisation over a single value, which torch refuses in the middle of a step."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from contract.errors import UserError

_TOO_FEW = "Expected more than 1 value per channel"
"""How torch's error begins."""


def values_per_channel(net: nn.Module, size: int) -> int | None:
    """The fewest values over which a batch normalisation of a network averages, for one picture of
    `size` pixels; None for a network without any.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return None
    probe, seen = copy.deepcopy(net).to("meta").eval(), []
    for module in probe.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].numel() // inputs[0].shape[1])
            )
    with torch.device("meta"), torch.no_grad():
        probe.forward_features(torch.empty(1, 3, size, size))
    return min(seen, default=None)


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Turn torch's error about batch normalisation over one value into a UserError with `remedy`,
    for batches whose sizes are not known in advance.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_TOO_FEW):
            raise
        raise UserError(
            f"batch normalisation needs two values a channel, and one picture gives one: {remedy}"
        ) from error
