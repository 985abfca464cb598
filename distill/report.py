"""What a user reads before and after training: the cast, the files made, the next command."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.checkpoint import load_run
from distill.config import Recipe, TeacherConfig
from distill.data import centre_crop
from distill.distributed import Ranks
from distill.errors import UserError
from distill.methods.deployment import BACKBONE
from distill.metrics import read_metrics
from distill.pictures import open_pictures
from distill.plots import plot_losses
from distill.teachers import build_teacher, weights_source
from distill.visualize import pca_figure

log = logging.getLogger(__name__)

PICTURES = 4
"""Photographs in the closing PCA picture."""


def show_start(recipe: Recipe, folder: Path, ranks: Ranks) -> None:
    """Say who learns from whom, and where it will be written."""
    log.info("student   %s at %d px, method %s", recipe.student.name, recipe.student.image_size, recipe.method)
    for teacher in recipe.teachers:
        log.info("teacher   %s: %s, %s, %s", teacher.label, teacher.name, teacher.role, weights_source(teacher))
    log.info("run       %s on %s x %d", folder, ranks.device.type, ranks.world)


def finish(recipe: Recipe, folder: Path, complete: bool) -> None:
    """Draw the pictures of a run and say what to open and what to type next."""
    if not complete:
        print(f"stopped before the last step; the checkpoint in {folder / 'checkpoint'} is complete. Continue with:")
        print(f"  python -m distill.run --output {folder} --resume")
        return
    rows = read_metrics(folder / "metrics.jsonl")
    plot = plot_losses(folder)
    picture = draw_pca(recipe, folder)
    if rows:
        print(
            f"loss      {rows[0]['loss']:.4f} at step {rows[0]['step']} -> {rows[-1]['loss']:.4f} at {rows[-1]['step']}"
        )
    print(f"run       {folder}")
    print(f"student   {folder / 'student.safetensors'}")
    print(f"losses    {plot}")
    print(f"features  {picture}")
    print("next      look closer at one photograph:")
    print(f"  python -m distill.visualize {folder} IMAGE.jpg --sizes 224 448")


def dense_teacher(recipe: Recipe) -> tuple[int, TeacherConfig]:
    """Index and config of the teacher whose patches mean most: a DINO one, else the first."""
    for index, teacher in enumerate(recipe.teachers):
        if teacher.role == "dino":
            return index, teacher
    return 0, recipe.teachers[0]


@torch.no_grad()
def draw_pca(recipe: Recipe, folder: Path) -> Path:
    """Write plots/pca.png: photographs, the student's features, its prediction of the dense teacher, that teacher."""
    run = load_run(folder)
    index, config = dense_teacher(recipe)
    teacher = build_teacher(config, recipe.teacher_runtime, index)
    pictures = open_pictures(recipe.data)
    student_images, teacher_images, photos = [], [], []
    for number in range(len(pictures)):
        try:
            image = pictures.load(number)
        except UserError:
            raise
        except Exception as error:  # an unreadable picture was named during training already
            log.debug("%s: %s", pictures.name(number), error)
            continue
        student_images.append(centre_crop(image, recipe.student.image_size))
        teacher_images.append(centre_crop(image, teacher.image_size))
        photos.append(np.asarray(centre_crop(image, 2 * recipe.student.image_size).permute(1, 2, 0)))
        if len(photos) == PICTURES:
            break
    predictions = run.method.deploy()(torch.stack(student_images).float() / 255)
    columns: dict[str, Tensor] = {
        "student backbone": predictions[BACKBONE].patches,
        f"student, {config.label} head": predictions[config.label].patches,
        f"teacher {config.label}": teacher(torch.stack(teacher_images)).patches,
    }
    return pca_figure(folder / "plots" / "pca.png", photos, columns)
