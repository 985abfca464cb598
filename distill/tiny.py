"""Any recipe shrunk to seconds on a CPU: same method, roles and families, small random networks,
real photographs.
"""

import re
from typing import Any

from contract.errors import UserError
from distill.config import Recipe
from distill.methods import METHODS
from distill.recipe_io import make_recipe

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64]}
RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}


def tiny(recipe: Recipe, steps: int = 2) -> Recipe:
    """Shrink `recipe`: every network by its family, 64-pixel crops of the packaged photographs,
    batches of four.

    Raises UserError for a recipe one of whose teachers is a run: that network is what it is.
    """
    values = recipe.model_dump(mode="json")
    values["student"] |= shrink(recipe.student.name, recipe.student.kwargs) | {
        "checkpoint": None,
        "pretrained": False,
    }
    for teacher in values["teachers"]:
        if teacher["name"] == "run":
            raise UserError(
                "tiny: a recipe whose teacher is a run cannot be shrunk (its teacher is what it is)"
            )
        teacher |= shrink(teacher["name"], teacher["kwargs"]) | {
            "checkpoint": None,
            "pretrained": False,
            "dim": None,
            "batch_size": teacher["batch_size"] and 2,
            "student_size": "auto",
        }
        teacher["block"] = None if teacher["block"] is None else VIT["depth"] - 1
    values["teacher_runtime"] |= {"precision": "auto", "compile": False}
    values["teacher_cache"] |= {"path": None, "views": min(1, recipe.teacher_cache.views)}
    values["targets"] |= {"batches": 1}
    method = METHODS[recipe.method]
    for section, config in {recipe.method: method.Config, **method.Sections}.items():
        values[section] |= config.TINY
    values["data"] |= {
        "kind": "packaged-photos",
        "path": None,
        "images": None,
        "image_size": "auto",
    }
    values["data"] |= {"workers": 0, "repeats": 1}
    values["train"] |= {
        "steps": steps,
        "epochs": None,
        "batch_size": 4,
        "accumulate": 1,
        "warmup_steps": 0,
    }
    values["train"] |= {
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "log_every": 1,
        "tensorboard": False,
    }
    return make_recipe(values)


def shrink(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Small `kwargs` and `image_size` for a timm architecture, by its family; other arguments and
    the patch stay.
    """
    if name.startswith("convnext"):
        return {"kwargs": kwargs | CONVNEXT, "image_size": 64}
    if name.startswith("resnet"):
        return {"kwargs": kwargs | RESNET, "image_size": 64}
    if name.startswith(("vit_", "deit", "eva", "beit")):
        named = re.search(r"patch(\d+)", name)
        patch = kwargs.get("patch_size", int(named[1]) if named else 16)
        return {"kwargs": kwargs | VIT, "image_size": 4 * patch}
    return {
        "kwargs": kwargs,
        "image_size": 64,
    }  # a family with no common names for its sizes: only the picture
