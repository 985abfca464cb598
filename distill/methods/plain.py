"""The baseline UMT is measured against: per-teacher MLP heads on one student, as in the RADIO line.

Same student, losses and targets as UMT; no model token, no interaction. The token of a teacher is
predicted from the student's summary, its map from the student's map.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from distill.config import Auto, Positive, Recipe, Section
from distill.data.crops import IMAGE, View
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment, RestoredHead, ShippedHead
from distill.methods.losses import (
    Prediction,
    alignment_loss_names,
    alignment_losses,
    free_length_of_role,
)
from distill.methods.method import Method
from distill.methods.targets import FeatureNormalizer
from distill.models.preprocess import Preprocess
from distill.models.student import Student


class Config(Section):
    """The RADIO-like baseline: one MLP per teacher and output, no interaction."""

    TINY: ClassVar = {"hidden_dim": "auto"}

    hidden_dim: Positive | Auto = Field(
        "auto", description="hidden width of a head; auto: the student's width"
    )


class Plain(Method):
    """A student with two MLP heads per teacher."""

    Config = Config
    views = (View(IMAGE),)

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        self.teachers, self.grid = recipe.teachers, recipe.align.grid
        self.teacher_views = {teacher.label: IMAGE for teacher in recipe.teachers}
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = Student(recipe.student)
        hidden = (
            self.student.width if recipe.plain.hidden_dim == "auto" else recipe.plain.hidden_dim
        )
        self.heads = nn.ModuleDict(
            {label: TeacherHead(self.student.width, hidden, dim) for label, dim in dims.items()}
        )
        self.normalizers = nn.ModuleDict(
            {
                label: FeatureNormalizer(label, dim, recipe.targets.normalize)
                for label, dim in dims.items()
            }
        )

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Compute every loss from one student forward; arguments and result as in `UMT.forward`."""
        features = self.student(self.preprocess(views[IMAGE]))
        predictions = {label: head(features) for label, head in self.heads.items()}
        normalized = {label: self.normalizers[label](target) for label, target in targets.items()}
        return alignment_losses(predictions, normalized, self.teachers, self.grid)

    def deploy(self) -> Deployment:
        """What ships: the backbone and one head per teacher, which read it directly."""
        heads = {
            teacher.label: ShippedHead(
                RestoredHead(self.heads[teacher.label], self.normalizers[teacher.label]),
                has_token=self.heads[teacher.label].token is not None,
                free_length=free_length_of_role(teacher.role),
            )
            for teacher in self.teachers
        }
        return Deployment(self.preprocess, self.student, nn.Identity(), heads)

    def describe(self) -> dict[str, list[str]]:
        """Losses and heads, a teacher each."""
        labels = list(self.heads)
        with_token = [label for label in labels if self.heads[label].token is not None]
        return {"losses": alignment_loss_names(labels, with_token), "heads": labels}


class TeacherHead(nn.Module):
    """Predicts one teacher's summary from the student's summary and its map from the student's
    map.
    """

    def __init__(self, width: int, hidden: int, dim: FeatureDims) -> None:
        super().__init__()
        self.token = None if dim.summary is None else mlp(width, hidden, dim.summary)
        self.patches = mlp(width, hidden, dim.patches)

    def forward(self, features: Features) -> Prediction:
        """Map student features to the teacher's widths; no token for a teacher without summary."""
        token = None if self.token is None else self.token(features.summary)
        return Prediction(token, self.patches(features.patches), self.patches(features.summary))


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Linear - LayerNorm - GELU - Linear."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.LayerNorm(hidden, eps=1e-6), nn.GELU(), nn.Linear(hidden, out)
    )
