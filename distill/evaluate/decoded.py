"""A teacher's decoder (`distill.attach`) under evaluation: on what a student predicts of that
teacher and, as its upper bound, on the teacher's own features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contract.errors import UserError
from distill.decoders.decoder import TeacherDecoder, try_decoder
from distill.evaluate.cast import Row
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import cast, precision_on
from distill.evaluate.outcome import NotApplicable
from distill.features import Features
from distill.heads import DECODER, Head, kind_of_head, load_head
from distill.methods.deployment import BACKBONE

_TRAINED = {"linear": "classification", "segmentation": "segmentation", "depth": "depth"}
"""Tasks that write a head, and the file they write."""


class HeadFiles(NamedTuple):
    """The heads of a run: their folder, the sha256 of its student, and whether the user trusts
    their code.
    """

    folder: Path
    student_sha256: str
    trust_code: bool = False


def heads_of(model: str, rows: Sequence[Row], trust_code: bool) -> HeadFiles | None:
    """The heads of a run folder whose student is the first of `rows`; None for other models."""
    if not Path(model).is_dir():
        return None
    return HeadFiles(Path(model) / "heads", rows[0].encoder.weights_sha256, trust_code)


def open_decoder(files: HeadFiles | None, task: str, encoder: Encoder) -> Head:
    """The decoder of a run that is scored on `encoder`; raises UserError where there is none, and
    NotApplicable where it reads other features.
    """
    if files is None:
        raise UserError(f"{task}.head = decoder needs a run folder, with a head of distill.attach")
    path = files.folder / f"{task}.safetensors"
    if kind_of_head(path) != DECODER:
        what = "is a head that was trained" if path.exists() else "is missing"
        raise UserError(
            f"{task}.head = decoder: {path} {what}: attach one with python -m distill.attach"
        )
    head = load_head(path, files.student_sha256, files.trust_code)
    reads, label = head.about["reads"], encoder.read_out
    if label == BACKBONE:  # a teacher, or the student's own features
        label = getattr(getattr(encoder, "teacher", None), "label", BACKBONE)
    if label != reads:
        raise NotApplicable(
            f"{encoder.name}: the decoder of {path} reads '{reads}', not '{label}': use --features "
            f"{reads}"
        )
    head.module.to(encoder.device)
    return head


def decoder_reader(
    encoder: Encoder, head: Head, config: EvaluationConfig
) -> tuple[Callable[[Tensor], Features], Callable[[Features], Tensor]]:
    """A function from uint8 images to what a decoder reads, and one from that to its answer."""
    precision, decoder = precision_on(encoder.device, config.extract), head.module
    own = encoder.read_out == BACKBONE

    @torch.no_grad()
    def read(images: Tensor) -> Features:
        with cast(encoder.device, precision):
            features = encoder(images.to(encoder.device))
        return features.map(Tensor.float)

    def answer(features: Features) -> Tensor:
        _check_grid(decoder, features, head, own)
        return try_decoder(decoder, features.patches, features.summary, own)

    return read, answer


def _check_grid(decoder: TeacherDecoder, features: Features, head: Head, own: bool) -> None:
    grid = tuple(features.patches.shape[1:3])
    if decoder.fixed and not own and grid != (decoder.side, decoder.side):
        size = decoder.side * head.about["patch_stride"]
        raise UserError(
            f"the decoder of {head.task} runs on pictures of {size}x{size} alone: set "
            f"dense.size={size} dense.test=windows"
        )


def keep_decoders(folders: Sequence[Path], tasks: Sequence[str], config: EvaluationConfig) -> None:
    """Raise UserError where training a head would replace a decoder that was attached."""
    for task in tasks:
        if task not in _TRAINED or getattr(getattr(config, task, None), "head", "") == "decoder":
            continue
        for folder in folders:
            path = folder / "heads" / f"{_TRAINED[task]}.safetensors"
            if kind_of_head(path) == DECODER:
                raise UserError(
                    f"{path} is a decoder of distill.attach, which --tasks {task} would replace: "
                    f"score it with {task}.head=decoder, or move it away"
                )
