"""What every task returns: named numbers for the table, details for evaluation.json, files to
open.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract.errors import UserError


class NotApplicable(UserError):
    """What a network has no output for: a teacher of a run goes without, the model itself is
    refused.
    """


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
