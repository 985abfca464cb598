"""The scores of a run that still trains: k-NN and linear probes of frozen features, by
`distill.evaluate`'s own tasks, in memory.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contract.errors import UserError
from contract.tables import entry
from contract.views import ViewPolicy
from distill.config import Recipe
from distill.distributed import Ranks
from distill.evaluate import knn
from distill.evaluate.classification import FrozenSplits, open_splits
from distill.evaluate.config import EvaluationConfig, ExtractConfig, ProbeConfig
from distill.evaluate.datasets import Labelled, Some
from distill.evaluate.encoder import RunEncoder
from distill.evaluate.extract import PolicyViews, summaries
from distill.evaluate.linear_probe import train_probe
from distill.methods.deployment import BACKBONE
from distill.runs import Run

log = logging.getLogger(__name__)

_PROBE = ProbeConfig(rates=13, epochs=30)
"""A probe between two steps of training: a third of the rates and epochs of the task `linear`."""

_MOST_UNREADABLE = 0.1
"""Share of unreadable pictures up to which the others are scored."""


def open_monitor(recipe: Recipe, ranks: Ranks) -> "Monitor | None":
    """What scores a run, on the first rank; None without `monitor.data`.

    Raises UserError on every rank for a folder that is not one of labelled pictures, and for a view
    of tiles.
    """
    if recipe.monitor.data is None:
        return None
    _check_view(recipe)
    monitor = problem = None
    if ranks.first:
        try:
            monitor = Monitor(recipe)
        except UserError as error:
            problem = f"monitor.data: {str(error).removeprefix('--data ')}"
    problem = ranks.gather(problem)[0]
    if problem:
        raise UserError(problem)
    if monitor:
        log.info("%s", entry("monitor", monitor.about))
    return monitor


def plan_monitor(recipe: Recipe) -> str | None:
    """For --dry-run: what would be scored; None without `monitor.data`. Raises UserError for a view
    of tiles.
    """
    if recipe.monitor.data is None:
        return None
    _check_view(recipe)
    try:
        return Monitor(recipe).about
    except UserError as error:
        return f"monitor.data is not readable here ({str(error).removeprefix('--data ')})"


def _check_view(recipe: Recipe) -> None:
    if ViewPolicy.parse(recipe.view).kind == "tiles":
        raise UserError(
            f"monitor.data scores image-level vectors, which a picture's tiles (view = "
            f"{recipe.view}) do not have: set another view, or monitor.data=null"
        )


class Monitor:
    """Scores students on some pictures of a labelled folder; a `distill.training.watch.Score`."""

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.monitor
        train, val = (_some(s, config.images) for s in open_splits(Path(config.data)))
        if len(np.unique(train.labels)) < 2:
            raise UserError(
                f"monitor.images = {config.images} leaves pictures of one class: set a larger one"
            )
        self.train, self.val, self.tasks = train, val, config.tasks
        self.main = f"{config.tasks[0]}.top1"
        extract = ExtractConfig(workers=recipe.data.workers)
        self.config = EvaluationConfig(extract=extract, probe=_PROBE)
        texts = (train.fingerprint(), val.fingerprint(), *config.tasks)
        self.fingerprint = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        self.about = (
            f"{' and '.join(config.tasks)} every {config.every:,} steps on {len(train):,} + "
            f"{len(val):,} pictures of {len(train.classes)} classes in {config.data}"
        )
        self._named: set[str] = set()

    def __call__(self, run: Run) -> dict[str, float]:
        """Scores by task and name of a student on its method's device; raises UserError where too
        many pictures cannot be read.
        """
        encoder = RunEncoder(run, BACKBONE)
        parts = []
        for split in (self.train, self.val):
            view = encoder.view_of(self.config.extract)
            views = _Readable(PolicyViews(split, encoder.image_size, view))
            features = summaries(encoder, views, self.config.extract)
            good = self._good(views, split)
            parts += [features[good], torch.from_numpy(split.labels)[good]]
        device = encoder.device
        splits = FrozenSplits(*(part.to(device) for part in parts), self.train.classes)
        scores = {}
        for task in self.tasks:
            if task == "knn":
                result = knn.evaluate(splits, self.config).scores
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    result = train_probe(splits, self.config).scores
            scores |= {f"{task}.{name}": value for name, value in result.items()}
        return scores

    def _good(self, views: "_Readable", split: Labelled) -> Tensor:
        """Numbers of the pictures that could be read; names each other one once."""
        bad = views.unreadable.nonzero().flatten().tolist()
        if len(bad) > _MOST_UNREADABLE * len(views):
            raise UserError(
                f"{len(bad)} of {len(views)} pictures cannot be read: {_why(split, bad[0])}"
            )
        reasons = {_why(split, number) for number in bad} - self._named
        for reason in sorted(reasons):
            log.warning("%s", entry("monitor", f"left out: {reason}"))
        self._named |= reasons
        return (~views.unreadable).nonzero().flatten()


def _why(split: Labelled, number: int) -> str:
    """Why a picture cannot be read, by reading it once more."""
    try:
        split.picture(number)
    except UserError as error:
        return str(error)
    return f"picture {number} could not be read for a moment"


def _some(split: Labelled, count: int) -> Labelled:
    """At most `count` pictures, evenly spread over a split, which is sorted by class."""
    if len(split) <= count:
        return split
    return Some(split, tuple(np.linspace(0, len(split) - 1, count).astype(int).tolist()))


@dataclass
class _Readable:
    """Views of which those that cannot be read are black, and marked as `unreadable`, by whichever
    process reads them.
    """

    views: PolicyViews

    def __post_init__(self) -> None:
        self.unreadable = torch.zeros(len(self.views), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, number: int) -> Tensor:
        try:
            return self.views[number]
        except (UserError, OSError):
            self.unreadable[number] = True
            return torch.zeros(3, self.views.size, self.views.size, dtype=torch.uint8)

    def fingerprint(self) -> str:
        return self.views.fingerprint()
