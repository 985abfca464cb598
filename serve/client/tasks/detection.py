"""Zero-shot detection: boxes of what labels name, by the server's model `detection`."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from contract.detection import Detections
from serve.client.calls import Calls
from serve.client.inputs import Images, Picture, list_pictures
from serve.client.options import RequestOptions
from serve.client.steps import Steps, Work
from serve.client.tasks import check_labels
from serve.errors import BadRequest, NotServed, WrongAnswer

THRESHOLD = 0.25
"""Score above which something counts as found, where none is given."""

EXAMPLES = ("person", "animal", "plant", "vehicle", "building")
"""What to look for where nobody said."""

_MODEL = "detection"
_OUTPUTS = ["boxes", "scores", "classes", "counts"]


class Detected(NamedTuple):
    """What was found in each picture, best first, and the labels that its `labels` are places in.

    Boxes are shares of the picture's width and height: left, upper, right and lower edge.
    """

    pictures: tuple[Detections, ...]
    classes: tuple[str, ...]


def detect(
    client: Any,
    images: Images,
    labels: Sequence[str],
    options: RequestOptions = RequestOptions(),
    *,
    threshold: float = THRESHOLD,
    **changes: Any,
) -> Detected:
    """Boxes in pictures of what `labels` name, any words, with scores above `threshold`; at most
    300 in a picture.

    Fields of `options` may be given as keyword arguments (`timeout`, `request_id`). Raises a
    ClientError, NotServed where the bundle has no detector.
    """
    options = replace(options, **changes)
    return client.run(_steps(client.calls, images, labels, threshold, options))


def _steps(
    calls: Calls,
    images: Images,
    labels: Sequence[str],
    threshold: float,
    options: RequestOptions,
) -> Steps[Detected]:
    """The task in steps; see serve.client.steps."""
    names = check_labels(labels)
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise BadRequest(f"threshold {threshold}: give a number from 0 to 1")
    extra = {
        "labels": np.array([name.encode() for name in names], dtype=np.object_),
        "threshold": np.array([threshold], np.float32),
    }
    pictures_given = list_pictures(images, calls.options.limits)
    try:
        answer = yield from calls.features(
            pictures_given, _OUTPUTS, replace(options, model=_MODEL), extra
        )
    except NotServed as error:
        if _MODEL in error.message:
            error.message = (
                "the server has no detection: its bundle has no detector (python -m export.run "
                "--detector adds one)"
            )
        raise
    boxes, scores, classes, counts = (answer[name] for name in _OUTPUTS)
    most = boxes.shape[1]
    wrong = (
        scores.shape[1] != most
        or classes.shape[1] != most
        or ((counts < 0) | (counts > most)).any()
    )
    pictures = []
    for row, count in enumerate(() if wrong else counts.tolist()):
        found = Detections(
            scores[row, :count], classes[row, :count].astype(np.int64), boxes[row, :count]
        )
        wrong |= bool(((found.labels < 0) | (found.labels >= len(names))).any())
        pictures.append(found)
    if wrong:
        raise WrongAnswer("'detection' answered with boxes of no label", answer.request_id)
    limits = calls.options.limits

    def own(picture: Picture, found: Detections) -> Detections:
        view, size = picture.view(answer.size, answer.view), picture.own_size(limits)
        boxes = view.boxes(found.boxes, size, answer.size)
        kept = np.ones(len(boxes), bool)
        if view.kind == "letterbox":  # what lies in its ground alone is nothing
            kept = (boxes[:, :2] < boxes[:, 2:]).all(1)
        return Detections(found.scores[kept], found.labels[kept], boxes[kept])

    undone = yield Work(lambda: tuple(map(own, pictures_given, pictures)))
    return Detected(undone, tuple(names))
