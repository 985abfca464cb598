"""Semantic segmentation: the likeliest class of every pixel, from a linear head on the patches."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import RequestOptions
from serve.client.steps import Steps
from serve.client.tasks import Side, maps


class Segmentation(NamedTuple):
    """`class_map`: int32 [h, w] of each picture, of its own size; its numbers index `classes`, and
    contract.views.UNSEEN is what the view did not show.
    """

    class_map: tuple[np.ndarray, ...]
    classes: tuple[str, ...]


def segment(
    client: Any,
    images: Images,
    options: RequestOptions = RequestOptions(),
    *,
    side: Side = "server",
    **changes: Any,
) -> Segmentation:
    """Segment pictures by the model `segmentation`, or here from the output `segmentation_logits`;
    see serve.client.tasks.maps.predict_map.
    """
    return client.run(_steps(client.calls, images, side, replace(options, **changes)))


def _steps(
    calls: Calls, images: Images, side: Side, options: RequestOptions
) -> Steps[Segmentation]:
    result = yield from maps.steps(calls, "segmentation", images, side, options)
    return Segmentation(result.values, result.classes)
