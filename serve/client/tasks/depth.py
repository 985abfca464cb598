"""Metric depth: metres at every pixel, from a head on the patches."""

from typing import Any, NamedTuple

import numpy as np

from contract.dense import depth_map
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.steps import Steps, Work
from serve.client.tasks import Side, check_side, task_facts
from serve.errors import WrongAnswer


class Depth(NamedTuple):
    """`depth` float32 [B, H, W] in `unit`, of the size the model saw."""

    depth: np.ndarray
    unit: str


def estimate_depth(client: Any, images: Images, *, side: Side = "server", **options: Any) -> Depth:
    """Depth of pictures by the model `depth`, or here from the output `depth`.

    Options are those of FeatureClient.features: timeout, request_id, size; with side="client" also
    encoded. Raises a ClientError, NotServed where the bundle has no such head.
    """
    return client.run(steps(client.calls, images, side, options))


def steps(calls: Calls, images: Images, side: Side, options: dict[str, Any]) -> Steps[Depth]:
    """The task in steps; see serve.client.steps."""
    check_side(side)
    facts = yield from task_facts(calls, "depth")
    if side == "server":
        answer = yield from calls.features(images, ["depth_map"], model="depth", **options)
        result = answer["depth_map"]
    else:
        answer = yield from calls.features(images, ["depth"], **options)
        cells = answer["depth"]
        result = yield Work(lambda: depth_map(cells, *answer.size, facts.get("stride")))
    if result.shape[1:] != tuple(answer.size):
        raise WrongAnswer(
            f"depth_map is {list(result.shape)} for pictures of {answer.size}", answer.request_id
        )
    return Depth(result, facts.get("unit") or "metre")
