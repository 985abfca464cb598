"""Whole runs in one start of torchrun: `python -m tests.distill.run_matrix FOLDER BACKEND` trains
each recipe `FOLDER/NAME.yaml` into `FOLDER/NAME`; BACKEND is torch.compile's.
"""

import functools
import sys
from pathlib import Path

import torch

from distill.distributed import join_ranks
from distill.recipe_io import load_recipe
from distill.training.loop import train
from distill.training.stop import StopSignal


def work(folder: Path, backend: str) -> None:
    torch.compile = functools.partial(torch.compile, backend=backend)
    with StopSignal() as stop, join_ranks("cpu") as ranks:
        for path in sorted(folder.glob("*.yaml")):
            recipe = load_recipe(str(path), [])
            if recipe.train.compile:
                torch._dynamo.reset()  # forget what was compiled for other runs
            train(recipe, folder / path.stem, ranks, False, stop)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
