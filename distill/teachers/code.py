"""Teachers of the user's own code: `python:package.module:function`, called with the recipe's
`kwargs`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from contract.errors import UserError
from distill.config import TeacherConfig
from distill.models.user_code import call, network_sha256
from distill.teachers.foreign import ForeignNet

_DATA = ("size", "mean", "std")


def build_code_teacher(config: TeacherConfig, index: int) -> tuple[ForeignNet, tuple, None]:
    """Call a teacher's function; returns its network, the (size, mean, std) that it states, None
    for each it does not, and no patch size.

    Raises UserError for a module that does not import, a function that is missing, fails, or does
    not return a network.
    """
    key = f"teachers.{index}"
    whose = f"teacher '{config.label}': {key}.name = {config.name}"
    if config.checkpoint:
        raise UserError(
            f"teacher '{config.label}': {key}.checkpoint is not for own code, whose function loads "
            f"its weights: give it the path in {key}.kwargs"
        )
    # random weights are the same in every process, as of timm's networks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        try:
            result = call(config.name, config.kwargs)
        except UserError as error:
            raise UserError(f"teacher '{config.label}': {key}.name = {error}") from error
    net, about = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(net, nn.Module) or not isinstance(about, Mapping):
        raise UserError(
            f"{whose}: returns {type(result).__name__}, not a torch.nn.Module, or one and a dict "
            "of size, mean and std"
        )
    teacher = ForeignNet(net, whose)
    teacher.source_sha256 = network_sha256(net, config.name)
    return teacher, _data(about, whose), None


def _data(about: Mapping[str, Any], whose: str) -> tuple:
    """(size, mean, std) as a function states them."""
    unknown = sorted(map(str, set(about) - set(_DATA)))
    if unknown:
        raise UserError(f"{whose}: states {unknown[0]}: use {', '.join(_DATA)}")
    size = about.get("size")
    if size is not None and (type(size) is not int or size < 1):
        raise UserError(f"{whose}: states size = {size!r}: give the side of its input in pixels")
    values = []
    for key in ("mean", "std"):
        value = about.get(key)
        try:
            value = None if value is None else tuple(float(v) for v in value)
        except (TypeError, ValueError):
            value = ()
        if value is not None and (len(value) != 3 or (key == "std" and min(value) <= 0)):
            raise UserError(f"{whose}: states {key} = {about[key]!r}: give three numbers, of RGB")
        values.append(value)
    return (size, *values)
