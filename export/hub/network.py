"""A student's network as timm and transformers build it from a `config.json`: which arguments, and
whether what they pool is the student's summary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from contract.errors import UserError
from contract.views import ViewPolicy
from distill.features import Features
from distill.models.sources import read_source
from distill.models.student import StudentLike
from distill.runs import Run

TOLERANCE = 1e-5
"""Largest difference over the largest value where two correct implementations add up in another
order: timm pools a CNN's map over its columns and rows, the student over positions.
"""

_POOLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"global_pool": "token"},
    {"global_pool": "avg"},
    {"global_pool": "token", "fc_norm": False},
    {"global_pool": "avg", "fc_norm": False},
    {"global_pool": "token", "use_fc_norm": False},
    {"global_pool": "avg", "use_fc_norm": False},
)
"""Arguments of timm's that choose what is pooled, the architecture's own first. `fc_norm` and
`use_fc_norm` keep the norm where it is, before the pooling.
"""

_REFUSALS = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What architectures raise for arguments that they do not have or like."""


@dataclass(frozen=True)
class Network:
    """What `timm.create_model(architecture, num_classes=0, **model_args)` is given, and the tensors
    it loads. `pooled`: whether what it then returns is the student's summary.
    """

    architecture: str
    model_args: dict[str, Any]
    state: dict[str, Tensor]
    pooled: bool
    pretrained_cfg: dict[str, Any]


def pictures_seen(view: ViewPolicy, mean: Sequence[float]) -> dict[str, Any]:
    """timm's words for a view policy, of a network that subtracts `mean`: its transforms give the
    same pixels. Raises UserError for a policy that timm has not.
    """
    if view.kind == "tiles" or not view.antialias or view != replace(view, fill=None).on(mean):
        raise UserError(
            f"view {view}: timm and transformers have no tiles, always antialias, and pad with the "
            "network's mean colour: add --view centre-crop:0.875, squash or letterbox"
        )
    mode = {"squash": "squash", "centre-crop": "center", "letterbox": "border"}[view.kind]
    return {"interpolation": view.interpolation, "crop_pct": view.share, "crop_mode": mode}


def describe_network(
    run: Run, student: StudentLike, pixels: Tensor, wanted: Features, seen: Mapping[str, Any]
) -> Network:
    """The network of a run's student; `wanted` are the student's features of `pixels`, normalised
    [B, 3, S, S]; `seen` is that of `pictures_seen`.

    Raises UserError for a student that timm cannot build from plain values.
    """
    config = run.recipe.student
    net, source = student.net, read_source(config.name)
    architecture = source.architecture if source else config.name.split(".")[0]
    arguments = (source.arguments if source else {}) | net.timm_arguments
    # of training, and what transformers gives itself
    for key in ("num_classes", "drop_path_rate", "pretrained"):
        arguments.pop(key, None)
    network = Network(
        architecture,
        arguments,
        dict(net.state_dict()),
        pooled=False,
        pretrained_cfg=_pretrained_cfg(run, net, arguments) | seen,
    )
    if student.map_strides:  # timm's network is only a part of it
        return network
    for pooling in _POOLINGS:
        if not pooling.items() <= arguments.items() or not pooling:
            candidate = _tried(network, pooling, pixels, wanted)
            if candidate is not None:
                return candidate
    return network


@torch.inference_mode()
def _tried(
    network: Network, pooling: Mapping[str, Any], pixels: Tensor, wanted: Features
) -> Network | None:
    """The network with other arguments, where what it pools is the student's summary; else None."""
    arguments = network.model_args | pooling
    try:
        net = timm.create_model(network.architecture, num_classes=0, **arguments).eval()
        state = {name: network.state[name] for name in net.state_dict()}
        net.load_state_dict(state)
        output = net.forward_features(pixels)
        pooled = net.forward_head(output)
    except _REFUSALS:
        return None
    tokens = wanted.patches.flatten(1, 2) if output.ndim == 3 else wanted.patches
    prefix = output.shape[1] - tokens.shape[1] if output.ndim == 3 else 0
    maps = [output[:, prefix:], output, output.movedim(1, -1)] if prefix >= 0 else []
    if not any(map_.shape == tokens.shape and torch.equal(map_, tokens) for map_ in maps):
        return None  # another norm, or none
    if not agree(pooled, wanted.summary):
        return None
    return replace(network, model_args=arguments, state=state, pooled=True)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to `TOLERANCE`."""
    return one.shape == other.shape and difference(one, other) <= TOLERANCE


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors over the largest value of the second; inf for numbers that
    are not finite.
    """
    scale = other.abs().max().clamp_min(1e-12)
    result = float((one.float() - other.float()).abs().max() / scale)
    return result if result == result else float("inf")


def _pretrained_cfg(run: Run, net: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """timm's description of weights and of the pictures they take."""
    student, own = run.recipe.student, getattr(net, "pretrained_cfg", {})
    size = student.image_size
    return {
        "tag": "vfm_distill",
        "custom_load": False,
        "input_size": [3, size, size],
        "fixed_input_size": "img_size" in arguments and not arguments.get("dynamic_img_size"),
        "mean": list(student.mean),
        "std": list(student.std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
    }
