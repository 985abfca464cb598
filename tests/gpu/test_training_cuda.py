"""Combinations that training on CUDA is used in: CNNs, the cache, compile, averages, resuming, and
several GPUs by NCCL under DDP and FSDP2.
"""

import pytest
import torch

from tests.conftest import metrics_of, run_command, run_here, weights_of

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, none is visible"
    ),
]
CNN = {"name": "resnet10t", "kwargs": {}, "drop_path": 0.0, "image_size": 64}
WIDE = {"space_dim": 32, "token_dim": 32, "groups": 8}

COMBINATIONS = {
    "cnn, channels_last, bf16": (
        {"train": {"precision": "bf16"}, "student": CNN, "umt": WIDE},
        (),
    ),
    "cnn, fp16": ({"train": {"precision": "fp16"}, "student": CNN, "umt": WIDE}, ()),
    "cnn, algorithms tried, tf32": (
        {"train": {"cudnn_benchmark": True, "tf32": True}, "student": CNN, "umt": WIDE},
        (),
    ),
    "cached teachers, workers": (
        {"teacher_cache": {"views": 2, "shard_size": 7}, "data": {"workers": 2}},
        ("teacher_runtime.precision=fp16",),
    ),
    "average, accumulation": (
        {"train": {"ema_decay": 0.9, "accumulate": 2, "precision": "bf16"}},
        (),
    ),
    "compiled student and teachers": (
        {"train": {"compile": True, "precision": "bf16"}},
        ("teacher_runtime.compile=true",),
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_trains_and_resumes(recipe_file, tmp_path, name):
    changes, words = COMBINATIONS[name]
    train = {"steps": 6, "device": "cuda", **changes.get("train", {})}
    recipe = recipe_file(**{**changes, "train": train}, checkpoint={"every_steps": 3})
    out = tmp_path / "run"
    command = (recipe, *words, "--output", out, "--resume")
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    first, rows = weights_of(out), metrics_of(out)
    # fp16 begins with a scale that may be too large
    assert rows[-1]["skipped_steps"] <= 2 and all(row["loss"] is not None for row in rows)
    for path in (out / "checkpoint").glob("step_00000006.*"):
        path.unlink()
    (out / "student.safetensors").unlink()
    again = run_here(*command)
    assert again.returncode == 0 and "resumed from step 3 of 6" in again.stdout, again.stderr
    # sums on a GPU are taken in another order each time
    for name, tensor in weights_of(out).items():
        torch.testing.assert_close(tensor, first[name], rtol=5e-2, atol=5e-3)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices for NCCL")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("student", [None, CNN], ids=["vit", "cnn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_train_as_one_does(recipe_file, tmp_path, parallel, student, precision):
    changes = {"student": student or {"drop_path": 0.0}, "umt": WIDE if student else {}}
    train = {"steps": 3, "device": "cuda", "parallel": parallel, "precision": precision}
    recipe = recipe_file(**changes, train=train, checkpoint={"every_steps": 3})
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        done = run_command(recipe, "--output", out, "--resume", ranks=ranks)
        assert done.returncode == 0, done.stderr
        losses.append(metrics_of(out)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
    # what two trained, one continues
    alone = run_command("--output", tmp_path / "2", "--resume", "train.steps=4")
    assert alone.returncode == 0 and "1 now, 2 before" in alone.stdout, alone.stderr
