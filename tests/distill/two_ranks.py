"""Gradients under DDP and FSDP2 in one start of torchrun, which takes far longer than the rest:
`python -m tests.distill.two_ranks FOLDER`.

FOLDER holds `batch.pt`, `ddp.yaml` and `fsdp.yaml`, and gets `ddp.pt` and `fsdp.pt`.
"""

import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from distill.distributed import Ranks, join_ranks, wrap
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.recipe_io import make_recipe

DIMS = {"cls": FeatureDims(24, 24), "mae": FeatureDims(16, 16), "dino": FeatureDims(32, 32)}


def gradients(folder: Path, parallel: str, ranks: Ranks) -> dict[str, Tensor]:
    """Gradients of one step on this rank's share of the batch."""
    recipe = make_recipe(yaml.safe_load((folder / f"{parallel}.yaml").read_text()))
    torch.manual_seed(0)
    method = build_method(recipe, DIMS)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    model = wrap(method, recipe.train, ranks)
    mine = slice(ranks.rank, None, ranks.world)
    targets = {name: Features(s[mine], p[mine]) for name, (s, p) in batch["targets"].items()}
    losses = model({"image": batch["images"][mine]}, targets)
    losses["loss"].backward()
    grads = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return grads


def work(folder: Path) -> None:
    with join_ranks("cpu") as ranks:
        for parallel in ("ddp", "fsdp"):
            grads = gradients(folder, parallel, ranks)
            if ranks.first:
                torch.save(grads, folder / f"{parallel}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
