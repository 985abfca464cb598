"""Where a run's measurements go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

To add one: a class with `Logger`'s members, a line in `LOGGERS`, its name in
`distill.config.LoggerName`, its library as an extra.
"""

import importlib.util
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from contract.errors import UserError, first_line
from contract.files import write_atomically
from distill.config import Recipe
from distill.distributed import Ranks
from distill.recipe_io import flatten

log = logging.getLogger(__name__)

_PROJECT = "vfm-distill"
_RECORD = "loggers.json"
"""In a run folder: the loggers' own names of the run, under which a resumed run goes on."""

_PATIENCE = 60
"""Seconds that the end of a run waits for a logger, at most."""


@dataclass(frozen=True)
class Start:
    """What a logger is opened with."""

    folder: Path
    recipe: Recipe
    step: int
    """Steps behind the run: values of later ones, logged before it was killed, are logged again."""
    identity: str | None
    """What the logger called the run before; None: a new one."""


class Logger(Protocol):
    """One destination of measurements, opened as `Kind(start)`; its methods are called in a thread
    of its own, may wait for a network and raise what they like.
    """

    needs: ClassVar[Mapping[str, str]]
    """The libraries it imports, and the extra that installs each."""
    identity: str | None
    """What the run is called there, to go on under when it is resumed; None: nothing needed."""
    where: str
    """For the user: where to look."""

    @staticmethod
    def check() -> None:
        """Raise UserError for what the user has to set first: credentials, say."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Write out what is left."""


class _TensorBoard:
    """Events in RUN/tensorboard."""

    needs: ClassVar = {"tensorboard": "tensorboard"}
    identity = None

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = start.folder / "tensorboard"
        # hides what an earlier, killed attempt wrote of later steps
        self.writer = SummaryWriter(folder, purge_step=start.step + 1)
        self.where = f"tensorboard --logdir {folder}"

    @staticmethod
    def check() -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """A run of Weights & Biases, by its own variables: WANDB_PROJECT (default: vfm-distill),
    WANDB_ENTITY, WANDB_MODE=offline, …
    """

    needs: ClassVar = {"wandb": "wandb"}

    def __init__(self, start: Start) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=start.folder,
            name=os.environ.get("WANDB_NAME", start.folder.name),
            id=start.identity,
            resume="allow" if start.identity else None,
            config=start.recipe.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=_PATIENCE, init_timeout=_PATIENCE
            ),
        )
        self.identity = self.run.id
        # asked for its address, a run without one warns
        sync = f"wandb sync {Path(self.run.dir).parent}"
        self.where = sync if self.run.offline else self.run.url or "disabled"

    @staticmethod
    def check() -> None:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return
        import wandb

        try:
            known = wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise UserError(_wandb_refusal(first_line(error))) from error
        if not known:
            raise UserError(_wandb_refusal("no API key"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # of a resumed run it has later steps already, and takes no earlier one
        if step >= self.run.step:
            self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb_refusal(reason: str) -> str:
    return (
        f"train.loggers: wandb cannot log in ({reason}): run `wandb login`, set WANDB_API_KEY, or "
        "WANDB_MODE=offline to upload later"
    )


class _MLflow:
    """A run of MLflow on the server that MLFLOW_TRACKING_URI names, by default in the database
    RUN/mlflow.db; experiment MLFLOW_EXPERIMENT_NAME, by default vfm-distill.
    """

    # a tracking server needs the client alone, but who has none keeps a database
    needs: ClassVar = {"mlflow": "mlflow", "sqlalchemy": "mlflow", "alembic": "mlflow"}

    def __init__(self, start: Start) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # its messages on tables that it makes, at the level of ours
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{(start.folder / 'mlflow.db').resolve()}"
        self.client, self.last, self.where = MlflowClient(uri), 0, uri
        if start.identity:
            self.identity = start.identity
            self.client.update_run(self.identity, status="RUNNING")
            history = self.client.get_metric_history(self.identity, "loss")
            self.last = max((value.step for value in history), default=0)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=start.folder.name)
        self.identity = run.info.run_id
        values = flatten(start.recipe.model_dump(mode="json"))
        # the least that servers take of a parameter's value, and of parameters at once
        params = [Param(key, str(value)[:500]) for key, value in values]
        for first in range(0, len(params), 100):
            self.client.log_batch(self.identity, params=params[first : first + 100])

    @staticmethod
    def check() -> None:
        pass

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step <= self.last:  # logged before the run was killed; MLflow would keep both
            return
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.identity, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.identity)


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def check_loggers(names: Sequence[str], ranks: Ranks) -> None:
    """Raise UserError on every rank for a logger whose library is missing on the first one, or that
    is not set up there.
    """
    problem = None
    if names and ranks.first:
        try:
            _check(names)
        except UserError as error:
            problem = str(error)
    problem = ranks.gather(problem)[0] if names else None
    if problem:
        raise UserError(problem)


def _check(names: Sequence[str]) -> None:
    for name in names:
        for library, extra in LOGGERS[name].needs.items():
            if importlib.util.find_spec(library) is None:
                raise UserError(
                    f"train.loggers = [{name}]: {library} is missing (pip install "
                    f"'vfm-distill[{extra}]')"
                )
        LOGGERS[name].check()


class Loggers:
    """All loggers of a run, each in a thread of its own, so that training waits for none.

    One that cannot be opened or fails is left out from then on, with one warning: metrics.jsonl has
    the values all the same.
    """

    def __init__(self, names: Sequence[str], folder: Path, recipe: Recipe, step: int) -> None:
        self._threads = []
        record = _read_record(folder / _RECORD)
        for name in names:
            try:
                logger = LOGGERS[name](Start(folder, recipe, step, record.get(name)))
            except Exception as error:  # whatever a library and its server make of it
                _warn(name, error)
                continue
            log.info("logger    %s: %s", name, logger.where)
            if logger.identity and record.get(name) != logger.identity:
                record[name] = logger.identity
                text = json.dumps(record, indent=1)
                write_atomically(folder / _RECORD, lambda path, text=text: path.write_text(text))
            self._threads.append(_Thread(name, logger))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values of a step to every logger."""
        for thread in self._threads:
            thread.queue.put((step, dict(values)))

    def close(self) -> None:
        """Let every logger write out what it has, for a minute at most."""
        for thread in self._threads:
            thread.queue.put(None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))
            if thread.is_alive():
                _warn(thread.name, TimeoutError(f"not done after {_PATIENCE} s"))


class _Thread(threading.Thread):
    """Passes what is put into its `queue` to a logger; None ends it."""

    def __init__(self, name: str, logger: Logger) -> None:
        super().__init__(name=name, daemon=True)
        self.logger = logger
        self.queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self.start()

    def run(self) -> None:
        failed = False
        while (item := self.queue.get()) is not None:
            failed = failed or not self._attempt(self.logger.log, *item)
        if not failed:
            self._attempt(self.logger.close)

    def _attempt(self, call: Any, *values: Any) -> bool:
        try:
            call(*values)
        except Exception as error:  # whatever a library and its server make of it
            _warn(self.name, error)
            return False
        return True


def _warn(name: str, error: Exception) -> None:
    log.warning(
        "logger    %s failed (%s): the run goes on without it, metrics.jsonl has all values",
        name,
        first_line(error) or type(error).__name__,
    )


def _read_record(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
