"""Scores while training: they change nothing of it, outlive kills, and cost no run."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contract.errors import UserError
from distill.distributed import ALONE, Ranks
from distill.evaluate.__main__ import main as evaluate
from distill.monitor import open_monitor, plan_monitor
from distill.recipe_io import load_recipe, make_recipe
from distill.runs import (
    BEST,
    EMA,
    STUDENT,
    Run,
    best_record,
    load_run,
    save_best,
    shipped_files,
)
from distill.tiny import tiny
from distill.training.watch import Watch
from export.graph import open_student
from tests.conftest import (
    command,
    kill_after,
    metrics_of,
    run_here,
    small_recipe,
    weights_of,
)


def watched(photos: Path, data: Path | None, **changes: object) -> dict:
    """One random teacher, a student with batch normalisation and stochastic depth whose weights are
    averaged.
    """
    recipe = small_recipe(
        photos,
        method="plain",
        targets={"normalize": "none"},
        checkpoint={"every_steps": 2, "keep": 5},
        monitor={"data": data and str(data), "every": 3, "tasks": ["knn", "linear"]},
        **changes,
    )
    recipe["teachers"] = recipe["teachers"][1:2]
    recipe["student"] = {"name": "test_efficientnet", "image_size": 64, "drop_path": 0.3}
    recipe["train"] |= {"steps": 6, "ema_decay": 0.9, "loggers": ["tensorboard"]}
    return recipe


@pytest.fixture(scope="module")
def watched_run(expensive, photo_folder, class_folders, made_once) -> Path:
    """A finished run with a monitor, in `run`; its recipe in `recipe.yaml`."""

    def make(folder: Path) -> None:
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(watched(photo_folder, class_folders)))
        done = run_here(recipe, "--output", folder / "run")
        assert done.returncode == 0, done.stderr
        (folder / "log").write_text(done.stdout)

    return made_once("watched", make)


def same(one: Path, other: Path, name: str) -> bool:
    left, right = load_file(one / name), load_file(other / name)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_run_with_a_monitor_ends_with_the_weights_of_one_without(watched_run, tmp_path):
    done = run_here(watched_run / "recipe.yaml", "--output", tmp_path / "run", "monitor.data=null")
    assert done.returncode == 0, done.stderr
    assert same(watched_run / "run", tmp_path / "run", STUDENT)
    assert any("running_mean" in name for name in weights_of(watched_run / "run"))
    rows, bare = metrics_of(watched_run / "run"), metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if "monitor.knn.top1" in row] == [3, 6]
    times = {"images_per_second"}
    for row, other in zip(rows, bare, strict=True):
        assert {k: v for k, v in row.items() if k[:8] != "monitor." and k not in times} == {
            k: v for k, v in other.items() if k not in times
        }
    assert not (tmp_path / "run" / BEST[STUDENT]).exists()
    assert (watched_run / "run" / "plots" / "monitor.png").stat().st_size > 5000
    assert not (tmp_path / "run" / "plots" / "monitor.png").exists()


def test_scores_are_those_of_an_evaluation_and_are_said(watched_run, class_folders, tmp_path):
    run, text = watched_run / "run", (watched_run / "log").read_text()
    words = " ".join(text.split())
    assert "monitor knn and linear every 3 steps on 12 + 6 pictures of 2 classes" in words
    assert "monitor   step 3, average of weights: knn.top1 " in text
    assert "logger    tensorboard: tensorboard --logdir" in text
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("monitor.knn.top1")] == [3, 6]
    assert "monitor   2 times, " in text and "best      " in text
    record = best_record(run)
    scores = {row["step"]: row["monitor.knn.top1"] for row in metrics_of(run) if len(row) > 14}
    assert record["score"] == scores[record["step"]] == max(scores.values())
    best = load_run(run, checkpoint="best")
    assert (best.step, best.finished) == (record["step"], False)
    assert f"of step {best.step}, the best by knn.top1: " in best.weights
    assert open_student(run, "best").run.step == best.step
    words = (run, "--data", class_folders, "--tasks", "knn", "--checkpoint", "best")
    done = run_here(*words, "--output", tmp_path / "e", command=evaluate)
    assert done.returncode == 0, done.stderr
    assert f"{record['score']:.3f}" in done.stdout


def test_a_watched_run_that_is_killed_and_resumed_is_bit_identical(watched_run, tmp_path):
    out, recipe = tmp_path / "run", watched_run / "recipe.yaml"
    kill_after(4, out, command(recipe, "--output", out))
    for path in (out / "checkpoint").glob("step_00000006.*"):
        path.unlink()  # as if it had been killed a moment earlier
    resumed = run_here("--output", out, "--resume", "monitor.every=3")
    assert resumed.returncode == 0, resumed.stderr
    for name in (STUDENT, BEST[STUDENT]):
        assert same(watched_run / "run", out, name), name
    before = best_record(watched_run / "run")
    assert best_record(out) == before
    named = [[k for k in row if k.startswith("monitor.")] for row in metrics_of(out)]
    assert named == [[k for k in r if k[:8] == "monitor."] for r in metrics_of(watched_run / "run")]


def test_the_best_so_far_is_remembered_unless_scores_do_not_compare(watched_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watched_run / "run", run)
    before = (run / BEST[STUDENT]).read_bytes()
    words = ("--output", run, "--resume", "train.steps=7")
    done = run_here(*words)
    assert done.returncode == 0, done.stderr
    if "(the best so far)" not in done.stdout:
        assert (run / BEST[STUDENT]).read_bytes() == before
    done = run_here("--output", run, "--resume", "train.steps=8", "monitor.images=4")
    assert "pictures or tasks are others now" in done.stdout and best_record(run)["step"] == 8


class Scores:
    """A score that says what it was given, one number after the other."""

    fingerprint, main = "0", "knn.top1"

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, run: Run) -> dict[str, float]:
        return {self.main: self.values.pop(0)}


def test_a_score_that_is_not_finite_is_no_score(plain_run, tmp_path, caplog):
    run = load_run(plain_run)
    folder = tmp_path / "run"
    folder.mkdir()

    def watch(*values: float) -> list[int | None]:
        """The best step after each."""
        alone = Ranks(0, 1, torch.device("cpu"))
        own = Watch(run.recipe, folder, run.method, run.dims, alone, Scores(*values))
        own.resume()
        steps = []
        for number, value in enumerate(values):
            named = own(number, run.method, None)
            assert bool(named) == math.isfinite(value)
            steps.append((best_record(folder) or {}).get("step"))
        return steps

    nan, inf = float("nan"), float("inf")
    assert watch(nan, inf, 0.5, nan, 0.25) == [None, None, 2, 2, 2]
    assert "step 0: no scores (knn.top1 is nan)" in caplog.text
    # as an earlier version has stored it
    record = {"fingerprint": "0", "name": "knn.top1", "score": nan, "scores": {"knn.top1": nan}}
    files = shipped_files(run.method.state_dict(), run.method)
    save_best(folder, files, run.recipe, run.dims, 9, record)
    assert watch(0.25) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_pictures_that_cannot_be_read_later_cost_no_run(
    photo_folder, class_folders, tmp_path, count, monkeypatch
):
    data = tmp_path / "classes"
    shutil.copytree(class_folders, data)
    recipe = make_recipe(watched(photo_folder, data) | {"checkpoint": {"every_steps": 9}})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    from distill import monitor

    opened = monitor.open_splits

    def then_damaged(folder: Path):
        splits = opened(folder)
        for path in sorted(data.glob("train/*/*.png"))[:count]:
            path.write_bytes(b"no picture")
        return splits

    monkeypatch.setattr(monitor, "open_splits", then_damaged)
    done = run_here(tmp_path / "r.yaml", "--output", tmp_path / "run", "train.steps=3")
    assert done.returncode == 0, done.stderr
    scored = ["monitor.knn.top1" in row for row in metrics_of(tmp_path / "run")]
    if count == 1:
        assert " ".join(done.stdout.split()).count("monitor left out: ") == 1
        assert scored == [False, False, True]
    else:
        assert "no scores (3 of 12 pictures cannot be read: " in " ".join(done.stdout.split())
        assert not any(scored) and (tmp_path / "run" / STUDENT).exists()


@pytest.mark.slow
def test_a_momentum_network_is_what_is_scored(class_folders, tmp_path):
    small = tiny(load_recipe("sefa_vit_tiny", [])).model_dump(mode="json")
    small["monitor"] |= {"data": str(class_folders), "every": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small))
    done = run_here(tmp_path / "r.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "monitor   step 2, momentum network: knn.top1" in done.stdout
    run = tmp_path / "run"
    assert same(run, run, BEST[EMA])
    for weights, name in (("student", STUDENT), ("ema", EMA)):
        best = load_run(run, weights, checkpoint="best").method.state_dict()
        last = load_file(run / name)
        assert all(torch.equal(best[key], tensor) for key, tensor in last.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("monitor.data=/nowhere", "monitor.data: /nowhere: no such folder"),
        ("monitor.data=.", "has no train split: create "),
        ("monitor.images=1", "monitor.images = 1 leaves pictures of one class"),
        ("monitor.tasks=[]", "monitor.tasks"),
        ("monitor.tasks=[depth]", 'monitor.tasks.0 = "depth"'),
        ("monitor.every=0", "monitor.every = 0"),
    ],
)
def test_a_wrong_monitor_is_one_line_before_anything_is_written(
    watched_run, tmp_path, monkeypatch, change, words
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    done = run_here(watched_run / "recipe.yaml", "--output", tmp_path / "run", change)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_monitor_has_no_best(plain_run, watched_run, tmp_path):
    with pytest.raises(UserError, match="nothing has been scored while it trained"):
        load_run(plain_run, checkpoint="best")
    done = run_here(watched_run / "recipe.yaml", "--dry-run", "monitor.data=/nowhere")
    assert "monitor.data is not readable here (/nowhere: no such folder)" in " ".join(
        done.stdout.split()
    )


def test_tiles_are_refused_before_training(photo_folder, class_folders):
    recipe = make_recipe(watched(photo_folder, class_folders, view="tiles:0.25"))
    for ask in (plan_monitor, lambda recipe: open_monitor(recipe, ALONE)):
        with pytest.raises(UserError, match="set another view, or monitor.data=null"):
            ask(recipe)
