"""Decoders as a user would write them, for tests of distill.attach."""

import torch
from torch import Tensor, nn


def segmenter(width: int, classes: int = 7, up: int = 2) -> nn.Module:
    """Patches [B, width, h, w] to logits [B, classes, up * h, up * w]."""
    return nn.Sequential(
        nn.Conv2d(width, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, classes * up * up, 1),
        nn.PixelShuffle(up),
    )


class Metres(nn.Module):
    """Patches [B, width, h, w] and a vector [B, width] to metres [B, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(width, 8, 3, padding=1), nn.Linear(width, 8)

    def forward(self, patches: Tensor, token: Tensor) -> Tensor:
        x = self.patches(patches) + self.token(token)[:, :, None, None]
        return 1 + nn.functional.softplus(x).sum(1)


class Placed(nn.Module):
    """Adds an embedding of fixed positions first, so that it takes one grid alone."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, width, side, side))
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, patches: Tensor) -> Tensor:
        return self.last(patches + self.places)


def scores(width: int, classes: int = 4) -> nn.Module:
    """A vector [B, width] to scores [B, classes]."""
    return nn.Linear(width, classes)


def pooled(width: int) -> nn.Module:
    """Patches [B, width, h, w] to scores [B, 4]: no map."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def nothing() -> None:
    """Not a module."""


def broken() -> nn.Module:
    """Raises."""
    raise FileNotFoundError("weights.pth is missing")


NUMBER = 3
