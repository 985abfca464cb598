"""Whole runs in one start of torchrun: `python -m tests.distill.run_matrix FOLDER` trains each
recipe `FOLDER/NAME.yaml` into `FOLDER/NAME`.
"""

import sys
from pathlib import Path

from distill.distributed import join_ranks
from distill.recipe_io import load_recipe
from distill.training.loop import StopSignal, train


def work(folder: Path) -> None:
    with StopSignal() as stop, join_ranks("cpu") as ranks:
        for path in sorted(folder.glob("*.yaml")):
            train(load_recipe(str(path), []), folder / path.stem, ranks, False, stop)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
