"""Figures of a run: its loss curves, summed as in UMT's Tables 2 and 3, and several models'
features side by side.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from contract.errors import UserError

# names of classes, files and teachers are shown as they are, whatever dollar signs they hold
matplotlib.rcParams["text.parse_math"] = False


def pca_figure(path: Path, photos: list[np.ndarray], groups: list[dict[str, Tensor]]) -> Path:
    """A row per photograph: the photograph, then PCA pictures of several models' maps [n, h, w, d].

    The columns of a group have features in one space and share its components, so their colours
    compare; colours of different groups do not.
    """
    columns = sum(len(group) for group in groups)
    size = (2.6 * (1 + columns), 2.7 * len(photos))
    figure, axes = plt.subplots(
        len(photos), 1 + columns, figsize=size, squeeze=False, layout="constrained"
    )
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
        raise UserError(
            f"cannot write {path}: {error.strerror} (choose another --output)"
        ) from error
    finally:
        plt.close(figure)
    return path


def pca_rgb(maps: list[Tensor]) -> list[np.ndarray]:
    """Colour maps [h, w, d] by their first three principal components, fitted over all of them
    together.

    Returns arrays [h, w, 3] in [0, 1]. Each component is stretched between its 1st and 99th
    percentile and has a fixed sign, so equal features always get equal colours.
    """
    rows = torch.cat([m.reshape(-1, m.shape[-1]) for m in maps]).double()
    centred = rows - rows.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:3]
    # a singular vector's sign is arbitrary: make its largest entry positive
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    scores = centred @ components.T
    if scores.shape[1] < 3:  # fewer than three positions or channels
        scores = F.pad(scores, (0, 3 - scores.shape[1]))
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    split = colours.split([m.shape[0] * m.shape[1] for m in maps])
    return [
        part.view(m.shape[0], m.shape[1], 3).numpy() for part, m in zip(split, maps, strict=True)
    ]


def cosine_map(summary: Tensor, patches: Tensor) -> np.ndarray:
    """Cosine [h, w] between an image-level vector [d] and every position of a map [h, w, d]."""
    return F.cosine_similarity(patches, summary, dim=-1).numpy()
