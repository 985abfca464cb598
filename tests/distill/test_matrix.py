"""Settings that are right alone may be wrong together: whole runs of two real processes, in which
every two values of two settings meet at least once.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distill.methods import METHODS
from distill.runs import load_run
from tests.conftest import environment, long_case, metrics_of, small_recipe
from tests.distill.methods.test_kpu import ADAPTER, kpu_recipe
from tests.distill.methods.test_sefa import sefa_recipe

pytestmark = pytest.mark.slow

SETTINGS = {
    "student": ("vit", "test_efficientnet", "test_convnext"),
    "parallel": ("ddp", "fsdp"),
    "precision": ("fp32", "bf16"),
    "channels_last": ("auto", True),
    "views": (0, 2),
    "method": ("umt", "plain", "unic"),
}
ROWS = [
    ("vit", "ddp", "fp32", "auto", 0, "umt"),
    ("vit", "fsdp", "bf16", True, 2, "plain"),
    ("vit", "fsdp", "bf16", "auto", 0, "unic"),
    ("test_efficientnet", "fsdp", "bf16", True, 2, "umt"),
    ("test_efficientnet", "ddp", "fp32", True, 0, "plain"),
    ("test_efficientnet", "ddp", "bf16", "auto", 2, "unic"),
    ("test_convnext", "ddp", "bf16", "auto", 2, "umt"),
    ("test_convnext", "fsdp", "fp32", "auto", 0, "plain"),
    ("test_convnext", "ddp", "fp32", True, 2, "unic"),
]


COMPILED = [
    ("vit", "ddp", "fp32", "auto", 0, "umt"),
    ("vit", "fsdp", "bf16", "auto", 0, "umt"),
    ("vit", "ddp", "bf16", "auto", 0, "sefa"),
    ("vit", "ddp", "fp32", "auto", 0, "kpu"),
    ("test_efficientnet", "ddp", "fp32", True, 2, "plain"),
    ("test_convnext", "fsdp", "bf16", "auto", 2, "unic"),
]
"""Rows that torch.compile is tried with."""


def test_every_two_values_meet():
    for one, other in itertools.combinations(range(len(SETTINGS)), 2):
        values = list(SETTINGS.values())
        wanted = set(itertools.product(values[one], values[other]))
        assert wanted == {(row[one], row[other]) for row in ROWS}, list(SETTINGS)[one]


def test_compiling_meets_every_value_and_every_method_in_the_processes_that_it_takes():
    for place, (name, values) in enumerate(SETTINGS.items()):
        assert {*values} <= {row[place] for row in COMPILED}, name
    names = ("umt", "sefa", "kpu")
    methods = {("ddp", name) for name in names}
    methods |= {("fsdp", name) for name in names if METHODS[name].shards}
    assert methods <= {(row[1], row[5]) for row in COMPILED}


def test_every_combination_trains_and_ships(tmp_path, photo_folder):
    recipes = [recipe_of(row, photo_folder, number % 2) for number, row in enumerate(ROWS)]
    train_all(tmp_path, recipes)
    for number, row in enumerate(ROWS):
        check(tmp_path / str(number), row, {"backbone", "mae", "dino"})


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("rows", "backend"),
    [
        # what is captured and differentiated, without C++, whose compiler takes minutes
        long_case(COMPILED[:1], "aot_eager"),
        long_case(COMPILED[1:], "aot_eager"),
        long_case(COMPILED[:2], "inductor"),
    ],
    ids=["one", "others", "inductor"],
)
def test_every_combination_trains_compiled(tmp_path, photo_folder, rows, backend):
    recipes = [recipe_of(row, photo_folder) for row in rows]
    for recipe in recipes:
        recipe["train"] |= {"compile": True, "accumulate": 1, "ema_decay": 0}
    train_all(tmp_path, recipes, backend)
    for number, (row, recipe) in enumerate(zip(rows, recipes, strict=True)):
        labels = {teacher.get("alias", teacher["role"]) for teacher in recipe["teachers"]}
        check(tmp_path / str(number), row, {"backbone", *labels})


def recipe_of(row: tuple, photos: Path, more: int = 0) -> dict:
    """The recipe of a row, with `more` micro-batches."""
    student, parallel, precision, channels_last, views, method = row
    if method == "sefa":
        recipe = sefa_recipe(photos)
    elif method == "kpu":
        recipe = kpu_recipe(photos)
        recipe["teachers"] = recipe["teachers"][:1]
        recipe["kpu"] = {"adapter": {**ADAPTER, "blocks": 1, "extra": 0, "points": 1}}
    else:
        recipe = small_recipe(photos, method=method)
        recipe["teachers"] = recipe["teachers"][1:]
    if student != "vit":
        recipe["student"] = {"name": student, "image_size": 64}
    recipe["teacher_cache"] = {"views": views}
    recipe["train"] |= {"steps": 3, "accumulate": 1 + more, "log_every": 1}
    recipe["train"] |= {"parallel": parallel, "precision": precision}
    recipe["train"] |= {"ema_decay": 0.5 if parallel == "ddp" else 0}
    if parallel == "fsdp":
        recipe["train"].pop("clip_mode", None)  # by parameter, in SeFA's
    recipe["train"] |= {"channels_last": channels_last}
    recipe["checkpoint"] = {"every_steps": 2}
    if method == "umt" and student != "vit":
        recipe["umt"] |= {"groups": "auto"}
    if method != "umt":
        recipe.pop("umt", None)
    if method == "unic":
        del recipe["targets"]
        recipe["unic"] = {"heads": "mlp", "hidden": 16, "last_hidden": 16}
    return recipe


def train_all(folder: Path, recipes: list[dict], backend: str = "inductor") -> None:
    """Train recipes into folders of their numbers, in one start of two processes; `backend` is
    torch.compile's.
    """
    for number, recipe in enumerate(recipes):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distill.run_matrix", folder, backend],
        capture_output=True,
        text=True,
        timeout=900 if backend == "inductor" else 280,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]


def check(folder: Path, row: tuple, outputs: set[str]) -> None:
    """That a run took three finite steps, and that what ships answers."""
    rows = metrics_of(folder)
    assert [line["step"] for line in rows] == [1, 2, 3], row
    assert all(math.isfinite(line["loss"]) for line in rows), row
    assert rows[-1]["skipped_steps"] == 0, row
    with torch.inference_mode():
        run = load_run(folder)
        side = run.recipe.student.image_size
        predictions = run.method.deploy()(torch.rand(1, 3, side, side))
    assert set(predictions) == outputs, row
    assert all(found.patches.isfinite().all() for found in predictions.values()), row
