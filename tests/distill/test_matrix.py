"""Settings that are right alone may be wrong together: whole runs of two real processes, in which
every two values of two settings meet at least once.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import yaml

from distill.runs import load_run
from tests.conftest import environment, metrics_of, small_recipe

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


def test_every_two_values_meet():
    for one, other in itertools.combinations(range(len(SETTINGS)), 2):
        values = list(SETTINGS.values())
        wanted = set(itertools.product(values[one], values[other]))
        assert wanted == {(row[one], row[other]) for row in ROWS}, list(SETTINGS)[one]


def test_every_combination_trains_and_ships(tmp_path, photo_folder):
    for number, values in enumerate(ROWS):
        student, parallel, precision, channels_last, views, method = values
        recipe = small_recipe(photo_folder, method=method, teacher_cache={"views": views})
        recipe["teachers"] = recipe["teachers"][1:]
        if student != "vit":
            recipe["student"] = {"name": student, "image_size": 64}
        recipe["train"] |= {"steps": 3, "accumulate": 1 + number % 2}
        recipe["train"] |= {"parallel": parallel, "precision": precision}
        recipe["train"] |= {"ema_decay": 0.5 if parallel == "ddp" else 0}
        recipe["train"] |= {"channels_last": channels_last}
        recipe["checkpoint"] = {"every_steps": 2}
        if method == "umt" and student != "vit":
            recipe["umt"] |= {"groups": "auto"}
        if method != "umt":
            del recipe["umt"]
        if method == "unic":
            del recipe["targets"]
            recipe["unic"] = {"heads": "mlp", "hidden": 16, "last_hidden": 16}
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distill.run_matrix", tmp_path],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for number, values in enumerate(ROWS):
        folder = tmp_path / str(number)
        rows = metrics_of(folder)
        assert [row["step"] for row in rows] == [1, 2, 3], values
        assert all(math.isfinite(row["loss"]) for row in rows), values
        assert rows[-1]["skipped_steps"] == 0, values
        with torch.inference_mode():
            predictions = load_run(folder).method.deploy()(torch.rand(1, 3, 64, 64))
        assert set(predictions) == {"backbone", "mae", "dino"}, values
        assert all(found.patches.isfinite().all() for found in predictions.values()), values
