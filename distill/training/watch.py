"""Scores of the student while it learns, and the weights that did best.

What scores is a function that the command hands in: training knows nothing of evaluation
(`tests/test_layout.py`), and evaluation nothing of training. It is given a copy of the network that
ships, so that the modes and the statistics of the one that learns stay as they are, and the random
state is put back afterwards: a run with a monitor and one without end with the same weights, bit
for bit.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from contract.errors import UserError, first_line
from contract.tables import entry
from distill.config import Recipe
from distill.distributed import Ranks, full_weights
from distill.features import FeatureDims
from distill.methods.method import Method
from distill.runs import (
    EMA,
    STUDENT,
    Run,
    best_record,
    build_shipped,
    refit_best,
    save_best,
    shipped_files,
)
from distill.training.stop import random_state, set_random_state

log = logging.getLogger(__name__)


class Score(Protocol):
    """Scores a student that has not finished: `distill/monitor.py`."""

    fingerprint: str
    """Changes with whatever makes scores not comparable: pictures, tasks."""
    main: str
    """Name of the score by which the best weights are known; higher is better."""

    def __call__(self, run: Run) -> dict[str, float]:
        """Scores by name; raises whatever goes wrong, which costs the run these scores alone."""


class Watch:
    """Scores a run every `monitor.every` steps and at its end, if its recipe has `monitor.data`.

    The first rank does it, while the others wait where waiting has no limit (`Ranks.barrier`).
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        method: Method,
        dims: Mapping[str, FeatureDims],
        ranks: Ranks,
        score: Score | None,
    ) -> None:
        self.recipe, self.folder, self.method, self.dims = recipe, folder, method, dims
        self.ranks, self.score = ranks, score
        self.times, self.seconds = 0, 0.0
        self._network: Method | None = None
        self._best: float | None = None

    def resume(self) -> None:
        """Remember the best weights of an earlier part of the run, if their score compares."""
        record = best_record(self.folder) if self.score else None
        if record is None or not math.isfinite(record["score"]):
            return
        if record.get("fingerprint") == self.score.fingerprint:
            self._best = record["score"]
        else:
            log.warning(
                "monitor   its pictures or tasks are others now: the best weights so far (step %s) "
                "are replaced by the next ones",
                record["step"],
            )

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after `step` of `steps` optimizer steps are scored."""
        monitor = self.recipe.monitor
        return monitor.data is not None and (step % monitor.every == 0 or step == steps)

    def __call__(
        self, step: int, model: nn.Module, average: AveragedModel | None
    ) -> dict[str, float]:
        """Scores for metrics.jsonl; empty on other ranks than the first, and where scoring failed.
        A collective call.
        """
        weights = average.module.state_dict() if average else full_weights(model)
        values = self._watched(step, weights, average is not None) if self.ranks.first else {}
        self.ranks.barrier()
        return values

    def finish(self, fit: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        """At the end of a run, on the first rank: fit the lengths of the best weights' heads too,
        and say how long watching took.
        """
        if self.score is None:
            return
        refit_best(self.folder, fit)
        if self.times:
            log.info("monitor   %d times, %.0f s in all", self.times, self.seconds)

    def _watched(
        self, step: int, weights: Mapping[str, Tensor], averaged: bool
    ) -> dict[str, float]:
        began, state = time.perf_counter(), random_state(self.ranks.device)
        try:
            files = shipped_files(weights, self.method)
            momentum = STUDENT if self.method.ships_averaged else EMA
            name = momentum if momentum in files else STUDENT
            scores = self.score(self._run(step, files[name]))
            main = scores[self.score.main]
            if not math.isfinite(main):  # nothing is greater than nan: it would stay the best
                raise ValueError(f"{self.score.main} is {main}")
            best = self._best is None or main > self._best
            record = {
                "fingerprint": self.score.fingerprint,
                "name": self.score.main,
                "score": main,
                "scores": scores,
            }
            if best:
                save_best(self.folder, files, self.recipe, self.dims, step, record)
                self._best = main
        # A score is not worth a run: whatever cannot be read, fitted or held now, training goes on.
        except Exception as error:
            log.warning("%s", entry("monitor", f"step {step}: no scores ({first_line(error)})"))
            return {}
        finally:
            if self._network is not None:
                self._network.cpu()  # its room on the device is training's
            set_random_state(state, self.ranks.device)
            seconds = time.perf_counter() - began
            self.times, self.seconds = self.times + 1, self.seconds + seconds
        whose = "student"
        if name == momentum:
            whose = "momentum network"
        elif averaged:
            whose = "average of weights"
        listed = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        place = "the best so far" if best else f"best so far {self._best:.4f}"
        log.info(
            "%s",
            entry("monitor", f"step {step}, {whose}: {listed} ({place}); {seconds:.1f} s"),
        )
        named = {f"monitor.{key}": value for key, value in scores.items()}
        return named | {"monitor.seconds": seconds}

    def _run(self, step: int, weights: Mapping[str, Tensor]) -> Run:
        """The network that would ship with such weights."""
        if self._network is None:
            self._network = build_shipped(self.recipe, self.dims)
        self._network.load_state_dict(weights)
        self._network.to(self.ranks.device).eval()
        name = f"step {step}"
        return Run(
            self.folder, self.recipe, dict(self.dims), self._network, step, name, finished=False
        )


def check_score(score: Score | None, recipe: Recipe, ranks: Ranks) -> None:
    """Raise UserError for a recipe that is to be watched where nothing was handed in to do it."""
    if recipe.monitor.data is not None and ranks.first and score is None:
        raise UserError("monitor.data is set, but train() was given no score: see distill.monitor")
