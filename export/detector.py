"""A detector behind a student that predicts the maps of its backbone: GroundingDINO's text tower
and the rest of it as two graphs, which are compared with torch.

They stay float32 in every bundle: queries are the best of thousands of positions, which rounding
would change, and are read at positions that fp16 resolves to half a thousandth of a side.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contract.detection import WINDOW
from contract.errors import UserError
from contract.manifest import DetectorRecord
from contract.signature import Port, detector_signatures, head_graph
from distill.models.deformable import Grid, gather_maps
from distill.models.grounding_dino import (
    VOCABULARY,
    DetectorRest,
    TextSide,
    is_same_checkpoint,
    load_detector,
    open_vocabulary,
    positions,
)
from distill.models.weights import tensors_sha256
from distill.teachers.grounding_dino import SIZE
from export.describe import describe_graph
from export.graph import Student
from export.modules import Part
from export.to_onnx import OPSET, export_part

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GroundingDinoForObjectDetection

log = logging.getLogger(__name__)

_ROLE = "detector"


class DetectorGraph(nn.Module):
    """`DetectorRest` on maps as heads give them, [B, h*w, d]."""

    def __init__(self, rest: DetectorRest, grids: Sequence[Grid]) -> None:
        super().__init__()
        self.rest, self.grids = rest, tuple(grids)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Three maps, then text, text_mask, self_mask and position_ids: logits and boxes."""
        maps = [value.unflatten(1, grid) for value, grid in zip(inputs, self.grids, strict=False)]
        return self.rest(maps, *inputs[len(maps) :])


@dataclass(frozen=True)
class Detector:
    """A detector that fits a teacher of the run, and its graphs to be."""

    source: str
    teacher: str
    model: "GroundingDinoForObjectDetection"
    vocabulary: bytes
    tokenizer: "Tokenizer"

    def parts(self, head: Sequence[Port], grids: Sequence[Grid]) -> tuple[Part, Part]:
        """`text_detector` and `detector`, on the outputs of the teacher's head."""
        config = self.model.config
        signatures = detector_signatures(head, config.d_model, config.num_queries, WINDOW)
        modules = TextSide(self.model), DetectorGraph(DetectorRest(self.model), grids)
        text, boxes = (
            Part(module, signature, {"teacher": self.teacher})
            for module, signature in zip(modules, signatures, strict=True)
        )
        return text, boxes


def open_detector(source: str, student: Student) -> Detector:
    """Load a checkpoint for the run's teacher of role detector.

    Raises UserError for a run without such a teacher, a checkpoint that cannot be read, and one
    whose backbone has other maps than the teacher had.
    """
    option = f"--detector {source}"
    trained = {
        teacher.label: teacher.checkpoint
        for teacher in student.run.recipe.teachers
        if teacher.role == _ROLE
    }
    if not trained:
        others = ", ".join(teacher.label for teacher in student.run.recipe.teachers) or "none"
        raise UserError(
            f"{option}: the run has no teacher of role detector (it has {others}): leave the "
            "option out, or distil one (recipe kpu_vit_base)"
        )
    model = load_detector(source, "--detector")
    widths = tuple(model.model.backbone.conv_encoder.intermediate_channel_sizes)
    dims = {label: student.run.dims[label] for label in trained}
    known = {label: (dim.patches, *dim.maps) for label, dim in dims.items()}
    fitting = [label for label in known if known[label] == widths]
    if not fitting:
        label = next(iter(known))
        raise UserError(
            f"{option}: its backbone's maps have {_listed(widths)} channels, those of teacher "
            f"'{label}' {_listed(known[label])}: give the detector that was the teacher"
        )
    same = [label for label in fitting if is_same_checkpoint(trained[label], source)]
    label = next(iter(same or fitting))
    if not same:
        log.warning(
            "detector  teacher '%s' was %s, not %s: boxes are only right if their backbones have "
            "the same weights",
            label,
            trained[label] or "random",
            source,
        )
    if len(student.deployment.shipped[label].strides) != len(widths):
        raise UserError(
            f"{option}: the student predicts the maps of '{label}' on one grid, the detector needs "
            "three: distil with kpu.preserve=true"
        )
    path, tokenizer = open_vocabulary(source, "--detector", model.config)
    return Detector(source, label, model, path.read_bytes(), tokenizer)


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def make_parts(
    detector: Detector, student: Student, parts: Sequence[Part], size: tuple[int, int]
) -> tuple[Part, Part]:
    """The detector's graphs for pictures of `size` (height, width), of which a warning is logged if
    the student was trained on larger ones; raises UserError where they have fewer positions than
    the detector looks for objects.
    """
    trained = _trained_side(student, detector.teacher)
    if min(size) < trained:
        log.warning(
            "detector  pictures of %dx%d are smaller than those of %d pixels that the student "
            "learnt '%s' on, and small objects are lost: add --resolutions %d",
            *size,
            trained,
            detector.teacher,
            trained,
        )
    graph = head_graph(detector.teacher)
    head = next(part for part in parts if part.signature.graph == graph)
    strides = student.deployment.shipped[detector.teacher].strides
    # strided convolutions round up
    grids = [tuple(-(-side // stride) for side in size) for stride in strides]
    there = positions(grids, detector.model.config.num_feature_levels)
    queries = detector.model.config.num_queries
    if there < queries:
        raise UserError(
            f"--detector {detector.source}: pictures of {size[0]}x{size[1]} have {there} "
            f"positions, it looks for {queries} objects: choose larger --resolutions"
        )
    return detector.parts(head.signature.outputs, grids)


def _trained_side(student: Student, label: str) -> int:
    """Pixels of a side of the pictures in which the student saw what the teacher says of them."""
    recipe = student.run.recipe
    teacher = next(teacher for teacher in recipe.teachers if teacher.label == label)
    if teacher.batch_size is None:  # it shares the pictures of all
        return recipe.student.image_size
    if teacher.student_size != "auto":
        return teacher.student_size
    crops = recipe.data.image_size
    crops = (teacher.image_size or SIZE) if crops == "auto" else crops
    return max(1, round(crops / student.stride)) * student.stride


def write_graphs(
    parts: Sequence[Part], stride: int, max_batch: int, folder: Path, about: dict[str, str]
) -> dict[str, Path]:
    """Trace and write both graphs into `folder`; returns their files by name."""
    paths = {part.signature.graph: folder / f"{part.signature.graph}.onnx" for part in parts}
    for part in parts:
        graph = part.signature.graph
        facts = about | {"graph": graph, "precision": "fp32"}
        facts |= {key: str(value) for key, value in part.about.items()}
        with gathering():
            # of a range of two sizes torch takes 2 for a constant, where it checks shapes as here
            export_part(part, stride, max(3, max_batch), paths[graph], facts, OPSET["fp32"])
    return paths


def describe(
    detector: Detector, parts: tuple[Part, Part], paths: dict[str, Path], folder: Path
) -> DetectorRecord:
    """Write the vocabulary into `folder`; returns the manifest's record."""
    (folder / VOCABULARY).write_bytes(detector.vocabulary)
    text, boxes = (describe_graph(part, paths, "fp32") for part in parts)
    count = len(parts[1].module.grids)
    source = Path(detector.source)
    return DetectorRecord(
        teacher=detector.teacher,
        # of a user's folder only its name leaves the machine
        source=source.resolve().name if source.is_dir() else detector.source,
        sha256=tensors_sha256(detector.model.state_dict()),
        maps=tuple(port.name for port in parts[1].signature.inputs[:count]),
        vocabulary=VOCABULARY,
        text=text,
        boxes=boxes,
    )


@contextmanager
def gathering() -> Iterator[None]:
    """While entered, transformers' detector is traced in a form that every runtime computes:
    deformable attention by gathers, scores padded without a slice of varying length, and no checks
    of shapes, which have no ONNX form.
    """
    from transformers.models.grounding_dino import modeling_grounding_dino as modeling

    changes = (
        (modeling.MultiScaleDeformableAttention, "forward", _attend),
        (modeling.GroundingDinoContrastiveEmbedding, "forward", _score),
        (modeling, "torch_compilable_check", lambda *_, **__: None),
    )
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, stand_in in changes:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(changes, before, strict=True):
            setattr(owner, name, original)


def _score(
    self: nn.Module, vision_hidden_state: Tensor, text_hidden_state: Tensor, text_token_mask: Tensor
) -> Tensor:
    """Stands in for GroundingDinoContrastiveEmbedding.forward: scores [B, Q, WINDOW] of tokens
    [B, T, d] for queries [B, Q, d], -inf where there is no text.
    """
    scores = vision_hidden_state @ text_hidden_state.transpose(-1, -2)
    scores = scores.masked_fill(~text_token_mask.unsqueeze(1), float("-inf"))
    places = torch.arange(WINDOW, device=scores.device)
    padded = scores.index_select(-1, places.clamp(max=scores.shape[-1] - 1))
    return padded.masked_fill(places >= scores.shape[-1], float("-inf"))


def _attend(
    self: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[Grid],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
    **_: Any,
) -> Tensor:
    """Stands in for MultiScaleDeformableAttention.forward: `value` [B, S, heads, d] of the maps one
    after another, places [B, Q, heads, levels, points, 2] in [0, 1], outside of which are zeros;
    returns [B, Q, heads * d].
    """
    places, weights = (
        tensor.transpose(1, 2).flatten(0, 1).unbind(2)
        for tensor in (sampling_locations, attention_weights)
    )
    read = gather_maps(value, value_spatial_shapes_list, places, weights)
    read = read.unflatten(0, (value.shape[0], -1))
    return read.transpose(1, 2).flatten(2)
