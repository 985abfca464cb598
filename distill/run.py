"""`python -m distill.run`: train a student from a recipe."""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from contract.claim import claimed, is_free
from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from distill.launch import launched

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
--dry-run prints what a recipe would train. --resume continues the run in
--output, or starts it where there is none yet: a job that may be preempted
always repeats one command line. Of a resumed run's recipe, only what does not
change its past may change: train.steps or epochs, data.path (the same pictures
elsewhere), data.changed=accept (others), data.workers, teachers.N.checkpoint
(the same weights elsewhere), teacher_cache.path, licences, monitor.*, loggers,
how often it logs and saves, and every grad_checkpointing.
torchrun, srun or mpirun start a process per GPU; their number may change.
train.batch_size is that of all together, and processes times train.accumulate
must divide it; train.parallel=fsdp shards the weights (no train.ema_decay).

Values are read as typed, by the key's type: quote for the shell alone, as in
'data.path=/my photos'. Lists are [a, b], mappings {a: 1}, null is none.

The run folder contains recipe.yaml, metrics.jsonl, checkpoint/, plots/ and, at
the end, student.safetensors.
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
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint in --output, or start there if there is no run",
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
    # only overrides were given; a path may have '=' in it, too
    if recipe and re.match(r"\s*[A-Za-z_][\w.]*\s*=", recipe) and not Path(recipe).is_file():
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

    `resume` continues the run in `output`, or starts it if there is none; `dry_run` prints the plan
    instead. Raises UserError for a mistake in the recipe, for an `output` with files of something
    else, and for one that another process trains in.
    """
    folder = output or Path("runs") / Path(name or "quickstart").stem
    if dry_run:
        from distill.licences import check_licences
        from distill.training.plan import print_plan

        recipe = _recipe(folder, name, overrides, resume)
        _show_overrides(recipe, overrides, print)
        from distill.monitor import plan_monitor

        print_plan(recipe, plan_monitor(recipe))
        check_licences(recipe)
        return
    launch = launched()
    _check_folder(folder, name, overrides, resume)
    # held before torch is loaded, so that of two commands started at once the second is refused
    with claimed(folder, "distill.run") if launch.rank == 0 else nullcontext():
        _check_folder(folder, name, overrides, resume)
        recipe = _recipe(folder, name, overrides, resume)

        from distill.distributed import join_ranks
        from distill.licences import check_licences
        from distill.monitor import open_monitor
        from distill.training.loop import train
        from distill.training.report import finish, show_start
        from distill.training.stop import StopSignal

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        logging.getLogger("timm").setLevel(logging.WARNING)
        if launch.rank == 0 or recipe.train.allowed_licences is not None:
            check_licences(recipe)
        with StopSignal() as stop:
            with join_ranks(recipe.train.device) as ranks:
                if not ranks.first:
                    logging.getLogger().setLevel(logging.ERROR)
                show_start(recipe, folder, ranks)
                _show_overrides(recipe, overrides, logging.info)
                complete = train(recipe, folder, ranks, resume, stop, open_monitor(recipe, ranks))
            if ranks.first:  # nobody waits for pictures
                finish(recipe, folder, complete)


def _show_overrides(recipe, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Say what each override was taken for."""
    from distill.recipe_files import show
    from distill.recipe_io import values_taken

    for key, value in values_taken(recipe, overrides):
        say(f"set       {key} = {show(value)}")


def _check_folder(folder: Path, name: str | None, overrides: Sequence[str], resume: bool) -> None:
    """Raise UserError for a run folder that neither has a run to continue nor is free for a new
    one.
    """
    if not resume:
        if not is_free(folder):
            raise UserError(
                f"{folder} already has files: add --resume to continue that run, or choose another "
                "--output"
            )
    elif not (folder / "recipe.yaml").is_file():
        if not is_free(folder):
            raise UserError(
                f"{folder} has no run to resume (recipe.yaml is missing), and other files: check "
                "--output"
            )
        if not name and not overrides:
            raise UserError(
                f"{folder} has no run to resume (recipe.yaml is missing): name the recipe to start "
                "with, or check --output"
            )


def _recipe(folder: Path, name: str | None, overrides: Sequence[str], resume: bool):
    """The recipe to train: of a run to resume the one stored in `folder`; raises UserError naming
    the first field that a given recipe or override must not change.
    """
    from distill.recipe_io import differing_fields, load_recipe

    stored = folder / "recipe.yaml"
    if not resume or not stored.is_file():
        return load_recipe(name or "quickstart", overrides)
    before = load_recipe(str(stored), [])
    if name or overrides:
        now = load_recipe(name or str(stored), overrides)
        changed = [
            (key, old, new)
            for key, old, new in differing_fields(before, now)
            if key not in _FREE_TO_CHANGE and not re.fullmatch(_FREE_PATTERN, key)
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
    "data.path",
    "data.images",
    "data.changed",
    "data.max_corrupt_fraction",
    "teacher_cache.path",
    "train.steps",
    "train.epochs",
    "train.allowed_licences",
    "train.max_bad_steps",
    "student.licence",
    "train.log_every",
    "student.grad_checkpointing",
    "umt.grad_checkpointing",
    "kpu.adapter.grad_checkpointing",
    "train.loggers",
    "train.tensorboard",
    "checkpoint.every_steps",
    "checkpoint.keep",
}
_FREE_PATTERN = r"teachers\.\d+\.(checkpoint|licence)|monitor\..*"
"""Keys that a resumed run may change: they do not affect what was trained so far, or are compared
with it (pictures, cache, length, teachers' weights) before anything is."""


if __name__ == "__main__":
    sys.exit(main())
