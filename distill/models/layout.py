"""How a timm network gives its features: learnt from one forward pass on the meta device, where it
costs neither memory nor arithmetic and the code is the same for every architecture.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from contract.errors import UserError, first_line
from distill.features import Features


class Layout(NamedTuple):
    """What `forward_features` of a network returns, and what it uses.

    `axes`: NLC for tokens [B, prefix + h * w, width], else those of a map; `stride` the pixels per
    position. `unused` names the parameters that it never reaches, `called` the modules that are
    called as a whole.
    """

    axes: Literal["NLC", "NCHW", "NHWC"]
    width: int
    stride: int
    prefix: int
    has_class_token: bool
    unused: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()

    @property
    def family(self) -> Literal["vit", "cnn"]:
        """ "vit" for tokens, "cnn" for maps."""
        return "vit" if self.axes == "NLC" else "cnn"

    def read(self, output: Tensor, size: tuple[int, int], second_token: bool = False) -> Features:
        """The features in what `forward_features` returns for images of `size` = (H, W), multiples
        of the stride; `second_token`: whether the token after the class token is one of them.
        """
        if self.axes != "NLC":
            patches = output if self.axes == "NHWC" else output.permute(0, 2, 3, 1)
            return Features(patches.mean(dim=(1, 2)), patches)
        grid = (size[0] // self.stride, size[1] // self.stride)
        patches = output[:, self.prefix :].unflatten(1, grid)
        summary = output[:, 0] if self.has_class_token else patches.mean(dim=(1, 2))
        return Features(summary, patches, second=output[:, 1] if second_token else None)


class WrongSize(UserError):
    """A size that a network does not take. `stride` is what other sizes might be multiples of, if
    that is known; `reason` is what torch or timm raised.
    """

    def __init__(self, message: str, stride: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.stride, self.reason = stride, reason


_REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What networks raise from within when they are given a size that is not theirs."""


def learn_layout(net: nn.Module, size: int) -> Layout:
    """The layout of a network on the meta device for pictures of `size` pixels.

    Raises UserError, without the network's name, where its features are not one square map:
    WrongSize where that may be due to the size.
    """
    patch = _patch(net)
    if patch and len(set(patch)) > 1:
        raise UserError(
            f"has patches of {patch[0]} x {patch[1]} pixels, not square: set patch_size to one side"
        )
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in net.named_modules()
    ]
    output = _features(net, size)
    for hook in hooks:
        hook.remove()
    if not isinstance(output, Tensor):
        kind = f"{len(output)} tensors" if isinstance(output, list | tuple) else "no tensor"
        raise UserError(f"gives {kind} in place of one feature map: choose a ViT or a CNN")
    if output.ndim == 3:
        layout = _tokens(net, size, output)
    elif output.ndim == 4:
        layout = _map(net, size, output)
    else:
        raise UserError(
            f"has no spatial features (its last ones are {output.ndim}-d): choose a ViT or a CNN"
        )
    output.sum().backward()
    unused = (name for name, parameter in net.named_parameters() if parameter.grad is None)
    return layout._replace(unused=frozenset(unused), called=frozenset(called))


def _features(net: nn.Module, size: int) -> object:
    if not hasattr(net, "forward_features"):
        raise UserError(
            f"is wrapped by timm in a {type(net).__name__}, which gives no last map: remove "
            "features_only and the like from kwargs"
        )
    channels = getattr(net, "in_chans", 3)
    if isinstance(channels, int) and channels != 3:
        raise UserError(f"takes {channels} channels, but pictures have 3: remove in_chans")
    try:
        with torch.device("meta"), torch.enable_grad():
            return net.forward_features(torch.empty(1, 3, size, size))
    except _REFUSALS as error:
        stride, taken = _declared(net), f"does not take pictures of {size} px"
        if stride and size % stride:
            taken += f", which its stride of {stride} pixels does not divide"
        reason = first_line(error) or type(error).__name__
        raise WrongSize(taken, stride, reason) from error


def _tokens(net: nn.Module, size: int, output: Tensor) -> Layout:
    """The layout of tokens [B, N, width]; a prefix that the network does not declare is learnt from
    what is left of the largest square.
    """
    count, width = output.shape[1:]
    prefix, class_tokens = getattr(net, "num_prefix_tokens", None), _class_tokens(net)
    if prefix is None:
        prefix = class_tokens if _side(count) is None else 0
    if class_tokens and count <= class_tokens:
        raise UserError("gives its class token alone, without a map: choose a ViT or a CNN")
    side = _side(count - prefix)
    if not side or (class_tokens and not prefix):
        raise UserError(
            f"gives {count} tokens for {size} px, not a square map: choose a ViT or a CNN"
        )
    stride = _token_stride(net, size, side, count - side * side)
    return Layout("NLC", width, stride, prefix, class_tokens > 0)


def _class_tokens(net: nn.Module) -> int:
    """How many tokens the network declares as class tokens: a distilled PiT has two in one."""
    token = getattr(net, "cls_token", None)
    if token is None:
        return 0
    return token.shape[1] if isinstance(token, Tensor) and token.ndim == 3 else 1


def _token_stride(net: nn.Module, size: int, side: int, prefix: int) -> int:
    """Pixels per token of a map of `side` tokens for `size` pixels; raises WrongSize where none is
    true of every size that the network takes.
    """
    stride = _declared(net) or _exact(size, side)
    plain = patch_size(net) == stride  # its patches leave nothing to be verified
    large = _larger(net, size)
    count = None if plain else _count(net, large)
    if stride * side == size and count in (None, (large // stride) ** 2 + prefix):
        return stride
    # of one size only, and its last tokens hang over the edge: spread evenly, they cover it
    if count is None and -(-size // stride) == side and size % side == 0:
        return size // side
    # timm derives some strides from the size
    rows = _side(count - prefix) if count else None
    if rows and large % rows == 0:
        stride = large // rows
    if size % stride:
        raise WrongSize(_indivisible(stride, size), stride)
    other = f"{rows} x {rows} for {large} px" if rows else f"a stride of {stride} pixels"
    raise UserError(
        f"gives {side} x {side} tokens for {size} px and has {other}: choose a ViT or a CNN"
    )


def _larger(net: nn.Module, size: int) -> int:
    """A second size: where the stride is not declared, one at which what a side leaves adds up to
    whole positions.
    """
    return (2 if _declared(net) else 8) * size


def _exact(size: int, side: int) -> int:
    if size % side:
        raise WrongSize(f"gives {side} x {side} tokens for {size} px, no whole pixels each")
    return size // side


def _count(net: nn.Module, size: int) -> int | None:
    """Tokens for `size` pixels; None where the network does not take them."""
    output = _other(net, size)
    return None if output is None else output.shape[1]


def _other(net: nn.Module, size: int) -> Tensor | None:
    """Features of pictures of a second size; None where the network does not take them."""
    try:
        with torch.device("meta"), torch.no_grad():
            return net.forward_features(torch.empty(1, 3, size, size))
    except _REFUSALS:
        return None


def _map(net: nn.Module, size: int, output: Tensor) -> Layout:
    last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    height, width = output.shape[1:3] if last else output.shape[2:]
    if height != width:
        raise UserError(f"gives a map of {height} x {width} for square pictures: choose another")

    def rows(pixels: int) -> int | None:
        other = _other(net, pixels)
        return None if other is None else other.shape[1 if last else 2]

    stride = map_stride(net, size, height, rows)
    # convolutions without padding drop the rest of other sides
    if stride and size % stride and height == size // stride:
        raise WrongSize(_indivisible(stride, size), stride)
    if not stride or -(-size // stride) != height:
        why = "which no stride of whole pixels explains"
        if stride:
            why = f"although its stride is {stride} pixels"
        raise UserError(f"gives a map of {height} rows for {size} px, {why}: choose another")
    return Layout("NHWC" if last else "NCHW", output.shape[-1 if last else 1], stride, 0, False)


_FAR = 6720
"""Pixels that every stride up to 8 divides, and 10, 12, 14, 16, 20, 24, 28, 32, 48, 56 and 64."""


def map_stride(
    net: nn.Module, size: int, height: int, rows: Callable[[int], int | None]
) -> int | None:
    """Pixels per position of a map that is `height` high for pictures of `size` pixels; None where
    no whole number is.

    `rows` of a side in pixels, None for one that the network does not take: positions are counted
    far apart, as of one size the quotient is not the stride. At stride 32 are of 112 px 4 rows with
    padding and 3 without, and of 299 px Inception leaves 8. Of a network of one size, what timm
    declares of the stage that comes nearest.
    """
    far = rows(size + _FAR)
    if far is not None:
        more = far - height
        return _FAR // more if more > 0 and _FAR % more == 0 else None
    declared = [r for r in _reductions(net) if r]
    if declared:
        return min(declared, key=lambda reduction: abs(math.log(size / height / reduction)))
    return size // height if size % height == 0 else None


def _declared(net: nn.Module) -> int | None:
    reductions = _reductions(net)
    return reductions[-1] if reductions else None


def _reductions(net: nn.Module) -> list[int | None]:
    """What timm declares of every stage, in pixels a position; none for ViTs of some versions."""
    declared = [stage.get("reduction") for stage in getattr(net, "feature_info", None) or ()]
    return [value if isinstance(value, int) else None for value in declared]


def patch_size(net: nn.Module) -> int | None:
    """Side of a ViT's patch in pixels; None for networks without a patch embedding of one square
    size.
    """
    patch = _patch(net)
    if patch is None or getattr(net, "num_prefix_tokens", None) is None:
        return None
    return patch[0]


def _patch(net: nn.Module) -> tuple[int, ...] | None:
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)


def _side(count: int) -> int | None:
    """The root of a square number, else None."""
    root = round(count**0.5) if count > 0 else 0
    return root if root and root * root == count else None


def _indivisible(stride: int, size: int) -> str:
    return f"has a stride of {stride} pixels, which does not divide {size} px"


def nearest_multiples(value: int, unit: int) -> str:
    """Name the multiples of `unit` around `value`: "96 or 112"."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
