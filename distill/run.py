"""`python -m distill.run`: train a student from a recipe."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status

EPILOG = """\
examples:
  python -m distill.run                                         the offline quickstart, about three minutes on two cores
  python -m distill.run umt_vit_base --dry-run                  what a paper recipe would train, without training
  python -m distill.run umt_vit_base data.path=/data/in1k/train train.batch_size=256
  torchrun --nproc-per-node 8 -m distill.run umt_vit_base       on eight GPUs
  python -m distill.run my.yaml teachers.0.weight=2 --output runs/heavier
  python -m distill.run --output runs/heavier --resume          continue a run that was stopped or killed
  python -m distill.run --list                                  shipped recipes, and every key a recipe can set

A run folder holds recipe.yaml, metrics.jsonl, checkpoint/, plots/ and, at the end, student.safetensors.
Exit status: 0 done (or stopped by SIGTERM after a checkpoint), 2 a mistake in what was asked, 1 a failure.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m distill.run",
        description="Distil several frozen vision teachers into one student.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="shipped recipe or YAML file (default: quickstart)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set any key of the recipe"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --output"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (parts, FLOPs, memory) and stop"
    )
    parser.add_argument(
        "--list", action="store_true", help="list shipped recipes and all keys, and stop"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.recipe and "=" in args.recipe:  # only overrides were given
        args.overrides.insert(0, args.recipe)
        args.recipe = None
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    # Imported here so that --help answers at once: torch and timm take seconds to load.
    from distill.recipe_io import describe_recipes, load_recipe

    if args.list:
        print(describe_recipes())
        return 0
    name = args.recipe or "quickstart"
    folder = args.output or Path("runs") / Path(name).stem
    if args.resume:
        recipe = _recipe_to_resume(folder, args.recipe, args.overrides)
    else:
        recipe = load_recipe(name, args.overrides)
    if args.dry_run:
        from distill.training.plan import print_plan

        print_plan(recipe)
        return 0
    if not args.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already has files: add --resume to continue that run, or choose another "
            "--output"
        )

    from distill.distributed import join_ranks
    from distill.training.loop import StopSignal, train
    from distill.training.report import finish, show_start

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("timm").setLevel(logging.WARNING)
    with join_ranks(recipe.train.device) as ranks, StopSignal() as stop:
        if not ranks.first:
            logging.getLogger().setLevel(logging.ERROR)
        show_start(recipe, folder, ranks)
        complete = train(recipe, folder, ranks, args.resume, stop)
        if ranks.first:
            finish(recipe, folder, complete)
    return 0


def _recipe_to_resume(folder: Path, name: str | None, overrides: Sequence[str]):
    """The recipe stored in `folder`; raises UserError naming the first field a given recipe or
    override changes.
    """
    from distill.recipe_io import differing_fields, load_recipe

    stored = folder / "recipe.yaml"
    if not stored.is_file():
        raise UserError(
            f"{folder} has no run to resume (recipe.yaml is missing): remove --resume, or check "
            "--output"
        )
    before = load_recipe(str(stored), [])
    if name or overrides:
        now = load_recipe(name or str(stored), overrides)
        changed = [
            (key, old, new)
            for key, old, new in differing_fields(before, now)
            if key not in _FREE_TO_CHANGE
        ]
        if changed:
            key, old, new = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise UserError(
                f"{key} is {old} in {stored}, but {new} was given{more}: a resumed run keeps its "
                "recipe (remove the change, or start a new run in another --output)"
            )
        return now
    return before


_FREE_TO_CHANGE = {
    "data.workers",
    "train.log_every",
    "train.tensorboard",
    "checkpoint.every_steps",
    "checkpoint.keep",
}
"""Keys that do not affect the result, so a resumed run may change them."""


if __name__ == "__main__":
    sys.exit(main())
