"""Answers as pictures: principal components of features, maps of every kind, bars of classes,
boxes.
"""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

from contract.detection import Detections
from contract.errors import UserError
from contract.views import UNSEEN
from serve.client.tasks.maps import TaskMap

_LONGEST = 1024
"""Pixels of a picture's longer side, at most."""

SCALAR_COLOURS = "magma_r"
"""Of matplotlib: small values (near ones, of depth) are bright."""

NOTHING_SEEN = "nothing of it in view"
"""Said of a map whose picture is too small for the view to show the middle of any pixel."""

_NAMED_COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (188, 189, 34),
    (23, 190, 207),
    (255, 221, 87),
    (112, 128, 144),
    (0, 100, 80),
)


def palette(classes: int) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]: the same for the same number, easy to
    distinguish for the first dozen.
    """
    colours = list(_NAMED_COLOURS[:classes])
    for number in range(len(colours), classes):
        # hues a golden angle apart never come round to the same place
        hue, light = (number * 0.618034) % 1, 0.45 + 0.2 * (number % 2)
        colours.append(tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.65)))
    return np.array(colours, np.uint8).reshape(-1, 3)


def shown(photo: Image.Image) -> Image.Image:
    """A photograph as large as pictures show it."""
    scale = _LONGEST / max(photo.size)
    if scale >= 1:
        return photo.convert("RGB")
    size = tuple(max(1, round(side * scale)) for side in photo.size)
    return photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def pca_rgb(patches: np.ndarray) -> np.ndarray:
    """Colour features [h, w, d] by their first three principal components: float [h, w, 3] in [0,
    1].

    Each component is stretched between its 1st and 99th percentile and has a fixed sign, as in
    distill's pictures.
    """
    rows = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    centred = rows - rows.mean(0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    # a singular vector's sign is arbitrary: make its largest entry positive
    largest = np.take_along_axis(components, np.abs(components).argmax(1, keepdims=True), 1)
    scores = centred @ (components * np.sign(largest)).T
    scores = np.pad(
        scores, ((0, 0), (0, 3 - scores.shape[1]))
    )  # fewer than three positions or channels
    low, high = np.quantile(scores, (0.01, 0.99), axis=0)
    colours = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*patches.shape[:2], 3)


def features_figure(
    photo: Image.Image,
    maps: Mapping[str, np.ndarray],
    region: tuple[float, float, float, float] = (0, 0, 1, 1),
) -> Figure:
    """A photograph beside the principal components of maps [h, w, d], each where it is of it:
    `region` is its left, upper, right and lower edge in shares of the photograph.
    """
    photo = shown(photo)
    figure, axes = _row_of(1 + len(maps), photo)
    axes[0].imshow(photo)
    axes[0].set_title(f"{photo.width}x{photo.height}", fontsize=10)
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
        left, upper, right, lower = np.array(region) * (photo.size * 2)
        axis.imshow(pca_rgb(values), interpolation="nearest", extent=(left, right, lower, upper))
        axis.set(xlim=(0, photo.width), ylim=(photo.height, 0))
        title = f"{name}, {values.shape[0]}x{values.shape[1]}"
        axis.set_title(title, fontsize=10, parse_math=False)
    return figure


def class_image(class_map: np.ndarray, classes: int) -> Image.Image:
    """A class map [H, W] as a picture whose pixels are its numbers: with colours up to 255 classes,
    16 bits beyond. What was not seen is 255, or 65535.
    """
    if classes > 255:
        return Image.fromarray(np.where(class_map == UNSEEN, 65535, class_map).astype(np.uint16))
    numbers = np.where(class_map == UNSEEN, 255, class_map).astype(np.uint8)
    image = Image.fromarray(numbers).convert("P")
    colours = palette(classes)
    if numbers.max(initial=0) >= classes:  # files have as few bits as there are colours
        colours = np.concatenate([colours, np.zeros((256 - classes, 3), np.uint8)])
    image.putpalette(colours.tobytes())
    return image


def overlay(
    photo: Image.Image, class_map: np.ndarray, classes: int, strength: float = 0.55
) -> Image.Image:
    """Classes laid over a photograph, with white lines between them; dark where nothing was
    seen.
    """
    photo = shown(photo)
    numbers = np.asarray(
        Image.fromarray(class_map.astype(np.int32)).resize(photo.size, Image.Resampling.NEAREST)
    )
    colours = np.concatenate([palette(classes), np.zeros((1, 3), np.uint8)])  # `UNSEEN` is -1
    mixed = (1 - strength) * np.asarray(photo, np.float32) + strength * colours[numbers]
    edge = np.zeros(numbers.shape, bool)
    edge[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    edge[1:] |= numbers[1:] != numbers[:-1]
    mixed[edge] = 255
    return Image.fromarray(mixed.round().astype(np.uint8))


def vector_image(vectors: np.ndarray) -> Image.Image:
    """Vectors [H, W, 3] of components in [-1, 1], as surface normals have, in red, green and
    blue.
    """
    seen = np.nan_to_num(vectors, nan=-1)  # black where nothing was seen
    return Image.fromarray((127.5 * (np.clip(seen, -1, 1) + 1)).round().astype(np.uint8))


def map_figure(photo: Image.Image, result: TaskMap, row: int) -> Figure:
    """A photograph beside one map of several, drawn as its kind is."""
    values = result.values[row]
    match result.task.map.kind:
        case "classes":
            return class_figure(photo, values, result.classes)
        case "scalar":
            return scalar_figure(photo, values, result.unit)
        case "vector":
            return _vector_figure(photo, values)


def class_figure(photo: Image.Image, class_map: np.ndarray, classes: Sequence[str]) -> Figure:
    """A photograph, its classes laid over it, and a legend of those that are there with the share
    of pixels of each.
    """
    figure, axes = _row_of(2, shown(photo), legend=2.2)
    axes[0].imshow(shown(photo))
    axes[1].imshow(overlay(photo, class_map, len(classes)))
    numbers, counts = np.unique(class_map[class_map != UNSEEN], return_counts=True)
    order = counts.argsort()[::-1]
    colours = palette(len(classes)) / 255
    entries = [
        Patch(
            color=colours[numbers[n]],
            label=f"{_shorten(classes[numbers[n]], 24)}  {counts[n] / counts.sum():.0%}",
        )
        for n in order[:12]
    ]
    if len(order) > 12:
        entries.append(Patch(color="none", label=f"and {len(order) - 12} more"))
    legend = axes[2].legend(
        handles=entries, loc="center left", frameon=False, fontsize=10, borderaxespad=0
    )
    for text in legend.get_texts():  # whatever dollar signs a class has
        text.set_parse_math(False)
    return figure


def scalar_figure(photo: Image.Image, values: np.ndarray, unit: str) -> Figure:
    """A photograph beside its depth (say) [H, W] in colours, small values bright, with a scale."""
    photo, units = shown(photo), plural(unit)
    figure, axes = _row_of(2, photo)
    axes[0].imshow(photo)
    extent = (0, photo.width, photo.height, 0)
    image = axes[1].imshow(values, cmap=SCALAR_COLOURS, extent=extent, interpolation="bilinear")
    seen = values[~np.isnan(values)]
    title = (
        f"{seen.min():.2f} to {seen.max():.2f}, median {np.median(seen):.2f} {units}"
        if seen.size
        else NOTHING_SEEN
    )
    axes[1].set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=axes[1], fraction=0.05, pad=0.02, label=units)
    bar.ax.invert_yaxis()  # small values above, as they are bright
    return figure


def _vector_figure(photo: Image.Image, vectors: np.ndarray) -> Figure:
    """A photograph beside its vectors [H, W, 3] as red, green and blue."""
    photo = shown(photo)
    figure, axes = _row_of(2, photo)
    axes[0].imshow(photo)
    axes[1].imshow(vector_image(vectors), extent=(0, photo.width, photo.height, 0))
    axes[1].set_title("x, y and z as red, green and blue", fontsize=10)
    return figure


def zero_shot_figure(
    photo: Image.Image, probabilities: np.ndarray, classes: Sequence[str], most: int = 10
) -> Figure:
    """A photograph beside bars of its likeliest classes, probabilities [C]."""
    photo = shown(photo)
    figure, axes = _row_of(2, photo, ratio=1.2)
    axes[0].imshow(photo)
    order = probabilities.argsort(kind="stable")[::-1][:most]
    bars = axes[1]
    bars.set_axis_on()
    bars.barh(range(len(order)), probabilities[order], color="#4477aa", height=0.7)
    for place, number in enumerate(order):
        bars.text(
            probabilities[number] + 0.01,
            place,
            f"{probabilities[number]:.1%}",
            va="center",
            fontsize=9,
        )
    names = [_shorten(classes[number]) for number in order]
    bars.set_yticks(range(len(order)), names, fontsize=10, parse_math=False)
    bars.set(
        xlim=(0, 1.12),
        ylim=(max(len(order), 4) - 0.4, -0.6),
        xlabel="probability",
        xticks=(0, 0.25, 0.5, 0.75, 1),
    )
    bars.spines[["top", "right"]].set_visible(False)
    if len(classes) > most:
        bars.set_title(f"the {most} likeliest of {len(classes)} classes", fontsize=10)
    return figure


def draw_boxes(photo: Image.Image, found: Detections, classes: Sequence[str]) -> Image.Image:
    """A photograph with the boxes of what was found in it, a colour for each class, and the label
    and score of each; the best lies on top.
    """
    picture = shown(photo)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 250))
    font = ImageFont.load_default(max(11, round(max(picture.size) / 45)))
    colours = palette(len(classes))
    sides = np.array(picture.size * 2)
    for place in reversed(range(len(found.scores))):
        number = found.labels[place]
        colour = tuple(colours[number].tolist())
        left, upper, right, lower = (found.boxes[place] * sides).tolist()
        draw.rectangle(
            (left, upper, max(left, right), max(upper, lower)), outline=colour, width=line
        )
        text = f"{_shorten(classes[number])} {found.scores[place]:.2f}"
        wide, tall = draw.textbbox((0, 0), text, font=font)[2:]
        # above the box, inside it where there is no room, and never beyond the right edge
        left = max(0, min(left, picture.width - wide - 4))
        upper = upper - tall - 4 if upper > tall + 4 else upper
        draw.rectangle((left, upper, left + wide + 4, upper + tall + 4), fill=colour)
        dark = sum(colour) > 380
        draw.text((left + 2, upper + 1), text, fill=(0, 0, 0) if dark else (255,) * 3, font=font)
    return picture


def plural(unit: str) -> str:
    """`metres` of `metre`."""
    return f"{unit}s" if unit else ""


def _shorten(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _row_of(
    panels: int, photo: Image.Image, legend: float = 0, ratio: float = 0
) -> tuple[Figure, list]:
    """A figure of panels in a photograph's shape, and a last one `legend` inches wide, or the last
    `ratio` times as wide.
    """
    tall = 3.4
    wide = min(max(tall * photo.width / photo.height, 1.6), 8, max(15 / panels, 2.2))
    tall = min(tall, wide * photo.height / photo.width)
    widths = [wide] * panels + ([legend] if legend else [])
    if ratio:
        widths[-1] = max(wide * ratio, 4.4)
    figure = Figure(figsize=(sum(widths) + 0.2, max(tall, 2.2) + 0.4), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis in axes:
        axis.set_axis_off()
    return figure, list(axes)


def save(picture: Figure | Image.Image, path: Path) -> Path:
    """Write a PNG, making its folder; raises UserError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Figure):
            picture.savefig(path, dpi=110)
        else:
            picture.save(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} (choose another --output)"
        ) from error
    return path
