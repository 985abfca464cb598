"""The student: any timm backbone with spatial features, ViT or CNN, behind one `Features`
output.
"""

import copy
import inspect
import logging
import re
from collections.abc import Set
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import timm
import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from contract.errors import UserError, first_line, out_of_memory, suggest
from distill.config import StudentConfig
from distill.features import Features
from distill.models.hub import quiet_hub
from distill.models.layout import (
    Layout,
    WrongSize,
    learn_layout,
    nearest_multiples,
    patch_size,
)
from distill.models.meta import building
from distill.models.published import activation_note
from distill.models.recompute import recompute_in_backward
from distill.models.sources import read_source
from distill.models.start import network_state
from distill.models.weights import load_into

log = logging.getLogger(__name__)


def create_timm(name: str, **kwargs: object) -> nn.Module:
    """Create a timm model, passing `img_size`/`dynamic_img_size` only to architectures that know
    them.

    Raises UserError for an unknown name (with the nearest one) or an argument the architecture
    refuses.
    """
    source = read_source(name)
    architecture = source.architecture if source else name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(
            f"model '{name}' is not a timm architecture: "
            f"{suggest(architecture, timm.list_models())}"
        )
    arguments = dict(kwargs)
    while True:
        try:
            net = timm.create_model(name, **arguments)
            net.timm_arguments = arguments  # for export.hub, which has others build it again
            return net
        except TypeError as error:
            _, keyword, listed = str(error).partition("unexpected keyword argument")
            refused = set(re.findall(r"'(\w+)'", listed)) & arguments.keys()
            # CNNs have no fixed input size and so no such arguments; anything else refused is the
            # user's.
            if keyword and refused and refused <= _OPTIONAL:
                for argument in refused:
                    del arguments[argument]
                continue
            raise UserError(_refusal(name, refused - _OPTIONAL, error)) from error
        except RuntimeError as error:
            if "pretrained" in str(error).lower():
                raise UserError(
                    f"model '{name}': {error} (set pretrained: false or another tag)"
                ) from error
            raise
        except (AssertionError, KeyError, ValueError) as error:
            if source and not arguments.get("pretrained"):
                raise UserError(
                    f"{name}: timm cannot build what its config.json describes "
                    f"({first_line(error)}): save it again, or set other kwargs"
                ) from error
            raise


_OPTIONAL = {"img_size", "dynamic_img_size"}
"""Arguments that are given to every network and that some do not have."""


def _refusal(name: str, arguments: Set[str], error: TypeError) -> str:
    """What to say of an architecture that does not have these arguments."""
    if arguments == {"drop_path_rate"}:
        return f"model '{name}' has no stochastic depth: set drop_path to 0"
    if arguments:
        listed = ", ".join(sorted(arguments))
        return f"model '{name}' does not have the arguments {listed}: remove them from kwargs"
    return f"model '{name}' cannot be built ({first_line(error)}): choose another, or other kwargs"


class Layer(NamedTuple):
    """An intermediate layer: `summary` [B, d], its class token or spatial mean, and `patches`
    [B, h, w, d].
    """

    summary: Tensor
    patches: Tensor


class StudentLike(Protocol):
    """What methods, export and evaluation know of a student: a timm backbone (`Student`), or a
    network of a method's own.
    """

    family: Literal["vit", "cnn"]
    width: int
    stride: int
    prefix: int
    has_class_token: bool
    net: nn.Module
    map_strides: tuple[int, ...]
    """Pixels per position of `Features.maps`, finest first."""
    map_widths: tuple[int, ...]
    second_token: bool
    """Whether `Features.second` is there."""

    def forward(self, images: Tensor) -> Features:
        """Encode normalised images [B, 3, H, W]."""
        ...

    def layers(self, images: Tensor) -> tuple[Features, list[Layer]]:
        """The features and, from the same pass, four layers for a dense head, shallow to deep."""
        ...

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stay out of weight decay."""
        ...


class Student(nn.Module):
    """A randomly initialised (UMT A.1) timm backbone giving F_S.

    `family` is "vit" (token sequences) or "cnn" (maps); `width` is d_S; `stride` the pixels per
    position.
    """

    family: Literal["vit", "cnn"]
    map_strides: tuple[int, ...] = ()
    map_widths: tuple[int, ...] = ()
    second_token: bool = False
    """Whether the token after the class token is a second summary (`Features.second`), for the
    method to set."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.layout = _probe(config.model_dump_json())
        self.net = _with_weights(config, network_arguments(config))
        # What `forward_features` never reaches (a classifier's own norm, say): DDP waits for every
        # gradient.
        for name, parameter in self.net.named_parameters():
            if name in self.layout.unused:
                parameter.requires_grad_(False)
        if config.grad_checkpointing:
            recompute_in_backward(self.net, config.name)
        self.family, self.width, self.stride = (
            self.layout.family,
            self.layout.width,
            self.layout.stride,
        )
        self.prefix, self.has_class_token = self.layout.prefix, self.layout.has_class_token

    def forward(self, images: Tensor) -> Features:
        """Encode normalised images [B, 3, H, W] whose sides are multiples of `stride`.

        Returns patches [B, H/stride, W/stride, width] and the summary [B, width]: the class token
        after the final norm for a ViT that has one, else the mean over positions.
        """
        return self.read(self.net.forward_features(images), images)

    def read(self, output: Tensor, images: Tensor) -> Features:
        """`forward`'s features from the network's own output for these images."""
        return self.layout.read(output, tuple(images.shape[-2:]), self.second_token)

    @property
    def has_blocks(self) -> bool:
        """Whether `tokens` can hide patches and return what the last block says: timm's plain
        ViTs."""
        return isinstance(self.net, VisionTransformer)

    def tokens(
        self, images: Tensor, mask: Tensor | None = None, filler: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, prefix + h * w, width] after the last block and before the final norm, for
        students with `has_blocks`.

        Where `mask` bool [B, h, w] is set, the vector `filler` [width] stands in the patch's place,
        before position embeddings (masked image modelling). `read(net.norm(tokens), images)` equals
        `forward` without a mask.
        """
        x = self.net.patch_embed(images)
        if mask is not None:
            hidden = mask.unsqueeze(-1) if x.ndim == 4 else mask.flatten(1).unsqueeze(-1)
            x = torch.where(hidden, filler.to(x.dtype), x)
        x = self.net.norm_pre(self.net.patch_drop(self.net._pos_embed(x)))
        if self.net.grad_checkpointing:
            return checkpoint_seq(self.net.blocks, x)
        return self.net.blocks(x)

    def every_layer(self, images: Tensor) -> list[Layer]:
        """Every block of a ViT or stage of a CNN, shallow to deep, as the network leaves it:
        without the final norm.
        """
        if self.family == "cnn":
            stages = self.net.forward_intermediates(
                images, intermediates_only=True, output_fmt="NCHW"
            )
            maps = [stage.permute(0, 2, 3, 1) for stage in stages]
            return [Layer(map_.mean(dim=(1, 2)), map_) for map_ in maps]
        blocks = self.net.forward_intermediates(
            images, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        return [_block_layer(block, grid, self.has_class_token) for block in blocks]

    def layers(self, images: Tensor) -> tuple[Features, list[Layer]]:
        """The features, as `forward` gives them, and the four layers of `dpt_layers` from the same
        pass. The only way to intermediate layers: a student that is more than its timm network
        overrides it.
        """
        output, layers = dpt_layers(self.net, images, self.stride)
        return self.read(output, images), layers

    def no_weight_decay(self) -> set[str]:
        """Names of parameters (position embedding, class token) that timm keeps out of weight
        decay.
        """
        skip = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else set()
        return {f"net.{name}" for name in skip}


def dpt_layers(net: nn.Module, pixels: Tensor, stride: int) -> tuple[Tensor, list[Layer]]:
    """Output of a timm network's `forward_features` and, from the same pass, the four layers that a
    DPT head reads, shallow to deep (UMT A.1).

    ViT of n blocks: after blocks n/3, n/2, 2n/3 and n (ViT-B 3, 5, 7, 11 and ViT-L 7, 11, 15, 23,
    from 0), normalised, with the class token as summary. CNN: the last four stages, each with its
    spatial mean. Raises UserError for a network of fewer stages, and for a ViT that does not return
    its blocks' tokens.
    """
    kind = type(net).__name__
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"{kind} does not return its layers: set depth.head=linear")
    arguments = inspect.signature(net.forward_intermediates).parameters
    if not (hasattr(net, "blocks") and "return_prefix_tokens" in arguments):
        if patch_size(net) is not None:
            raise UserError(f"{kind} does not return its blocks' tokens: set depth.head=linear")
        count = len(getattr(net, "feature_info", ()))
        if count < 4:
            raise UserError(
                f"{kind} has {count} stages, and a DPT head reads four: set depth.head=linear"
            )
        output, stages = net.forward_intermediates(pixels, indices=4, output_fmt="NCHW")
        maps = [stage.permute(0, 2, 3, 1) for stage in stages]
        return output, [Layer(m.mean(dim=(1, 2)), m) for m in maps]
    output, blocks = net.forward_intermediates(
        pixels,
        indices=dpt_blocks(len(net.blocks)),
        norm=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
    )
    grid = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
    return output, [_block_layer(block, grid, class_token=True) for block in blocks]


def _block_layer(
    block: Tensor | tuple[Tensor, Tensor], grid: tuple[int, int], class_token: bool
) -> Layer:
    """A block as timm's `forward_intermediates` gives it: patches [B, h * w, d], and prefix tokens
    if there are some.
    """
    tokens, prefix = block if isinstance(block, tuple) else (block, None)
    summary = tokens.mean(1) if prefix is None or not class_token else prefix[:, 0]
    return Layer(summary, tokens.unflatten(1, grid))


def dpt_blocks(blocks: int) -> list[int]:
    """Indices of the four blocks of a ViT that DPT reads: the paper's for 12 and 24 blocks, in
    proportion otherwise.
    """
    return [max(0, round(blocks * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def network_arguments(config: StudentConfig) -> dict[str, object]:
    """What timm is given to create a student's network, its weights aside."""
    arguments = {
        "num_classes": 0,
        "img_size": config.image_size,
        "dynamic_img_size": True,
        **config.kwargs,
    }
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    return arguments


def _with_weights(config: StudentConfig, arguments: dict[str, object]) -> nn.Module:
    """A student's network with the weights it starts from; raises UserError where they cannot be
    fetched or do not fit.
    """
    if config.checkpoint:
        net = create_timm(config.name, **arguments)
        source = f"student.checkpoint {config.checkpoint}"
        state = network_state(config.checkpoint)
        load_into(net, state, source)
        _warn_of_activation(config, net, tuple(state))
        return net
    try:
        with quiet_hub():
            net = create_timm(config.name, pretrained=config.pretrained, **arguments)
        if config.pretrained:
            _warn_of_activation(config, net)
        return net
    except UserError:
        raise
    # hub clients raise their own kinds of connection, repository and file errors
    except Exception as error:
        if not config.pretrained or out_of_memory(error):
            raise
        raise UserError(
            f"student: cannot fetch weights of '{config.name}' ({first_line(error)}): set "
            "student.checkpoint to a local file, or student.pretrained=false for random weights"
        ) from error


def _warn_of_activation(config: StudentConfig, net: nn.Module, names: tuple[str, ...] = ()) -> None:
    note = activation_note(config.name, net, config.checkpoint, names)
    if note:
        log.warning("note      student: %s", note)


# Plans, exports and evaluations build the same student several times, and a probe takes longer than
# a small student.
@lru_cache(maxsize=32)
@torch.inference_mode(False)  # whatever the caller's mode: gradients tell what is used
def _probe(student: str) -> Layout:
    """The layout of the student of a configuration (as JSON, which is hashable)."""
    config = StudentConfig.model_validate_json(student)
    try:
        return _learn(config)
    except WrongSize as error:
        raise UserError(f"student '{config.name}'{_given(config)} {_advised(config, error)}") from (
            error
        )


def _given(config: StudentConfig) -> str:
    return f" with kwargs {config.kwargs}" if config.kwargs else ""


def _learn(config: StudentConfig) -> Layout:
    """The layout of a student; raises WrongSize, without its name, where the size may be at fault,
    and UserError for what else is.
    """
    with building():
        try:
            net = create_timm(config.name, **network_arguments(config)).eval()
        except UserError:
            raise
        # whatever a constructor makes of arguments and sizes that it does not expect
        except Exception as error:
            reason = first_line(error) or type(error).__name__
            raise WrongSize(f"cannot be built for {config.image_size} px", None, reason) from error
    patch = patch_size(net)
    if patch and config.image_size % patch:
        raise UserError(
            f"student '{config.name}': its patch of {patch} pixels does not divide "
            f"student.image_size = {config.image_size} (use "
            f"{nearest_multiples(config.image_size, patch)})"
        )
    try:
        return learn_layout(net, config.image_size)
    except WrongSize:
        raise
    except UserError as error:
        raise UserError(f"student '{config.name}'{_given(config)} {error}") from error


def _advised(config: StudentConfig, error: WrongSize) -> str:
    """The error with sizes that the student takes; without any the size is not at fault, and what
    torch or timm raised says more.
    """
    published = timm.get_pretrained_cfg(config.name.split(".")[0])
    own = published.input_size[-1] if published else config.image_size
    layout = _tried(config, own)
    stride = error.stride or (layout and layout.stride)
    near = [config.image_size // stride * stride + add for add in (0, stride)] if stride else []
    sizes = [size for size in near if size not in (0, config.image_size) and _tried(config, size)]
    if not sizes and layout:
        sizes = [own]
    if sizes:
        return f"{error} (use {' or '.join(map(str, sizes))})"
    return f"{error} ({error.reason})" if error.reason else f"{error}: choose another"


def _tried(config: StudentConfig, size: int) -> Layout | None:
    """The student's layout at another size; None where it does not take that."""
    try:
        return _learn(config.model_copy(update={"image_size": size}))
    except UserError:
        return None


@torch.inference_mode(False)
def freeze_unreached(student: Student, size: int) -> list[Layer]:
    """Freeze what no layer of `Student.every_layer` depends on (a final norm, say), and return the
    layers of one image on the meta device, for their shapes.

    Raises UserError for a network whose layers timm cannot return.
    """
    probe = copy.deepcopy(student).to("meta").eval()
    try:
        with torch.enable_grad():
            layers = probe.every_layer(torch.empty(1, 3, size, size, device="meta"))
            sum(layer.patches.sum() + layer.summary.sum() for layer in layers).backward()
    except (AssertionError, AttributeError, TypeError) as error:
        raise UserError(
            f"student '{type(student.net).__name__}' does not return its layers ({error}): set "
            "unic.heads=mlp"
        ) from error
    unused = {name for name, parameter in probe.named_parameters() if parameter.grad is None}
    for name, parameter in student.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)
    return layers
