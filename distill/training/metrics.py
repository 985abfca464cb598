"""A run's measurements: metrics.jsonl, the console, and loggers."""

import json
import logging
import math
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contract.files import write_atomically
from contract.tables import packed
from distill.training.loggers import Loggers

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a log step to RUN/metrics.jsonl, hands it to `loggers` and shows
    progress; a context manager.

    Starting at step `start`, lines of later steps (of a run that was killed) are dropped first.
    """

    def __init__(
        self, folder: Path, steps: int, start: int, loggers: Loggers | None = None
    ) -> None:
        self.path, self.steps = folder / "metrics.jsonl", steps
        _truncate(self.path, start)
        self.file = open(self.path, "a")
        self.began, self.start = time.perf_counter(), start
        self.loggers, self.scores = loggers, ""
        self.progress = None
        if sys.stdout.isatty():
            text = TextColumn("{task.description}")
            self.progress = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.task = self.progress.add_task("training", total=steps, completed=start)
            self.progress.start()

    def write(self, row: dict) -> None:
        """Append a line; a value that is not finite becomes null, which is valid JSON."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()
        if self.loggers:
            self.loggers.log(row["step"], row)
        self.scores = ", ".join(_scores(row)) or self.scores
        if self.progress:
            parts = [f"loss {row['loss']:.4f}", f"{row['images_per_second']:.0f} images/s"]
            described = ", ".join([*parts, *filter(None, [self.scores])])
            self.progress.update(self.task, completed=row["step"], description=described)
        else:
            log.info("%s", self.line(row))

    def line(self, row: dict) -> str:
        """What a console without a progress bar shows."""
        done = row["step"] - self.start
        left = (time.perf_counter() - self.began) / max(1, done) * (self.steps - row["step"])
        labels = [
            key.split(".")[1] for key in row if key.count(".") == 2 and key.endswith(".patches")
        ]
        parts = [f"step {row['step']}/{self.steps}", f"loss {row['loss']:.4f}"]
        for label in labels:
            token, patches = row.get(f"loss.{label}.token"), row[f"loss.{label}.patches"]
            parts.append(
                f"{label} {patches:.3f}" if token is None else f"{label} {token:.3f}+{patches:.3f}"
            )
        parts += [
            *_scores(row),
            f"{row['images_per_second']:.0f} images/s",
            f"{int(left // 60)}:{int(left % 60):02d} left",
        ]
        return packed(parts)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.loggers:
            self.loggers.close()
        if self.progress:
            self.progress.stop()


def _scores(row: dict) -> list[str]:
    """What the monitor says, if this is one of its steps: the first score of every task."""
    return [
        f"{name.split('.')[1]} {value:.3f}"
        for name, value in row.items()
        if name.startswith("monitor.") and name.endswith(".top1")
    ]


def _truncate(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that a kill left incomplete; atomic."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; an incomplete last one is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
