"""Tasks on features: maps (segmentation, depth) and zero-shot classification, by a head on the
server or on the client, and zero-shot detection on the server.

Every task is a function of a client and pictures. Given an AsyncFeatureClient it returns something
to await.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from serve.errors import BadRequest

Side = Literal["server", "client"]
"""Where a task's last step runs: in the server's own model for it, or here, from features."""


def check_side(side: str) -> None:
    """Raise BadRequest for an unknown side."""
    if side not in ("server", "client"):
        raise BadRequest(f"side='{side}': choose 'server' or 'client'")


def check_labels(labels: Sequence[str]) -> list[str]:
    """Labels without blanks around them; raises BadRequest for none, an empty one, or one twice."""
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise BadRequest(f"labels: give a list of them, not a {type(labels).__name__}")
    labels = list(labels)
    for label in labels:
        if not isinstance(label, str):
            raise BadRequest(f"a label is of type {type(label).__name__}: give texts")
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            raise BadRequest(f"label {label!r} is not text: it holds half a character")
    result = [label.strip() for label in labels]
    if not result or not all(result):
        raise BadRequest("labels: give at least one, none of them empty")
    twice = [label for label in result if result.count(label) > 1]
    if twice:
        raise BadRequest(f"label '{twice[0]}' is given twice")
    return result
