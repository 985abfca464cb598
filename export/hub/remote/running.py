"""The way back to a teacher's units from targets that were normalised by running statistics."""

from distill.features import FeatureDims
from distill.methods.lengths import Restoring
from distill.methods.standardize import FeatureStandardizer


def restoring(dims: FeatureDims, mode: str) -> Restoring:
    """The normalisers of a teacher of these widths."""
    return FeatureStandardizer(dims)
