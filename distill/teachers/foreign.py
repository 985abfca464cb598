"""Teachers that are neither timm's nor ours: what their networks may return, and what of it becomes
`Features`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from contract.errors import UserError, first_line, out_of_memory
from distill.features import Features
from distill.models.user_code import RAISED

_FORM = (
    "return Features(summary, patches), (summary, patches) or {'summary': …, 'patches': …} with "
    "summary [B, d] or None and patches [B, h, w, d]"
)


class ForeignNet(nn.Module):
    """A network behind one call, from normalised images [B, 3, S, S] to `Features`.

    `whose` names the teacher and its key, for messages; `source_sha256` is the hash of the code
    that its features depend on beside its weights, if there is such.
    """

    source_sha256: str | None = None

    def __init__(self, net: nn.Module, whose: str) -> None:
        super().__init__()
        self.net, self.whose = net, whose

    def forward(self, pixels: Tensor) -> Features:
        """Features of normalised images; raises UserError for what is not `Features`."""
        return as_features(self.net(pixels), len(pixels), self.whose)

    def inside(self) -> dict[str, Any]:
        """What it is that neither its name nor its weights say, as plain data."""
        return {"source_sha256": self.source_sha256} if self.source_sha256 else {}


def as_features(output: object, batch: int, whose: str) -> Features:
    """A network's output as `Features`; raises UserError, beginning with `whose`, for anything that
    is not documented, has no grid or another batch.
    """
    if isinstance(output, Mapping):
        unknown = sorted(map(str, set(output) - {"summary", "patches", "maps"}))
        if unknown or "patches" not in output:
            raise UserError(
                f"{whose}: returns the keys {', '.join(map(str, output)) or 'none'}: {_FORM}"
            )
        output = Features(output.get("summary"), output["patches"], tuple(output.get("maps") or ()))
    elif type(output) is tuple and len(output) == 2:
        output = Features(*output)
    if not isinstance(output, Features):
        raise UserError(f"{whose}: returns {_kind(output)}: {_FORM}")
    if output.second is not None:
        raise UserError(f"{whose}: returns a second summary, which students alone have: {_FORM}")
    named = {"patches": output.patches, "summary": output.summary}
    named |= {f"maps.{level}": map_ for level, map_ in enumerate(output.maps)}
    for name, value in named.items():
        axes = "[B, d]" if name == "summary" else "[B, h, w, d]"
        if name == "summary" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{whose}: its {name} are {_kind(value)}, not a tensor {axes}")
        if value.ndim != axes.count(",") + 1 or len(value) != batch or 0 in value.shape:
            shape = list(value.shape)
            reason = "tokens without a grid" if name != "summary" and value.ndim == 3 else "not"
            reason = f"{reason}: {axes} is needed" if reason != "not" else f"not {axes}"
            raise UserError(
                f"{whose}: its {name} have the shape {shape} for {batch} picture"
                f"{'s' if batch > 1 else ''}, {reason}"
            )
        if not value.is_floating_point():
            raise UserError(f"{whose}: its {name} are {value.dtype}, not floating point")
    return output


def _kind(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def check_network(net: ForeignNet, size: int, device: torch.device) -> None:
    """Run a network twice on two small random pictures; raises UserError where it fails, returns
    something else than `Features`, numbers that are not finite, or others the second time.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, size, size, generator=generator).to(device)
    try:
        with torch.no_grad():
            first, second = net(pixels), net(pixels)
    except UserError:
        raise
    except RAISED as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{net.whose}: fails on pictures [2, 3, {size}, {size}] "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if device.type == "meta":
        return
    for name, value in first.named().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{net.whose}: its {name} of a random picture are not finite")
        if not torch.allclose(value, second.named()[name], rtol=1e-3, atol=1e-4):
            raise UserError(
                f"{net.whose}: its {name} of one picture differ between two calls (masking or "
                "dropout): a frozen teacher has to give the same each time"
            )
