"""Small objectives, and the numbers of the reference implementations."""

import json
from pathlib import Path

import torch

from distill.methods.self_supervised import OBJECTIVES
from distill.models.student import Student
from distill.recipe_io import make_recipe

REFERENCE = Path(__file__).parents[3] / "data" / "reference"


def reference(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small_recipe(kind: str, **ssl: object):
    """A ViT of two blocks at 64 pixels with patches of 16, local crops of 32."""
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if kind == "udi":
        kwargs["reg_tokens"] = 1
    small = {"prototypes": 12, "head_hidden": 16, "bottleneck": 8, "locals": 2, "local_size": 32}
    return make_recipe(
        {
            "method": "sefa",
            "student": {"name": "vit_tiny_patch16_224", "image_size": 64, "kwargs": kwargs},
            "teachers": [],
            "sefa": {"ssl_weight": 1},
            "ssl": {"kind": kind, **small, **ssl},
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 4},
        }
    )


def build(kind: str, with_student: bool = False, **ssl: object):
    """An objective, and its student where asked."""
    recipe = small_recipe(kind, **ssl)
    torch.manual_seed(0)
    student = Student(recipe.student)
    student.second_token = kind == "udi"
    made = OBJECTIVES[kind](recipe, student)
    return (made, student) if with_student else made
