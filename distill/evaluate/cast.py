"""What is evaluated: the outputs of a student and, on request, its teachers."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from contract.errors import UserError
from distill.evaluate.encoder import Encoder, RunEncoder, named_encoder, teacher_encoder
from distill.methods.deployment import BACKBONE
from distill.runs import Checkpoint, load_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, its encoder, and where its pictures and heads go."""

    name: str
    encoder: Encoder
    folder: Path
    optional: bool = False
    """Whether it goes without the tasks that it has no output for: a teacher of the run."""


def check_device(device: str) -> None:
    """Raise UserError for a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available (use --device cpu)")


def open_rows(
    model: str,
    features: list[str],
    with_teachers: bool,
    size: int | None,
    device: str,
    output: Path,
    weights: Literal["student", "momentum"] | None = None,
    checkpoint: Checkpoint | None = None,
    trust_code: bool = False,
) -> list[Row]:
    """Open the requested encoders. The first of a run's `features` writes into the run folder
    itself, where export reads it, unless `weights` names the network that does not ship (None:
    the one that does). The heads of a `checkpoint` go to `output`/step_N, where export reads them.

    Raises UserError for a model, output or device that does not exist, and without `trust_code` for
    a run's teachers that are code of their own.
    """
    check_device(device)
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    rows = []
    if Path(model).is_dir():
        run = load_run(model, checkpoint=checkpoint)
        teachers = run.teachers(trust_code) if with_teachers else []
        shipped = "momentum" if run.method.ships_averaged else "student"
        weights = weights or shipped
        if weights != shipped:
            run = load_run(model, "ema", checkpoint)
        step = "" if run.finished else f"step {run.step} "
        if step:
            log.info("weights   %s", run.weights)
            output = output / f"step_{run.step}"
        for number, name in enumerate(dict.fromkeys(part.strip() for part in features)):
            encoder = RunEncoder(run, name)
            ships = number == 0 and weights == shipped
            home = Path(model) if run.finished else output
            folder = home if ships else output / f"{weights}-{name}"
            rows.append(Row(f"{step}{weights} {name}", encoder, folder))
        for index, config in teachers:
            encoder = teacher_encoder(config, config.image_size, index, f"teacher-{config.label}")
            rows.append(
                Row(
                    f"teacher {config.label} ({config.name})",
                    encoder,
                    output / f"teacher-{config.label}",
                    optional=True,
                )
            )
    else:
        if checkpoint is not None:
            raise UserError(f"--checkpoint needs a run folder; got '{model}'")
        if with_teachers:
            raise UserError(f"--with-teachers needs a run folder; got '{model}'")
        if features != [BACKBONE]:
            raise UserError(
                f"--features {','.join(features)}: a timm network has only its backbone (use "
                "--features backbone)"
            )
        if weights == "momentum":
            raise UserError(
                f"--weights {weights}: a timm network has no momentum network (use --weights "
                "student)"
            )
        encoder = named_encoder(model, size)
        rows.append(Row(model, encoder, output))
    for row in rows:
        if size:
            if not row.encoder.accepts(size):
                raise UserError(
                    f"--size {size} is not a multiple of {row.name}'s stride {row.encoder.stride}: "
                    f"use {row.encoder.fit(size)}"
                )
            row.encoder.image_size = size
        row.encoder.view = rows[0].encoder.view  # one table compares on the same pixels
        row.encoder.to(place)
    return rows
