"""The modules that are traced: tensors in, tensors out, in the order of `contract/signature.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from contract.errors import UserError
from contract.signature import FEATURES, FEATURES_GLOBAL, SPACES, Port, Signature
from contract.tasks import Task
from distill.decoders.decoder import TeacherDecoder
from distill.features import Features
from distill.methods.deployment import COUPLING, Deployment, ShippedHead
from distill.methods.losses import Prediction


class BackboneGraph(nn.Module):
    """uint8 [B, H, W, 3] to the student's features, for clients and for the other graphs.

    Where sizes vary, the graph itself must refuse a side that is not a multiple of the stride:
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
        features_global [B, 1, d]; of a student with a second class token backbone_second [B, d];
        of a student with further maps, of each also
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
        second = () if result.second is None else (result.second.float(),)
        return summary, patches.flatten(1, 2), patches, summary.unsqueeze(1), *second, *maps


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

    `maps` are the strides of the student's further maps, `stride` its own.
    """

    def __init__(self, head: ShippedHead, prefix: int, maps: Sequence[int], stride: int) -> None:
        super().__init__()
        self.head, self.reads, self.has_token = head.module, head.reads, head.has_token
        self.prefix, self.maps, self.stride = prefix, tuple(maps), stride
        self.further = max(0, len(head.strides) - 1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The token [B, g] if the head predicts one, patches [B, h*w, d], and further maps
        [B, h_l*w_l, d_l].
        """
        result = self.predict(*inputs)
        if len(result.maps) > self.further:
            raise UserError("a head predicts further maps, and does not say of which strides")
        maps = [map_.flatten(1, 2).float() for map_ in (result.patches, *result.maps)]
        return (result.token.float(), *maps) if self.has_token else tuple(maps)

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
        features = Features(summary, given.get("patches"), maps)
        return self.head(features, self._grid(given))

    def _grid(self, given: dict[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of the student's map, which the head may not read itself."""
        if "patches" in given:
            return tuple(given["patches"].shape[1:3])
        stride, level = next((s, given[f"maps.{s}"]) for s in self.maps if f"maps.{s}" in given)
        return tuple(side * stride // self.stride for side in level.shape[1:3])


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


class DecoderGraph(nn.Module):
    """A teacher's own decoder, with the student's head of that teacher in front of it.

    Behind a coupling part the head does not see the grid: it is `grid`, rows and columns, or, where
    sizes vary, that of a further input, the student's map.
    """

    def __init__(
        self, decoder: TeacherDecoder, reader: HeadGraph, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.decoder, self.reader, self.grid, self.prefix = decoder, reader, grid, reader.prefix
        self.coupled = COUPLING in reader.reads

    def forward(self, *inputs: Tensor) -> Tensor:
        """The task's output: [B, C], [B, h'*w'] or [B, h'*w', C]."""
        seen = self.reader.predict(*inputs[: len(self.reader.reads)])
        patches = seen.patches.float()
        if self.coupled and self.decoder.reads != "token":
            grid = self.grid or tuple(inputs[-1].shape[1:3])
            patches = patches.flatten(1, 2).unflatten(1, grid)
        token = None if seen.token is None else seen.token.float()
        return flatten_positions(self.decoder(patches, token))


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


class PyramidGraph(nn.Module):
    """A head of `distill.evaluate` on the student's further maps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *maps: Tensor) -> Tensor:
        """The task's output, such as scores [B, h*w, C] at every position of the finest map."""
        dtype = next(self.head.parameters()).dtype
        return flatten_positions(self.head([map_.to(dtype) for map_ in maps]).float())


def flatten_positions(values: Tensor) -> Tensor:
    """A head's [B, h, w] as [B, h*w], its [B, C, h, w] as [B, h*w, C]; scores [B, C] stay."""
    if values.ndim == 4:
        return values.flatten(2).transpose(1, 2)
    return values.flatten(1) if values.ndim == 3 else values


@dataclass(frozen=True)
class Part:
    """A graph to be: its module, its signature, and facts for the manifest and metadata."""

    module: nn.Module
    signature: Signature
    about: dict = field(default_factory=dict)


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
