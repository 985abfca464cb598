"""A second stage: the parts of a method beside the student's network start from an earlier run."""

import logging
from collections.abc import Sequence

import torch

from distill.config import Recipe
from distill.methods.method import Method
from distill.models.start import run_file, student_note
from distill.models.weights import read_tensors
from distill.recipe_io import parse_recipe

log = logging.getLogger(__name__)

_REFITTED = ("normalizers.", "preprocess.")
"""Buffers that belong to the recipe and its data, not to what was learnt."""

_SHOWN = 6


@torch.no_grad()
def start_from_run(method: Method, recipe: Recipe) -> None:
    """Where `student.checkpoint` is a run folder, copy what its method learnt beside the network
    (heads, interaction, an adapter) into `method`, by name and shape, and log what starts anew.

    The network itself was loaded with the student, strictly. What mean and deviation it takes from
    its weights is logged too.
    """
    note = student_note(recipe.student, recipe.teachers)
    if note:
        log.warning("note      %s", note)
    path = run_file(recipe.student.checkpoint) if recipe.student.checkpoint else None
    if path is None:
        return
    tensors, metadata = read_tensors(path, "train that run again, or copy it again")
    before = parse_recipe(metadata["recipe"], str(path)).student
    left_out = (*_REFITTED, "student.net.", *(f"{name}." for name in method.train_only))
    own = {
        name: tensor
        for name, tensor in method.state_dict(keep_vars=True).items()
        if not name.startswith(left_out)
    }
    fitting = [n for n, t in own.items() if n in tensors and tensors[n].shape == t.shape]
    for name in fitting:
        own[name].copy_(tensors[name])
    log.info("start     network and %d of %d other tensors from %s", len(fitting), len(own), path)
    _list("start anew here", [name for name in own if name not in fitting])
    unused = [n for n in tensors if n not in own and not n.startswith(left_out)]
    _list("of that run are not used", unused)
    now = recipe.student
    if now.image_size != before.image_size:
        log.info(
            "start     at %d px, after %d: position embeddings are resampled to the new grid",
            now.image_size,
            before.image_size,
        )
    if (now.mean, now.std) != (before.mean, before.std):
        log.warning(
            "start     student.mean and student.std are %s and %s, but that run had %s and %s",
            *(list(values) for values in (now.mean, now.std, before.mean, before.std)),
        )


def _list(what: str, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        log.info("start     %d tensors %s: %s%s", len(names), what, ", ".join(names[:_SHOWN]), more)
