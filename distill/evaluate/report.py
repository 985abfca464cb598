"""Output of an evaluation: a table on the terminal, `evaluation.json` and `scores.png`."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import timm
import torch
from rich.text import Text

from contract.errors import UserError
from contract.files import write_atomically
from contract.tables import print_table
from distill.evaluate.outcome import Outcome
from distill.evaluate.protocols import Applied
from distill.evaluate.tasks import TASKS
from distill.figures import save_figure
from distill.runs import git_commit

_Results = dict[str, dict[str, Outcome]]
"""Outcomes by row (a network and the output read) and task."""

_BACKGROUNDS = "imagenet-9 "
"""Scores that have a table of their own, as in SeFA's Table 21: a line per set, a column per
network."""

_LOWER_IS_BETTER = ("rmse", "abs_rel", "mCE", "gap")


def _shown_scores(task: str, outcome: Outcome) -> dict[str, float]:
    """The scores of an outcome that the table shows; all of them if the task selects none."""
    shown = TASKS[task].shown
    return {name: value for name, value in outcome.scores.items() if not shown or name in shown}


def _columns(results: _Results) -> list[tuple[str, str]]:
    """(task, score) of every score to show, in the order of the tasks."""
    result: dict[tuple[str, str], None] = {}
    for task in TASKS:
        for outcomes in results.values():
            if task in outcomes:
                result |= dict.fromkeys(
                    (task, name) for name in _shown_scores(task, outcomes[task])
                )
    return list(result)


def print_scores(results: _Results) -> None:
    """A line per network, a column per score; the best of a column in bold. ImageNet-9's sets
    follow in a table of their own.
    """
    heads = _columns(results)
    sets = [(task, name) for task, name in heads if name.startswith(_BACKGROUNDS)]
    heads = [head for head in heads if head not in sets]
    if heads:
        _print_networks(results, heads)
    if sets:
        _print_sets(results, sets)


def _print_networks(results: _Results, heads: list[tuple[str, str]]) -> None:
    titles = [
        "\n".join(filter(None, (task, name, "lower is better" if _lower(name) else "")))
        for task, name in heads
    ]
    rows = [(row, *(_cell(results, row, task, name) for task, name in heads)) for row in results]
    print_table(("features", *titles), rows)


def _print_sets(results: _Results, heads: list[tuple[str, str]]) -> None:
    rows = []
    for task, name in heads:
        title = name.removeprefix(_BACKGROUNDS) + (", lower is better" if _lower(name) else "")
        rows.append((title, *(_cell(results, row, task, name) for row in results)))
    print_table(("ImageNet-9", *results), rows)


def _cell(results: _Results, row: str, task: str, name: str) -> Text:
    """A score to three digits, the best of all networks in bold; empty where there is none."""
    value = results[row][task].scores.get(name) if task in results[row] else None
    if value is None:
        return Text()
    return Text(f"{value:.3f}", "bold" if value == _best(results, task, name) else "")


def _lower(name: str) -> bool:
    return any(word in name for word in _LOWER_IS_BETTER)


def _best(results: _Results, task: str, name: str) -> float:
    values = [
        o[task].scores[name] for o in results.values() if task in o and name in o[task].scores
    ]
    return min(values) if _lower(name) else max(values)


def read_scores(path: Path) -> dict[str, dict]:
    """The rows of an earlier `evaluation.json`, none if there is no file; raises UserError for a
    damaged one.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): move it away, or choose another --output"
        ) from error


def write_json(path: Path, row: str, task: str, outcome: Outcome, about: dict[str, Any]) -> Path:
    """Put one outcome into `evaluation.json`, keeping those of other rows and tasks.

    Every entry carries the network, protocol, settings, data, date and commit it was made with.
    Raises UserError for a damaged file.
    """
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
    }
    entry = {
        "scores": outcome.scores,
        "details": outcome.details,
        "files": [str(file) for file in outcome.files],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"cannot write in {path.parent}: {error.strerror} (choose another --output)"
        ) from error
    try:
        with contextlib.suppress(OSError):  # not every file system can lock
            fcntl.flock(held, fcntl.LOCK_EX)  # other processes may evaluate other tasks meanwhile
        rows = read_scores(path)
        rows.setdefault(row, {})[task] = entry | made | about | {"versions": versions}
        text = json.dumps({"format": 1, "rows": rows}, indent=1, allow_nan=False)
        write_atomically(path, lambda temporary: temporary.write_text(text))
    finally:
        os.close(held)
    return path


def print_protocols(applied: Iterable[Applied]) -> None:
    """The protocol behind each task's numbers, and which values are not the papers'."""
    for each in applied:
        print("\n".join(each.lines(whole=False)))


def draw_scores(path: Path, results: _Results, protocols: Mapping[str, str]) -> Path:
    """Bars of every column of the table, a panel each, named with the task's protocol."""
    heads = _columns(results)
    wide = min(4, len(heads))
    high = -(-len(heads) // wide)
    size = (3.4 * wide + 1.2, (0.8 + 0.34 * len(results)) * high + 0.3)
    figure, axes = plt.subplots(
        high, wide, figsize=size, squeeze=False, layout="constrained", sharey=True
    )
    for axis in axes.flat[len(heads) :]:
        axis.set_axis_off()
    names = list(results)
    # folders of teachers may be longer than a panel is wide
    labels = [name if len(name) <= 48 else f"{name[:20]}…{name[-27:]}" for name in names]
    for axis, (task, name) in zip(axes.flat, heads, strict=False):
        values = [
            results[row][task].scores.get(name, 0.0) if task in results[row] else 0.0
            for row in names
        ]
        marked = _best(results, task, name)
        colours = ["#1f77b4" if value == marked else "#b8cbe0" for value in values]
        axis.barh(range(len(names)), values, color=colours)
        axis.bar_label(axis.containers[0], fmt="%.3f", padding=3, fontsize=8)
        axis.margins(x=0.25)
        below = f"{protocols[task]} protocol" + (", lower is better" if _lower(name) else "")
        axis.set_title(f"{task}: {name}\n{below}", fontsize=9)
    axes[0, 0].set_yticks(range(len(names)), labels)
    axes[0, 0].invert_yaxis()
    return save_figure(figure, path)
