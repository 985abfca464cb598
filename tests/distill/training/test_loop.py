"""The loop as a user runs it: learning, killing, resuming, stopping, averaging, diverging."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from distill.config import TrainConfig
from distill.features import FeatureDims
from distill.runs import load_run
from distill.training.checkpoint import load_checkpoint
from distill.training.loop import take_step
from distill.training.schedule import learning_rate
from tests.conftest import command, environment, long_case, metrics_of, run_here, weights_of


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_the_contract_names(recipe_file, tmp_path):
    out = tmp_path / "run"
    recipe = recipe_file(train={"steps": 60, "lr": 3e-3, "batch_size": 6}, targets={"batches": 20})
    done = run_here(recipe, "--output", out)
    assert done.returncode == 0, done.stderr
    rows = metrics_of(out)
    assert [row["step"] for row in rows] == list(range(1, 61))
    first = rows[0]
    assert sum(row["loss"] for row in rows[-5:]) < 0.8 * sum(row["loss"] for row in rows[:5])
    for key in (
        "epoch",
        "lr",
        "images_per_second",
        "loss.token",
        "loss.patches",
        "loss.cls.token",
        "loss.dino.patches",
    ):
        assert isinstance(first[key], float), key
    assert first["loss"] == pytest.approx(first["loss.token"] + first["loss.patches"], rel=1e-4)
    for name in ("recipe.yaml", "student.safetensors", "plots/losses.png", "plots/pca.png"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "checkpoint").glob("*.pt"))) == 2
    assert f"python -m distill.visualize {out}" in done.stdout

    run = load_run(out)
    outputs = run.method.deploy()(torch.rand(1, 3, 64, 64))
    assert set(outputs) == {"backbone", "cls", "mae", "dino"}


def start(log: Path, *arguments: object) -> subprocess.Popen:
    with open(log, "w") as output:
        return subprocess.Popen(
            command(*arguments), stdout=output, stderr=subprocess.STDOUT, env=environment()
        )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_bytes().splitlines()) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within two minutes")


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, long_case(True)], ids=["teachers", "cached"])
def test_a_run_killed_at_any_moment_and_resumed_is_bit_identical(recipe_file, tmp_path, cache):
    # checkpoints at every other step make it likely that some kill falls into writing one
    recipe = recipe_file(
        train={"steps": 16, "ema_decay": 0.9, "accumulate": 2},
        checkpoint={"every_steps": 2},
        teacher_cache={"views": 2 if cache else 0, "shard_size": 7},
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_here(recipe, "--output", whole).returncode == 0
    log, words = tmp_path / "log", [recipe]
    for kill_at in (9,) if cache else (1, 9):
        process = start(log, *words, "--output", broken)
        wait_for_step(broken, kill_at, process, log)
        process.send_signal(signal.SIGKILL)
        process.wait()
        words = ["--resume"]
    resumed = run_here("--output", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(whole, broken)
    assert [row["step"] for row in metrics_of(broken)] == list(range(1, 17))


@pytest.mark.slow
def test_sigterm_checkpoints_exits_zero_and_says_how_to_go_on(recipe_file, tmp_path):
    recipe = recipe_file(train={"steps": 400}, checkpoint={"every_steps": 1000})
    out = tmp_path / "run"
    log = tmp_path / "log"
    process = start(log, recipe, "--output", out)
    wait_for_step(out, 5, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()
    assert f"python -m distill.run --output {out} --resume" in log.read_text()
    saved = load_checkpoint(out / "checkpoint")
    assert saved["step"] == metrics_of(out)[-1]["step"] >= 5
    assert not (out / "student.safetensors").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_its_hash_and_the_one_before_it_used(
    recipe_file, tmp_path
):
    recipe, out = recipe_file(), tmp_path / "run"
    assert run_here(recipe, "--output", out).returncode == 0
    before = weights_of(out)
    newest = sorted((out / "checkpoint").glob("*.pt"))[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resumed = run_here("--output", out, "--resume")
    assert (
        resumed.returncode == 0
        and f"{newest.name} does not match its recorded sha256" in resumed.stdout
    )
    assert "resumed from step 6 of 8" in resumed.stdout
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(out).items())


@pytest.mark.slow
def test_a_full_disk_while_checkpointing_keeps_the_previous_checkpoint(recipe_file, tmp_path):
    out = tmp_path / "run"
    assert run_here(recipe_file(), "--output", out, "checkpoint.every_steps=8").returncode == 0
    saved = load_checkpoint(out / "checkpoint")
    size = max(path.stat().st_size for path in (out / "checkpoint").glob("*.pt"))
    # a limit on file size stands in for the disk: the same write fails half-way with the same kind
    # of error
    limited = ["bash", "-c", f'ulimit -f {size // 1024 // 2}; exec "$@"', "bash"]
    fresh = tmp_path / "full"
    failed = subprocess.run(
        [*limited, *command(recipe_file(), "--output", fresh)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert failed.returncode == 2, failed.stderr
    assert (
        failed.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: cannot write {fresh}/checkpoint/step_00000003.pt")
    )
    assert list((fresh / "checkpoint").iterdir()) == []
    assert load_checkpoint(out / "checkpoint")["step"] == saved["step"]


def test_diverging_training_stops_with_status_one_and_names_the_losses(recipe_file, tmp_path):
    recipe = recipe_file(
        train={"steps": 60, "lr": 1e30, "warmup_steps": 0, "max_bad_steps": 3, "clip_grad": 0}
    )
    failed = run_here(recipe, "--output", tmp_path / "run")
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()[-1:]
    assert "3 steps in a row had non-finite gradients" in line and "train.lr = 1e+30" in line


def test_a_step_with_non_finite_gradients_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, float("nan"), 1.0])
    off = torch.amp.GradScaler("cpu", enabled=False)
    take_step(optimizer, off, bad=torch.tensor(True))
    assert torch.equal(weight, torch.ones(3)) and not optimizer.state
    weight.grad = torch.ones(3)
    take_step(optimizer, off, bad=torch.tensor(False))
    assert not torch.equal(weight, torch.ones(3))


def test_the_learning_rate_warms_up_linearly_then_falls_along_a_cosine():
    settings = TrainConfig(steps=101, lr=1.0, min_lr=0.1, warmup_steps=20)
    rates = [learning_rate(step, 101, 10, settings) for step in range(101)]
    assert (
        rates[0] == pytest.approx(1 / 21) and rates[20] == 1.0 and rates[100] == pytest.approx(0.1)
    )
    assert rates[60] == pytest.approx(0.55)
    by_epochs = TrainConfig(steps=101, lr=1.0, min_lr=0.1, warmup_epochs=2.0)
    assert [learning_rate(step, 101, 10, by_epochs) for step in range(101)] == rates


@pytest.mark.slow
def test_accumulated_micro_batches_make_the_gradient_of_the_whole_batch(recipe_file, tmp_path):
    rows = []
    for parts in (1, 2, 4):
        changes = {"train": {"steps": 1, "accumulate": parts}, "student": {"drop_path": 0.0}}
        out = tmp_path / str(parts)
        assert run_here(recipe_file(**changes), "--output", out).returncode == 0
        rows.append(metrics_of(out)[0])
    for row in rows[1:]:
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)


def test_bf16_training_keeps_finite_losses(recipe_file, tmp_path):
    done = run_here(
        recipe_file(train={"precision": "bf16", "steps": 4}), "--output", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert all(isinstance(row["loss"], float) for row in metrics_of(tmp_path / "run"))


@pytest.mark.slow
def test_a_cnn_student_trains_with_every_teacher_kind(recipe_file, tmp_path):
    recipe = recipe_file(
        student={"name": "resnet10t", "kwargs": {}, "drop_path": 0.0, "image_size": 64},
        umt={"space_dim": 32, "token_dim": 32, "groups": 8},
    )
    done = run_here(recipe, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "run")[-1]["skipped_steps"] == 0


@pytest.mark.slow
def test_a_students_run_can_teach_another_student(recipe_file, tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    assert run_here(recipe_file(), "--output", teacher).returncode == 0
    listed = [{"name": "run", "checkpoint": str(teacher), "role": "dino", "image_size": 64}]
    done = run_here(recipe_file(teachers=listed), "--output", out)
    assert done.returncode == 0, done.stderr
    assert load_run(out).dims["dino"] == FeatureDims(48, 48)


def test_a_folder_with_a_corrupt_image_trains_and_names_it(recipe_file, tmp_path, photo_folder):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in photo_folder.rglob("*.jpg"):
        os.link(path, mixed / path.name)
    (mixed / "broken.jpg").write_bytes((mixed / "00.jpg").read_bytes()[:300])
    data = {"path": str(mixed), "max_corrupt_fraction": 0.2}
    done = run_here(recipe_file(data=data), "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stdout
    assert metrics_of(tmp_path / "run")[-1]["skipped_images"] == 1
    strict = run_here(
        recipe_file(data=data | {"max_corrupt_fraction": 0.0}), "--output", tmp_path / "strict"
    )
    assert strict.returncode == 2 and "data.max_corrupt_fraction" in strict.stderr


def test_a_teacher_without_a_summary_is_learnt_by_its_map_alone(recipe_file, tmp_path):
    recipe = recipe_file(train={"steps": 2, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0})
    words = ("teachers.1.summary=false", "teacher_cache.views=1", "targets.normalize=standardize")
    done = run_here(recipe, *words, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    row = metrics_of(tmp_path / "run")[-1]
    assert "loss.mae.patches" in row and "loss.mae.token" not in row and "loss.cls.token" in row
    run = load_run(tmp_path / "run")
    assert run.dims["mae"].summary is None
    assert run.method.deploy()(torch.rand(1, 3, 64, 64))["mae"].token is None
