"""Any recipe shrunk to seconds on a CPU: same method, roles and families, small random networks,
real photographs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from contract.errors import UserError
from distill.config import DETECTOR, Recipe
from distill.fields import source_of
from distill.methods import METHODS
from distill.recipe_io import make_recipe

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64]}
RESNET = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}


def tiny(recipe: Recipe, steps: int = 2) -> Recipe:
    """Shrink `recipe`: every network by its family, 64-pixel crops of the packaged photographs,
    batches of four.

    Raises UserError for a recipe one of whose teachers is a run: that network is what it is.
    """
    values = recipe.model_dump(mode="json")
    values["student"] |= shrink(recipe.student.name, recipe.student.kwargs) | {
        "checkpoint": None,
        "pretrained": False,
        "grad_checkpointing": False,
    }
    for teacher in values["teachers"]:
        if teacher["name"] == "run" or source_of(teacher["name"])[0]:
            raise UserError(
                f"tiny: a recipe whose teacher is {teacher['name']} cannot be shrunk (its teacher "
                "is what it is)"
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
        "loggers": [],
    }
    values["monitor"] |= {"data": None}
    return make_recipe(values)


def shrink(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Small `kwargs` and `image_size` for an architecture, by its family; other arguments and
    the patch stay.
    """
    if name == DETECTOR:
        return {"kwargs": SWIN, "image_size": 64}
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


def save_tiny_detector(
    folder: Path, labels: Sequence[str] = ("cat", "dog", "person"), seed: int = 0
) -> Path:
    """Write a GroundingDINO of half a million random weights, with a vocabulary that has the words
    of `labels` and all letters; needs transformers.
    """
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        SwinConfig,
    )
    from transformers.utils import logging

    vocabulary = detector_vocabulary(labels)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN, out_indices=[2, 3, 4]),
        text_config=BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        d_model=32,  # its GroupNorms have 32 groups
        num_queries=20,
        encoder_layers=1,
        decoder_layers=2,  # a single one ties weights that it does not have
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        disable_custom_kernels=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GroundingDinoForObjectDetection(config)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def detector_vocabulary(labels: Sequence[str]) -> list[str]:
    """BERT's special tokens where GroundingDINO looks for them, the words of labels, and letters
    for all other words.
    """
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [
        word for label in labels for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", label.lower())
    ]
    further = iter(
        dict.fromkeys([*letters, *(f"##{letter}" for letter in letters), "-", "'", ",", *words])
    )
    tokens = [special.get(number) or f"[unused{number}]" for number in range(1037)]
    known = set(special.values())
    return tokens + [word for word in further if word not in known]
