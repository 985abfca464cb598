"""The modules that are traced: tensors in, tensors out, in the order of `signature.py`. Rebuilt
from a run folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from contract.errors import UserError
from contract.signature import (
    FEATURES,
    FEATURES_GLOBAL,
    FUSED,
    INTERACTION,
    MAP_OF_STRIDE,
    SPACES,
    Port,
    Signature,
    backbone_ports,
    feature_ports,
    head_graph,
    head_ports,
    image_port,
    layer_ports,
    map_ports,
    task_port,
)
from contract.tasks import TASKS, Task
from distill.evaluate.encoder import RunEncoder
from distill.features import Features
from distill.heads import Head, load_head, scaled
from distill.methods.deployment import BACKBONE, COUPLING, Deployment, ShippedHead
from distill.methods.losses import Prediction
from distill.models.weights import tensors_sha256
from distill.runs import Run, load_run

DPT = "dpt-depth"
"""Kind of the head that reads four layers."""


class BackboneGraph(nn.Module):
    """uint8 [B, H, W, 3] to the student's features, for clients and for the other graphs.

    Where sizes vary, the graph itself must refuse a side that is no multiple of the stride:
    convolutions would crop it.
    """

    def __init__(self, deployment: Deployment, varying: bool) -> None:
        super().__init__()
        self.preprocess, self.student, self.varying = (
            deployment.preprocess,
            deployment.student,
            varying,
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """backbone_global [B, d], backbone_patches [B, h*w, d], features [B, h, w, d],
        features_global [B, 1, d]; of a student with further maps, of each also
        backbone_s<stride> [B, h_l*w_l, d_l] and features_s<stride> [B, h_l, w_l, d_l].
        """
        return self.tell(self.student(self.normalize(image)))

    def normalize(self, image: Tensor) -> Tensor:
        """What the network takes."""
        # bytes become floats before anything else happens to them: TensorRT only casts bytes
        pixels = image.float() / 255
        if self.varying:
            # whole cells, or an error; the transposition in between keeps runtimes from joining the
            # two reshapes into none
            side = self.student.stride
            cells = pixels.unflatten(2, (image.shape[2] // side, side)).unflatten(
                1, (image.shape[1] // side, side)
            )
            pixels = cells.permute(0, 5, 1, 2, 3, 4).flatten(4, 5).flatten(2, 3)
        else:
            pixels = pixels.permute(0, 3, 1, 2)
        pixels = self.preprocess.normalize(pixels)
        # normalisation stays in float32 whatever the network's precision
        return pixels.to(next(self.student.parameters()).dtype)

    def tell(self, result: Features) -> tuple[Tensor, ...]:
        """The outputs of the student's features."""
        summary, patches = result.summary.float(), result.patches.float()
        maps = (value for m in result.maps for value in (m.float().flatten(1, 2), m.float()))
        return summary, patches.flatten(1, 2), patches, summary.unsqueeze(1), *maps


class LayersGraph(BackboneGraph):
    """The backbone and, from the same pass, the four layers that a DPT head reads."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The backbone's outputs, then layers_k [B, h_k, w_k, d_k] and layers_k_global [B, 1, d_k],
        shallow to deep.
        """
        features, layers = self.student.layers(self.normalize(image))
        flat = (
            value.float()
            for layer in layers
            for value in (layer.patches, layer.summary.unsqueeze(1))
        )
        return (*self.tell(features), *flat)


class InteractionGraph(nn.Module):
    """A method's coupling part: features to spaces [B, N, M, c]."""

    def __init__(self, coupling: nn.Module) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, features: Tensor, features_global: Tensor) -> Tensor:
        """Couple [B, h, w, d] and [B, 1, d]."""
        dtype = next(self.coupling.parameters()).dtype
        return self.coupling(Features(features_global[:, 0].to(dtype), features.to(dtype))).float()


class HeadGraph(nn.Module):
    """One teacher's head, on spaces or on those of the student's features that it reads.

    `maps` are the strides of the student's further maps.
    """

    def __init__(self, head: ShippedHead, prefix: int, maps: Sequence[int]) -> None:
        super().__init__()
        self.head, self.reads, self.has_token = head.module, head.reads, head.has_token
        self.prefix, self.maps = prefix, tuple(maps)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The token [B, g] if the head predicts one, and patches [B, h*w, d]."""
        result = self.predict(*inputs)
        patches = result.patches.flatten(1, 2).float()
        return (result.token.float(), patches) if self.has_token else (patches,)

    def predict(self, *inputs: Tensor) -> Prediction:
        """The head's own prediction; behind a coupling part its map is a single row."""
        dtype = next((p.dtype for p in self.head.parameters()), torch.float32)
        inputs = tuple(value.to(dtype) for value in inputs)
        if COUPLING in self.reads:
            # a head asks for the grid to tell the class position from patches: one row of all of
            # them says as much
            return self.head(inputs[0], (1, inputs[0].shape[1] - self.prefix))
        given = dict(zip(self.reads, inputs, strict=True))
        summary = given["summary"][:, 0] if "summary" in given else None
        maps = tuple(given.get(f"maps.{stride}") for stride in self.maps)
        finest = next(value for value in given.values() if value.ndim == 4)
        features = Features(summary, given.get("patches"), maps)
        return self.head(features, tuple(finest.shape[1:3]))


class TaskGraph(nn.Module):
    """A task head of `distill.evaluate`, with the teacher's head in front of it if it reads one."""

    def __init__(self, task: Task, head: nn.Module, reader: HeadGraph | None) -> None:
        super().__init__()
        self.task, self.head, self.reader = task, head, reader

    def forward(self, *inputs: Tensor) -> Tensor:
        """The task's output: [B, C], [B, h*w] or [B, h*w, C]."""
        if self.reader is not None:
            seen = self.reader.predict(*inputs)
            # without a token the map's own vector stands for the picture
            vector = seen.summary if seen.token is None else seen.token
            value = seen.patches if self.task.dense else vector
        else:
            value = inputs[0] if self.task.dense else inputs[0][:, 0]
        value = value.to(next(self.head.parameters()).dtype)
        return flatten_positions(self.head(value).float())


class DPTGraph(nn.Module):
    """A DPT head of `distill.evaluate`, on the backbone's layers."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *layers: Tensor) -> Tensor:
        """The task's output, such as metres [B, h*w], of maps and vectors in turn, shallow to
        deep.
        """
        dtype = next(self.head.parameters()).dtype
        maps, vectors = ([value.to(dtype) for value in layers[start::2]] for start in (0, 1))
        pairs = [(vector[:, 0], layer) for vector, layer in zip(vectors, maps, strict=True)]
        return flatten_positions(self.head(pairs))


def flatten_positions(values: Tensor) -> Tensor:
    """A head's [B, h, w] as [B, h*w], its [B, C, h, w] as [B, h*w, C]; scores [B, C] stay."""
    if values.ndim == 4:
        return values.flatten(2).transpose(1, 2)
    return values.flatten(1) if values.ndim == 3 else values


class FusedGraph(nn.Module):
    """Everything a client may ask for in one graph."""

    def __init__(
        self,
        backbone: "Part",
        interaction: nn.Module | None,
        parts: Sequence["Part"],
        client: Sequence[Port],
    ) -> None:
        super().__init__()
        self.backbone, self.interaction = backbone.module, interaction
        self.backbone_names = [port.name for port in backbone.signature.outputs]
        self.client_names = [port.name for port in client]
        self.parts = nn.ModuleList(part.module for part in parts)
        self.reads = [[port.name for port in part.signature.inputs] for part in parts]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """What clients get of the backbone, then the outputs of every head and task."""
        known = dict(zip(self.backbone_names, self.backbone(image), strict=True))
        if self.interaction is not None:
            known[SPACES] = self.interaction(known[FEATURES], known[FEATURES_GLOBAL])
        result = [known[name] for name in self.client_names]
        for module, reads in zip(self.parts, self.reads, strict=True):
            message = module(*(known[name] for name in reads))
            result += message if isinstance(message, tuple) else (message,)
        return tuple(result)


@dataclass(frozen=True)
class Part:
    """A graph to be: its module, its signature, and facts for the manifest and metadata."""

    module: nn.Module
    signature: Signature
    about: dict = field(default_factory=dict)


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

    @cached_property
    def encoder(self) -> RunEncoder:
        """The student as evaluation reads it."""
        return RunEncoder(self.run, BACKBONE)


def open_student(folder: Path) -> Student:
    """Load a run and its task heads; raises UserError for anything missing, damaged or not of this
    student.
    """
    run = load_run(folder)
    sha256 = tensors_sha256(run.method.state_dict())
    heads = [
        load_head(folder / "heads" / f"{task}.safetensors", sha256)
        for task in TASKS
        if (folder / "heads" / f"{task}.safetensors").exists()
    ]
    deployment = run.method.deploy()
    student = Student(run, deployment, tuple(heads), deployment.student.stride, sha256)
    if any(head.kind == DPT for head in heads):
        return replace(student, layer_strides=measure_strides(student))
    return student


@torch.inference_mode()
def measure_strides(student: Student) -> tuple[int, ...]:
    """Pixels per position of the four layers; raises UserError where they are no whole part of the
    student's stride.
    """
    stride = student.stride
    size = max(1, student.run.recipe.student.image_size // stride) * stride
    layers = student.encoder.layers(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    rows = [patches.shape[1] for _, patches in layers]
    if any(size % n or stride % (size // n) for n in rows):
        raise UserError(
            f"the layers of '{student.run.recipe.student.name}' have {', '.join(map(str, rows))} "
            f"rows for {size} pixels, which its stride {stride} is no multiple of: train the "
            "depth head with depth.head=linear, or move it away"
        )
    return tuple(size // n for n in rows)


def build_parts(student: Student, height: int | None, width: int | None) -> list[Part]:
    """Every graph of a student: backbone, interaction if there is one, heads, tasks, fused.

    `height` and `width` are pixels, None where they vary.
    """
    deployment, stride = student.deployment, student.stride
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
    if any(pixels > stride for pixels in maps) and not (height and width):
        raise UserError(
            f"--resolutions: the student's maps of a position every {max(maps)} pixels are coarser "
            f"than its stride {stride}, so sizes cannot vary: give one"
        )
    client = backbone_ports(d, positions)
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
            backbone_ports(d, positions) + inputs + map_outputs + layers,
        ),
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
            "the M spaces after their interaction, for the heads",
        )
        interaction = Part(InteractionGraph(coupling), Signature(INTERACTION, inputs, (spaces,)))
        parts.append(interaction)
        by_read[COUPLING] = spaces
    readers: dict[str, HeadGraph] = {}
    read: dict[str, tuple[Port, ...]] = {}
    heads = []
    for label, head in deployment.shipped.items():
        dims = student.run.dims[label]
        readers[label] = HeadGraph(head, prefix, maps)
        reads = read[label] = tuple(by_read[name] for name in head.reads)
        ports = head_ports(
            label,
            dims.summary if head.has_token else None,
            dims.patches,
            _positions_of(reads, positions),
            not head.free_length,
        )
        heads.append(
            Part(readers[label], Signature(head_graph(label), reads, ports), {"teacher": label})
        )
    tasks = [
        build_dpt(head, layers, student.layer_strides[0], height, width)
        if head.kind == DPT
        else build_task(head, readers, read, inputs, positions, stride)
        for head in student.heads
    ]
    fused = FusedGraph(
        backbone, interaction.module if interaction else None, [*heads, *tasks], client
    )
    outputs = client + tuple(p for part in [*heads, *tasks] for p in part.signature.outputs)
    return [*parts, *heads, *tasks, Part(fused, Signature(FUSED, (image,), outputs))]


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
    positions: int | str = f"{head.task}_positions"
    if height and width:
        about["grid"] = (scaled(height // finest, scale), scaled(width // finest, scale))
        positions = about["grid"][0] * about["grid"][1]
    port = task_port(TASKS[head.task], 1, positions, f"cell of {finest / scale:g} pixels")
    return Part(DPTGraph(head.module), Signature(head.task, layers, (port,)), about)


def describe(head: Head) -> dict:
    """What a client should know of a head."""
    names = ("reads", "size", *TASKS[head.task].facts)
    return {name: head.about[name] for name in names if name in head.about}
