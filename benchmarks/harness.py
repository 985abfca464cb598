"""What the benchmarks that train many small students share: several runs at a time, scores of their
features, and tables of means and deviations.
"""

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distill.evaluate.cast import Row
from distill.evaluate.settings import load_settings
from distill.evaluate.tasks import TASKS, Context

SCORES = {"knn": "top1", "linear": "top1", "segmentation": "mIoU"}
"""Tasks, and what is reported of each."""

SETTINGS = ("extract.workers=0", "dense.size=128", "dense.steps=300", "dense.lr=3e-3")
"""Of the evaluation, the same for everyone; the learning rate suits 400 pictures, not ADE20K."""


def run_all(jobs: int, waiting: Sequence[tuple[str, int]]) -> None:
    """Run this script's command line for every variant and seed (`--one VARIANT SEED`), `jobs` at a
    time; a failure ends them all.
    """
    waiting, running = list(waiting), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_launch(*waiting.pop(0)))
        time.sleep(0.2)
        for job in running:
            if job.poll():
                for other in running:
                    other.kill()
                sys.exit(f"error: {' '.join(job.args[-2:])} failed (its message is above)")
        running = [job for job in running if job.poll() is None]


def _launch(variant: str, seed: int) -> subprocess.Popen:
    """Start one run in a process of its own, on one thread: sums then come out in one order
    whatever else runs.
    """
    command = [sys.executable, *sys.argv, "--one", variant, str(seed)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def scores_of(row: Row, data: Path, cache: Path) -> dict[str, float]:
    """Every score of `SCORES` of one row's features."""
    context = Context(row.encoder, data, load_settings(list(SETTINGS)), cache, row.folder)
    return {task: TASKS[task].run(context).scores[name] for task, name in SCORES.items()}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for what a variant does not have."""
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean and deviation for a table."""
    mean, deviation = spread(values)
    return "–" if math.isnan(mean) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"
