"""Distillation methods. To add one: a file with one `nn.Module` that has these four members, and a
line in METHODS.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from distill.config import Recipe
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment
from distill.methods.plain import Plain
from distill.methods.umt import UMT


class Method(Protocol):
    """What the training loop needs of a method; structural, nothing inherits from it."""

    teacher_views: dict[str, str]
    """Which view (a key of `views`) each teacher sees, by teacher label."""

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Return scalar losses; "loss" carries the gradient. Every pass of a step happens inside
        this one call.
        """
        ...

    def after_step(self, step: int) -> None:
        """Update whatever follows the weights (a momentum teacher, say)."""
        ...

    def deploy(self) -> Deployment:
        """Return what ships."""
        ...


METHODS: dict[str, type[nn.Module]] = {"umt": UMT, "plain": Plain}


def build_method(recipe: Recipe, dims: Mapping[str, FeatureDims]) -> nn.Module:
    """Build the recipe's method for teachers of the given widths (keys: labels, in the recipe's
    order).
    """
    return METHODS[recipe.method](recipe, dims)
