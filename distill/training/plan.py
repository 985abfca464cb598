"""`--dry-run`: what a recipe would train, counted on the meta device (no weights, no images, no
arithmetic).
"""

import math
import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from contract.errors import UserError
from distill.config import CrossSpace, Recipe, TeacherConfig
from distill.data.pictures import open_pictures
from distill.features import Features
from distill.methods import build_method
from distill.teachers import Teacher, build_teacher, weights_source

GIGA = 1e9
MODES: tuple[CrossSpace, ...] = ("channel", "token", "axial", "grouped")


@dataclass(frozen=True)
class Part:
    """Cost of one part of the step, for one image: parameters, forward GFLOP (2 x
    multiply-adds).
    """

    name: str
    parameters: int
    trainable: int
    gflop: float


@dataclass(frozen=True)
class Cost:
    """The student's side of a step: its parts, and the bytes one image keeps for the backward
    pass.
    """

    parts: list[Part]
    activation_bytes: int


def meta_teacher(config: TeacherConfig, recipe: Recipe, index: int) -> Teacher:
    """A teacher without weights, for its shapes and costs (a teacher that is a run is loaded, it is
    small).
    """
    if config.name == "run":
        return build_teacher(config, recipe.teacher_runtime, index)
    bare = config.model_copy(update={"checkpoint": None, "pretrained": False})
    with torch.device("meta"):
        return build_teacher(
            bare, recipe.teacher_runtime.model_copy(update={"compile": False}), index
        )


def method_cost(recipe: Recipe, teachers: list[Teacher]) -> Cost:
    """Count the student, the interaction and the heads of a recipe on the meta device."""
    student = recipe.student.model_copy(update={"pretrained": False})
    # Statistics of targets do not exist yet, and they cost next to nothing.
    targets = recipe.targets.model_copy(update={"normalize": "none"})
    recipe = recipe.model_copy(update={"student": student, "targets": targets})
    with torch.device("meta"):
        method = build_method(recipe, {teacher.label: teacher.dims for teacher in teachers}).train()
        image = torch.empty(
            1, 3, recipe.student.image_size, recipe.student.image_size, dtype=torch.uint8
        )
        looks = {
            t.label: Features(
                torch.empty(1, t.dims.summary), torch.empty(1, *t.grid, t.dims.patches)
            )
            for t in teachers
        }
        kept = KeptBytes(method)
        with FlopCounterMode(display=False) as counter, kept.hooks():
            method({"image": image}, looks)
    flops = counter.get_flop_counts()
    parts = [
        Part(
            name,
            *count_parameters(child),
            sum(flops.get(f"{type(method).__name__}.{name}", {}).values()) / GIGA,
        )
        for name, child in method.named_children()
        if count_parameters(child)[0]
    ]
    return Cost(parts, kept.total)


class KeptBytes:
    """Adds up the distinct tensors autograd keeps for the backward pass, parameters aside."""

    def __init__(self, method: nn.Module) -> None:
        self.seen = {id(p) for p in method.parameters()}
        self.alive: list[torch.Tensor] = []
        self.total = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Context in which a forward pass is measured."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in self.seen:
            self.seen.add(id(base))
            self.alive.append(base)  # keeps the id from being used again
            self.total += base.numel() * base.element_size()
        return tensor


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of those that train."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def count_images(recipe: Recipe) -> tuple[int | None, str]:
    """Number of pictures, and where the number comes from; falls back on `data.images` where there
    are no files.
    """
    try:
        number = len(open_pictures(recipe.data))
    except UserError as error:
        if recipe.data.images is None:
            return None, f"not readable here ({error})"
        return recipe.data.images, f"as the recipe says; not readable here ({error})"
    return number, f"found ({recipe.data.kind})"


def print_plan(recipe: Recipe) -> None:
    """Print parts, costs, images, steps and memory of a recipe."""
    console = Console()
    teachers = [meta_teacher(t, recipe, i) for i, t in enumerate(recipe.teachers)]
    cost = method_cost(recipe, teachers)
    world = int(os.environ.get("WORLD_SIZE", "1"))

    table = Table(
        title=f"{recipe.method}: {recipe.student.name} at {recipe.student.image_size} px, one image"
    )
    for column in ("part", "parameters", "trainable", "forward GFLOP", "features", "weights"):
        table.add_column(
            column, justify="left" if column in ("part", "features", "weights") else "right"
        )
    for part in cost.parts:
        table.add_row(
            part.name, f"{part.parameters:,}", f"{part.trainable:,}", f"{part.gflop:.2f}", "", ""
        )
    for config, teacher in zip(recipe.teachers, teachers, strict=True):
        grid = "x".join(str(side) for side in teacher.grid)
        features = f"{teacher.dims.summary} + {grid} x {teacher.dims.patches}"
        size, _ = count_parameters(teacher)
        gflop = f"{teacher_gflop(teacher):.2f}"
        table.add_row(
            f"teacher {teacher.label} ({config.role})",
            f"{size:,}",
            "0",
            gflop,
            features,
            source(config),
        )
    console.print(table)

    if recipe.method == "umt" and recipe.umt.cross_mode:
        console.print(alternatives(recipe, teachers))
    images, origin = count_images(recipe)
    console.print(f"images       {f'{images:,}' if images else 'unknown'} {origin}")
    print_schedule(console, recipe, images)
    print_memory(console, recipe, cost, teachers, world)


def source(config: TeacherConfig) -> str:
    """Where a teacher's weights come from."""
    return weights_source(config)


def teacher_gflop(teacher: Teacher) -> float:
    """Forward cost of a teacher at its own input size."""
    device = next(teacher.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(
            torch.empty(
                1, 3, teacher.image_size, teacher.image_size, dtype=torch.uint8, device=device
            )
        )
    return counter.get_total_flops() / GIGA


def alternatives(recipe: Recipe, teachers: list[Teacher]) -> Table:
    """Cost of the interaction for every `umt.cross_space`, beside the student's forward."""
    table = Table(title="umt.cross_space: cost of the interaction")
    for column in ("cross_space", "parameters", "forward GFLOP", "of the student's"):
        table.add_column(column, justify="left" if column == "cross_space" else "right")
    for mode in MODES:
        umt = recipe.umt.model_copy(update={"cross_space": mode})
        parts = {
            p.name: p for p in method_cost(recipe.model_copy(update={"umt": umt}), teachers).parts
        }
        interaction, student = parts["interaction"], parts["student"]
        chosen = " (this recipe)" if mode == recipe.umt.cross_mode else ""
        share = f"{100 * interaction.gflop / student.gflop:.0f} %"
        table.add_row(
            mode + chosen, f"{interaction.parameters:,}", f"{interaction.gflop:.2f}", share
        )
    return table


def print_schedule(console: Console, recipe: Recipe, images: int | None) -> None:
    """Print steps and epochs."""
    train = recipe.train
    if images is None:
        console.print(f"steps        {train.steps or 'unknown: the number of images is'}")
        return
    per_epoch = images * recipe.data.repeats // train.batch_size
    if per_epoch == 0:
        raise UserError(
            f"train.batch_size = {train.batch_size} is more than {images} images x data.repeats = "
            f"{recipe.data.repeats}: raise data.repeats or lower train.batch_size"
        )
    steps = train.steps or train.epochs * per_epoch
    seen = steps * train.batch_size
    console.print(
        f"steps        {steps:,} of {train.batch_size} images = {steps / per_epoch:.1f} epochs of "
        f"{per_epoch:,} steps, {seen:,} images seen"
    )
    views = recipe.teacher_cache.views
    if views:
        per_view = sum(
            dim.summary + math.prod(grid) * dim.patches
            for dim, grid in (
                (t.dims, t.grid)
                for t in (meta_teacher(c, recipe, i) for i, c in enumerate(recipe.teachers))
            )
        )
        size = images * views * per_view * 2 / GIGA
        console.print(
            f"cache        {images * views:,} views, {size:.2f} GB on disk; teachers run on each "
            "view once"
        )


def print_memory(
    console: Console, recipe: Recipe, cost: Cost, teachers: list[Teacher], world: int
) -> None:
    """Print an estimate of device memory on each of `world` ranks."""
    train = recipe.train
    trainable = sum(part.trainable for part in cost.parts)
    frozen = sum(count_parameters(teacher)[0] for teacher in teachers)
    shards = world if train.parallel == "fsdp" else 1
    state = (
        trainable * 16 / shards / GIGA
    )  # weights, gradients and two moments of AdamW, 4 bytes each
    micro = max(1, train.batch_size // (world * train.accumulate))
    half = train.precision != "fp32"
    activations = micro * cost.activation_bytes * (0.6 if half else 1.0) / GIGA
    total = state + frozen * 4 / GIGA + activations
    console.print(
        f"memory       about {total:.1f} GB a rank: {state:.1f} weights, gradients and moments, "
        f"{frozen * 4 / GIGA:.1f} teachers, {activations:.1f} activations of {micro} images "
        f"({world} "
        f"rank{'s' if world > 1 else ''}{', autocast keeps some in fp32' if half else ''})"
    )
    console.print("[dim]An estimate from shapes: workspace and fragmentation come on top.[/dim]")
