"""What only a CUDA device shows: mixed precision, fused steps that skip themselves, agreement with
the CPU.
"""

import pytest
import torch

from distill.training.loop import take_step
from tests.conftest import metrics_of, run_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, none is visible"
    ),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_cuda_lowers_the_loss_in_every_precision(recipe_file, tmp_path, precision):
    settings = {"steps": 60, "lr": 3e-3, "batch_size": 6, "device": "cuda", "precision": precision}
    recipe = recipe_file(train=settings, targets={"batches": 20})
    done = run_here(recipe, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in metrics_of(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_first_loss_on_cuda_is_the_cpus(recipe_file, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        changes = {"train": {"steps": 1, "device": device}, "student": {"drop_path": 0.0}}
        recipe = recipe_file(
            **changes, targets={"normalize": "none"}, teacher_runtime={"precision": "fp32"}
        )
        assert run_here(recipe, "--output", tmp_path / device).returncode == 0
        losses.append(metrics_of(tmp_path / device)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_fused_adamw_skips_a_bad_step_without_being_asked_by_the_host():
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    off = torch.amp.GradScaler("cuda", enabled=False)
    weight.grad = torch.full((3,), float("nan"), device="cuda")
    take_step(optimizer, off, bad=torch.tensor(True, device="cuda"))
    assert torch.equal(weight.detach().cpu(), torch.ones(3))
    weight.grad = torch.ones(3, device="cuda")
    take_step(optimizer, off, bad=torch.tensor(False, device="cuda"))
    assert not torch.equal(weight.detach().cpu(), torch.ones(3))
