"""The page of `python -m serve.demo`: a picture goes to the server, what it answers is shown as it
comes in.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gradio
from PIL import Image

from contract.images import Limits, fit
from serve.client import FeatureClient
from serve.client.inputs import Picture
from serve.client.served import FRONT_DOOR, Served
from serve.client.tasks.depth import estimate_depth
from serve.client.tasks.segmentation import segment
from serve.client.tasks.zero_shot import classify
from serve.demo.cards import (
    Request,
    depth_card,
    hint,
    patches_card,
    problem_card,
    requests_card,
    segmentation_card,
    zero_shot_card,
)
from serve.errors import BadRequest, ClientError, NotServed, Unavailable

Result = TypeVar("Result")

TITLE = "A distilled vision backbone, served by Triton"
ABOUT = (
    "One small network with a head for each of its teachers. Drop a photograph to see the "
    "features it makes, and their uses."
)
SHOWN = 640
"""Pixels of the longer side of photographs under classes and depth."""
EXAMPLES = (
    ("skimage", "data/chelsea.png"), ("skimage", "data/coffee.png"), ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"), ("sklearn", "datasets/images/flower.jpg"),
)  # fmt: skip
"""Photographs that installed packages may carry."""


class Offer(NamedTuple):
    """What a server has that the page can show, and what it says of itself and of its zero_shot."""

    front_door: Served
    tasks: tuple[str, ...]
    about: Mapping[str, Any]
    zero_shot: Mapping[str, Any]

    @property
    def new_labels(self) -> bool:
        """Whether classes can be any words."""
        return bool(self.zero_shot.get("new_labels"))

    @property
    def patches(self) -> list[str]:
        """Outputs with a row a patch."""
        return [name for name in self.front_door.outputs if name.endswith("_patches")]


def ask_offer(client: FeatureClient) -> Offer:
    """Ask the server what it has, anew each time: another bundle may have been rolled out. Raises a
    ClientError.
    """
    front_door = describe(client, FRONT_DOOR)
    result = {}
    for task in ("segmentation", "depth", "zero_shot"):
        try:
            result[task] = describe(client, task)
        except NotServed:
            continue
    zero_shot = result["zero_shot"].facts("about") if "zero_shot" in result else None
    return Offer(front_door, tuple(result), front_door.facts("about") or {}, zero_shot or {})


def describe(client: FeatureClient, model: str) -> Served:
    """A model as the server has it now."""
    return client.run(client.calls.describe(model, client.calls.options.timeout, fresh=True))


class Asking:
    """The requests for one picture, timed, with the models that the server ran for each."""

    def __init__(self, client: FeatureClient) -> None:
        self.client = client
        self.requests: list[Request] = []

    def timed(self, what: str, ask: Callable[[], Result]) -> Result:
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
        chains = {FRONT_DOOR, "segmentation", "depth"}
        return {
            stat.name: stat.execution_count
            for stat in answer.model_stats
            if stat.name not in chains
        }


Shown = tuple[str, str]
"""HTML of the answers, and of the list of requests."""


def look(
    client: FeatureClient, photo: Image.Image, labels: Sequence[str] | None
) -> Iterator[Shown]:
    """Everything the server can say of a photograph; it grows with every answer.

    A request that fails becomes a sentence in its place; one that finds no server ends the matter.
    """
    asking, cards = Asking(client), []
    offer = ask_offer(client)
    scale = SHOWN / max(photo.size)
    small = photo.resize(
        [max(1, round(scale * side)) for side in photo.size], Image.Resampling.LANCZOS
    )
    parts = {"Patches": lambda: patches(asking, offer, photo)} if offer.patches else {}
    if "segmentation" in offer.tasks:
        parts["Segmentation"] = lambda: segmentation(asking, photo, small)
    if "depth" in offer.tasks:
        parts["Depth"] = lambda: depth(asking, photo, small)
    if "zero_shot" in offer.tasks:
        parts["Zero-shot"] = lambda: zero_shot(asking, offer, photo, labels)
    for title, part in parts.items():
        try:
            cards.append(part())
        except Unavailable as error:
            if is_gone(error):
                raise
            cards.append(problem_card(title, sentence(error, client.url)))
        except ClientError as error:
            cards.append(problem_card(title, sentence(error, client.url)))
        yield page_of(cards), page_of([requests_card(asking.requests)] if asking.requests else [])


def patches(asking: Asking, offer: Offer, photo: Image.Image) -> str:
    """The backbone's and every head's patches, as far as they are well."""
    names, client = offer.patches, asking.client
    answer = asking.timed(
        f"{FRONT_DOOR}, {len(names)} outputs", lambda: client.features(photo, names, partial=True)
    )
    maps = {name: answer[name][0].reshape(*answer.grid(name), -1) for name in answer}
    return patches_card(
        fit(photo, *answer.size),
        {name.removesuffix("_patches"): maps[name] for name in maps},
        answer.missing,
    )


def segmentation(asking: Asking, photo: Image.Image, small: Image.Image) -> str:
    """The class of every pixel."""
    result = asking.timed("segmentation", lambda: segment(asking.client, photo))
    return segmentation_card(small, result.class_map[0], result.classes)


def depth(asking: Asking, photo: Image.Image, small: Image.Image) -> str:
    """The distance of every pixel."""
    result = asking.timed("depth", lambda: estimate_depth(asking.client, photo))
    return depth_card(small, result.depth[0], result.unit)


def zero_shot(
    asking: Asking, offer: Offer, photo: Image.Image, labels: Sequence[str] | None
) -> str:
    """Probabilities of classes: of the labels, or of the bundle's own."""
    result = asking.timed("zero_shot", lambda: classify(asking.client, photo, labels))
    teacher = offer.zero_shot.get("teacher")
    token = f"{teacher}_token" if teacher else "the picture"
    about = (
        f"{token} against "
        f"{'your labels' if labels else f'the {len(result.classes)} classes of the bundle'}"
    )
    return zero_shot_card(result.probabilities[0], result.classes, about)


def page_of(cards: Sequence[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(cards)}</div>'


def is_gone(error: ClientError) -> bool:
    """Whether there is no server, as against one that is busy."""
    return isinstance(error, Unavailable) and (
        "connect" in error.message or "resolving" in error.message
    )


def sentence(error: ClientError, url: str) -> str:
    """A failure as the page says it."""
    if is_gone(error):
        return (
            f"No server answers at {url}. Start one with python -m serve.run BUNDLE, then try "
            "again."
        )
    text = str(error)
    return text[:1].upper() + text[1:] if isinstance(error, BadRequest) else text


def build(client: FeatureClient, labels: Sequence[str] | None) -> gradio.Blocks:
    """The page; `labels` are the classes it starts with (None: the bundle's)."""

    def heading() -> str:
        try:
            offer = ask_offer(client)
        except ClientError as error:
            return heading_of(escape(sentence(error, client.url)))
        return heading_of(facts_of(offer, client.url))

    def labels_box() -> Any:
        try:
            return gradio.update(visible=ask_offer(client).new_labels)
        except ClientError:
            return gradio.update()

    def answer(file: Mapping[str, Any] | None, lines: str | None) -> Iterator[Shown]:
        if not file:
            yield HINT, ""
            return
        requested = [line.strip() for line in (lines or "").splitlines() if line.strip()]
        try:
            yield from look(client, open_upload(file, Path(image.GRADIO_CACHE)), requested or None)
        except ClientError as error:
            title = "This picture cannot be read" if isinstance(error, BadRequest) else "No answer"
            yield page_of([problem_card(title, sentence(error, client.url))]), ""

    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.HTML(heading)
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=3, min_width=250):
                image = gradio.Image(
                    label="Photograph",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=240,
                    buttons=[],
                    elem_id="photograph",
                )
                result = example_photographs()
                if result:
                    gradio.Examples(
                        [[str(path)] for path in result],
                        [image],
                        label="Examples",
                        examples_per_page=8,
                    )
                words = gradio.Textbox(
                    "\n".join(labels or ()),
                    label="Zero-shot labels, one a line",
                    lines=5,
                    max_lines=12,
                    visible=False,
                    placeholder="empty: the bundle's own classes",
                    elem_id="labels",
                )
                again = gradio.Button(
                    "Ask with these labels", size="sm", visible=False, elem_id="again"
                )
                requests = gradio.HTML("", elem_id="requests")
            with gradio.Column(scale=10, min_width=500):
                answers = gradio.HTML(HINT, elem_id="answers")
        # the file is decoded by `answer`, which says in a sentence what is wrong with it
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        given = {
            "fn": answer,
            "inputs": [image, words],
            "outputs": [answers, requests],
            "preprocess": False,
            **quiet,
        }
        image.change(**given, trigger_mode="always_last")
        again.click(**given)
        for part in (words, again):
            page.load(labels_box, None, [part], **quiet)
    return page


HINT = hint(
    "Drop a JPEG, PNG or WebP photograph on the left, or choose an example. It goes to the server "
    "and nowhere else."
)


def open_upload(file: Mapping[str, Any], folder: Path) -> Image.Image:
    """A picture that was dropped on the page; raises BadRequest for one that cannot be read.

    Gradio lets whoever writes requests by hand name any file of this machine: only those of its own
    folder are read.
    """
    path = Path(file.get("path") or "").resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadRequest("the file was not uploaded to this page")
    return Picture(path, Path(file.get("orig_name") or path).name).open(Limits())


def heading_of(line: str) -> str:
    """What this page is, and a line of HTML."""
    return f'<div class="heading"><h1>{TITLE}</h1><p>{ABOUT}</p><p>{line}</p></div>'


def facts_of(offer: Offer, url: str) -> str:
    """What is served, in a line of HTML; servers of other makes may say less."""
    about, size = offer.about, offer.front_door.size()
    facts = []
    if "student" in about:
        facts.append(f"<b>{escape(str(about['student']))}</b>")
    if about.get("teachers"):
        teachers = ", ".join(str(teacher.get("label")) for teacher in about["teachers"])
        facts.append(escape(f"distilled with {about.get('method')} from {teachers}"))
    if size:
        facts.append(f"{size[1]}×{size[0]} pixels")
    if "precision" in about:
        facts.append(escape(str(about["precision"])))
    if "bundle" in about:
        facts.append(f"bundle <code>{escape(str(about['bundle']))}</code>")
    return " · ".join([*facts, f"Triton at <code>{escape(url)}</code>"])


def example_photographs() -> list[Path]:
    """Photographs of packages that happen to be installed; none if none are."""
    result = []
    for package, name in EXAMPLES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / name).is_file():
                result.append(Path(folder) / name)
    return result
