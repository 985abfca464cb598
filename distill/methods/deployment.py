"""What a trained method hands over: backbone, coupling and heads, the only thing export and
pictures see.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from distill.methods.losses import Prediction
from distill.models.preprocess import Preprocess
from distill.models.student import Student

BACKBONE = "backbone"
"""Name of the student's own outputs beside the teachers' labels."""


class Deployment(nn.Module):
    """A frozen student with one head per teacher.

    `student` encodes; `coupling` prepares what all heads read (UMT's interaction; identity for
    plain heads); `heads[label]` maps that and the grid to a `Prediction` in the teacher's own
    units.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        student: Student,
        coupling: nn.Module,
        heads: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.preprocess, self.student, self.coupling = preprocess, student, coupling
        self.heads = nn.ModuleDict(heads)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> dict[str, Prediction]:
        """Run everything on float RGB [B, 3, H, W] in [0, 1], H and W multiples of the student's
        stride.

        Returns a `Prediction` for "backbone" (token and summary are both the student's global
        feature) and for every teacher.
        """
        features = self.student(self.preprocess.normalize(pixels))
        coupled = self.coupling(features)
        grid = tuple(features.patches.shape[1:3])
        backbone = Prediction(features.summary, features.patches, features.summary)
        return {
            BACKBONE: backbone,
            **{label: head(coupled, grid) for label, head in self.heads.items()},
        }
