"""Two real processes over gloo compute what one does: gradients under DDP and FSDP2, whole runs,
resuming.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import environment, metrics_of, run_command, small_recipe, weights_of

pytestmark = pytest.mark.slow

WORKER = """
import sys, torch, yaml
from distill.distributed import join_ranks, wrap, full_state
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.recipe_io import make_recipe

recipe = make_recipe(yaml.safe_load(open(sys.argv[1])))
with join_ranks("cpu") as ranks:
    torch.manual_seed(0)
    dims = {"cls": FeatureDims(24, 24), "mae": FeatureDims(16, 16), "dino": FeatureDims(32, 32)}
    method = build_method(recipe, dims)
    batch = torch.load(sys.argv[2], weights_only=True)
    model = wrap(method, recipe.train, ranks)
    mine = slice(ranks.rank, None, ranks.world)
    targets = {name: Features(s[mine], p[mine]) for name, (s, p) in batch["targets"].items()}
    losses = model({"image": batch["images"][mine]}, targets)
    losses["loss"].backward()
    grads = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    if ranks.first:
        torch.save(grads, sys.argv[3])
"""


def gradients(tmp_path: Path, photos: Path, ranks: int, parallel: str) -> dict[str, torch.Tensor]:
    recipe = small_recipe(photos, train={"parallel": parallel}, targets={"normalize": "none"})
    recipe["student"]["drop_path"] = 0.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "worker.py").write_text(WORKER)
    torch.manual_seed(3)
    dims = {"cls": (24, 2), "mae": (16, 4), "dino": (32, 4)}
    torch.save(
        {
            "images": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8),
            "targets": {
                name: (torch.randn(4, d), torch.randn(4, g, g, d)) for name, (d, g) in dims.items()
            },
        },
        tmp_path / "batch.pt",
    )
    out = tmp_path / f"{parallel}{ranks}.pt"
    launcher = (
        []
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    )
    files = [str(tmp_path / name) for name in ("worker.py", "recipe.yaml", "batch.pt")]
    done = subprocess.run(
        [sys.executable, *launcher, *files, str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def test_two_ranks_compute_the_gradients_of_one_under_ddp_and_fsdp(tmp_path, photo_folder):
    alone = gradients(tmp_path, photo_folder, 1, "ddp")
    assert any(name.endswith("model_token") for name in alone)
    for parallel in ("ddp", "fsdp"):
        together = gradients(tmp_path, photo_folder, 2, parallel)
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
    alone = run_command("--output", out, "--resume")
    assert alone.returncode == 2 and "trained with 2 processes, but there are now 1" in alone.stderr
