"""Answers as pieces of a web page: everything is in the HTML itself, pictures too, so that nothing
is fetched from anywhere.

Colours are those of the pictures that `python -m serve.client` writes (serve.client.pictures). All
text from outside is escaped.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from contract.detection import Detections
from contract.views import UNSEEN
from serve.client.pictures import (
    SCALAR_COLOURS,
    draw_boxes,
    overlay,
    palette,
    pca_rgb,
    plural,
    vector_image,
)
from serve.client.tasks.maps import TaskMap

_TILE = 256
"""Pixels that small maps are magnified to, so that a saved picture is not a stamp."""
BARS, LEGEND = 7, 9
"""Classes that are shown at most."""

CSS = """
.gradio-container { max-width: 1320px !important; }
footer { display: none !important; }
.gradio-container .html-container { padding: 0; }
.heading, .cards, .hint { --faint: color-mix(in srgb, var(--body-text-color) 66%, transparent); color: var(--body-text-color); }
.heading h1 { font-size: 1.4rem; font-weight: 650; margin: 0; color: inherit; }
.heading p { margin: .2rem 0 0; font-size: .88rem; color: var(--faint); }
.heading code { font-size: .95em; background: none; border: 0; padding: 0; color: inherit; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; }
.card { flex: 1 1 380px; min-width: 0; padding: 9px 14px 12px; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--block-background-fill); box-sizing: border-box; }
.card.wide { flex-basis: 100%; }
.card h3 { margin: 0 0 7px; font-size: .95rem; font-weight: 600; color: inherit; }
.card h3 small { margin-left: .5em; font-weight: 400; font-size: .8rem; color: var(--faint); }
.card p { margin: 6px 0 0; font-size: .82rem; }
.card img { display: block; margin: 0; border-radius: 4px; max-width: 100%; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 10px; }
.tiles figure { margin: 0; max-width: 190px; }
.tiles img { width: 100%; }
.tiles .map { image-rendering: pixelated; }
.tiles figcaption { margin-top: 3px; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
.tiles figcaption span, .legend span, .scale span, .requests span, .hint { color: var(--faint); }
.beside { display: flex; gap: 14px; align-items: stretch; }
.beside img { max-height: 190px; min-width: 0; object-fit: contain; align-self: start; max-width: 75%; }
.legend { list-style: none; margin: 0 !important; padding: 0 !important; font-size: .82rem; line-height: 1.65; }
.legend li { margin: 0; padding: 0; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; vertical-align: -.05em; }
.scale { display: flex; gap: 8px; font-size: .8rem; min-height: 110px; max-height: 190px; }
.scale > i { width: 14px; border-radius: 3px; }
.scale > div { display: flex; flex-direction: column; justify-content: space-between; white-space: nowrap; line-height: 1; }
.bars { display: grid; grid-template-columns: fit-content(40%) 1fr 3.6em; gap: 4px 10px; align-items: center; font-size: .82rem; }
.bars > span { overflow-wrap: anywhere; }
.bars > div { height: 13px; border-radius: 3px; background: color-mix(in srgb, var(--body-text-color) 7%, transparent); }
.bars i { display: block; height: 100%; border-radius: 3px; background: #4477aa; }
.bars b { font-weight: 400; text-align: right; font-variant-numeric: tabular-nums; }
.requests dl { display: grid; grid-template-columns: 1fr auto; gap: 0 8px; margin: 0; font-size: .82rem; line-height: 1.4; }
.requests dt, .requests dd { margin: 0; padding-top: 5px; color: inherit; }
.requests dd { font-variant-numeric: tabular-nums; }
.requests dd.ran { grid-column: 1 / -1; padding-top: 0; color: var(--faint); }
.card.problem { border-color: #d97706; border-left-width: 5px; }
.hint { padding: 100px 20px; text-align: center; border: 1px dashed var(--border-color-primary); border-radius: 8px; }
"""


class Request(NamedTuple):
    """A request as the page lists it: its task, its model, milliseconds, and the models
    the server ran for it.
    """

    what: str
    milliseconds: float
    ran: tuple[str, ...]


def patches_card(
    seen: np.ndarray, maps: Mapping[str, np.ndarray], missing: Mapping[str, object]
) -> str:
    """The picture as the model sees it, uint8 [H, W, 3], and the principal components of maps [h,
    w, d] in colours.
    """
    height, width = seen.shape[:2]
    size = f"{width}×{height}"
    tiles = [_tile(Image.fromarray(seen), "seen", "as the model sees it", f"{size} pixels")]
    for name, values in maps.items():
        rgb = (255 * pca_rgb(values)).round().astype(np.uint8)
        scale = max(1, _TILE // max(height, width))
        picture = Image.fromarray(rgb).resize(
            (width * scale, height * scale), Image.Resampling.NEAREST
        )
        about = f"{values.shape[1]}×{values.shape[0]} patches, {values.shape[2]}-d"
        tiles.append(_tile(picture, "map", name, about))
    lost = "".join(
        f"<p>{escape(name)} is missing: {escape(str(why))}</p>" for name, why in missing.items()
    )
    title = (
        "Patches <small>each map's first three principal components as red, green and blue</small>"
    )
    return card("patches", title, f'<div class="tiles">{"".join(tiles)}</div>{lost}', wide=True)


def _tile(picture: Image.Image, kind: str, name: str, about: str) -> str:
    caption = f"{escape(name)}<br><span>{escape(about)}</span>"
    return f'<figure><img class="{kind}" alt="{escape(name)}" src="{_embed(picture)}"><figcaption>{caption}</figcaption></figure>'


def map_card(photo: Image.Image, result: TaskMap) -> str:
    """The map of one photograph, drawn in its shape as the map's kind is."""
    values = result.values[0]
    match result.task.map.kind:
        case "classes":
            shown = np.unique(values[values != UNSEEN])
            about = f"{len(shown)} of {len(result.classes)} classes"
            picture = overlay(photo, values, len(result.classes))
            legend = _legend(values, result.classes)
        case "scalar":
            median = f"median {np.nanmedian(values):.2f}"
            about = ", ".join(filter(None, (plural(result.unit), median)))
            picture, legend = _scalar_picture(photo, values), _scale(values)
        case "vector":
            about = "x, y and z as red, green and blue"
            picture = vector_image(values).resize(photo.size, Image.Resampling.BILINEAR)
            legend = ""
    name = result.task.name
    inside = f'<img alt="{name}" src="{_embed(picture)}">{legend}'
    title = f"{result.task.title} <small>{escape(about)}</small>"
    return card(name, title, f'<div class="beside">{inside}</div>')


def _legend(class_map: np.ndarray, classes: Sequence[str]) -> str:
    """The colours of classes and the share of each."""
    numbers, counts = np.unique(class_map[class_map != UNSEEN], return_counts=True)
    order = counts.argsort(kind="stable")[::-1]
    colours = palette(len(classes))
    entries = [
        f'<li><i style="background: rgb{tuple(colours[numbers[n]].tolist())}"></i>{escape(classes[numbers[n]])} '
        f"<span>{counts[n] / counts.sum():.1%}</span></li>"
        for n in order[:LEGEND]
    ]
    if len(order) > LEGEND:
        entries.append(f"<li><span>and {len(order) - LEGEND} more</span></li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _scalar_picture(photo: Image.Image, values: np.ndarray) -> Image.Image:
    """Values [H, W] in colours, in the photograph's shape, small ones bright; grey: not seen."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    share = Image.fromarray(((values - low) / max(high - low, 1e-12)).astype(np.float32))
    share = np.asarray(share.resize(photo.size, Image.Resampling.BILINEAR))
    colours = matplotlib.colormaps[SCALAR_COLOURS]
    rgb = colours(np.clip(share, 0, 1), bytes=True)[..., :3]
    return Image.fromarray(np.where(np.isnan(share)[..., None], 128, rgb).astype(np.uint8))


def _scale(values: np.ndarray) -> str:
    """The colours of values, the smallest above."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    colours = matplotlib.colormaps[SCALAR_COLOURS]
    stops = ", ".join(
        f"rgb{tuple(int(part) for part in colours(n / 8, bytes=True)[:3])}" for n in range(9)
    )
    marks = "".join(f"<span>{low + (high - low) * n / 4:.2f}</span>" for n in range(5))
    bar = f'<i style="background: linear-gradient(to bottom, {stops})"></i>'
    return f'<div class="scale">{bar}<div>{marks}</div></div>'


def zero_shot_card(probabilities: np.ndarray, classes: Sequence[str], about: str) -> str:
    """Bars of the likeliest classes; `about` says what they were compared with."""
    order = probabilities.argsort(kind="stable")[::-1]
    bars = "".join(
        f'<span>{escape(classes[n])}</span><div><i style="width: {probabilities[n]:.1%}"></i></div><b>{probabilities[n]:.1%}</b>'
        for n in order[:BARS]
    )
    more = f", the {BARS} likeliest" if len(order) > BARS else ""
    title = f"Zero-shot <small>{escape(about)}{more}</small>"
    return card("zero-shot", title, f'<div class="bars">{bars}</div>', wide=True)


def detection_card(photo: Image.Image, found: Detections, classes: Sequence[str]) -> str:
    """Boxes of what was found in a photograph, and how many of each class there are."""
    numbers, counts = np.unique(found.labels, return_counts=True)
    colours = palette(len(classes))
    entries = [
        f'<li><i style="background: rgb{tuple(colours[number].tolist())}"></i>'
        f"{escape(classes[number])} <span>{count}</span></li>"
        for number, count in zip(numbers[:LEGEND], counts[:LEGEND], strict=True)
    ]
    if len(numbers) > LEGEND:
        entries.append(f"<li><span>and {len(numbers) - LEGEND} more</span></li>")
    picture = f'<img alt="detection" src="{_embed(draw_boxes(photo, found, classes))}">'
    legend = f'<ul class="legend">{"".join(entries)}</ul>'
    title = f"Detection <small>{len(found.scores)} found of {len(classes)} labels</small>"
    return card("detection", title, f'<div class="beside">{picture}{legend}</div>')


def requests_card(requests: Iterable[Request]) -> str:
    """Requests, their latencies, and the models that ran."""
    rows = "".join(
        f'<dt>{escape(one.what)}</dt><dd>{one.milliseconds:.1f} ms</dd><dd class="ran">{escape(", ".join(one.ran))}</dd>'
        for one in requests
    )
    about = "Round trips as measured here; below each, the models that the server ran meanwhile."
    return card("requests", "Requests", f"<dl>{rows}</dl><p><span>{about}</span></p>")


def problem_card(title: str, sentence: str) -> str:
    return card("problem", escape(title), escape(sentence), wide=True)


def card(name: str, title: str, inside: str, wide: bool = False) -> str:
    """A frame with a title; both are HTML already."""
    return (
        f'<section class="card {name}{" wide" if wide else ""}"><h3>{title}</h3>{inside}</section>'
    )


def hint(sentence: str) -> str:
    """What is shown before there is anything to show."""
    return f'<div class="hint">{escape(sentence)}</div>'


def _embed(picture: Image.Image) -> str:
    """A picture as an address that holds it: small ones without loss, photographs as JPEG."""
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) <= _TILE else "jpeg"
    picture.save(buffer, kind, **({"quality": 90, "subsampling": 0} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
