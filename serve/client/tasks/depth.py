"""Metric depth: metres at every pixel, from a head on the patches."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import RequestOptions
from serve.client.steps import Steps
from serve.client.tasks import Side, maps


class Depth(NamedTuple):
    """`depth`: float32 [h, w] of each picture in `unit`, of its own size; NaN where the view did
    not show it.
    """

    depth: tuple[np.ndarray, ...]
    unit: str


def estimate_depth(
    client: Any,
    images: Images,
    options: RequestOptions = RequestOptions(),
    *,
    side: Side = "server",
    **changes: Any,
) -> Depth:
    """Depth of pictures by the model `depth`, or here from the output `depth`; see
    serve.client.tasks.maps.predict_map.
    """
    return client.run(_steps(client.calls, images, side, replace(options, **changes)))


def _steps(calls: Calls, images: Images, side: Side, options: RequestOptions) -> Steps[Depth]:
    result = yield from maps.steps(calls, "depth", images, side, options)
    return Depth(result.values, result.unit)
