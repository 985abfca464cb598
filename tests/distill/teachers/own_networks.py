"""Networks of own code, right and wrong, that tests name as `python:…`."""

import torch
from torch import Tensor, nn

from distill.features import Features


class Grid(nn.Module):
    """A convolution of 8 px and its mean."""

    def __init__(self, width: int = 12, returns: str = "features") -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 8, 8)
        self.returns = returns

    def forward(self, pixels: Tensor) -> object:
        patches = self.convolution(pixels).permute(0, 2, 3, 1)
        summary = patches.mean(dim=(1, 2))
        return {
            "features": Features(summary, patches),
            "tuple": (None, patches),
            "dict": {"summary": summary, "patches": patches},
            "maps": {"patches": patches, "maps": [patches[:, ::2, ::2]]},
            "keys": {"tokens": patches},
            "tokens": (summary, patches.flatten(1, 2)),
            "wide": (summary[:1], patches),
            "numbers": (summary, patches.long()),
            "none": None,
            "list": [summary, patches],
            "nan": (summary, patches * float("nan")),
            "second": Features(summary, patches, second=summary),
            "text": ("a", patches),
        }[self.returns]


class Dropping(Grid):
    """Gives something else each time."""

    def forward(self, pixels: Tensor) -> object:
        features = super().forward(pixels)
        return features.map(lambda values: values * torch.rand(1))


class Edges(nn.Module):
    """Without parameters."""

    def forward(self, pixels: Tensor) -> object:
        return None, nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)


DATA = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def grid(**kwargs: object) -> tuple[nn.Module, dict]:
    return Grid(**kwargs), DATA


def bare(width: int = 12, pretrained: bool = True) -> nn.Module:
    return Grid(width)


def edges() -> tuple[nn.Module, dict]:
    return Edges(), DATA


def dropping() -> tuple[nn.Module, dict]:
    return Dropping(), DATA


def narrow() -> tuple[nn.Module, dict]:
    return nn.Conv2d(4, 2, 1), DATA


def failing() -> nn.Module:
    raise FileNotFoundError("weights/mine.pth is missing")


def number() -> int:
    return 3


def stating(**about: object) -> tuple[nn.Module, dict]:
    return Grid(), about


def other(**kwargs: object) -> tuple[nn.Module, dict]:
    return grid(**kwargs)


def ending() -> nn.Module:
    raise SystemExit(0)


class Leaving(nn.Module):
    """Ends the program where it is called."""

    def forward(self, pixels: Tensor) -> object:
        raise SystemExit("usage")


def leaving() -> tuple[nn.Module, dict]:
    return Leaving(), DATA
