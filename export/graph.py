"""The modules that are traced: tensors in, tensors out, in the order of `signature.py`. Rebuilt from a run folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.checkpoint import Run, load_run
from distill.errors import UserError
from distill.features import Features
from distill.heads import Head, load_head
from distill.losses import FEATURE_LOSS, patch_cosine, pooled_cosine
from distill.methods.deployment import BACKBONE, Deployment
from distill.weights import tensors_sha256
from export.signature import (
    FEATURES,
    FEATURES_GLOBAL,
    FUSED,
    INTERACTION,
    SPACES,
    Port,
    Signature,
    backbone_ports,
    feature_ports,
    head_graph,
    head_ports,
    image_port,
    task_port,
)

TASKS = ("classification", "segmentation", "depth")
"""Task heads looked for in RUN/heads, in the order of the outputs."""


class BackboneGraph(nn.Module):
    """uint8 [B, H, W, 3] to the student's features, for clients and for the other graphs."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__()
        self.preprocess, self.student = deployment.preprocess, deployment.student

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """backbone_global [B, d], backbone_patches [B, h*w, d], features [B, h, w, d], features_global [B, 1, d]."""
        # bytes become floats before anything else happens to them: TensorRT only casts bytes
        pixels = self.preprocess.normalize((image.float() / 255).permute(0, 3, 1, 2))
        # normalisation stays in float32 whatever the network's precision
        found = self.student(pixels.to(next(self.student.parameters()).dtype))
        summary, patches = found.summary.float(), found.patches.float()
        return summary, patches.flatten(1, 2), patches, summary.unsqueeze(1)


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
    """One teacher's head, on spaces or (without a coupling part) on features."""

    def __init__(self, head: nn.Module, coupled: bool, prefix: int, has_token: bool) -> None:
        super().__init__()
        self.head, self.coupled, self.prefix, self.has_token = head, coupled, prefix, has_token

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The token [B, g] if the method predicts one, and patches [B, h*w, d]."""
        dtype = next((p.dtype for p in self.head.parameters()), torch.float32)
        inputs = tuple(value.to(dtype) for value in inputs)
        if self.coupled:
            # a head asks for the grid to tell the class position from patches: one row of all of them says as much
            found = self.head(inputs[0], (1, inputs[0].shape[1] - self.prefix))
        else:
            features, features_global = inputs
            found = self.head(Features(features_global[:, 0], features), tuple(features.shape[1:3]))
        patches = found.patches.flatten(1, 2).float()
        return (found.token.float(), patches) if self.has_token else (patches,)


class TaskGraph(nn.Module):
    """A task head of `distill.evaluate`, with the teacher's head in front of it if it reads one."""

    def __init__(self, task: str, head: nn.Module, reader: HeadGraph | None) -> None:
        super().__init__()
        self.task, self.head, self.reader = task, head, reader

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits [B, C], logits [B, h*w, C] or metres [B, h*w]."""
        if self.reader is not None:
            found = self.reader(*inputs)
            value = found[0] if self.task == "classification" else found[-1].unsqueeze(1)
        else:
            value = inputs[0][:, 0] if self.task == "classification" else inputs[0]
        value = value.to(next(self.head.parameters()).dtype)
        said = self.head(value).float()
        if self.task == "segmentation":
            return said.flatten(2).transpose(1, 2)
        return said.flatten(1) if self.task == "depth" else said


class FusedGraph(nn.Module):
    """Everything a client may ask for in one graph."""

    def __init__(self, backbone: nn.Module, interaction: nn.Module | None, parts: Sequence["Part"]) -> None:
        super().__init__()
        self.backbone, self.interaction = backbone, interaction
        self.parts = nn.ModuleList(part.module for part in parts)
        self.reads = [[port.name for port in part.signature.inputs] for part in parts]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """backbone_global, backbone_patches, then the outputs of every head and task."""
        summary, flat, features, features_global = self.backbone(image)
        known = {FEATURES: features, FEATURES_GLOBAL: features_global}
        if self.interaction is not None:
            known[SPACES] = self.interaction(features, features_global)
        found = [summary, flat]
        for module, reads in zip(self.parts, self.reads, strict=True):
            said = module(*(known[name] for name in reads))
            found += said if isinstance(said, tuple) else (said,)
        return tuple(found)


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


def open_student(folder: Path) -> Student:
    """Load a run and its task heads; raises UserError for anything missing, damaged or not of this student."""
    run = load_run(folder)
    sha256 = tensors_sha256(run.method.state_dict())
    heads = [load_head(folder / "heads" / f"{task}.safetensors", sha256) for task in TASKS
             if (folder / "heads" / f"{task}.safetensors").exists()]  # fmt: skip
    for head in heads:
        if head.kind == "dpt-depth":
            raise UserError(
                f"{folder}/heads/depth.safetensors is a DPT head, which reads four layers; graphs have the last one only "
                "(train it with depth.head=linear, or move it away)"
            )
    deployment = run.method.deploy()
    return Student(run, deployment, tuple(heads), deployment.student.stride, sha256)


def build_parts(student: Student, height: int | None, width: int | None) -> list[Part]:
    """Every graph of a student: backbone, interaction if there is one, heads, tasks, fused.

    `height` and `width` are pixels, None where they vary.
    """
    deployment, stride = student.deployment, student.stride
    d = deployment.student.width
    rows, columns = (height // stride, width // stride) if height and width else ("rows", "columns")
    positions = rows * columns if height and width else "positions"
    image = image_port(height or "height", width or "width")
    backbone = Part(
        BackboneGraph(deployment),
        Signature(BACKBONE, (image,), backbone_ports(d, positions) + feature_ports(d, rows, columns)),
    )
    parts, interaction, inputs = [backbone], None, feature_ports(d, rows, columns)
    prefix = int(deployment.student.has_class_token)
    coupled = not isinstance(deployment.coupling, nn.Identity)
    if coupled:
        coupling = deployment.coupling
        n = positions + prefix if isinstance(positions, int) else "tokens"
        spaces = Port(
            SPACES, "float32", ("batch", n, coupling.spaces, coupling.space_dim + coupling.token_dim),
            "the M spaces after their interaction, for the heads",
        )  # fmt: skip
        interaction = Part(InteractionGraph(coupling), Signature(INTERACTION, inputs, (spaces,)))
        parts.append(interaction)
        inputs = (spaces,)
    readers: dict[str, HeadGraph] = {}
    heads = []
    for teacher in student.run.recipe.teachers:
        label, dims = teacher.label, student.run.dims[teacher.label]
        has_token = student.run.recipe.method != "umt" or student.run.recipe.umt.model_token
        readers[label] = HeadGraph(deployment.heads[label], coupled, prefix, has_token)
        by_direction = FEATURE_LOSS[teacher.role] in (pooled_cosine, patch_cosine)
        ports = head_ports(label, dims.summary if has_token else None, dims.patches, positions, not by_direction)
        heads.append(Part(readers[label], Signature(head_graph(label), inputs, ports), {"teacher": label}))
    tasks = [build_task(head, readers, inputs, feature_ports(d, rows, columns), positions) for head in student.heads]
    fused = FusedGraph(backbone.module, interaction.module if interaction else None, [*heads, *tasks])
    outputs = backbone_ports(d, positions) + tuple(p for part in [*heads, *tasks] for p in part.signature.outputs)
    return [*parts, *heads, *tasks, Part(fused, Signature(FUSED, (image,), outputs))]


def build_task(
    head: Head,
    readers: dict[str, HeadGraph],
    coupled: tuple[Port, ...],
    features: tuple[Port, ...],
    positions: int | str,
) -> Part:
    """The graph of one task head; one that reads a teacher's output carries that teacher's head inside.

    (Fed from the head's own output, it would make that both an ensemble output and a step's input.)
    """
    reads, classes = head.about["reads"], head.module.settings.get("classes", 1)
    about = {key: head.about[key] for key in ("reads", "classes", "size", "unit") if key in head.about}
    reader = None if reads == BACKBONE else readers[reads]
    inputs = coupled if reader else (features[1] if head.task == "classification" else features[0],)
    port = task_port(head.task, classes, positions)
    return Part(TaskGraph(head.task, head.module, reader), Signature(head.task, inputs, (port,)), about)
