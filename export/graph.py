"""Every graph of a student, rebuilt from its run folder: which modules, which inputs and
outputs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from contract.errors import UserError
from contract.signature import (
    FEATURES,
    FITTED,
    FREE,
    FUSED,
    INTERACTION,
    MAP_OF_STRIDE,
    SPACES,
    TEACHERS,
    FurtherMap,
    Port,
    Signature,
    backbone_ports,
    dpt_axis,
    feature_ports,
    head_graph,
    head_ports,
    image_port,
    layer_ports,
    map_ports,
    second_port,
    task_port,
)
from contract.tasks import POSITIONS, TASKS
from contract.views import SQUASH, ViewPolicy
from distill.evaluate.encoder import RunEncoder
from distill.features import scaled
from distill.heads import DECODER, Head, load_head
from distill.methods.deployment import BACKBONE, COUPLING, Deployment, ShippedHead
from distill.runs import Checkpoint, Run, load_run
from export.modules import (
    BackboneGraph,
    DecoderGraph,
    DPTGraph,
    FusedGraph,
    HeadGraph,
    InteractionGraph,
    LayersGraph,
    Part,
    PyramidGraph,
    TaskGraph,
)

log = logging.getLogger(__name__)

DPT = "dpt-depth"
"""Kind of the head that reads four layers."""
UPERNET = "upernet-segmentation"
"""Kind of the head that reads the student's further maps, all of them."""


@dataclass(frozen=True)
class Student:
    """A run folder as export sees it."""

    run: Run
    deployment: Deployment
    heads: tuple[Head, ...]
    stride: int
    sha256: str
    layer_strides: tuple[int, ...] = ()
    """Pixels per position of the layers a DPT head reads, empty without such a head."""
    merged: int = 0
    """Layers of its network whose branches were merged (see `merge`)."""
    view: ViewPolicy = SQUASH
    """What it is shown of pictures."""

    @cached_property
    def encoder(self) -> RunEncoder:
        """The student as evaluation reads it."""
        return RunEncoder(self.run, BACKBONE)


def open_student(
    folder: Path,
    checkpoint: Checkpoint | None = None,
    trust_code: bool = False,
    view: str | None = None,
) -> Student:
    """Load a run, or a checkpoint of it, and its task heads, those whose decoder is the user's own
    code only with `trust_code`; raises UserError for anything missing, damaged or not of this
    student. `view`: in place of the recipe's.
    """
    run = load_run(folder, checkpoint=checkpoint)
    if not run.finished:
        log.warning("weights   %s", run.weights)
        folder = folder / "evaluation" / f"step_{run.step}"
    heads = [
        load_head(folder / "heads" / f"{task}.safetensors", run.sha256, trust_code)
        for task in TASKS
        if (folder / "heads" / f"{task}.safetensors").exists()
    ]
    deployment = run.method.deploy()
    student = Student(
        run,
        deployment,
        tuple(heads),
        deployment.student.stride,
        run.sha256,
        view=ViewPolicy.parse(view or run.recipe.view).on(run.recipe.student.mean),
    )
    _compare_views(student)
    if any(head.kind == DPT for head in heads):
        return replace(student, layer_strides=measure_strides(student))
    return student


def _compare_views(student: Student) -> None:
    """Warn of heads whose scores were taken with another view than the bundle's."""
    for head in student.heads:
        scored = head.about.get("view", str(student.view))
        if scored != str(student.view):
            log.warning(
                "view      head %s was scored with view %s, but the bundle has %s: its scores do "
                "not hold there (--view %s)",
                *(head.task, scored, student.view, scored),
            )


@torch.inference_mode()
def measure_strides(student: Student) -> tuple[int, ...]:
    """Pixels per position of the four layers; raises UserError where they do not divide the
    student's stride.
    """
    stride = student.stride
    size = max(1, student.run.recipe.student.image_size // stride) * stride
    layers = student.encoder.layers(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    rows = [patches.shape[1] for _, patches in layers]
    if any(size % n or stride % (size // n) for n in rows):
        raise UserError(
            f"the layers of '{student.run.recipe.student.name}' have {', '.join(map(str, rows))} "
            f"rows for {size} pixels, which do not divide its stride {stride}: train the "
            "depth head with depth.head=linear, or move it away"
        )
    return tuple(size // n for n in rows)


def build_parts(student: Student, height: int | None, width: int | None) -> list[Part]:
    """Every graph of a student: backbone, interaction if there is one, heads, tasks, fused.

    `height` and `width` are pixels, None where they vary.
    """
    deployment, stride = student.deployment.folded(), student.stride
    d, maps = deployment.student.width, deployment.student.map_strides
    rows, columns = (height // stride, width // stride) if height and width else ("rows", "columns")
    positions = rows * columns if height and width else "positions"
    image = image_port(height or "height", width or "width")
    layers: tuple[Port, ...] = ()
    for head in student.heads:
        if head.kind == DPT:
            layers = layer_ports(
                head.module.settings["widths"], student.layer_strides, stride, height, width
            )
    second = (second_port(d),) if deployment.student.second_token else ()
    client = backbone_ports(d, positions) + second
    inputs = feature_ports(d, rows, columns)
    by_read = dict(zip(("patches", "summary"), inputs, strict=True))
    map_outputs: tuple[Port, ...] = ()
    for pixels, width_of_map in zip(maps, deployment.student.map_widths, strict=True):
        pair = map_ports(pixels, width_of_map, height, width)
        client += pair[:1]
        map_outputs += pair
        by_read[f"maps.{pixels}"] = pair[1]
    backbone = Part(
        (LayersGraph if layers else BackboneGraph)(deployment, varying=not (height and width)),
        Signature(
            BACKBONE,
            (image,),
            backbone_ports(d, positions) + inputs + second + map_outputs + layers,
        ),
        {"merged_layers": student.merged} if student.merged else {},
    )
    parts, interaction = [backbone], None
    prefix = int(deployment.student.has_class_token)
    coupled = not isinstance(deployment.coupling, nn.Identity)
    if coupled:
        coupling = deployment.coupling
        n = positions + prefix if isinstance(positions, int) else "tokens"
        spaces = Port(
            SPACES,
            "float32",
            ("batch", n, coupling.spaces, coupling.space_dim + coupling.token_dim),
            "the M spaces after their last cross-space block, for the heads",
        )
        interaction = Part(
            InteractionGraph(coupling),
            Signature(INTERACTION, inputs, (spaces,)),
            {"class_tokens": prefix},
        )
        parts.append(interaction)
        by_read[COUPLING] = spaces
    readers: dict[str, HeadGraph] = {}
    read: dict[str, tuple[Port, ...]] = {}
    heads = []
    for label, head in deployment.shipped.items():
        dims = student.run.dims[label]
        if set(head.reads) <= {"summary"}:
            raise UserError(f"the head of teacher '{label}' reads no map of the student")
        readers[label] = HeadGraph(head, prefix, maps, stride)
        reads = read[label] = tuple(by_read[name] for name in head.reads)
        grids = [_positions_of([by_read[f"maps.{pixels}"]], positions) for pixels in head.strides]
        first, *further = grids or [_positions_of(reads, positions)]
        ports = head_ports(
            label,
            dims.summary if head.has_token else None,
            dims.patches,
            first,
            units_of(head),
            [FurtherMap(*of) for of in zip(head.strides[1:], dims.maps, further, strict=False)],
        )
        heads.append(
            Part(readers[label], Signature(head_graph(label), reads, ports), {"teacher": label})
        )
    tasks = []
    for head in student.heads:
        if head.kind == DPT:
            part = build_dpt(head, layers, student.layer_strides[0], height, width)
        elif head.kind == UPERNET:
            part = _build_pyramid(head, tuple(by_read[f"maps.{s}"] for s in maps), maps[0])
        elif head.kind == DECODER:
            label = head.about["reads"]
            part = _build_decoder(head, readers[label], read[label], inputs[0], height, width)
        else:
            part = build_task(head, readers, read, inputs, positions, stride)
        tasks.append(part)
    fused = FusedGraph(
        backbone, interaction.module if interaction else None, [*heads, *tasks], client
    )
    outputs = client + tuple(p for part in [*heads, *tasks] for p in part.signature.outputs)
    return [*parts, *heads, *tasks, Part(fused, Signature(FUSED, (image,), outputs))]


def units_of(head: ShippedHead) -> dict[str, str]:
    """What the length of a head's outputs means."""

    def unit(kind: str) -> str:
        if kind not in head.free_length:
            return TEACHERS
        normalizer = head.normalizer
        return FITTED if normalizer is not None and normalizer.lengths.is_fitted(kind) else FREE

    return {kind: unit(kind) for kind in ("token", "patches", "maps")}


def _positions_of(reads: Sequence[Port], positions: int | str) -> int | str:
    """Positions of a head's map: the student's, unless it reads nothing but a further map."""
    grids = [port.axes[1:3] for port in reads if port.name.startswith(MAP_OF_STRIDE)]
    if not grids or any(port.name in (FEATURES, SPACES) for port in reads):
        return positions
    rows, columns = grids[0]
    if isinstance(rows, int) and isinstance(columns, int):
        return rows * columns
    return str(rows).replace("rows", "positions")


def build_task(
    head: Head,
    readers: dict[str, HeadGraph],
    read: dict[str, tuple[Port, ...]],
    features: tuple[Port, ...],
    positions: int | str,
    stride: int,
) -> Part:
    """The graph of one task head; one that reads a teacher's output carries that teacher's head
    inside, whose inputs are `read[label]`.

    (Fed from the head's own output, it would make that both an ensemble output and a step's input.)
    """
    task, reads = TASKS[head.task], head.about["reads"]
    about = describe(head)
    if task.dense:
        grid = (features[0].axes[1], features[0].axes[2])
        about |= {"stride": stride} | ({"grid": grid} if isinstance(positions, int) else {})
    reader = None if reads == BACKBONE else readers[reads]
    inputs = read[reads] if reader else (features[0] if task.dense else features[1],)
    port = task_port(task, head.module.settings.get("classes", 1), positions)
    return Part(TaskGraph(task, head.module, reader), Signature(task.name, inputs, (port,)), about)


def build_dpt(
    head: Head, layers: tuple[Port, ...], finest: int, height: int | None, width: int | None
) -> Part:
    """The graph of a DPT head; `finest` is the stride of the first layer, whose grid it multiplies
    by its first scale.

    What it says is finer than patches, so `about` has its own stride: floor(pixels / stride + 1/2)
    rows or columns.
    """
    scale = head.module.settings["scales"][0]
    about = describe(head) | {"stride": finest / scale}
    positions: int | str = dpt_axis(head.task)
    if height and width:
        about["grid"] = (scaled(height // finest, scale), scaled(width // finest, scale))
        positions = about["grid"][0] * about["grid"][1]
    port = task_port(TASKS[head.task], 1, positions, _cell(finest / scale))
    return Part(DPTGraph(head.module), Signature(head.task, layers, (port,)), about)


def _build_decoder(
    head: Head,
    reader: HeadGraph,
    reads: tuple[Port, ...],
    features: Port,
    height: int | None,
    width: int | None,
) -> Part:
    """The graph of a teacher's decoder, behind the student's head of that teacher; raises UserError
    for sizes that the decoder does not take.
    """
    task, decoder, about = TASKS[head.task], head.module, describe(head)
    patch = head.about.get("patch_stride", 0)
    grid = (height // patch, width // patch) if patch and height and width else None
    positions: int | str = 0
    if task.dense:
        if decoder.fixed and grid != (decoder.side, decoder.side):
            size = decoder.side * patch
            raise UserError(
                f"--resolutions: the decoder of task {task.name} runs on pictures of {size}x{size} "
                f"alone: give --resolutions {size}, or move its head away"
            )
        stride = patch / decoder.scale
        about["stride"] = int(stride) if stride.denominator == 1 else float(stride)
        positions = POSITIONS if decoder.scale == 1 else dpt_axis(task.name)
        if grid:
            rows, columns = (scaled(side, decoder.scale) for side in grid)
            about["grid"], positions = (rows, columns), rows * columns
    inputs = reads
    if reads[0].name == SPACES and not grid and task.dense:
        inputs = (*reads, features)
    cell = "patch" if positions == POSITIONS or decoder.scale == 1 else _cell(about["stride"])
    port = task_port(task, decoder.settings["classes"], positions, cell)
    return Part(DecoderGraph(decoder, reader, grid), Signature(task.name, inputs, (port,)), about)


def _cell(stride: float) -> str:
    return f"cell of {stride:g} pixels"


def _build_pyramid(head: Head, levels: tuple[Port, ...], finest: int) -> Part:
    """The graph of a head on the student's maps, which says something at every position of the
    finest, `finest` pixels each.
    """
    about = describe(head) | {"stride": finest}
    positions = _positions_of(levels[:1], "positions")
    if isinstance(positions, int):
        about["grid"] = levels[0].axes[1:3]
    classes = head.module.settings["classes"]
    port = task_port(TASKS[head.task], classes, positions, _cell(finest))
    return Part(PyramidGraph(head.module), Signature(head.task, levels, (port,)), about)


def describe(head: Head) -> dict:
    """What a client should know of a head."""
    names = ("reads", "size", *TASKS[head.task].facts)
    return {name: head.about[name] for name in names if name in head.about}
