"""What a trained method hands over: backbone, coupling and heads, the only thing export and
pictures see.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from distill.features import Features
from distill.methods.lengths import Kind, Restoring
from distill.methods.losses import Prediction
from distill.models.preprocess import Preprocess
from distill.models.student import StudentLike

BACKBONE = "backbone"
"""Name of the student's own outputs beside the teachers' labels."""


COUPLING = "coupling"
"""What a head reads that reads the output of the coupling part."""


class ShippedHead(NamedTuple):
    """A teacher's head, and what its outputs mean.

    `module(features, grid)` returns a `Prediction` in the teacher's own units, to which its
    `normalizer` brings it; `features` are the
    coupling part's output, or the student's `Features` of which it reads `reads`: "summary",
    "patches", "maps.<stride>". `grid` is the (h, w) of the student's map.
    """

    module: nn.Module
    reads: tuple[str, ...] = ("patches", "summary")
    has_token: bool = True
    free_length: tuple[Kind | Literal["maps"], ...] = ()
    """Outputs trained by cosine alone. The length of tokens and patches is a fitted factor
    (`lengths`); that of further maps stays free."""
    strides: tuple[int, ...] = ()
    """Of a head that predicts maps on the grids of the student's: the stride of the student's map
    that has the grid of `patches`, then those of each of `maps`. Empty: see what it reads."""

    @property
    def normalizer(self) -> Restoring | None:
        """What brings its predictions to the teacher's units; None for a head that needs none."""
        return getattr(self.module, "normalizer", None)


class RestoredHead(nn.Module):
    """A head on the student's features whose predictions are back in the teacher's own units;
    `normalizer.restore` brings them there.
    """

    def __init__(self, head: nn.Module, normalizer: Restoring) -> None:
        super().__init__()
        self.head, self.normalizer = head, normalizer

    def forward(self, features: Features, grid: tuple[int, int]) -> Prediction:
        """Predict from student features; `grid` is in the map's shape already."""
        return self.normalizer.restore(self.head(features))


class Deployment(nn.Module):
    """A frozen student with its heads, one for a teacher; there may be none.

    `student` encodes; `coupling` prepares what heads read that read "coupling" (UMT's interaction;
    identity for a method without); `shipped[label]` is the head of teacher `label`.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        student: StudentLike,
        coupling: nn.Module,
        shipped: Mapping[str, ShippedHead],
    ) -> None:
        super().__init__()
        self.preprocess, self.student, self.coupling = preprocess, student, coupling
        self.shipped = dict(shipped)
        self.heads = nn.ModuleDict({label: head.module for label, head in shipped.items()})
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> dict[str, Prediction]:
        """Run everything on float RGB [B, 3, H, W] in [0, 1], H and W multiples of the student's
        stride.

        Returns a `Prediction` for "backbone" (token and summary are both the student's global
        feature) and for every teacher.
        """
        return self.predict(self.preprocess.normalize(pixels))

    def folded(self) -> "Deployment":
        """The same function with what does not depend on the picture computed once, for serving;
        itself where its coupling part has nothing to fold.

        Heads then read what their coupling part hands over, not its training form's output.
        """
        fold = getattr(self.coupling, "folded", None)
        if fold is None:
            return self
        return Deployment(self.preprocess, self.student, *fold(self.shipped))

    def predict(self, pixels: Tensor) -> dict[str, Prediction]:
        """The same of pixels that `preprocess` has normalised."""
        features = self.student(pixels)
        coupled = self.coupling(features)
        grid = tuple(features.patches.shape[1:3])
        results = {
            BACKBONE: Prediction(
                features.summary, features.patches, features.summary, *features[2:]
            )
        }
        for label, head in self.heads.items():
            reads_coupling = COUPLING in self.shipped[label].reads
            results[label] = head(coupled if reads_coupling else features, grid)
        return results
