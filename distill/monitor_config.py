"""The recipe's section `monitor`; what it sets is done by `distill/monitor.py`."""

from typing import Literal

from pydantic import Field

from distill.fields import Positive, Section


class MonitorConfig(Section):
    """Scores on labelled pictures while training goes on; they change nothing of it."""

    data: str | None = Field(
        None,
        description="folder of labelled pictures, in a layout of classification of "
        "distill.evaluate --list; null: no monitor",
    )
    every: Positive = Field(1000, description="steps between two scores; there is one at the end")
    tasks: tuple[Literal["knn", "linear"], ...] = Field(
        ("knn",),
        min_length=1,
        description="what is scored: knn, or linear too (13 rates and 30 epochs); the best weights "
        "are those of the first one's best top1",
    )
    images: Positive = Field(
        5000, description="pictures of each split at most, evenly spread over it"
    )
