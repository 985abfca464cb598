"""`python -m distill.run`: train a student from a recipe."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status

EPILOG = """\
examples:
  python -m distill.run
  python -m distill.run umt_vit_base --dry-run
  python -m distill.run umt_vit_base data.path=/data/in1k/train train.lr=2e-4
  torchrun --nproc-per-node 8 -m distill.run umt_vit_base
  python -m distill.run my.yaml teachers.0.weight=2 --output runs/heavier
  python -m distill.run --output runs/heavier --resume
  python -m distill.run --list

The default recipe is the offline quickstart, about three minutes on two cores.
--dry-run prints what a recipe would train, --resume continues an interrupted
run, torchrun starts a process per GPU. The run folder contains recipe.yaml,
metrics.jsonl, checkpoint/, plots/ and, at the end, student.safetensors.
Exit status: 0 done (or stopped by SIGTERM after a checkpoint), 1 a failure,
2 a mistake in the command line or its input.
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
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe (see --list)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --output"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (parts, FLOPs, memory), then exit"
    )
    parser.add_argument(
        "--list", action="store_true", help="list shipped recipes and all keys, then exit"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.list:
        return exit_status(_print_list)
    recipe, overrides = args.recipe, args.overrides
    if recipe and "=" in recipe:  # only overrides were given
        recipe, overrides = None, [recipe, *overrides]
    return exit_status(lambda: distil(recipe, overrides, args.output, args.resume, args.dry_run))


def _print_list() -> None:
    # Imported here and below so that --help answers at once: torch and timm take seconds to load.
    from distill.recipe_io import describe_recipes

    print(describe_recipes())


def distil(
    name: str | None,
    overrides: Sequence[str],
    output: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Train the recipe `name` (default: quickstart) with `overrides` into `output`.

    `resume` continues the run in `output`; `dry_run` prints the plan instead. Raises UserError for
    a mistake in the recipe, or an `output` with files of something else.
    """
    from distill.recipe_io import load_recipe

    folder = output or Path("runs") / Path(name or "quickstart").stem
    if resume:
        recipe = _recipe_to_resume(folder, name, overrides)
    else:
        recipe = load_recipe(name or "quickstart", overrides)
    if dry_run:
        from distill.training.plan import print_plan

        print_plan(recipe)
        return
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already has files: add --resume to continue that run, or choose another "
            "--output"
        )

    from distill.distributed import join_ranks
    from distill.training.loop import StopSignal, train
    from distill.training.report import finish, show_start

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("timm").setLevel(logging.WARNING)
    with StopSignal() as stop:
        with join_ranks(recipe.train.device) as ranks:
            if not ranks.first:
                logging.getLogger().setLevel(logging.ERROR)
            show_start(recipe, folder, ranks)
            complete = train(recipe, folder, ranks, resume, stop)
        if ranks.first:  # nobody waits for pictures
            finish(recipe, folder, complete)


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
