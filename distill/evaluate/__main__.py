"""`python -m distill.evaluate`: the papers' protocols, applied to a student or any teacher."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, suggest

EPILOG = """\
examples:
  python -m distill.scenes --output runs/scenes                 drawn data, where there is no other
  python -m distill.evaluate runs/quickstart --data runs/scenes --tasks knn,segmentation,depth --with-teachers
  python -m distill.evaluate runs/mine --data /data/imagenet --tasks knn,linear probe.runs=5
  python -m distill.evaluate runs/mine --data /data/imagenet --tasks linear --features backbone,dino
  python -m distill.evaluate runs/mine --data ADEChallengeData2016 --tasks segmentation dense.steps=80000
  python -m distill.evaluate runs/mine --data /data/nyu --tasks depth depth.head=dpt depth.crop=eigen
  python -m distill.evaluate vit_base_patch16_dinov3 --data /data/imagenet --tasks knn
  python -m distill.evaluate mobilenetv2_100@package:mobilenet-v2 --data runs/scenes --tasks knn
  python -m distill.evaluate --list                             tasks, data layouts, and every setting

MODEL is a run folder, or NAME[@CHECKPOINT][:BLOCK]: a timm name (weights from its hub), weights from a file or
package:NAME instead (@random: none), features read after a block. Heads that tasks train go to RUN/heads for export
(those of the first of --features; of other rows, below --output). Extracted features are kept and reused.
Exit status: 0 done, 2 a mistake in what was asked, 1 a failure.
"""

NAMES = (
    "knn", "linear", "finetune", "zero-shot", "segmentation", "depth", "retrieval", "video", "robustness", "clusters",
)  # fmt: skip
"""Names of the tasks: a copy, because --help must not wait for torch (a test compares them)."""

_LAYOUTS = """\
data layouts (--data ROOT; ROOT/classification, ROOT/dense, … go before ROOT itself where they exist):
  classification  {train,val}/CLASS/*.jpg
  dense           {train,val}/{images,masks,depth}/*;  images/{training,validation}/* with annotations/… (ADE20K);
                  {train,test}/SCENE/rgb_*.jpg with sync_depth_*.png (NYUv2's official splits)
  retrieval       gnd_*.pkl or gnd_*.json, jpg/NAME.jpg (revisited Oxford and Paris)
  video           JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png, ImageSets/2017/val.txt (DAVIS-2017)
  robustness      imagenet-a, imagenet-r, imagenet-v2, imagenet-c, imagenet-9: any of them
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.evaluate",
        description="Score a student, its heads and its teachers by the papers' protocols.",
        epilog=EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, or timm name")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="set any key of --list")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        default="knn,linear",
        help=f"of {', '.join(NAMES)} (default: knn,linear)",
    )
    parser.add_argument(
        "--data", action="append", metavar="[TASK=]ROOT", help="data; may be given per task"
    )
    parser.add_argument(
        "--features",
        default="backbone",
        metavar="A,B",
        help="backbone, or teachers' labels (backbone)",
    )
    parser.add_argument(
        "--weights",
        default="student",
        choices=("student", "ema"),
        help="a run's student, or its momentum network where the method has one (student)",
    )
    parser.add_argument(
        "--with-teachers", action="store_true", help="score the run's teachers too, in the same way"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="input side for classification (default: its own)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: RUN/evaluation, or runs/evaluation/NAME",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    parser.add_argument(
        "--list", action="store_true", help="list tasks, layouts and settings, and stop"
    )
    args = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    # Imported here so that --help answers at once: torch and timm take seconds to load.
    from distill.evaluate.settings import describe_settings, load_settings
    from distill.evaluate.tasks import TASKS

    if args.list:
        print("tasks:")
        print("\n".join(f"  {name:15} {task.does}" for name, task in TASKS.items()))
        print(f"\n{_LAYOUTS}\nsettings (key, type, default, meaning):\n{describe_settings()}")
        return 0
    if not args.model or "=" in args.model.partition("@")[0]:
        raise UserError(
            "no MODEL: give a run folder or a timm name (python -m distill.evaluate --help)"
        )
    tasks = [name.strip() for name in args.tasks.split(",")]
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: {suggest(name, TASKS, show=len(TASKS))}")
    config = load_settings(args.settings)
    roots = _data_roots(args.data or [], tasks)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("timm").setLevel(logging.WARNING)

    from distill.evaluate.cast import open_rows
    from distill.evaluate.report import draw_scores, print_table, read_scores, write_json
    from distill.evaluate.tasks import Context

    output = args.output or _default_output(args.model)
    read_scores(output / "evaluation.json")  # report a damaged file before the work, not after
    rows = open_rows(
        args.model,
        args.features.split(","),
        args.with_teachers,
        args.size,
        args.device,
        output,
        args.weights,
    )
    about = {
        "model": args.model,
        "settings": config.model_dump(mode="json"),
        "data": {task: str(root) for task, root in roots.items()},
    }
    results: dict[str, dict] = {row.name: {} for row in rows}
    for row in rows:
        contexts: dict[Path, Context] = {}
        for task in tasks:
            context = contexts.setdefault(
                roots[task], Context(row.encoder, roots[task], config, output / "cache", row.folder)
            )
            outcome = TASKS[task].run(context)
            about["network"] = context.binding | {"device": str(row.encoder.device)}
            # after every task, so that an interrupted evaluation keeps its results so far
            written = write_json(output / "evaluation.json", row.name, task, outcome, about)
            results[row.name][task] = outcome
    picture = draw_scores(output / "scores.png", results)
    print_table(results)
    for outcomes in results.values():
        for outcome in outcomes.values():
            for file in outcome.files:
                print(f"wrote     {file}")
    print(f"scores    {written}")
    print(f"picture   {picture}")
    if Path(args.model).is_dir():
        print("next      compare its teachers, or score it on your own labelled pictures:")
        print(f"  python -m distill.similarity --run {args.model}")
        print(
            f"  python -m distill.evaluate {args.model} --data ROOT --tasks knn,linear    "
            "(layouts: --list)"
        )
    return 0


def _data_roots(given: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    """The data root of every task from `ROOT` and `TASK=ROOT`; raises UserError where one is
    missing.
    """
    roots: dict[str, Path] = {}
    for entry in given:
        task, equals, root = entry.partition("=")
        if equals and task in tasks:
            roots[task] = Path(root)
        else:
            roots |= {task: Path(entry) for task in tasks if task not in roots}
    for task in tasks:
        if task not in roots:
            raise UserError(
                f"--tasks {task} needs data: add --data ROOT or --data {task}=ROOT (layouts: "
                "--list)"
            )
        if not roots[task].is_dir():
            raise UserError(f"--data {roots[task]}: no such folder")
    return roots


def _default_output(model: str) -> Path:
    """RUN/evaluation for a run folder, runs/evaluation/NAME for a timm name."""
    if Path(model).is_dir():
        return Path(model) / "evaluation"
    return Path("runs/evaluation") / model.replace("/", "_").replace(":", "_").replace("@", "_")


if __name__ == "__main__":
    sys.exit(main())
