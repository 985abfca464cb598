"""`python -m distill.evaluate`: the tasks that the papers report, for a student or any teacher."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, suggest
from distill.launch import launched

EPILOG = """\
examples:
  python -m distill.scenes --output runs/scenes
  python -m distill.evaluate runs/quickstart --data runs/scenes \\
      --tasks knn,segmentation,depth --with-teachers
  python -m distill.evaluate runs/mine --data /data/imagenet \\
      --tasks knn,linear --features backbone,dino probe.runs=5
  python -m distill.evaluate runs/mine --data transfer=/data/transfer \\
      --tasks transfer --with-teachers
  python -m distill.evaluate runs/mine --data /data/imagenet \\
      --data robustness=/data/variants --tasks linear,finetune,robustness \\
      finetune.init=probe robustness.classifier=finetuned
  python -m distill.evaluate runs/mine --data ADEChallengeData2016 \\
      --tasks segmentation protocol=paper
  python -m distill.evaluate runs/mine --data /data/nyu \\
      --tasks depth depth.protocol=paper dense.lr=5e-5
  python -m distill.evaluate runs/kpu_vit_base --data /data/coco \\
      --tasks detection --with-teachers
  python -m distill.evaluate runs/mine --data runs/scenes --features dino \\
      --tasks segmentation segmentation.head=decoder --with-teachers
  python -m distill.evaluate vit_base_patch16_dinov3 --data /data/imagenet
  python -m distill.evaluate mobilenetv2_100@package:mobilenet-v2 \\
      --data runs/scenes --tasks knn
  torchrun --nproc-per-node 8 -m distill.evaluate runs/mine \\
      --data ADEChallengeData2016 --tasks segmentation protocol=paper
  python -m distill.evaluate --list

MODEL is a run folder, or NAME[@CHECKPOINT][:BLOCK]: a timm name with weights
from its hub, or from a file or package:NAME (@random: none), its features read
after a block; local-dir:FOLDER or hf-hub:OWNER/NAME as timm saves them;
hf:FOLDER or hf:OWNER/NAME of transformers; python:module:function of own code;
or grounding_dino@FOLDER, a detector (docs/teachers.md). Trained heads go
to RUN/heads for export (those of the first of --features; others below
--output, and those of a --checkpoint in OUTPUT/step_N/heads). Extracted
features are kept and reused. distill.scenes draws data to try the tasks on.
Every task runs under a protocol: quick (the default: small data, short runs) or
paper, the papers' values, which numbers for a published table need. Both are
listed, and a key that is given wins over either.
torchrun, srun or mpirun start a process per GPU; all need to see --output.
They share extraction, k-NN, the probe's rates, fine-tuning, whole pictures,
videos and the features of augmented windows. Heads on windows that stay the
same, trained backbones and clusters are the first process's work, for which
the others wait. Refused: more processes than pictures in a batch of finetune,
and, on CPUs, finetune of networks with batch normalisation.
Exit status: 0 done, 1 a failure, 2 a mistake in the command line or its input.
"""

NAMES = (
    "knn",
    "linear",
    "finetune",
    "transfer",
    "zero-shot",
    "segmentation",
    "depth",
    "detection",
    "retrieval",
    "video",
    "robustness",
    "clusters",
)
"""Names of the tasks: a copy, because --help must not wait for torch (a test compares them)."""

_LAYOUTS = """\
data layouts of --data ROOT (ROOT/classification, ROOT/dense, … come first):
  classification  {train,val}/CLASS/*.jpg, or an archive as its authors pack it:
                  cifar-10-batches-py/* and cifar-100-python/* (the Python
                  versions), flowers-102/{jpg/*.jpg,imagelabels.mat,setid.mat},
                  oxford-iiit-pet/{images/*.jpg,annotations/*.txt}
  transfer        a folder of several of these, a data set each
  dense           {train,val}/{images,masks,depth}/*
                  images/{training,validation}/* with annotations/… (ADE20K
                  if objectInfo150.txt lies beside them)
                  {train,test}/SCENE/rgb_*.jpg with sync_depth_*.png (NYUv2)
  detection       annotations/instances_val2017.json, val2017/*.jpg (COCO)
  retrieval       gnd_*.pkl or gnd_*.json, jpg/NAME.jpg (revisited Oxford and
                  Paris)
  video           JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png,
                  ImageSets/2017/val.txt (DAVIS-2017)
  robustness      any of imagenet-a, imagenet-r, imagenet-v2, imagenet-c,
                  imagenet-9
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.evaluate",
        description="Score a student, its heads and its teachers on the papers' tasks.",
        epilog=EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder or timm name")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="change a setting (see --list)"
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        default="knn,linear",
        help=f"any of {', '.join(NAMES)} (default: knn,linear)",
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="[TASK=]ROOT",
        help="data folder, for all tasks or for one; may be repeated",
    )
    parser.add_argument(
        "--features",
        default="backbone",
        metavar="A,B",
        help="backbone or labels of teachers (default: backbone)",
    )
    parser.add_argument(
        "--weights",
        choices=("student", "momentum", "ema"),
        metavar="student|momentum",
        help="a run's student, or its momentum network if the method has one, which may also be "
        "called ema (default: the one that the run ships)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|STEP",
        help="which of the run's weights: latest (newest checkpoint), a step, or best (by its "
        "monitor); default: those of the finished run",
    )
    parser.add_argument(
        "--with-teachers", action="store_true", help="also score the run's teachers"
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and run the code that RUN names: of a decoder in RUN/heads, and with "
        "--with-teachers of its recipe's teachers (python:, trust_remote_code)",
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
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto"
    )
    parser.add_argument(
        "--list", action="store_true", help="list tasks, data layouts and settings, then exit"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.list:
        return exit_status(_print_list)
    return exit_status(
        lambda: evaluate(
            args.model,
            args.settings,
            tasks=[name.strip() for name in args.tasks.split(",")],
            data=args.data or [],
            features=args.features.split(","),
            weights="momentum" if args.weights == "ema" else args.weights,
            checkpoint=args.checkpoint,
            with_teachers=args.with_teachers,
            size=args.size,
            output=args.output,
            device=args.device,
            trust_code=args.trust_code,
        )
    )


def _print_list() -> None:
    # Imported here and below so that --help answers at once: torch and timm take seconds to load.
    from distill.evaluate.protocols import describe_protocols
    from distill.evaluate.settings import describe_settings
    from distill.evaluate.tasks import TASKS

    print("tasks:")
    print("\n".join(f"  {name:15} {task.does}" for name, task in TASKS.items()))
    print(f"\n{_LAYOUTS}\nsettings, with default, type and meaning:\n{describe_settings()}")
    print("\nvalues of protocol=paper, with their source, and of protocol=quick (the default)")
    print(f"where they differ; a key that is given wins over both:\n{describe_protocols()}")


def evaluate(
    model: str | None,
    settings: Sequence[str],
    *,
    tasks: Sequence[str],
    data: Sequence[str],
    features: list[str],
    weights: Literal["student", "momentum"] | None,
    checkpoint: str | None,
    with_teachers: bool,
    size: int | None,
    output: Path | None,
    device: str,
    trust_code: bool = False,
) -> None:
    """Score a run or timm network on `tasks` and write evaluation.json and scores.png to `output`.

    Raises UserError for an unknown model, task or setting, and for missing data.
    """
    launched()  # a mistake in the environment is reported before torch is loaded

    from distill.evaluate.settings import load_settings
    from distill.evaluate.tasks import TASKS

    if not model or ("=" in model.partition("@")[0] and not Path(model).is_dir()):
        raise UserError(
            "MODEL is missing: add a run folder or a timm name (python -m distill.evaluate --help)"
        )
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: {suggest(name, TASKS, show=len(TASKS))}")
    config = load_settings(settings)
    roots = _data_roots(data, tasks)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("timm").setLevel(logging.WARNING)

    from distill.distributed import join_ranks
    from distill.evaluate.cast import check_device, open_rows
    from distill.evaluate.decoded import heads_of, keep_decoders
    from distill.evaluate.protocols import apply_protocol
    from distill.evaluate.report import (
        draw_scores,
        print_protocols,
        print_scores,
        read_scores,
        write_json,
    )
    from distill.evaluate.tasks import Context, run_task
    from distill.evaluate.views import view_of
    from distill.freed_memory import keep_freed_memory
    from distill.runs import parse_checkpoint

    keep_freed_memory()

    check_device(device)
    output = output or _default_output(model)
    wanted = parse_checkpoint(checkpoint)
    with join_ranks(device) as ranks:
        if not ranks.first:
            logging.getLogger().setLevel(logging.ERROR)
        read_scores(output / "evaluation.json")  # report a damaged file before the work, not after
        rows = open_rows(
            model,
            features,
            with_teachers,
            size,
            device,
            output,
            weights,
            wanted,
            trust_code,
        )
        keep_decoders([row.folder for row in rows], tasks, config)
        heads = heads_of(model, rows, trust_code)
        own = str(rows[0].encoder.view)
        protocols = {task: apply_protocol(config, task, own) for task in tasks}
        lines = (line for each in protocols.values() for line in each.lines())
        logging.info("%s", "\n".join(lines))
        about = {
            "model": model,
            "data": {task: str(root) for task, root in roots.items()},
        }
        results: dict[str, dict] = {row.name: {} for row in rows}
        for row in rows:
            row.encoder.ranks = ranks
            contexts: dict[Path, Context] = {}
            for task in tasks:
                context = contexts.setdefault(
                    roots[task],
                    Context(row.encoder, roots[task], config, output / "cache", row.folder, heads),
                )
                outcome = run_task(context, task, row)
                if outcome is None or not ranks.first:
                    continue
                about["network"] = context.binding | {"device": str(row.encoder.device)}
                about["protocol"] = protocols[task].about(outcome.details)
                about["view"] = view_of(row.encoder, task, protocols[task].config, outcome)
                logging.info("view      %s, %s: %s", row.name, task, about["view"])
                about["settings"] = protocols[task].config.model_dump(mode="json")
                # after every task, so that an interrupted evaluation keeps its results so far
                write_json(output / "evaluation.json", row.name, task, outcome, about)
                results[row.name][task] = outcome
    if not ranks.first:
        return
    results = {name: outcomes for name, outcomes in results.items() if outcomes}
    names = {task: protocol.name for task, protocol in protocols.items()}
    picture = draw_scores(output / "scores.png", results, names)
    print_scores(results)
    print_protocols(protocols.values())
    for outcomes in results.values():
        for outcome in outcomes.values():
            for file in outcome.files:
                print(f"wrote     {file}")
    print(f"scores    {output / 'evaluation.json'}")
    print(f"picture   {picture}")
    if Path(model).is_dir():
        print("next      compare its teachers, or score it on your own labelled pictures:")
        code = " --trust-code" if trust_code else ""
        print(f"  python -m distill.similarity --run {model}{code}")
        print(
            f"  python -m distill.evaluate {model} --data ROOT --tasks knn,linear    "
            "(layouts: --list)"
        )


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
