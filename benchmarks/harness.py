"""What the benchmarks that train many small students share: several runs at a time, scores of their
features, and tables of means and deviations.
"""

import argparse
import json
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


def scores_of(row: Row, data: Path, cache: Path, *settings: str) -> dict[str, float]:
    """Every score of `SCORES` of one row's features, with further `settings` of the evaluation."""
    config = load_settings([*SETTINGS, *settings])
    context = Context(row.encoder, data, config, cache, row.folder)
    return {task: TASKS[task].run(context).scores[name] for task, name in SCORES.items()}


def parser(description: str, output: str, steps: int) -> argparse.ArgumentParser:
    """The options of these benchmarks, with their default folder and number of steps."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--output", type=Path, default=Path(output), metavar="DIR", help=f"({output})"
    )
    numbers = {
        "seeds": (3, "seeds 0 to N-1"),
        "steps": (steps, "optimizer steps"),
        "train": (400, "scenes to learn from"),
        "val": (200, "scenes held out"),
        "jobs": (2, "runs at a time, one CPU thread each"),
    }
    for name, (default, does) in numbers.items():
        made.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{does} ({default})"
        )
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    made.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    return made


def made_with(args: argparse.Namespace) -> dict[str, object]:
    """What a result depends on besides its variant and seed."""
    return {name: getattr(args, name) for name in ("steps", "train", "val", "device")}


def is_done(folder: Path, args: argparse.Namespace) -> bool:
    """Whether a run has its result; ends the process where it was made with other options."""
    result = folder / "result.json"
    if not result.exists():
        return False
    before = json.loads(result.read_text())["made_with"]
    if before != made_with(args):
        sys.exit(
            f"error: {folder} was made with {before}, but {made_with(args)} was requested: choose "
            "another --output"
        )
    return True


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN for what a variant does not have."""
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Mean and deviation for a table."""
    mean, deviation = spread(values)
    return "–" if math.isnan(mean) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"
