"""What the page shows: a picture goes to the server, and what it answers becomes cards as it comes
in.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from contract.signature import BACKBONE
from contract.tasks import map_tasks
from serve.client import FeatureClient
from serve.client.served import FRONT_DOOR, Served, whole_view
from serve.client.tasks.detection import EXAMPLES, detect
from serve.client.tasks.maps import predict_map
from serve.client.tasks.zero_shot import classify
from serve.demo.cards import (
    Request,
    detection_card,
    map_card,
    patches_card,
    problem_card,
    requests_card,
    zero_shot_card,
)
from serve.errors import BadRequest, ClientError, NotServed, Unavailable

Result = TypeVar("Result")

_SHOWN = 640
"""Pixels of the longer side of photographs under maps."""
_ZERO_SHOT = "zero_shot"
DETECTION = "detection"


class Offer(NamedTuple):
    """What a server has that the page can show, and what it says of itself and of its zero_shot."""

    front_door: Served
    tasks: tuple[str, ...]
    about: Mapping[str, Any]
    zero_shot: Mapping[str, Any]

    @property
    def new_labels(self) -> bool:
        """Whether there are classes of the user's own to compare with."""
        return bool(self.zero_shot.get("new_labels"))

    @property
    def detection(self) -> bool:
        """Whether objects can be looked for."""
        return DETECTION in self.tasks

    @property
    def view(self) -> str | None:
        """The view that all but maps are asked for with; None: the bundle's."""
        return whole_view(self.about)

    @property
    def patches(self) -> list[str]:
        """Outputs with a row a patch."""
        return [name for name in self.front_door.outputs if name.endswith("_patches")]


def ask_offer(client: FeatureClient) -> Offer:
    """What the server has now, since another bundle may have been rolled out. Raises a
    ClientError.
    """
    front_door = _describe(client, FRONT_DOOR)
    result = {}
    for model in (*(task.name for task in map_tasks()), _ZERO_SHOT, DETECTION):
        try:
            result[model] = _describe(client, model)
        except NotServed:
            continue
    zero_shot = result[_ZERO_SHOT].facts("about") if _ZERO_SHOT in result else None
    return Offer(front_door, tuple(result), front_door.facts("about") or {}, zero_shot or {})


def _describe(client: FeatureClient, model: str) -> Served:
    """A model as the server has it now."""
    return client.run(client.calls.describe(model, fresh=True))


class _Timed:
    """A client and its requests for one picture: how long each took, and the models that ran."""

    def __init__(self, client: FeatureClient) -> None:
        self.client = client
        self.requests: list[Request] = []

    def call(self, what: str, ask: Callable[[], Result]) -> Result:
        """The answer to a request, which is noted."""
        before = self.executions()
        start = time.perf_counter()
        result = ask()
        milliseconds = 1000 * (time.perf_counter() - start)
        ran = [name for name, count in self.executions().items() if count > before.get(name, 0)]
        self.requests.append(Request(what, milliseconds, tuple(ran)))
        return result

    def executions(self) -> dict[str, int]:
        """How often the server has run each model that is not a mere chain of others; empty where
        it does not tell.
        """
        calls = self.client.calls
        deadline = time.monotonic() + calls.options.timeout
        try:
            answer = self.client.run(calls.ask("get_inference_statistics", {}, deadline, ""))
        except ClientError:
            return {}
        result = {stat.name: stat.execution_count for stat in answer.model_stats}
        if BACKBONE in result:  # a model a graph, and ensembles in front of them
            for chain in (FRONT_DOOR, *(task.name for task in map_tasks())):
                result.pop(chain, None)
        return result


Shown = tuple[str, str]
"""HTML of the answers, and of the list of requests."""


def look(
    client: FeatureClient, photo: Image.Image, labels: Sequence[str] | None
) -> Iterator[Shown]:
    """Everything the server can say of a photograph; it grows with every answer.

    A request that fails becomes a sentence in its place; one that finds no server ends the matter.
    """
    timed, cards = _Timed(client), []
    offer = ask_offer(client)
    scale = _SHOWN / max(photo.size)
    small = photo.resize(
        [max(1, round(scale * side)) for side in photo.size], Image.Resampling.LANCZOS
    )
    parts = {"Patches": lambda: _patches(timed, offer, photo)} if offer.patches else {}
    for task in map_tasks():
        if task.name in offer.tasks:
            parts[task.title] = partial(_map, timed, task.name, photo, small)
    if _ZERO_SHOT in offer.tasks:
        # labels may be for the detector alone
        own = labels if offer.new_labels or not offer.detection else None
        parts["Zero-shot"] = lambda: _zero_shot(timed, offer, photo, own)
    if offer.detection:
        parts["Detection"] = lambda: _detection(timed, offer, photo, small, labels or EXAMPLES)
    for title, part in parts.items():
        try:
            cards.append(part())
        except Unavailable as error:
            if _is_gone(error):
                raise
            cards.append(problem_card(title, sentence(error, client.url)))
        except ClientError as error:
            cards.append(problem_card(title, sentence(error, client.url)))
        yield page_of(cards), page_of([requests_card(timed.requests)] if timed.requests else [])


def _patches(timed: _Timed, offer: Offer, photo: Image.Image) -> str:
    """The patches of the backbone and of every head that answers."""
    names, client = offer.patches, timed.client
    answer = timed.call(
        f"{FRONT_DOOR}, {len(names)} outputs",
        lambda: client.features(photo, names, partial=True, view=offer.view),
    )
    maps = {name: answer[name][0].reshape(*answer.grid(name), -1) for name in answer}
    return patches_card(
        answer.view.pixels(photo, *answer.size),
        {name.removesuffix("_patches"): maps[name] for name in maps},
        answer.missing,
    )


def _map(timed: _Timed, task: str, photo: Image.Image, small: Image.Image) -> str:
    return map_card(small, timed.call(task, lambda: predict_map(timed.client, task, photo)))


def _zero_shot(
    timed: _Timed, offer: Offer, photo: Image.Image, labels: Sequence[str] | None
) -> str:
    """Probabilities of classes: of the labels, or of the bundle's own."""
    result = timed.call(_ZERO_SHOT, lambda: classify(timed.client, photo, labels, view=offer.view))
    teacher = offer.zero_shot.get("teacher")
    token = f"{teacher}_token" if teacher else "the picture"
    about = (
        f"{token} against "
        f"{'your labels' if labels else f'the {len(result.classes)} classes of the bundle'}"
    )
    return zero_shot_card(result.probabilities[0], result.classes, about)


def _detection(
    timed: _Timed,
    offer: Offer,
    photo: Image.Image,
    small: Image.Image,
    labels: Sequence[str],
) -> str:
    """Boxes of what the labels name."""
    result = timed.call(DETECTION, lambda: detect(timed.client, photo, labels, view=offer.view))
    return detection_card(small, result.pictures[0], result.classes)


def page_of(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _is_gone(error: ClientError) -> bool:
    """Whether there is no server, as against one that is busy."""
    return isinstance(error, Unavailable) and (
        "connect" in error.message or "resolving" in error.message
    )


def sentence(error: ClientError, url: str) -> str:
    if _is_gone(error):
        return (
            f"No server answers at {url}. Start one with python -m serve.run BUNDLE, then try "
            "again."
        )
    text = str(error)
    return text[:1].upper() + text[1:] if isinstance(error, BadRequest) else text
