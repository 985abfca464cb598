"""The teachers' heads of a student."""

from collections.abc import Mapping, Sequence

from torch import nn

from distill.features import Features
from distill.methods.losses import Prediction


class Heads(nn.Module):
    """What predicts the teachers' features from the student's: `teachers` by label, on the output
    of `coupling` where there is one. With `grid` = (h, w) of the student's map each returns a
    `Prediction`, in its teacher's units.
    """

    def __init__(self, teachers: Mapping[str, nn.Module], coupling: nn.Module | None = None):
        super().__init__()
        self.coupling, self.teachers = coupling, nn.ModuleDict(teachers)

    def forward(self, features: Features, labels: Sequence[str]) -> dict[str, Prediction]:
        """The predictions of the teachers `labels`."""
        if not labels:
            return {}
        grid = tuple(features.patches.shape[1:3])
        inputs = features if self.coupling is None else self.coupling(features)
        return {label: self.teachers[label](inputs, grid) for label in labels}
