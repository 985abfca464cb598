"""A run's measurements: metrics.jsonl, the console, and optionally TensorBoard."""

import json
import logging
import math
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contract.errors import UserError
from contract.files import write_atomically

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a log step to RUN/metrics.jsonl and shows progress; a context
    manager.

    Starting at step `start`, lines of later steps (of a run that was killed) are dropped first.
    """

    def __init__(self, folder: Path, steps: int, start: int, tensorboard: bool) -> None:
        self.path, self.steps = folder / "metrics.jsonl", steps
        _truncate(self.path, start)
        self.file = open(self.path, "a")
        self.began, self.start = time.perf_counter(), start
        self.board = _open_tensorboard(folder / "tensorboard", start) if tensorboard else None
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
        if self.board:
            for key, value in row.items():
                self.board.add_scalar(key, value, row["step"])
        if self.progress:
            rate = f"{row['images_per_second']:.0f} images/s"
            self.progress.update(
                self.task, completed=row["step"], description=f"loss {row['loss']:.4f}, {rate}"
            )
        else:
            log.info("%s", self.line(row))

    def line(self, row: dict) -> str:
        """One line for a console without a progress bar."""
        done = row["step"] - self.start
        left = (time.perf_counter() - self.began) / max(1, done) * (self.steps - row["step"])
        labels = [
            key.split(".")[1] for key in row if key.count(".") == 2 and key.endswith(".patches")
        ]
        parts = []
        for label in labels:
            token, patches = row.get(f"loss.{label}.token"), row[f"loss.{label}.patches"]
            parts.append(
                f"{label} {patches:.3f}" if token is None else f"{label} {token:.3f}+{patches:.3f}"
            )
        return (
            f"step {row['step']}/{self.steps}  loss {row['loss']:.4f}  {'  '.join(parts)}  "
            f"{row['images_per_second']:.0f} images/s  {int(left // 60)}:{int(left % 60):02d} left"
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()
        if self.progress:
            self.progress.stop()


def _open_tensorboard(folder: Path, start: int):
    """A TensorBoard writer that hides steps after `start` from an earlier, killed attempt."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "train.tensorboard = true: tensorboard is missing (pip install "
            "'vfm-distill[tensorboard]')"
        ) from error
    return SummaryWriter(folder, purge_step=start + 1)


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
