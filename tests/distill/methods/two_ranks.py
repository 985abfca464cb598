"""A few steps of methods whose statistics are reduced over ranks, on drawn batches; as a command,
under torchrun, every rank takes its share of the batch and the first one saves the state.

    torchrun --nproc-per-node 2 -m tests.distill.methods.two_ranks FILE
"""

import sys

import torch
from torch import Tensor

from distill.config import Recipe
from distill.distributed import Ranks, join_ranks, wrap
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.method import Method, Progress
from distill.recipe_io import make_recipe
from distill.training.loop import build_optimizer

BATCH, STEPS, WIDTH = 4, 3, 24
KINDS = ("unic", "unic_batch", "dino", "ibot", "udi", "kpu", "kpu_famo", "kpu_famo_next")
KINDS += ("kpu_teacher_drop",)


def recipe_of(kind: str) -> Recipe:
    """UNIC by image or batch, SeFA with an objective, or KPU with a weighting, on a ViT of two
    blocks.
    """
    method = kind.split("_")[0] if kind.startswith(("unic", "kpu")) else "sefa"
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if kind == "udi":
        kwargs["reg_tokens"] = 1
    teachers = [
        {"name": "resnet10t", "role": role, "pretrained": False} for role in ("dino", "mae")
    ]
    values = {
        "method": method,
        "student": {"name": "vit_tiny_patch16_224", "image_size": 64, "kwargs": kwargs},
        "teachers": teachers,
        "data": {"kind": "packaged-photos"},
        "train": {"steps": STEPS, "batch_size": BATCH, "lr": 1e-3, "clip_grad": 0},
    }
    if method == "unic":
        values["unic"] = {"hidden": 16, "last_hidden": 16, "scope": kind.removeprefix("unic_")}
        if kind == "unic":
            values["unic"]["scope"] = "image"
    elif method == "kpu":
        adapter = {"blocks": 2, "heads": 2, "points": 2, "width": 32}
        weighting = kind.removeprefix("kpu").removeprefix("_").removesuffix("_next") or "equal"
        values["kpu"] = {"weighting": weighting, "adapter": adapter}
        if kind == "kpu_famo_next":
            values["kpu"]["famo_update"] = "next_batch"
        if kind == "kpu":
            for teacher in teachers:
                teacher["batch_size"] = BATCH  # a stream of its own
        if kind == "kpu_teacher_drop":
            values["kpu"]["levels"] = "pick"  # of four levels three learn nothing
    else:
        values["sefa"] = {"hidden": 16}
        values["ssl"] = {
            "kind": kind,
            "prototypes": 12,
            "head_hidden": 16,
            "bottleneck": 8,
            "locals": 2,
            "local_size": 32,
            "freeze_last_layer": 0,
            # AdamW's first steps are the signs of gradients: blunt what a near-zero one can do
            "teacher_temp": [0.5, 0.5],
            "student_temp": 0.5,
        }
    return make_recipe(values)


def draw(method: Method, step: int) -> tuple[dict[str, Tensor], dict[str, Features]]:
    """A batch of BATCH pictures and their teachers' features, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    views: dict[str, Tensor] = {}
    for view in method.views:
        shapes = view._replace(size=view.size or 64).shapes(BATCH)
        for name, (shape, kind) in shapes.items():
            if kind == torch.uint8:
                views[name] = torch.randint(0, 256, shape, generator=generator, dtype=kind)
            elif kind == torch.bool:
                views[name] = torch.rand(shape, generator=generator) < 0.4
            elif kind == torch.int64:
                views[name] = torch.randint(0, 4, shape, generator=generator)
            else:
                boxes = torch.tensor([0.1, 0.1, 0.8, 0.8]).repeat(shape[0], 1)
                views[name] = boxes + 0.2 * torch.rand(shape, generator=generator)
    seen = len(views[next(iter(method.teacher_views.values()))])
    targets = {}
    for label in method.teacher_views:
        summary = torch.randn(seen, WIDTH, generator=generator) * 2 + 1
        patches = torch.randn(seen, 2, 2, WIDTH, generator=generator) * 3 - 1
        targets[label] = Features(summary, patches)
    return views, targets


def share(values: Tensor, ranks: Ranks) -> Tensor:
    """This rank's pictures of a tensor [crops * BATCH, …]."""
    return values.unflatten(0, (-1, BATCH))[:, ranks.rank :: ranks.world].flatten(0, 1)


def kind_of(method: torch.nn.Module) -> torch.dtype:
    """The type of a method's weights."""
    return next(method.parameters()).dtype


def train(kind: str, ranks: Ranks) -> dict[str, Tensor]:
    """Take STEPS steps; the state afterwards, with the losses of the last one."""
    recipe = recipe_of(kind)
    torch.manual_seed(0)
    dims = {teacher.label: FeatureDims(WIDTH, WIDTH) for teacher in recipe.teachers}
    method = build_method(recipe, dims).train()
    if kind.startswith("kpu"):
        # biases before a norm of single channels have no gradient but rounding's, of which AdamW
        # takes the sign
        method.double()
    model = wrap(method, recipe.train, ranks)
    optimizer = build_optimizer(method, recipe.train, ranks.device)
    losses: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        progress = Progress(step, STEPS, 2)
        method.before_step(progress)
        views, targets = draw(method, step)
        losses = model(
            {name: share(view, ranks) for name, view in views.items()},
            {
                label: f.map(lambda t: share(t, ranks).to(kind_of(method)))
                for label, f in targets.items()
            },
        )
        losses["loss"].backward()
        if step == 0:
            first = _gradients_and_buffers(method)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
    named = {f"losses.{name}": ranks.mean(value.detach().clone()) for name, value in losses.items()}
    return {name: tensor.clone() for name, tensor in method.state_dict().items()} | named | first


def _gradients_and_buffers(method: Method) -> dict[str, Tensor]:
    """What the first batch alone decides, before AdamW turns small differences into steps."""
    gradients = {
        f"first.grad.{name}": parameter.grad.clone()
        for name, parameter in method.named_parameters()
        if parameter.grad is not None
    }
    return gradients | {f"first.{n}": b.clone() for n, b in method.named_buffers()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        states = {kind: train(kind, ranks) for kind in KINDS}
        if ranks.first:
            torch.save(states, sys.argv[1])
