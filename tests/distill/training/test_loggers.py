"""Measurements in TensorBoard, Weights & Biases and MLflow, offline; a logger never ends a run."""

import importlib.util
import json
import logging
import struct
import time
from pathlib import Path

import pytest
import torch

from contract.errors import UserError
from distill.config import TrainConfig
from distill.distributed import Ranks
from distill.recipe_io import load_recipe, make_recipe
from distill.training import loggers
from distill.training.loggers import LOGGERS, Loggers, check_loggers
from tests.conftest import run_here, small_recipe

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def recipe(photo_folder):
    return make_recipe(small_recipe(photo_folder))


def row(step: int) -> dict:
    return {"step": step, "loss": 1.0 / step, "loss.mae.patches": float("nan")}


def test_tensorboard_has_every_value(tmp_path, recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (1, (2, 4))):
        opened = Loggers(["tensorboard"], tmp_path, recipe, start)
        for step in steps:
            opened.log(step, row(step))
        opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 4]


def steps_of(file: Path) -> list[int]:
    """Steps with a loss in a file of wandb's: after 7 bytes records in LevelDB's log format, of
    which a small file has whole ones in one block.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, steps = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, place)
        record = Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        names = {item.key or ".".join(item.nested_key) for item in record.history.item}
        if "loss" in names:
            steps.append(record.history.step.num)
        place += 7 + length
    return steps


def test_wandb_offline_goes_on_in_the_same_run(tmp_path, recipe, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(["wandb"], ALONE)
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        opened = Loggers(["wandb"], tmp_path, recipe, start)
        for step in steps:
            opened.log(step, row(step))
        opened.close()
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(files) == 2  # `wandb sync` puts both into one
    assert [steps_of(file) for file in files] == [[1, 2], [2, 3]]


def test_mlflow_goes_on_in_the_same_run(tmp_path, recipe, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_loggers(["mlflow"], ALONE)
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        opened = Loggers(["mlflow"], tmp_path, recipe, start)
        for step in steps:
            opened.log(step, row(step))
        opened.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("vfm-distill").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.batch_size"] == "4"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(value.step, value.value) for value in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


class _Bad:
    """Fails where a test asks it to."""

    needs = {}
    identity, where = None, "nowhere"
    fails = ""
    logged: list[int] = []

    def __init__(self, start):
        self._meet("open")

    @staticmethod
    def check():
        pass

    def _meet(self, what):
        if what == self.fails:
            raise ConnectionError("no network\nmore words")

    def log(self, step, values):
        self.logged.append(step)
        self._meet("log")

    def close(self):
        self._meet("close")


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_logger_that_fails_warns_once_and_never_ends_a_run(
    tmp_path, recipe, monkeypatch, caplog, fails
):
    monkeypatch.setitem(LOGGERS, "wandb", _Bad)
    monkeypatch.setattr(_Bad, "fails", fails)
    monkeypatch.setattr(_Bad, "logged", [])
    with caplog.at_level(logging.WARNING):
        opened = Loggers(["wandb"], tmp_path, recipe, 0)
        for step in (1, 2, 3):
            opened.log(step, row(step))
        opened.close()
    assert [record.getMessage() for record in caplog.records] == [
        "logger    wandb failed (no network): the run goes on without it, metrics.jsonl has all "
        "values"
    ]
    assert _Bad.logged == {"open": [], "log": [1], "close": [1, 2, 3]}[fails]


def test_training_does_not_wait_for_a_logger(tmp_path, recipe, monkeypatch, caplog):
    monkeypatch.setitem(LOGGERS, "wandb", _Bad)
    monkeypatch.setattr(_Bad, "log", lambda self, step, values: time.sleep(1))
    monkeypatch.setattr(loggers, "_PATIENCE", 0.1)
    opened = Loggers(["wandb"], tmp_path, recipe, 0)
    for step in range(100):
        opened.log(step, row(step + 1))
    opened.close()
    assert "not done after 0.1 s" in caplog.text
    opened._threads[0].queue.queue.clear()


def test_the_older_key_of_tensorboard_still_works(recipe_file):
    recipe = load_recipe(str(recipe_file()), ["train.tensorboard=true", "train.loggers=[wandb]"])
    assert recipe.train.all_loggers == ("wandb", "tensorboard")
    assert TrainConfig(steps=1, tensorboard=True, loggers=["tensorboard"]).all_loggers == (
        "tensorboard",
    )


@pytest.mark.parametrize(
    ("name", "library"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_missing_library_is_one_line_that_names_the_extra(
    recipe_file, tmp_path, monkeypatch, name, library
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked: None if asked == library else find(asked)
    )
    words = (f"train.loggers=[{name}]", "--output", tmp_path / "run")
    done = run_here(recipe_file(), *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{library} is missing (pip install 'vfm-distill[{name}]')" in done.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="wandb cannot log in .*WANDB_MODE=offline"):
        check_loggers(["wandb"], ALONE)


def test_an_unknown_logger_is_one_line(recipe_file, tmp_path):
    done = run_here(recipe_file(), "train.loggers=[board]", "--output", tmp_path / "run")
    assert done.returncode == 2 and "train.loggers" in done.stderr
    assert done.stderr.count("\n") == 1
