"""Whether a run may go on as it is asked to: its pictures, its length, its processes."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contract.errors import UserError
from contract.tables import entry
from distill.config import Recipe
from distill.data.listing import PictureList, compare, list_pictures, read_list
from distill.data.pictures import Pictures
from distill.distributed import Ranks
from distill.methods.lengths import with_lengths
from distill.methods.method import Method
from distill.models.weights import misfit
from distill.recipe_io import parse_recipe
from distill.teachers import Teacher

log = logging.getLogger(__name__)

_LIST = "pictures.npz"


def check_pictures(
    pictures: Pictures, recipe: Recipe, folder: Path, saved: Mapping[str, Any] | None, ranks: Ranks
) -> dict[str, object]:
    """Compare the pictures with those that the checkpoint `saved` was trained on, and return what
    the next checkpoint records of them.

    Raises UserError on every rank, naming what differs, unless `data.changed` accepts it.
    """
    record, problem = {}, None
    if ranks.first:
        listed = list_pictures(pictures.entries())
        record = {
            "count": len(pictures),
            "digest": listed.digest(),
            "times": listed.times_digest(),
        }
        before = saved.get("pictures") if saved else None
        problem = before and _difference(before, record, listed, saved, recipe, folder)
        if problem and recipe.data.changed == "accept":
            log.warning(
                "pictures  %s: accepted; from here on their order and the length of an epoch are "
                "those of the new list",
                problem,
            )
            problem = None
        if not problem:
            record["list"] = listed
    if saved:  # every rank ends in the same way
        problem = ranks.gather(problem)[0]
    if problem:
        raise UserError(
            f"{problem}: restore them, or train on with data.changed=accept (another order of "
            "pictures), or start a new run in another --output"
        )
    return record


def check_teachers(
    teachers: Sequence[Teacher], saved: Mapping[str, Any] | None, ranks: Ranks
) -> dict[str, str]:
    """Hashes of the teachers' weights, on the first rank, for checkpoints.

    Raises UserError on every rank for a teacher of other weights than the checkpoint `saved` had.
    """
    record, problem = {}, None
    if ranks.first:
        record = {teacher.label: teacher.fingerprint() for teacher in teachers}
        before = (saved or {}).get("teachers", record)
        changed = [label for label in record if before.get(label) != record[label]]
        if changed:
            problem = (
                f"teacher '{changed[0]}' has other weights than when the checkpoint was written: "
                "restore its file, or start a new run in another --output"
            )
    if saved:
        problem = ranks.gather(problem)[0]
    if problem:
        raise UserError(problem)
    return record


def keep_list(record: dict[str, object], folder: Path) -> dict[str, object]:
    """Write the list of `check_pictures` into the run folder; returns what a checkpoint records."""
    listed = record.pop("list")
    kept = read_list(folder / _LIST)
    if kept is None or (kept.digest(), kept.times_digest()) != (record["digest"], record["times"]):
        listed.save(folder / _LIST)
    return record


def _difference(
    before: Mapping[str, object],
    now: Mapping[str, object],
    listed: PictureList,
    saved: Mapping[str, Any],
    recipe: Recipe,
    folder: Path,
) -> str | None:
    """What differs from the pictures of a checkpoint, in words; None where nothing does."""
    old_path = parse_recipe(saved["recipe"], "the checkpoint").data.path
    moved = old_path != recipe.data.path
    if before["digest"] == now["digest"] and (moved or before["times"] == now["times"]):
        if moved:
            log.info("pictures  moved from %s: the same names and sizes", old_path)
        return None
    kept = read_list(folder / _LIST)
    where = f"data.path = {recipe.data.path}" if recipe.data.path else "the pictures"
    if kept is None or (kept.digest(), kept.times_digest()) != (before["digest"], before["times"]):
        return (
            f"{where} changed since the checkpoint ({before['count']} pictures, now {now['count']})"
        )
    different = compare(kept, listed, times=not moved)
    return f"{where} changed since the checkpoint ({now['count']} pictures: {different})"


def check_length(saved: Mapping[str, Any], steps: int, recipe: Recipe) -> None:
    """Raise UserError for a run that is to end before the step it has reached; say what a new
    length changes.
    """
    if saved["step"] > steps:
        key = "epochs" if recipe.train.epochs else "steps"
        raise UserError(
            f"train.{key} = {getattr(recipe.train, key)} ends at step {steps}, but the run has "
            f"{saved['step']} steps behind it: set a larger one"
        )
    before = parse_recipe(saved["recipe"], "the checkpoint").train
    if (before.steps, before.epochs) != (recipe.train.steps, recipe.train.epochs):
        about = (
            f"changed to {steps} steps: from step {saved['step']} on, learning rate and other "
            "schedules are those of the new length"
        )
        log.info("%s", entry("length", about))


def check_weights(saved: Mapping[str, Any], method: Method) -> None:
    """Raise UserError for a checkpoint whose tensors the method of its recipe does not have: one of
    an earlier version.
    """
    wrong = misfit(method, with_lengths(saved["model"], method))
    if wrong:
        raise UserError(
            f"the checkpoint of step {saved['step']} does not fit its recipe ({wrong}): it was "
            "written by another version; go on with that, or start a new run"
        )


def seed_for_new_world(saved: Mapping[str, Any], seed: int, ranks: Ranks) -> None:
    """Begin the random states of a run that goes on with another number of processes."""
    log.warning(
        "processes %d now, %d before: the pictures of every step stay the same, but random states "
        "(stochastic depth) begin anew and sums are taken in another order, so that the result is "
        "not bit-identical with that of an uninterrupted run",
        ranks.world,
        saved["world"],
    )
    entropy = np.random.SeedSequence([seed, saved["step"], ranks.world, ranks.rank])
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
