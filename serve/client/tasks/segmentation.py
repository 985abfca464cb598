"""Semantic segmentation: the likeliest class of every pixel, from a linear head on the patches."""

from typing import Any, NamedTuple

import numpy as np

from contract.dense import class_map
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.steps import Steps, Work
from serve.client.tasks import Side, check_side, task_facts
from serve.errors import WrongAnswer


class Segmentation(NamedTuple):
    """`class_map` int32 [B, H, W], of the size the model saw; its numbers index `classes`."""

    class_map: np.ndarray
    classes: tuple[str, ...]


def segment(client: Any, images: Images, *, side: Side = "server", **options: Any) -> Segmentation:
    """Segment pictures by the model `segmentation`, or here from the output `segmentation_logits`.

    Options are those of FeatureClient.features: timeout, request_id, size; with side="client" also
    encoded. Raises a ClientError, NotServed where the bundle has no such head.
    """
    return client.run(steps(client.calls, images, side, options))


def steps(calls: Calls, images: Images, side: Side, options: dict[str, Any]) -> Steps[Segmentation]:
    """The task in steps; see serve.client.steps."""
    check_side(side)
    facts = yield from task_facts(calls, "segmentation")
    if side == "server":
        answer = yield from calls.features(images, ["class_map"], model="segmentation", **options)
        result = answer["class_map"]
    else:
        answer = yield from calls.features(images, ["segmentation_logits"], **options)
        logits = answer["segmentation_logits"]
        result = yield Work(lambda: class_map(logits, *answer.size, facts.get("stride")))
    if result.shape[1:] != tuple(answer.size) or result.min() < 0:
        raise WrongAnswer(
            f"class_map is {list(result.shape)} for pictures of {answer.size}", answer.request_id
        )
    # a server of another make may not say its classes
    classes = tuple(
        facts.get("classes") or (f"class {number}" for number in range(result.max() + 1))
    )
    if result.max() >= len(classes):
        raise WrongAnswer(
            f"class {result.max()} of {len(classes)} that the server names: ask again",
            answer.request_id,
        )
    return Segmentation(result, classes)
