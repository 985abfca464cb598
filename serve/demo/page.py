"""The page of `python -m serve.demo`, in gradio; what it shows is made in answers.py."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio
from PIL import Image

from contract.images import Limits
from serve.client import FeatureClient
from serve.client.inputs import Picture
from serve.demo.answers import Offer, Shown, ask_offer, look, page_of, sentence
from serve.demo.cards import hint, problem_card
from serve.errors import BadRequest, ClientError

_TITLE = "A distilled vision backbone, served by Triton"
_ABOUT = (
    "One small network with a head for each of its teachers. Drop a photograph to see the "
    "features it makes, and their uses."
)
_EXAMPLES = (
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
"""Photographs that installed packages may carry."""


def build(client: FeatureClient, labels: Sequence[str] | None) -> gradio.Blocks:
    """The page; `labels` are the classes it starts with (None: the bundle's)."""

    def heading() -> str:
        try:
            offer = ask_offer(client)
        except ClientError as error:
            return _heading_of(escape(sentence(error, client.url)))
        return _heading_of(_facts_of(offer, client.url))

    def labels_box() -> Any:
        try:
            offer = ask_offer(client)
            return gradio.update(visible=offer.new_labels or offer.detection)
        except ClientError:
            return gradio.update()

    def answer(file: Mapping[str, Any] | None, lines: str | None) -> Iterator[Shown]:
        if not file:
            yield _HINT, ""
            return
        requested = [line.strip() for line in (lines or "").splitlines() if line.strip()]
        try:
            yield from look(client, _open_upload(file, Path(image.GRADIO_CACHE)), requested or None)
        except ClientError as error:
            title = "This picture cannot be read" if isinstance(error, BadRequest) else "No answer"
            yield page_of([problem_card(title, sentence(error, client.url))]), ""

    with gradio.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
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
                result = _example_photographs()
                if result:
                    gradio.Examples(
                        [[str(path)] for path in result],
                        [image],
                        label="Examples",
                        examples_per_page=8,
                    )
                words = gradio.Textbox(
                    "\n".join(labels or ()),
                    label="Labels, one a line",
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
                answers = gradio.HTML(_HINT, elem_id="answers")
        # the file is decoded by `answer`, which says in a sentence what is wrong with it
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        event = {
            "fn": answer,
            "inputs": [image, words],
            "outputs": [answers, requests],
            "preprocess": False,
            **quiet,
        }
        image.change(**event, trigger_mode="always_last")
        again.click(**event)
        for part in (words, again):
            page.load(labels_box, None, [part], **quiet)
    return page


_HINT = hint(
    "Drop a JPEG, PNG or WebP photograph on the left, or choose an example. It goes to the server "
    "and nowhere else."
)


def _open_upload(file: Mapping[str, Any], folder: Path) -> Image.Image:
    """A picture that was dropped on the page; raises BadRequest for one that cannot be read.

    Gradio accepts handwritten requests with any path of this machine, so only files of its own
    folder are read.
    """
    path = Path(file.get("path") or "").resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadRequest("the file was not uploaded to this page")
    return Picture(path, Path(file.get("orig_name") or path).name).open(Limits())


def _heading_of(line: str) -> str:
    """What this page is, and a line of HTML."""
    return f'<div class="heading"><h1>{_TITLE}</h1><p>{_ABOUT}</p><p>{line}</p></div>'


def _facts_of(offer: Offer, url: str) -> str:
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


def _example_photographs() -> list[Path]:
    """Photographs of packages that happen to be installed; none if none are."""
    result = []
    for package, name in _EXAMPLES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / name).is_file():
                result.append(Path(folder) / name)
    return result
