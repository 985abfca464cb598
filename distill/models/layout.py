"""How a timm network gives its features: learnt from one forward pass on the meta device, where it
costs neither memory nor arithmetic and the code is the same for every architecture.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from contract.errors import UserError, first_line


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


def learn_layout(net: nn.Module, size: int) -> Layout:
    """The layout of a network on the meta device for pictures of `size` pixels.

    Raises UserError, without the network's name, where its features are not one square map.
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
    # whatever a network of another size raises from within: assertions, shape errors
    except (
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        own = getattr(net, "default_cfg", {}).get("input_size", (3, size, size))[-1]
        remedy = f": use its own size, {own}" if own != size else ""
        reason = first_line(error) or type(error).__name__
        raise UserError(f"does not take pictures of {size} px ({reason}){remedy}") from error


def _tokens(net: nn.Module, size: int, output: Tensor) -> Layout:
    """The layout of tokens [B, N, width]; a prefix that the network does not declare is learnt from
    what is left of the largest square.
    """
    count, width = output.shape[1:]
    prefix, class_token = getattr(net, "num_prefix_tokens", None), hasattr(net, "cls_token")
    class_token = class_token and net.cls_token is not None
    if prefix is None:
        prefix = int(class_token and _side(count) is None)
    if count == 1 and class_token:
        raise UserError("gives its class token alone, without a map: choose a ViT or a CNN")
    side = _side(count - prefix)
    if not side or (class_token and not prefix):
        raise UserError(
            f"gives {count} tokens for {size} px, not a square map: choose a ViT or a CNN"
        )
    if size % side:
        patch = _patch(net)
        stride = patch[0] if patch else round(size / side)
        raise UserError(_indivisible(stride, size))
    return Layout("NLC", width, size // side, prefix, class_token)


def _map(net: nn.Module, size: int, output: Tensor) -> Layout:
    last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    height, width = output.shape[1:3] if last else output.shape[2:]
    if height != width:
        raise UserError(f"gives a map of {height} x {width} for square pictures: choose another")
    stride = map_stride(net, size, height)
    if -(-size // stride) != height or not _doubles(net, size, stride, height, last):
        raise UserError(
            f"gives a map of {height} rows for {size} px, which no stride of whole pixels makes "
            "(convolutions without padding): choose another"
        )
    return Layout("NHWC" if last else "NCHW", output.shape[-1 if last else 1], stride, 0, False)


def _doubles(net: nn.Module, size: int, stride: int, height: int, last: bool) -> bool:
    """Whether a stride that is not the network's declared one explains its map at twice the size
    too; True where it takes no other size.
    """
    if _declared(net) in (None, stride):
        return True
    try:
        with torch.device("meta"), torch.no_grad():
            output = net.forward_features(torch.empty(1, 3, 2 * size, 2 * size))
    except (AssertionError, RuntimeError, ValueError):
        return True
    return output.shape[1 if last else 2] == 2 * height


def map_stride(net: nn.Module, size: int, height: int) -> int:
    """Pixels per position of a map that is `height` high for pictures of `size` pixels.

    timm's own figure where there is one: 112 pixels make a map of 4 at stride 32, not at 28.
    """
    reduction = _declared(net)
    if reduction and -(-size // reduction) == height:
        return reduction
    return max(1, size // height)


def _declared(net: nn.Module) -> int | None:
    info = getattr(net, "feature_info", None)
    reduction = info[-1]["reduction"] if info else None
    return reduction if isinstance(reduction, int) else None


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
    return (
        f"its patch of {stride} pixels does not divide {size} px (use "
        f"{nearest_multiples(size, stride)})"
    )


def nearest_multiples(value: int, unit: int) -> str:
    """Name the multiples of `unit` around `value`: "96 or 112"."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
