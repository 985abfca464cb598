"""Whether a student can learn, and be exported, at the sizes of a recipe: decided before anything
is written.
"""

import os
import shutil
import sys
from collections.abc import Mapping

import torch

from contract.errors import UserError
from distill.config import Recipe
from distill.methods.method import Method
from distill.models.batch_norm import values_per_channel
from distill.models.layout import nearest_multiples


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


def check_compiler(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError where torch.compile is asked for on a CPU and lacks the C++ compiler that it
    calls there.
    """
    compiled = {
        "train.compile": recipe.train.compile,
        "teacher_runtime.compile": recipe.teacher_runtime.compile,
    }
    # as torch._inductor.config.cpp.cxx has it
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    for key, wanted in compiled.items():
        if wanted and device.type == "cpu" and not shutil.which(name):
            raise UserError(
                f"{key} = true: torch.compile needs a C++ compiler on a CPU, and '{name}' is not "
                f"there: install one, name one in CXX, or set {key}=false"
            )
