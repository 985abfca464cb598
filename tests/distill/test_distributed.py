"""Two real processes over gloo compute what one does: gradients under DDP and FSDP2, whole runs,
resuming.
"""

import subprocess
import sys

import pytest
import torch
import yaml

from distill.distributed import Ranks
from tests.conftest import environment, metrics_of, run_command, run_here, small_recipe, weights_of
from tests.distill.two_ranks import DIMS, gradients

pytestmark = pytest.mark.slow


def test_two_ranks_compute_the_gradients_of_one_under_ddp_and_fsdp(tmp_path, photo_folder):
    for parallel in ("ddp", "fsdp"):
        recipe = small_recipe(
            photo_folder, train={"parallel": parallel}, targets={"normalize": "none"}
        )
        recipe["student"]["drop_path"] = 0.0
        (tmp_path / f"{parallel}.yaml").write_text(yaml.safe_dump(recipe))
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
    alone = gradients(tmp_path, "ddp", Ranks(0, 1, torch.device("cpu")))
    assert any(name.endswith("model_token") for name in alone)
    for parallel in ("ddp", "fsdp"):
        together = torch.load(tmp_path / f"{parallel}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name in alone:
            torch.testing.assert_close(
                together[name], alone[name], rtol=1e-4, atol=1e-6, msg=f"{parallel} {name}"
            )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_and_resume_as_if_never_stopped(recipe_file, tmp_path, parallel):
    recipe = recipe_file(
        train={"parallel": parallel, "steps": 6}, checkpoint={"every_steps": 3, "keep": 5}
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
    again = weights_of(out)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    alone = run_here("--output", out, "--resume")
    assert alone.returncode == 2 and "trained with 2 processes, but there are now 1" in alone.stderr
