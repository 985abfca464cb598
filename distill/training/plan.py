"""`--dry-run`: what a recipe would train, counted on the meta device (no weights, no images, no
arithmetic).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from contract.errors import UserError
from contract.tables import entry, print_table
from distill.config import DETECTOR, Recipe, Section, TeacherConfig
from distill.data.batches import check_batch_size
from distill.data.crops import View, view_of
from distill.data.pictures import open_pictures
from distill.features import features_of
from distill.fields import source_of
from distill.launch import planned_world
from distill.licences import inheritance
from distill.methods import METHODS, build_method
from distill.methods.method import Method, Progress
from distill.models.batch_norm import values_per_channel
from distill.models.meta import building
from distill.models.packaged import describe_checkpoint
from distill.models.published import activation_note
from distill.models.start import checkpoint_names, student_note
from distill.teachers import Teacher, build_teacher, weights_source
from distill.teachers.cache import Spec, bytes_a_slot
from distill.teachers.grounding_dino import architecture
from distill.teachers.timm import teacher_notes
from distill.training.schedule import Schedule, resolve_views

_GIGA = 1e9

_UNKNOWN = 10**9
"""Pictures assumed if their number is unknown, so that no batch is too large."""


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
    """The student's side of a step: its parts, and the bytes a picture keeps for the backward
    pass, by its stream.
    """

    parts: list[Part]
    stream_bytes: Mapping[str, int]
    method: Method
    """On the meta device."""


def meta_teacher(config: TeacherConfig, recipe: Recipe, index: int) -> Teacher:
    """A teacher without weights, for its shapes and costs (a run as a teacher is loaded: it is
    small; and own code does what it does).
    """
    if config.name == "run" or source_of(config.name)[0] == "python":
        return build_teacher(config, recipe.teacher_runtime, index)
    changes: dict = {"checkpoint": None, "pretrained": False}
    if config.name == DETECTOR:
        changes["kwargs"] = architecture(config, index)
    bare = config.model_copy(update=changes)
    with building():
        return build_teacher(
            bare, recipe.teacher_runtime.model_copy(update={"compile": False}), index
        )


def method_cost(recipe: Recipe, teachers: list[Teacher]) -> Cost:
    """Count the parts of a recipe's method on the meta device, for one picture of every stream, and
    what a picture of each keeps.
    """
    method, views = _meta_method(recipe, teachers)
    streams = list(dict.fromkeys(view.stream for view in views))
    with FlopCounterMode(display=False) as counter:
        kept = _kept_bytes(method, views, teachers, dict.fromkeys(streams, 1))
    stream_bytes = {streams[0]: kept}
    for stream in streams[1:]:
        second = _kept_bytes(method, views, teachers, dict.fromkeys(streams, 1) | {stream: 2})
        stream_bytes[stream] = second - kept
        stream_bytes[streams[0]] -= stream_bytes[stream]
    flops = counter.get_flop_counts()
    parts = [
        Part(
            name,
            *_count_parameters(child),
            _flops_of(flops, f"{type(method).__name__}.{name}") / _GIGA,
        )
        for name, child in method.named_children()
        if _count_parameters(child)[0]
    ]
    return Cost(parts, stream_bytes, method)


def _meta_method(recipe: Recipe, teachers: list[Teacher]) -> tuple[Method, tuple[View, ...]]:
    """A recipe's method on the meta device, before its first step, and its views."""
    student = recipe.student.model_copy(update={"pretrained": False, "checkpoint": None})
    # Statistics of targets do not exist yet, and they cost next to nothing.
    targets = recipe.targets.model_copy(update={"normalize": "none"})
    recipe = recipe.model_copy(update={"student": student, "targets": targets})
    with building():
        method = build_method(recipe, {teacher.label: teacher.dims for teacher in teachers}).train()
    if values_per_channel(method.student.net, recipe.student.image_size) == 1:
        # costs are those of one picture, over which these cannot average
        for part in method.modules():
            if isinstance(part, _BatchNorm):
                part.eval()
    method.before_step(Progress(0, recipe.train.steps or 1, 1))
    return method, resolve_views(recipe, method, teachers)


def _kept_bytes(
    method: Method, views: Sequence[View], teachers: list[Teacher], pictures: Mapping[str, int]
) -> int:
    """Bytes that autograd keeps of a forward pass of so many `pictures` of every stream."""
    kept = _KeptBytes(method)
    with torch.device("meta"), kept.hooks():
        crops = {
            name: torch.empty(shape, dtype=kind)
            for view in views
            for name, (shape, kind) in view.shapes(pictures[view.stream]).items()
        }
        features = {}
        for teacher in teachers:
            seen = view_of(method.teacher_views[teacher.label])
            view = next(view for view in views if view.name == seen)
            shapes = teacher.shapes.items()
            count = view.crops * pictures[view.stream]
            features[teacher.label] = features_of(
                {name: torch.empty(count, *shape) for name, shape in shapes}
            )
        method(crops, features)
    return kept.total


def _flops_of(counts: Mapping[str, Mapping[object, int]], part: str) -> int:
    """FLOPs of a part: of its own calls or, where a method calls what is inside it (a mapping of
    heads, a student's layers), of the outermost modules inside.
    """
    inside = [name for name in counts if name.startswith(f"{part}.")]
    outermost = [n for n in inside if not any(n.startswith(f"{other}.") for other in inside)]
    return max(
        sum(counts.get(part, {}).values()),
        sum(sum(counts[name].values()) for name in outermost),
    )


class _KeptBytes:
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


def _count_parameters(module: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of those that train."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def _count_images(recipe: Recipe) -> tuple[int | None, str]:
    """Number of pictures, and where the number comes from; falls back on `data.images` without
    files.
    """
    try:
        number = len(open_pictures(recipe.data))
    except UserError as error:
        if recipe.data.images is None:
            return None, f"not readable here ({error})"
        return recipe.data.images, f"from data.images; not readable here ({error})"
    return number, f"counted ({recipe.data.kind})"


def print_plan(recipe: Recipe, monitor: str | None = None) -> None:
    """Print parts, costs, views, images, steps and memory of a recipe, and what `monitor` says."""
    teachers = [meta_teacher(t, recipe, i) for i, t in enumerate(recipe.teachers)]
    cost = method_cost(recipe, teachers)
    images, origin = _count_images(recipe)
    schedule = Schedule(recipe, cost.method, teachers, images or _UNKNOWN)
    _print_parts(recipe, cost, teachers, schedule)
    for line in inheritance(recipe):
        _say("inherits", line)
    for note in _notes(recipe, cost.method, teachers):
        _say("note", note)
    part, variants = METHODS[recipe.method].variants(recipe)
    if variants:
        _compare(part, variants, recipe, cost, teachers)
    for view in schedule.views:
        seen = [
            label for label, key in cost.method.teacher_views.items() if view_of(key) == view.name
        ]
        _say(
            "view",
            f"{view.name}: {view.crops} of {view.size} px, "
            f"{schedule.batch_sizes[view.stream]:,} pictures a step of stream {view.stream}"
            + (f", for {', '.join(seen)}" if seen else ""),
        )
    for caution in cost.method.cautions():
        _say("caution", caution)
    _say("images", f"{f'{images:,}' if images else 'unknown'} {origin}")
    _print_schedule(recipe, schedule, images)
    if recipe.teacher_cache.views and images:
        _print_cache(recipe, schedule, cost.method, teachers, images)
    if monitor:
        _say("monitor", monitor)
    world = planned_world()
    _print_memory(recipe, cost, schedule, teachers, world)


def _say(label: str, text: str) -> None:
    print(entry(label, text, 13))


def _print_parts(recipe: Recipe, cost: Cost, teachers: list[Teacher], schedule: Schedule) -> None:
    """A row for each part of the method and each teacher, whose cost is that of all its crops."""
    rows = []
    for part in cost.parts:
        row = [part.name, f"{part.parameters:,}", f"{part.trainable:,}", f"{part.gflop:.2f}", ""]
        rows.append((*row, _student_source(recipe) if part.name == "student" else ""))
    crops = {view.name: view.crops for view in schedule.views}
    for config, teacher in zip(recipe.teachers, teachers, strict=True):
        shapes = ("x".join(map(str, shape)) for shape in teacher.shapes.values())
        gflop = crops[view_of(cost.method.teacher_views[teacher.label])] * teacher_gflop(teacher)
        row = (
            f"teacher {teacher.label} ({config.role})",
            f"{_count_parameters(teacher)[0]:,}",
            "0",
            f"{gflop:.2f}",
            " + ".join(shapes),
            weights_source(config),
        )
        rows.append(row)
    print_table(
        ("part", "parameters", "trainable", "forward GFLOP", "features", "weights"),
        rows,
        left=("features", "weights"),
        title=f"{recipe.method}: {recipe.student.name} at {recipe.student.image_size} px, one "
        "image",
    )
    print()


def _notes(recipe: Recipe, method: Method, teachers: list[Teacher]) -> list[str]:
    """What a user should know of the weights, as far as names and the files beside them say."""
    notes = [
        note
        for index, (config, teacher) in enumerate(zip(recipe.teachers, teachers, strict=True))
        if config.name not in ("run", DETECTOR) and not source_of(config.name)[0]
        if config.checkpoint or config.pretrained
        for note in teacher_notes(config, teacher.net, index, checkpoint_names(config.checkpoint))
    ]
    student = recipe.student
    if student.pretrained or student.checkpoint:
        names = checkpoint_names(student.checkpoint)
        note = activation_note(student.name, method.student.net, student.checkpoint, names)
        notes += [f"student: {note}"] if note else []
    said = student_note(student, recipe.teachers)
    notes += [said] if said else []
    return notes


def _student_source(recipe: Recipe) -> str:
    """Where the student's weights come from, in a few words."""
    if recipe.student.checkpoint:
        return describe_checkpoint(recipe.student.checkpoint)
    return f"timm hub, {recipe.student.name}" if recipe.student.pretrained else "random weights"


def teacher_gflop(teacher: Teacher) -> float:
    """Forward cost of a teacher at its own input size."""
    device = teacher.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher(
            torch.empty(
                1, 3, teacher.image_size, teacher.image_size, dtype=torch.uint8, device=device
            )
        )
    return counter.get_total_flops() / _GIGA


def _compare(
    part: str,
    variants: Mapping[str, Recipe],
    recipe: Recipe,
    cost: Cost,
    teachers: list[Teacher],
) -> None:
    """Print the cost of a part of the method in variants of the recipe, compared with the student's
    forward pass.
    """
    rows = []
    for name, variant in variants.items():
        result = cost if variant == recipe else method_cost(variant, teachers)
        parts = {p.name: p for p in result.parts}
        share = f"{100 * parts[part].gflop / parts['student'].gflop:.0f} %"
        name += " (this recipe)" if variant == recipe else ""
        rows.append((name, f"{parts[part].parameters:,}", f"{parts[part].gflop:.2f}", share))
    print_table(
        ("recipe", "parameters", "forward GFLOP", "of the student's"),
        rows,
        title=f"alternatives: cost of the {part}",
    )
    print()


def _print_schedule(recipe: Recipe, schedule: Schedule, images: int | None) -> None:
    train = recipe.train
    if images is None:
        _say("steps", f"{train.steps or 'unknown, as is the number of images'}")
        return
    world = planned_world()
    for stream, size in schedule.batch_sizes.items():
        check_batch_size(stream, size, images, recipe.data.repeats, world, train.accumulate)
    steps, per_epoch = schedule.steps, schedule.per_epoch
    _say(
        "steps",
        f"{steps:,} of {schedule.pictures_per_step} images = {steps / per_epoch:.1f} "
        f"epochs of {per_epoch:,} steps, {steps * schedule.pictures_per_step:,} images seen",
    )


def _print_cache(
    recipe: Recipe,
    schedule: Schedule,
    method: Method,
    teachers: list[Teacher],
    images: int,
) -> None:
    """Print how much room the cached features of the teachers take."""
    views = {view.name: view for view in schedule.views}
    specs = {
        teacher.label: Spec(views[view_of(method.teacher_views[teacher.label])], teacher.shapes)
        for teacher in teachers
    }
    slots, dtype = images * recipe.teacher_cache.views, recipe.teacher_cache.dtype
    size = slots * bytes_a_slot(specs, dtype) / _GIGA
    _say(
        "cache",
        f"{slots:,} views, {size:.2f} GB of {dtype} on disk; teachers run on each view once",
    )


def _print_memory(
    recipe: Recipe,
    cost: Cost,
    schedule: Schedule,
    teachers: list[Teacher],
    world: int,
) -> None:
    """Print an estimate of device memory on each of `world` ranks; all streams share one backward
    pass, so that their activations add up.
    """
    train = recipe.train
    trainable = sum(part.trainable for part in cost.parts)
    frozen = sum(_count_parameters(teacher)[0] for teacher in teachers)
    shards = world if train.parallel == "fsdp" else 1
    # weights, gradients and two moments of AdamW, 4 bytes each
    held = sum(part.parameters for part in cost.parts)
    # a momentum network has weights alone, and so has the average of all
    copies = held - trainable + (held if train.ema_decay else 0)
    state = (trainable * 16 + copies * 4) / shards / _GIGA
    micro = {
        stream: max(1, size // (world * train.accumulate))
        for stream, size in schedule.batch_sizes.items()
    }
    half = train.precision != "fp32"
    share = (0.6 if half else 1.0) / _GIGA
    streams = {stream: micro[stream] * size * share for stream, size in cost.stream_bytes.items()}
    activations = sum(streams.values())
    total = state + frozen * 4 / _GIGA + activations
    _say(
        "memory",
        f"about {total:.1f} GB a rank: {state:.1f} weights, gradients and moments, "
        f"{frozen * 4 / _GIGA:.1f} teachers, {activations:.1f} activations of "
        f"{sum(micro.values())} images "
        f"({world} rank{'s' if world > 1 else ''}"
        f"{', autocast keeps some in fp32' if half else ''})",
    )
    if len(streams) > 1:
        parts = (
            f"{size:.2f} of {micro[stream]} in stream {stream}" for stream, size in streams.items()
        )
        _say("activations", f"{' + '.join(parts)} = {activations:.2f} GB, in one backward pass")
    for switch, variant in _other_memory(recipe).items():
        try:
            method, views = _meta_method(variant, teachers)
        except UserError:  # a network that has no such switch
            continue
        other = _kept_bytes(method, views, teachers, micro) * share
        _say("activations", f"with {switch}: {other:.2f} GB in place of {activations:.2f}")
    _say("", "an estimate from shapes: workspace and fragmentation come on top")


def _other_memory(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with each of its method's memory switches turned over, and with all of those that
    are off turned on.
    """
    keys = METHODS[recipe.method].memory_switches(recipe)
    variants = {}
    for key in keys:
        variant = _turned_over(recipe, key.split("."))
        variants[f"{key}={_switch(variant, key)}"] = variant
    off = [key for key in keys if _switch(recipe, key) == "false"]
    if len(off) > 1:
        both = recipe
        for key in off:
            both = _turned_over(both, key.split("."))
        variants["both"] = both
    return variants


def _turned_over(section: Section, path: Sequence[str]) -> Section:
    """A section with the switch at `path` inside it turned over."""
    name, *rest = path
    value = getattr(section, name)
    return section.model_copy(update={name: _turned_over(value, rest) if rest else not value})


def _switch(recipe: Recipe, key: str) -> str:
    return str(reduce(getattr, key.split("."), recipe)).lower()
