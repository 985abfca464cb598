"""What every task returns: named numbers for the table, details for evaluation.json, files to
open.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract.errors import UserError
from distill.distributed import Ranks

log = logging.getLogger(__name__)


class NotApplicable(UserError):
    """What a network has no output for: a teacher of a run goes without, the model itself is
    refused.
    """


class Left(Exception):
    """Ends a task in a process that has done its part of it."""


def first_alone(ranks: Ranks, what: str = "") -> None:
    """Leave the rest of a task, which is not shared, to the first process: raises Left in others,
    which wait at its end. The log says so of `what` takes long.
    """
    if not ranks.first:
        raise Left
    if what and ranks.world > 1:
        log.info("alone     %s: one of %d processes works", what, ranks.world)


@dataclass(frozen=True)
class Outcome:
    """Result of one task on one encoder.

    `scores`: the numbers of the table, each named with its metric ("top1", "mIoU"); shares are in
    [0, 1]. `details`: anything else that JSON can hold (per class, per sequence, settings chosen).
    `files`: pictures and heads written.
    """

    scores: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
