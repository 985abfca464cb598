"""Any recipe, shrunk to seconds on a CPU: the same method, roles and families, small random networks, real photographs."""

from typing import Any

from distill.config import Recipe
from distill.errors import UserError

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64]}


def tiny(recipe: Recipe, steps: int = 2) -> Recipe:
    """Shrink `recipe`: every network by its family, 64-pixel crops of the packaged photographs, batches of four."""
    values = recipe.model_dump(mode="json")
    values["student"] |= shrink(recipe.student.name, recipe.student.kwargs) | {"pretrained": False}
    for teacher in values["teachers"]:
        if teacher["name"] == "run":
            raise UserError("tiny: a recipe whose teacher is a run cannot be shrunk (its teacher is what it is)")
        teacher |= shrink(teacher["name"], teacher["kwargs"]) | {"checkpoint": None, "pretrained": False, "dim": None}
        teacher["block"] = None if teacher["block"] is None else 1
    values["umt"] |= {"space_dim": 32, "token_dim": 32, "groups": 8, "heads": "auto"}
    values["data"] |= {"kind": "packaged-photos", "path": None, "image_size": "auto", "workers": 0, "repeats": 1}
    values["teacher_cache"] |= {"path": None, "views": min(1, recipe.teacher_cache.views)}
    values["targets"] |= {"batches": 1}
    values["train"] |= {
        "steps": steps, "epochs": None, "batch_size": 4, "accumulate": 1, "warmup_steps": 0, "precision": "fp32",
        "compile": False, "device": "cpu", "log_every": 1,
    }  # fmt: skip
    return Recipe.model_validate(values)


def shrink(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Small arguments for a timm architecture, by its family; the patch size and everything else stay."""
    if name.startswith("convnext"):
        return {"kwargs": kwargs | CONVNEXT, "image_size": 64}
    if "vit" in name or "deit" in name or "eva" in name:
        patch = 14 if "patch14" in name else 16
        return {"kwargs": kwargs | VIT, "image_size": 4 * patch}
    if name.startswith("resnet"):
        return {"kwargs": kwargs | {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}, "image_size": 64}
    return {"image_size": 64}
