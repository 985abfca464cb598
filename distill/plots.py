"""Figures of a run: its loss curves, summed as in UMT's Tables 2 and 3, and several models' features side by side."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from distill.errors import UserError
from distill.metrics import read_metrics
from distill.pca import pca_rgb


def plot_losses(folder: Path) -> Path:
    """Draw RUN/plots/losses.png from RUN/metrics.jsonl and return its path."""
    rows = read_metrics(folder / "metrics.jsonl")
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for panel, kind, title in zip(
        panels, ("token", "patches"), ("token loss $L^m$ (MSE)", "feature loss $L^f$ (by role)"), strict=True
    ):
        keys = [key for key in (rows[0] if rows else {}) if key.startswith("loss.") and key.endswith(kind)]
        for key in sorted(keys, key=lambda key: key.count(".")):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            total = key == f"loss.{kind}"
            name = "sum" if total else key.split(".")[1]
            label = f"{name}: {values[0]:.3f} → {values[-1]:.3f}"
            panel.plot(steps, values, label=label, color="black" if total else None, linewidth=2.2 if total else 1.4)
        panel.set(title=title, xlabel="step", ylabel="loss")
        panel.grid(alpha=0.3)
        if keys:
            panel.legend(frameon=False)
            panel.set_ylim(bottom=0)
    return save_figure(figure, folder / "plots" / "losses.png")


def pca_figure(path: Path, photos: list[np.ndarray], groups: list[dict[str, Tensor]]) -> Path:
    """Photographs, a row each, beside PCA pictures of several models' maps [n, h, w, d], a column each.

    The columns of a group have features in one space and share its components, so their colours compare; colours of
    different groups do not.
    """
    columns = sum(len(group) for group in groups)
    size = (2.6 * (1 + columns), 2.7 * len(photos))
    figure, axes = plt.subplots(len(photos), 1 + columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for row, photo in enumerate(photos):
        axes[row, 0].imshow(photo)
    column = 0
    for group in groups:
        colours = iter(pca_rgb([image for maps in group.values() for image in maps]))
        for title, maps in group.items():
            column += 1
            axes[0, column].set_title(f"{title}, {maps.shape[1]}x{maps.shape[2]}", fontsize=10)
            for row in range(len(photos)):
                axes[row, column].imshow(next(colours), interpolation="nearest")
    return save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write a figure as PNG, making its folder; raises UserError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror} (choose another --output)") from error
    finally:
        plt.close(figure)
    return path
