"""Gradients under DDP and FSDP2 in one start of torchrun, which takes far longer than the rest:
`python -m tests.distill.two_ranks FOLDER`.

FOLDER holds `batch.pt` and a recipe `NAME.yaml` for each case, and gets `NAME.pt`, and
`settled_RANK.json`, the teachers' precision as each rank has settled it.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from distill.config import TeacherConfig, TeacherRuntime
from distill.distributed import Ranks, join_ranks, wrap
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.method import Progress
from distill.recipe_io import make_recipe
from distill.teachers import build_teacher, precision
from distill.training.loop import AUTOCAST
from distill.training.memory_format import set_memory_format

DIMS = {"cls": FeatureDims(24, 24), "mae": FeatureDims(16, 16), "dino": FeatureDims(32, 32)}


def gradients(folder: Path, case: str, ranks: Ranks) -> dict[str, Tensor]:
    """Gradients of one step on this rank's share of the batch."""
    recipe = make_recipe(yaml.safe_load((folder / f"{case}.yaml").read_text()))
    torch.manual_seed(0)
    method = build_method(recipe, DIMS)
    set_memory_format(method, recipe.train, ranks.device)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    model = wrap(method, recipe.train, ranks)
    mine = slice(ranks.rank, None, ranks.world)
    targets = {name: Features(s[mine], p[mine]) for name, (s, p) in batch["targets"].items()}
    method.before_step(Progress(0, 1, 1))
    kind = AUTOCAST[recipe.train.precision]
    with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
        losses = model(dict.fromkeys(("image", "image.plain"), batch["images"][mine]), targets)
    losses["loss"].backward()
    grads = {}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            grads[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return grads


def settled(ranks: Ranks) -> dict[str, str]:
    """What the teacher's precision is where every rank has bf16 arithmetic, and where one has."""
    config = {"name": "vit_tiny_patch16_224", "role": "dino", "image_size": 32}
    config |= {"pretrained": False, "kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    result = {}
    for case, able in (("all", True), ("one", ranks.first)):
        precision.has_bf16 = lambda able=able: able
        teacher = build_teacher(TeacherConfig(**config), TeacherRuntime(), 0)
        result |= {case: precision.settle_precisions([teacher], None, None, ranks)["dino"]}
        assert teacher.identity()["precision"] == result[case]
    return result


def work(folder: Path) -> None:
    with join_ranks("cpu") as ranks:
        (folder / f"settled_{ranks.rank}.json").write_text(json.dumps(settled(ranks)))
        for recipe in sorted(folder.glob("*.yaml")):
            grads = gradients(folder, recipe.stem, ranks)
            if ranks.first:
                torch.save(grads, folder / f"{recipe.stem}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
