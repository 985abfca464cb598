"""Figures of dense tasks and of detection: photograph, truth, prediction."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from contract.detection import Detections
from distill.evaluate.boxes import Boxes
from distill.figures import save_figure


def _palette(classes: int) -> np.ndarray:
    """Distinct RGB colours [classes, 3] in [0, 1]; the golden angle keeps neighbours apart."""
    hues = (np.arange(classes) * 0.61803) % 1
    values = 0.95 - 0.35 * (np.arange(classes) // 6 % 2)
    return matplotlib.colors.hsv_to_rgb(np.stack([hues, np.full(classes, 0.65), values], axis=1))


def map_figure(
    path: Path, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: int, ignore: int
) -> Path:
    """Photograph, true labels, predicted labels; ignored pixels are black."""
    colours = np.concatenate([_palette(classes), np.zeros((1, 3))])

    def paint(labels: np.ndarray) -> np.ndarray:
        return colours[np.where(labels == ignore, classes, labels)]

    figure, axes = _grid(rows, ("picture", "truth", "prediction"))
    for line, (picture, truth, predicted) in zip(axes, rows, strict=True):
        for axis, image in zip(line, (picture, paint(truth), paint(predicted)), strict=True):
            axis.imshow(image, interpolation="nearest")
    return save_figure(figure, path)


def depth_figure(
    path: Path, rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], largest: float
) -> Path:
    """Photograph, true and predicted depth on one scale of metres; unknown depth is white."""
    figure, axes = _grid(rows, ("picture", "truth, m", "prediction, m"))
    for line, (picture, truth, metres) in zip(axes, rows, strict=True):
        known = np.where((truth > 0) & (truth <= largest), truth, np.nan)
        low, high = np.nanmin(known), np.nanmax(known)
        line[0].imshow(picture)
        line[1].imshow(known, vmin=low, vmax=high, cmap="magma_r")
        shown = line[2].imshow(metres, vmin=low, vmax=high, cmap="magma_r")
        figure.colorbar(shown, ax=line[2], shrink=0.8)
    return save_figure(figure, path)


def boxes_figure(
    path: Path,
    rows: list[tuple[Image.Image, Boxes, Detections]],
    classes: Sequence[str],
    threshold: float,
) -> Path:
    """Photographs with the true boxes, and with those detected whose score exceeds the
    threshold.
    """
    figure, axes = _grid(rows, ("truth", f"detected, score above {threshold:g}"))
    colours = _palette(len(classes))
    for line, (picture, truth, result) in zip(axes, rows, strict=True):
        for axis in line:
            axis.imshow(np.asarray(picture))
        for edges, label in zip(truth.edges, truth.labels, strict=True):
            draw_box(line[0], edges, colours[label], classes[label])
        kept = result.scores > threshold
        detected = result.boxes[kept] * np.array(picture.size * 2)
        for edges, label, score in zip(
            detected, result.labels[kept], result.scores[kept], strict=True
        ):
            draw_box(line[1], edges, colours[label], f"{classes[label]} {score:.2f}")
    return save_figure(figure, path)


def draw_box(axis: plt.Axes, edges: np.ndarray, colour: object, text: str) -> None:
    """A box [4] by its left, upper, right and lower edge in pixels, with `text` above it."""
    left, upper, right, lower = edges - 0.5  # imshow has the first pixel's centre at 0
    axis.plot([left, right, right, left, left], [upper, upper, lower, lower, upper], color=colour)
    axis.text(left, upper, text, fontsize=7, va="bottom", color=colour, clip_on=True)


def _grid(rows: list, titles: tuple[str, ...]) -> tuple[plt.Figure, np.ndarray]:
    size = (2.8 * len(titles), 2.7 * len(rows))
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    return figure, axes
