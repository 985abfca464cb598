"""Whether a student can learn, and be exported, at the sizes of a recipe: decided before anything
is written.
"""

import os
from collections.abc import Mapping

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
