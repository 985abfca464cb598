"""Memory formats and arithmetic: `train.channels_last` and where torch cannot, `train.tf32`,
`train.cudnn_benchmark`.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.methods.method import Method
from distill.models.layout import patch_size
from distill.models.preprocess import Preprocess
from distill.models.student import Student
from distill.teachers import Teacher

log = logging.getLogger(__name__)

_FEW = 7
"""Input channels up to which torch 2.15's backward pass of a 1x1 convolution with a stride writes
out of bounds on a CPU in channels_last: 4 to 7 crash in every fresh process, 8 to 16 in none."""


def set_memory_format(method: Method, settings: TrainConfig, device: torch.device) -> None:
    """Put the method's students, momentum networks too, into channels_last where the settings say
    so: `auto` for CNNs on CUDA. On a CPU it is slower or broken, and a warning says which.
    """
    students = [part for part in method.modules() if isinstance(part, Student)]
    wanted = settings.channels_last
    if wanted == "auto":
        wanted = device.type == "cuda" and any(part.family == "cnn" for part in students)
    if not wanted:
        return
    if device.type == "cpu":
        broken = sum(map(_writes_out_of_bounds, method.student.modules()))
        log.warning(
            "train.channels_last = true on a CPU: %s (auto is right here)",
            f"not done, as torch's backward pass of {broken} of this student's 1x1 convolutions "
            "corrupts memory"
            if broken
            else "it gains nothing, and torch's backward pass of 1x1 convolutions of pictures with "
            "a stride corrupts memory",
        )
        if broken:
            return
    # FSDP2 takes contiguous parameters alone; convolutions follow the format of what they read
    if settings.parallel == "fsdp":
        for part in method.modules():
            if isinstance(part, Preprocess):
                part.register_forward_hook(_to_channels_last)
        return
    for network in students or [method.student]:
        network.to(memory_format=torch.channels_last)


def set_arithmetic(settings: TrainConfig, teachers: Sequence[Teacher]) -> None:
    """On CUDA: what `train.tf32` and `train.cudnn_benchmark` say, for this process, and teachers
    that are CNNs in channels_last, the faster format of convolutions in half precision.
    """
    if settings.tf32 != "auto":
        kind = "tf32" if settings.tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = kind
        torch.backends.cudnn.conv.fp32_precision = kind
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    for teacher in teachers:
        if patch_size(teacher.net) is None:
            teacher.to(memory_format=torch.channels_last)


def _writes_out_of_bounds(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels <= _FEW
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
    )


def _to_channels_last(module: nn.Module, inputs: tuple, pixels: Tensor) -> Tensor:
    return pixels.contiguous(memory_format=torch.channels_last)
