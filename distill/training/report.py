"""Printed before and after training: the networks, the files written, the next command."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contract.errors import first_line
from contract.images import UnreadableImage
from contract.tables import entry, print_table
from distill.config import Recipe, TeacherConfig
from distill.data.crops import centre_crop
from distill.data.pictures import Pictures, open_pictures
from distill.distributed import Ranks
from distill.figures import pca_figure
from distill.licences import inheritance
from distill.methods.deployment import BACKBONE
from distill.runs import BEST, STUDENT, best_record, load_run
from distill.teachers import build_teacher, weights_source
from distill.training.metrics import read_metrics
from distill.training.plots import plot_losses, plot_monitor

log = logging.getLogger(__name__)

_PICTURES = 4
"""Photographs in the closing PCA picture."""

_ZOOM = 3
"""Their size over the training sizes; a multiple of a multiple of the patch is one too."""


def show_start(recipe: Recipe, folder: Path, ranks: Ranks) -> None:
    """Log the student, its teachers and the run folder."""
    log.info(
        "student   %s at %d px, method %s",
        recipe.student.name,
        recipe.student.image_size,
        recipe.method,
    )
    for teacher in recipe.teachers:
        about = f"{teacher.label}: {teacher.name}, {teacher.role}, {weights_source(teacher)}"
        log.info("%s", entry("teacher", about))
    log.info("run       %s on %s x %d", folder, ranks.device.type, ranks.world)


def finish(recipe: Recipe, folder: Path, complete: bool) -> None:
    """Draw the pictures of a run and print its files and the next command."""
    if not complete:
        print(
            f"stopped before the last step; the checkpoint in {folder / 'checkpoint'} is complete. "
            "Continue with:"
        )
        print(f"  python -m distill.run --output {folder} --resume")
        return
    rows = read_metrics(folder / "metrics.jsonl")
    plot = _attempt("losses", lambda: plot_losses(folder))
    scores = _attempt("scores", lambda: plot_monitor(folder))
    picture = _attempt("features", lambda: _draw_pca(recipe, folder))
    if rows:
        print_losses(rows)
    print(f"run       {folder}")
    print(f"student   {folder / 'student.safetensors'}")
    best = best_record(folder)
    if best:
        about = f"{folder / BEST[STUDENT]}, step {best['step']}: {best['name']} {best['score']:.4f}"
        print(entry("best", about))
    for name, path in (("losses", plot), ("scores", scores), ("features", picture)):
        if path:
            print(f"{name:9} {path}")
    for line in inheritance(recipe):
        print(f"inherits  {line}")
    print("next      inspect one photograph:")
    print(f"  python -m distill.visualize {folder} IMAGE.jpg --sizes 224 448")


def print_losses(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print first, last and best value of every loss of the lines of a metrics.jsonl: the total,
    then teacher by teacher, then others.
    """
    names = dict.fromkeys(name for row in rows for name in row if name.split(".")[0] == "loss")
    order = sorted(names, key=lambda name: (name != "loss", name.count(".") < 2))
    table = []
    for name in order:
        points = [(row[name], row["step"]) for row in rows if row.get(name) is not None]
        if not points:
            continue
        best, step = min(points)
        title = " ".join(name.split(".")[1:]) or "all"
        table.append(
            (title, *(f"{v:.4f}" for v in (points[0][0], points[-1][0], best)), f"{step:,}")
        )
    heads = ("loss", f"step {rows[0]['step']:,}", f"step {rows[-1]['step']:,}", "best", "at step")
    print_table(heads, table)
    print()


def _attempt(what: str, draw: Callable[[], Path | None]) -> Path | None:
    """Draw a picture; whatever goes wrong is a warning, as training is complete."""
    try:
        return draw()
    except Exception as error:
        log.warning(
            "the picture of the %s could not be drawn (%s); the run is complete without it",
            what,
            first_line(error),
        )
        return None


def _dense_teacher(recipe: Recipe) -> tuple[int, TeacherConfig] | None:
    """Index and config of the teacher for the PCA picture: a DINO one, else the first, if any."""
    for index, teacher in enumerate(recipe.teachers):
        if teacher.role == "dino":
            return index, teacher
    return (0, recipe.teachers[0]) if recipe.teachers else None


@torch.no_grad()
def _draw_pca(recipe: Recipe, folder: Path) -> Path:
    """Write plots/pca.png: photographs, the student's features, its prediction of the dense
    teacher, that teacher.

    Whole photographs at ZOOM times the training sizes, so that maps are fine enough to look at.
    """
    run = load_run(folder)
    side = _ZOOM * recipe.student.image_size
    photos = _some_photographs(open_pictures(recipe.data))
    predictions = run.method.deploy()(
        torch.stack([centre_crop(p, side) for p in photos]).float() / 255
    )
    shown = [centre_crop(p, side).permute(1, 2, 0).numpy() for p in photos]
    columns = [{"student backbone": predictions[BACKBONE].patches}]
    dense = _dense_teacher(recipe)
    if dense:
        index, config = dense
        usual = build_teacher(config, recipe.teacher_runtime, index).image_size
        wide = config.model_copy(update={"image_size": _ZOOM * usual})
        teacher = build_teacher(wide, recipe.teacher_runtime, index)
        target = teacher(torch.stack([centre_crop(p, teacher.image_size) for p in photos])).patches
        compared = {f"teacher {config.label}": _unit_scale(target)}
        if config.label in predictions:
            # Both live in the teacher's space, so they share one set of colours: equal colours mean
            # that the student predicts the teacher well.
            head = _unit_scale(predictions[config.label].patches)
            compared = {f"student's {config.label} head": head} | compared
        columns.append(compared)
    return pca_figure(folder / "plots" / "pca.png", shown, columns)


def _unit_scale(maps: Tensor) -> Tensor:
    """Centre maps [n, h, w, d] and give them one overall deviation: a cosine loss leaves a head's
    scale free.
    """
    centred = maps - maps.mean(dim=(0, 1, 2))
    return centred / centred.std()


def _some_photographs(pictures: Pictures) -> list[Image.Image]:
    """A few readable pictures, spread over the data set."""
    result = []
    for number in torch.linspace(0, len(pictures) - 1, _PICTURES).long().unique().tolist():
        try:
            result.append(pictures.load(number))
        except UnreadableImage as error:  # training has named and replaced it already
            log.debug("%s", error)
    return result
