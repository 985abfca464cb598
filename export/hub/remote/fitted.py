"""The way back to a teacher's units from targets that were normalised by fitted statistics."""

from distill.features import FeatureDims
from distill.methods.lengths import Restoring
from distill.methods.targets import TargetNormalizer


def restoring(dims: FeatureDims, mode: str) -> Restoring:
    """The normalisers of a teacher of these widths."""
    normalizer = Restoring()
    if dims.summary is not None:
        normalizer.summary = TargetNormalizer(dims.summary, mode)
    normalizer.patches = TargetNormalizer(dims.patches, mode)
    return normalizer
