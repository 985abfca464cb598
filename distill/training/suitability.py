"""Whether a student can learn, and be exported, at the sizes of a recipe: decided before anything
is written.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from contract.errors import UserError
from distill.config import Recipe
from distill.methods.method import Method
from distill.models.layout import nearest_multiples

_TOO_FEW = "Expected more than 1 value per channel"
"""How torch's error begins."""


def check_student(recipe: Recipe, method: Method, batch_sizes: Mapping[str, int]) -> None:
    """Raise UserError for a size that the student's stride does not divide, and for batch
    normalisation over a single value; `batch_sizes` are those of the streams.
    """
    size, stride = recipe.student.image_size, method.student.stride
    if size % stride:
        raise UserError(
            f"student '{recipe.student.name}': its stride of {stride} pixels does not divide "
            f"student.image_size = {size}, at which it could not be exported (use "
            f"{nearest_multiples(size, stride)})"
        )
    parts = int(os.environ.get("WORLD_SIZE", "1")) * recipe.train.accumulate
    pictures = min(batch_sizes.values()) // parts
    if pictures == 1 and values_per_channel(method.student.net, size) == 1:
        raise UserError(
            f"train.batch_size = {min(batch_sizes.values())}: batch normalisation in student "
            f"'{recipe.student.name}' needs two values a channel, and one picture of {size} px "
            f"gives one: use {2 * parts} or more, two for every process and micro-batch"
        )


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
