"""How far an embedding is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

_EVERY = 10.0
"""Seconds between plain lines."""


def duration(seconds: float) -> str:
    """Seconds as 2h05m, 3m20s or 12s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class Count:
    """Rows of this run, and how fast they come; `before` were there when it began."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.rows, self.errors = total, before, 0, 0
        self.begun = time.monotonic()

    def add(self, rows: int, errors: int) -> None:
        self.rows, self.errors = self.rows + rows, self.errors + errors

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.begun, 1e-9)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.rows / self.seconds

    def words(self) -> str:
        done = self.before + self.rows
        text = f"{done:,} of {self.total:,} ({done / self.total:.0%})"
        if not self.rows:
            return text
        text += f", {self.rate:.1f} images/s"
        if done < self.total:
            text += f", {duration((self.total - done) / self.rate)} left"
        return text + (f", errors: {self.errors:,}" if self.errors else "")


class PlainProgress:
    """A line every ten seconds."""

    def __init__(self, count: Count) -> None:
        self._count, self._due = count, time.monotonic() + _EVERY

    def __enter__(self) -> "PlainProgress":
        return self

    def __exit__(self, *error: object) -> None: ...

    def advance(self, rows: int, errors: int) -> None:
        self._count.add(rows, errors)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            print(f"embedded  {self._count.words()}", flush=True)


class BarProgress:
    """A bar of rich's."""

    def __init__(self, count: Count) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._count = count
        self._bar = Progress(BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._task = self._bar.add_task(count.words(), total=count.total, completed=count.before)

    def __enter__(self) -> "BarProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, rows: int, errors: int) -> None:
        self._count.add(rows, errors)
        self._bar.update(self._task, advance=rows, description=self._count.words())


def open_progress(count: Count) -> PlainProgress | BarProgress:
    """The one that suits standard output."""
    return BarProgress(count) if sys.stdout.isatty() else PlainProgress(count)
