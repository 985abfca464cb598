"""Heads from a student's features to its teachers' spaces, for UNIC and SeFA."""

from collections.abc import Callable, Sequence

from torch import nn

from distill.features import FeatureDims, Features
from distill.methods.losses import Prediction
from distill.models.student import Layer


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers between the given widths with GELU in between."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def initialize(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02 and zero biases, as DINO and UNIC have it."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FeatureHead(nn.Module):
    """A projector from the student's summary to a teacher's, where it has one, and another from the
    student's map to the teacher's.

    `make(out)` builds a projector to a width. With `detach_patches` the map's projector is trained
    without moving the student.
    """

    def __init__(
        self, make: Callable[[int], nn.Module], dims: FeatureDims, detach_patches: bool = False
    ) -> None:
        super().__init__()
        self.token = None if dims.summary is None else make(dims.summary)
        self.patches = make(dims.patches)
        self.detach_patches = detach_patches
        self.apply(initialize)

    def forward(self, features: Features) -> Prediction:
        """Map student features to the teacher's widths; no token for a teacher without summary."""
        patches, summary = features.patches, features.summary
        if self.detach_patches:
            patches = patches.detach()
        token = None if self.token is None else self.token(summary)
        if self.training:  # the map's own summary is for clients alone
            return Prediction(token, self.patches(patches), None)
        return Prediction(token, self.patches(patches), self.patches(summary))


class LadderHead(nn.Module):
    """UNIC's ladder of projectors to one teacher: every layer of the student has its own, and their
    outputs are added up.

    Used in training alone, on maps of one grid.
    """

    def __init__(
        self, widths: Sequence[int], hidden: int, last_hidden: int, dims: FeatureDims
    ) -> None:
        super().__init__()
        inner = [hidden] * (len(widths) - 1) + [last_hidden]

        def ladder(out: int) -> nn.ModuleList:
            pairs = zip(widths, inner, strict=True)
            return nn.ModuleList(mlp((width, middle, out)) for width, middle in pairs)

        self.token = None if dims.summary is None else ladder(dims.summary)
        self.patches = ladder(dims.patches)
        self.apply(initialize)

    def forward(self, layers: Sequence[Layer]) -> Prediction:
        """Add up what the projectors say of each layer."""
        patches = sum(rung(layer.patches) for rung, layer in zip(self.patches, layers, strict=True))
        if self.token is None:
            return Prediction(None, patches, None)
        token = sum(rung(layer.summary) for rung, layer in zip(self.token, layers, strict=True))
        return Prediction(token, patches, None)
