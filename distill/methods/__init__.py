"""Distillation methods. To add one: a file here with its `Config` and its `Method`, and a line in
METHODS.
"""

from collections.abc import Mapping

from distill.config import Recipe
from distill.features import FeatureDims
from distill.methods.kpu import KPU
from distill.methods.method import Method
from distill.methods.plain import Plain
from distill.methods.sefa import SeFA
from distill.methods.umt import UMT
from distill.methods.unic import UNIC

METHODS: dict[str, type[Method]] = {
    "umt": UMT,
    "plain": Plain,
    "unic": UNIC,
    "sefa": SeFA,
    "kpu": KPU,
}


def build_method(
    recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
) -> Method:
    """Build the recipe's method for teachers of the given widths (keys: labels, in the recipe's
    order); `inference` leaves out what never ships.
    """
    return METHODS[recipe.method](recipe, dims, inference)
