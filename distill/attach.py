"""`python -m distill.attach`: a teacher's own decoder as a task head of a student."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, suggest
from contract.tasks import CLASSES, TASKS, Task

if TYPE_CHECKING:  # --help must not wait for torch to load
    from distill.features import Features
    from distill.methods.deployment import ShippedHead
    from distill.runs import Run

EPILOG = """\
examples:
  python -m distill.attach runs/mine --teacher dino --task segmentation \\
      --decoder python:my_heads:linear --kwargs width=384 classes=150 \\
      --weights linear_ade20k.pth --classes ade20k.txt
  python -m distill.attach runs/mine --teacher mobile --task segmentation \\
      --decoder hf:weights/deeplab:segmentation_head
  python -m distill.attach runs/mine --teacher cls --task classification \\
      --decoder classifier

A decoder is
  python:PACKAGE.MODULE:FUNCTION  a function that is called with --kwargs and
                                  returns an nn.Module
  hf:FOLDER:PART                  a part of a transformers model in a folder
  classifier                      a timm teacher's own, for classification
The module is called with float32 features in the teacher's own units: patches
[B, d, rows, columns], the image-level vector [B, d], or both in this order
(--reads). It returns [B, classes, H, W] for segmentation, [B, H, W] or
[B, 1, H, W] for depth and [B, classes] for classification. H and W may be any
multiple of rows and columns; leave a last resizing to the picture out, as the
server does it.

The weights go to RUN/heads/TASK.safetensors; of a python: decoder so does its
name, not its code. A task has one head, trained or attached. To score and to
export a python: decoder, distill.evaluate and export.run import its code again,
with --trust-code. A bundle has no code.

Exit status: 0 done, 1 a failure, 2 a mistake in the command line or its input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m distill.attach",
        description="Make a teacher's own frozen decoder a task head of a student.",
        epilog=EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument(
        "--teacher", required=True, metavar="LABEL", help="whose features the decoder was made for"
    )
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--decoder", required=True, metavar="DECODER", help="see below")
    parser.add_argument(
        "--kwargs",
        nargs="+",
        default=[],
        metavar="key=value",
        help="arguments of a python: function",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights of a python: decoder, .safetensors or a weights-only .pth "
        "(default: those that the function gives it)",
    )
    parser.add_argument(
        "--reads",
        choices=("patches", "token", "both"),
        help="what the decoder is called with (default: patches; for classification token)",
    )
    parser.add_argument(
        "--grid",
        default="student",
        metavar="student|teacher|N",
        help="rows of the patches that the decoder gets for a picture of the student's training "
        "size: the student's own, the teacher's, or N; they are resampled to it (default: student)",
    )
    parser.add_argument(
        "--classes",
        metavar="A,B,…|FILE",
        help="names of the classes, or a file with one a line (default: class 0, class 1, …; of an "
        "ImageNet classifier its own)",
    )
    parser.add_argument("--unit", metavar="NAME", help="unit of depth (default: metre)")
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="--grid teacher: import and run the code of RUN's teacher (python:, "
        "trust_remote_code); that of --decoder is yours to name, and runs",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace the head that the task has already"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(**vars(args)))


def _run(**options: Any) -> None:
    attach(**options)


def attach(
    run: Path,
    *,
    teacher: str,
    task: str,
    decoder: str,
    kwargs: Sequence[str] = (),
    weights: Path | None = None,
    reads: str | None = None,
    grid: str = "student",
    classes: str | None = None,
    unit: str | None = None,
    replace: bool = False,
    trust_code: bool = False,
) -> Path:
    """Write `run`/heads/TASK.safetensors and return its path; arguments are those of the command
    line.

    Raises UserError for a teacher or task that does not exist, a decoder that cannot be imported,
    built or called with the student's predictions, and an answer that is not the task's.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: {suggest(task, TASKS)}")
    meaning = TASKS[task]
    if unit and "unit" not in meaning.facts:
        raise UserError(f"--unit {unit}: {task} has no unit (leave it out)")
    if classes and CLASSES not in meaning.axes:
        raise UserError(f"--classes: {task} has no classes (leave it out)")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("timm").setLevel(logging.WARNING)

    from distill.decoders.fit import fit_decoder
    from distill.decoders.sources import open_classifier, open_source
    from distill.heads import save_head
    from distill.runs import load_run

    loaded = load_run(run)
    shipped = _shipped_head(loaded, teacher)
    place = run / "heads" / f"{task}.safetensors"
    if place.exists() and not replace:
        raise UserError(
            f"{place} exists: a task has one head (--replace replaces it; a second one needs a "
            "task of its own in contract/tasks.py)"
        )
    names = _read_names(classes) if classes else None
    facts: dict[str, Any] = {}
    if decoder == "classifier":
        if task != "classification":
            raise UserError(f"--decoder classifier is for --task classification, not {task}")
        if kwargs or weights:
            option = "--kwargs" if kwargs else "--weights"
            raise UserError(f"{option} is for python: decoders: leave it out")
        _check_reads("token", meaning, loaded, teacher, shipped)
        index, config = next(
            entry for entry in enumerate(loaded.recipe.teachers) if entry[1].label == teacher
        )
        module, facts["classes"] = open_classifier(config, index, names)
        told = f"{teacher}'s own classifier"
    else:
        chosen = reads or ("patches" if meaning.dense else "token")
        _check_reads(chosen, meaning, loaded, teacher, shipped)
        features = _predicted(loaded, teacher)
        rows = _rows(grid, loaded, teacher, features.patches.shape[1], trust_code)
        source = open_source(decoder, kwargs, weights)
        module, facts = fit_decoder(source, meaning, chosen, features, rows, names)
        told = source.reference
        if meaning.dense:
            facts["patch_stride"] = loaded.recipe.student.image_size // features.patches.shape[1]
    about = {
        "network": loaded.recipe.student.name,
        "reads": teacher,
        "output": getattr(module, "reads", "token"),
        "student_sha256": loaded.sha256,
        "image_size": loaded.recipe.student.image_size,
        "size": loaded.recipe.student.image_size,
        **facts,
    }
    if meaning.map and meaning.map.unit:
        about["unit"] = unit or meaning.map.unit
    written = save_head(run / "heads", task, module, about)
    count = sum(tensor.numel() for tensor in module.parameters())
    print(f"decoder   {told}, {count:,} parameters")
    print(f"wrote     {written}")
    code = " --trust-code" if decoder.startswith("python:") else ""
    print("next      score it beside the teacher's own features, or export it:")
    if task in ("segmentation", "depth"):
        print(
            f"  python -m distill.evaluate {run} --data ROOT --tasks {task} \\\n"
            f"      --features {teacher} --with-teachers {task}.head=decoder"
            f"{code or loaded.trust_option}"
        )
    print(f"  python -m export.run {run} --output BUNDLE{code}")
    return written


def _shipped_head(run: "Run", teacher: str) -> "ShippedHead":
    """The student's head of a teacher; raises UserError for one whose predictions are not what a
    decoder of that teacher reads.
    """
    known = run.dims
    if teacher not in known:
        raise UserError(
            f"--teacher {teacher}: {run.folder} has no such teacher: {suggest(teacher, known)}"
        )
    shipped = run.method.deploy().shipped
    if teacher not in shipped:
        raise UserError(
            f"--teacher {teacher}: {run.folder} ships no head of it (its method ships the backbone "
            "alone)"
        )
    if known[teacher].maps:
        raise UserError(
            f"--teacher {teacher} is a detector, whose decoder reads maps of several sizes: "
            "export.run --detector adds it"
        )
    head = shipped[teacher]
    normalizer = head.normalizer
    if getattr(getattr(normalizer, "patches", None), "mode", None) == "layernorm":
        raise UserError(
            f"--teacher {teacher}: the student learnt targets.normalize=layernorm, which loses the "
            "teacher's scale, and its decoder needs that: train with standardize or phi-s"
        )
    if "patches" in head.free_length and not (
        normalizer is not None and normalizer.lengths.is_fitted("patches")
    ):
        logging.warning(
            "note      the length of what the student predicts of '%s' was never fitted (its run "
            "is of an earlier version): a decoder may see another scale than the teacher's",
            teacher,
        )
    return head


def _check_reads(reads: str, task: Task, run: "Run", teacher: str, shipped: "ShippedHead") -> None:
    """Raise UserError for features that the student does not predict, or are not the task's."""
    if reads != "patches" and not (shipped.has_token and run.dims[teacher].summary):
        raise UserError(
            f"--reads {reads}: the student predicts no image-level vector of '{teacher}' (use "
            "--reads patches)"
        )
    if reads == "token" and task.dense:
        raise UserError(f"--reads token: {task.name} needs patches (use patches or both)")


def _predicted(run: "Run", teacher: str) -> "Features":
    """What the student predicts of a teacher for two photographs."""
    import numpy as np
    import torch

    from distill.data.pictures import PackagedPhotos
    from distill.evaluate.encoder import RunEncoder

    photos, size = PackagedPhotos(), run.recipe.student.image_size
    pictures = [photos.load(number).convert("RGB").resize((size, size)) for number in (0, 3)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    with torch.no_grad():
        features = RunEncoder(run, teacher)(pixels.permute(0, 3, 1, 2))
    rows, columns = features.patches.shape[1:3]
    if rows != columns or size % rows:
        raise UserError(
            f"--teacher {teacher}: the student predicts it on a grid of {rows}x{columns} for "
            f"{size} pixels, which no whole stride gives: decoders cannot be attached to it"
        )
    return features


def _rows(grid: str, run: "Run", teacher: str, side: int, trust_code: bool) -> int:
    """Rows of the patches that the decoder gets for a picture of the student's training size."""
    if grid == "student":
        return side
    if grid == "teacher":
        from distill.training.plan import meta_teacher

        ((index, config),) = run.teachers(trust_code, teacher)
        try:
            rows, columns = meta_teacher(config, run.recipe, index).grid
        except UserError as error:
            raise UserError(f"--grid teacher: {error} (or give the number of rows)") from error
        if rows != columns:
            raise UserError(f"--grid teacher: its grid is {rows}x{columns}, not square")
        return rows
    if not grid.isdecimal() or int(grid) < 1:
        raise UserError(f"--grid {grid}: give student, teacher or a number of rows")
    return int(grid)


def _read_names(text: str) -> list[str]:
    """Names of classes, "a,b" or a file with one a line."""
    path = Path(text)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8").strip().replace("\n", ",")
        except UnicodeDecodeError as error:
            raise UserError(f"--classes {path} is not a text file in UTF-8") from error
    names = [name.strip() for name in text.split(",")]
    twice = next((name for name in names if names.count(name) > 1 or not name), None)
    if twice is not None:
        what = f"'{twice}' twice" if twice else "an empty name"
        raise UserError(f"--classes {path}: it has {what}")
    return names


if __name__ == "__main__":
    sys.exit(main())
