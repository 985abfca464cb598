"""Feature maps as pictures: principal components as RGB, and the cosine to a summary (UMT Figures 1, 3 and 4)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pca_rgb(maps: list[Tensor]) -> list[np.ndarray]:
    """Colour maps [h, w, d] by their first three principal components, fitted over all of them together.

    Returns arrays [h, w, 3] in [0, 1]. Each component is stretched between its 1st and 99th percentile and has a fixed
    sign, so equal features always get equal colours.
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
    return [part.view(m.shape[0], m.shape[1], 3).numpy() for part, m in zip(split, maps, strict=True)]


def cosine_map(summary: Tensor, patches: Tensor) -> np.ndarray:
    """Cosine [h, w] between an image-level vector [d] and every position of a map [h, w, d]."""
    return F.cosine_similarity(patches, summary, dim=-1).numpy()
