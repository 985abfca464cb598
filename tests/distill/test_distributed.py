"""Two real processes over gloo compute what one does: gradients under DDP and FSDP2, whole runs,
resuming.
"""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from distill.distributed import Ranks
from distill.runs import best_record
from tests.conftest import (
    environment,
    long_case,
    metrics_of,
    run_command,
    run_here,
    small_recipe,
    weights_of,
)
from tests.distill.two_ranks import DIMS, gradients

pytestmark = pytest.mark.slow

SMALL_TWINS = {"embed_dims": [16, 16, 32, 32], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}


AGAIN = {"student": {"grad_checkpointing": True}, "umt": {"depth": 1, "grad_checkpointing": True}}
CASES = {
    "vit_ddp": {},
    "vit_fsdp": {"train": {"parallel": "fsdp"}},
    "again_ddp": AGAIN,
    "again_fsdp": AGAIN | {"train": {"parallel": "fsdp"}},
    "unic_ddp": {"method": "unic"},
    "unic_fsdp": {"method": "unic", "train": {"parallel": "fsdp"}},
    # depthwise and strided convolutions, batch normalisation
    "cnn_ddp": {"student": {"name": "test_efficientnet"}},
    "cnn_ddp_last": {"student": {"name": "test_efficientnet"}, "train": {"channels_last": True}},
    "cnn_ddp_bf16": {"student": {"name": "test_efficientnet"}, "train": {"precision": "bf16"}},
    "cnn_fsdp_last": {
        "student": {"name": "test_efficientnet"},
        "train": {"parallel": "fsdp", "channels_last": True},
    },
    "cnn_fsdp_bf16": {
        "student": {"name": "test_efficientnet"},
        "train": {"parallel": "fsdp", "precision": "bf16"},
    },
    # stages that are called as lists of what is inside them
    "lists_ddp": {"student": {"name": "twins_svt_small", "kwargs": SMALL_TWINS}},
    "lists_fsdp": {
        "student": {"name": "twins_svt_small", "kwargs": SMALL_TWINS},
        "train": {"parallel": "fsdp"},
    },
}


def test_two_ranks_compute_the_gradients_of_one_under_ddp_and_fsdp(tmp_path, photo_folder):
    for name, changes in CASES.items():
        recipe = small_recipe(photo_folder, targets={"normalize": "none"}, umt={"depth": 1})
        for key, value in changes.items():
            merged = key == "train" or "again" in name
            recipe[key] = recipe[key] | value if merged else value
        recipe["student"] = {"image_size": 64} | recipe["student"] | {"drop_path": 0.0}
        if recipe["method"] == "unic":
            recipe["unic"] = {"drop": 0.0, "hidden": 16, "last_hidden": 16}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(3)
    grids = {"cls": 2, "mae": 4, "dino": 4}
    targets = {
        name: (torch.randn(4, dim.summary), torch.randn(4, grids[name], grids[name], dim.patches))
        for name, dim in DIMS.items()
    }
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    torch.save({"images": images, "targets": targets}, tmp_path / "batch.pt")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distill.two_ranks", tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    together = {name: torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in CASES}
    alone = gradients(tmp_path, "vit_ddp", Ranks(0, 1, torch.device("cpu")))
    assert any(name.endswith("model_token") for name in alone)

    def same(case: str, wanted: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
        got = together[case]
        assert got.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(
                got[name], wanted[name], rtol=rtol, atol=atol, msg=f"{case} {name}"
            )

    same("vit_ddp", alone, 1e-4, 1e-6)
    same("vit_fsdp", alone, 1e-4, 1e-6)
    same("again_ddp", alone, 1e-4, 1e-6)
    same("again_fsdp", alone, 1e-4, 1e-6)
    # statistics of a batch, or of a rank's share of it: two ranks are not one, but both are alike
    same("unic_fsdp", together["unic_ddp"], 1e-4, 1e-6)
    same("cnn_ddp_last", together["cnn_ddp"], 1e-3, 1e-6)
    same("cnn_fsdp_last", together["cnn_ddp"], 1e-3, 1e-6)
    same("cnn_fsdp_bf16", together["cnn_ddp_bf16"], 1e-3, 1e-6)
    same("lists_fsdp", together["lists_ddp"], 1e-4, 1e-6)
    for rank in (0, 1):
        settled = json.loads((tmp_path / f"settled_{rank}.json").read_text())
        assert settled == {"all": "bf16", "one": "fp32"}


@pytest.mark.parametrize("parallel", [long_case("ddp"), "fsdp"])
def test_two_ranks_train_and_resume_as_if_never_stopped(
    recipe_file, class_folders, tmp_path, parallel
):
    recipe = recipe_file(
        train={"parallel": parallel, "steps": 6},
        checkpoint={"every_steps": 3, "keep": 5},
        monitor={"data": str(class_folders), "every": 2},
    )
    out = tmp_path / "run"
    done = run_command(recipe, "--output", out, ranks=2)
    assert done.returncode == 0, done.stderr
    whole, rows = weights_of(out), metrics_of(out)
    assert [row["step"] for row in rows] == list(range(1, 7))
    for path in (out / "checkpoint").glob("step_00000006.*"):
        path.unlink()
    (out / "student.safetensors").unlink()
    resumed = run_command("--output", out, "--resume", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step 3 of 6" in resumed.stdout
    scored = [row["monitor.knn.top1"] for row in metrics_of(out) if row["step"] % 2 == 0]
    assert scored == [row["monitor.knn.top1"] for row in rows if row["step"] % 2 == 0]
    assert best_record(out)["score"] == max(scored)
    again = weights_of(out)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for path in (out / "checkpoint").glob("step_00000006.*"):
        path.unlink()
    alone = run_here("--output", out, "--resume")
    assert alone.returncode == 0, alone.stderr
    assert "1 now, 2 before" in alone.stdout and "not bit-identical" in alone.stdout
    assert [row["step"] for row in metrics_of(out)] == list(range(1, 7))
    # the same pictures from equal weights: but for stochastic depth, the same loss
    assert metrics_of(out)[3]["loss"] == pytest.approx(rows[3]["loss"], rel=0.2)
