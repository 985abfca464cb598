"""Frozen teachers: any timm model, network of transformers or of own code, an earlier student, or a
detector's backbone, giving `Features` from the shared uint8 crop.

To add a teacher, name it in a recipe. To support a new kind of timm network, add a row to the table
in `distill/teachers/reading.py`.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import DETECTOR, TeacherConfig, TeacherRuntime
from distill.features import FeatureDims, Features
from distill.fields import source_of
from distill.models.packaged import describe_checkpoint
from distill.models.preprocess import Preprocess
from distill.models.sources import read_source
from distill.models.student import nearest_multiples, patch_size
from distill.models.weights import tensors_sha256
from distill.teachers.code import build_code_teacher
from distill.teachers.foreign import ForeignNet, check_network
from distill.teachers.grounding_dino import (
    MEAN,
    SIZE,
    STD,
    DetectorBackbone,
    build_detector_backbone,
)
from distill.teachers.hf import build_hf_teacher
from distill.teachers.reading import read_map, read_tokens, reading_of
from distill.teachers.run import StudentNet
from distill.teachers.timm import blocks_of, build_timm_teacher

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """One frozen teacher: always in eval mode, no gradients, its own input size and
    normalisation.

    `dims` are the widths of its features, `shapes` their shapes by name (`Features.named`) without
    the batch, `grid` the (h, w) of its map.
    """

    def __init__(
        self, config: TeacherConfig, runtime: TeacherRuntime, net: nn.Module, preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.config, self.runtime = config, runtime
        self.settled: str | None = None  # what `auto` means, once a run has settled it
        self.net, self.preprocess = net, preprocess
        self.image_size = preprocess.size
        self.eval().requires_grad_(False)
        if isinstance(net, ForeignNet):
            check_network(net, preprocess.size, self.device)
        self._encode = torch.compile(self.encode) if runtime.compile else self.encode
        with torch.no_grad():
            features = self.probe()
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in features.named().items()}
        self.dims = FeatureDims(
            None if features.summary is None else features.summary.shape[-1],
            features.patches.shape[-1],
            tuple(level.shape[-1] for level in features.maps),
        )
        self.grid = self.shapes["patches"][:2]

    @property
    def label(self) -> str:
        return self.config.label

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a frozen teacher has no dropout and no batch statistics of its own."""
        return super().train(False)

    def probe(self) -> Features:
        """Features of one black image, for their shapes."""
        side = self.image_size
        return self.encode(torch.zeros(1, 3, side, side, device=self.device))

    @property
    def device(self) -> torch.device:
        """Where it runs; a network of own code may have no parameters."""
        return self.preprocess.mean.device

    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images [B, 3, S, S] in float32, whatever precision the network ran
        in.
        """
        precision = self.precision_on(images.device.type)
        pixels = self.preprocess(images)
        cast = (
            torch.autocast(images.device.type, AUTOCAST[precision])
            if precision in AUTOCAST
            else nullcontext()
        )
        with cast:
            features = self._encode(pixels)
        return features.map(Tensor.float)

    def precision_on(self, device: str) -> str:
        """Precision on a kind of device; `auto` is float32 on a CPU until a run has settled it."""
        if self.runtime.precision == "auto":
            return self.settled or ("bf16" if device == "cuda" else "fp32")
        return self.runtime.precision

    def encode(self, pixels: Tensor) -> Features:
        """Features of normalised images [B, 3, S, S], without the summary if the recipe excludes
        it.
        """
        features = self._encode_network(pixels)
        return features if self.config.summary else features._replace(summary=None)

    def _encode_network(self, pixels: Tensor) -> Features:
        """Features by the network's kind, as the table in `distill/teachers/reading.py` says.

        Raises UserError for a network with neither tokens on a grid nor one map.
        """
        net = self.net
        if isinstance(net, StudentNet | DetectorBackbone | ForeignNet):
            return net(pixels)
        block = self.config.block
        output = (
            self._output_of_block(pixels) if block is not None else net.forward_features(pixels)
        )
        prefix, patch = getattr(net, "num_prefix_tokens", 0), patch_size(net)
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch) if patch else (0, 0)
        dimensions = output.ndim if isinstance(output, Tensor) else 0
        # several maps at once (CoaT), tokens without a grid (mixers) or with another (ViTs behind a
        # ResNet)
        if dimensions != 4 and not (
            dimensions == 3 and output.shape[1] == prefix + grid[0] * grid[1]
        ):
            raise UserError(
                f"teacher '{self.label}': '{self.config.name}' has no single feature map (choose a "
                "ViT or a CNN that has)"
            )
        last = block is None or self._is_last_block()
        # an earlier block is not what the projection was trained on, and the last one's features
        # before it are asked for by its number
        projected = self.config.role == "clip" and block is None
        if dimensions == 3:
            return read_tokens(net, output, grid, projected, last)
        return read_map(net, output, projected, block is not None, last)

    def _is_last_block(self) -> bool:
        return self.config.block in (-1, blocks_of(self.net) - 1)

    def _output_of_block(self, pixels: Tensor) -> Tensor:
        """Output of block `config.block`: normalised tokens [B, prefix + h*w, d], or a CNN stage's
        map.
        """
        tokens = patch_size(self.net) is not None
        options = {"output_fmt": "NLC", "return_prefix_tokens": True} if tokens else {}
        # a stage before the last has another width than the final norm
        block, norm = self.config.block, tokens or self._is_last_block()
        try:
            (result,) = self.net.forward_intermediates(
                pixels, indices=[block], norm=norm, intermediates_only=True, **options
            )
        # networks without these arguments (XCiT, CaiT), and some whose own code fails
        except (TypeError, AttributeError, UnboundLocalError) as error:
            raise UserError(
                f"teacher '{self.label}': '{self.config.name}' does not return its blocks' tokens: "
                "remove its block"
            ) from error
        if not tokens:  # timm gives maps channels first, whatever the network's own order
            return (
                result.permute(0, 2, 3, 1)
                if getattr(self.net, "output_fmt", "NCHW") == "NHWC"
                else result
            )
        patches, prefix = result if isinstance(result, tuple) else (result, None)
        return patches if prefix is None else torch.cat((prefix, patches), dim=1)

    def fingerprint(self) -> str:
        """Hash of its weights, and of the code that is its user's own."""
        weights = tensors_sha256(self.net.state_dict())
        source = getattr(self.net, "source_sha256", None)
        return f"{weights} {source}" if source else weights

    def identity(self) -> dict[str, Any]:
        """All that its features depend on beside its weights, as plain data: every setting but
        those known not to matter, resolved, the network inside, and how it is read.
        """
        mean, std = (
            [round(value, 6) for value in buffer.flatten().tolist()]
            for buffer in (self.preprocess.mean, self.preprocess.std)
        )
        resolved = {"image_size": self.image_size, "mean": mean, "std": std}
        kind, _ = source_of(self.config.name)
        # not where it lies: what is there counts; of a file of own code it is one function of it
        if kind and kind != "python":
            resolved["name"] = kind
        runtime = self.runtime.model_dump(exclude={"compile"})
        runtime["precision"] = self.precision_on(self.device.type)
        return self.config.settings() | resolved | runtime | self._network_inside()

    def _network_inside(self) -> dict[str, Any]:
        """What a network is that neither its name nor its weights describe, and how it is read."""
        if isinstance(self.net, StudentNet):
            recipe = self.net.recipe
            own = recipe.model_dump(mode="json", include={"student", "method", recipe.method})
            own["student"].pop("licence")
            return own
        if isinstance(self.net, ForeignNet):
            return self.net.inside()
        if isinstance(self.net, DetectorBackbone):
            config = self.net.swin.config.to_dict()
            own = {"transformers_version", "dtype", "architectures"}
            kept = {k: v for k, v in config.items() if k not in own and not k.startswith("_")}
            return {"network": json.loads(json.dumps(kept, default=str))}
        reading = reading_of(self.net, patch_size(self.net) is not None)
        source = read_source(self.config.name)
        network = {"network": [source.architecture, source.arguments]} if source else {}
        return {"summary_is": reading.summary, "patches_are": reading.patches, **network}


def build_teacher(config: TeacherConfig, runtime: TeacherRuntime, index: int) -> Teacher:
    """Build teacher number `index` of a recipe and load its weights.

    Raises UserError for an unknown model, weights that are unavailable or do not fit, an input size
    the patch does not divide, or features of another width than `dim`.
    """
    if config.name == "run":
        if not config.checkpoint:
            raise UserError(
                f"teacher '{config.label}': name = run needs teachers.{index}.checkpoint = "
                "RUN_FOLDER"
            )
        net: nn.Module = StudentNet(config.checkpoint)
        if config.block is not None:
            raise UserError(
                f"teacher '{config.label}': teachers.{index}.block is for timm models: remove it, "
                "as a run has only its last features"
            )
        student = net.recipe.student
        size, mean, std, patch = student.image_size, student.mean, student.std, net.student.stride
    elif config.name == DETECTOR:
        net = build_detector_backbone(config, index)
        size, mean, std, patch = SIZE, MEAN, STD, None
    else:
        kind, _ = source_of(config.name)
        build = {"hf": build_hf_teacher, "python": build_code_teacher}.get(kind)
        if build and config.block is not None:
            raise UserError(
                f"teacher '{config.label}': teachers.{index}.block is for timm models: remove it"
            )
        net, (size, mean, std), patch = (build or build_timm_teacher)(config, index)
    size, mean, std = config.image_size or size, config.mean or mean, config.std or std
    for value, name in ((size, "image_size"), (mean, "mean"), (std, "std")):
        if value is None:
            raise UserError(
                f"teacher '{config.label}': {config.name} does not state its {name}: set "
                f"teachers.{index}.{name}"
            )
    if patch and size % patch:
        raise UserError(
            f"teacher '{config.label}': its patch of {patch} pixels does not divide "
            f"teachers.{index}.image_size = {size} (use {nearest_multiples(size, patch)})"
        )
    teacher = Teacher(config, runtime, net, Preprocess(size, mean, std))
    if config.dim is not None and config.dim != teacher.dims.patches:
        raise UserError(
            f"teacher '{config.label}': has {teacher.dims.patches}-d features, but the recipe has "
            f"{config.dim} (set teachers.{index}.dim={teacher.dims.patches} or remove it)"
        )
    return teacher


def weights_source(config: TeacherConfig) -> str:
    """Where a teacher's weights come from, in a few words, without loading them."""
    if config.name == "run":
        return f"run folder {config.checkpoint}"
    if config.name == DETECTOR and config.checkpoint:
        place = "folder" if Path(config.checkpoint).is_dir() else "Hugging Face hub,"
        return f"{place} {config.checkpoint}"
    if config.checkpoint:
        return describe_checkpoint(config.checkpoint)
    kind, place = source_of(config.name)
    if kind == "python":
        return f"own code, {place}"
    if not config.pretrained:
        return "random weights"
    if kind == "local-dir" or (kind == "hf" and Path(place).is_dir()):
        return f"folder {place}"
    return f"Hugging Face hub, {place}" if kind else f"timm hub, {config.name}"
