"""SeFA's heads with DINO's bottleneck."""

from types import SimpleNamespace

from distill.features import FeatureDims
from distill.methods.deployment import RestoredHead
from distill.methods.projectors import FeatureHead
from distill.methods.self_supervised.dino import Head
from export.hub.remote.fitted import restoring
from export.hub.remote.heads import Heads
from export.hub.remote.student import Student


def build_heads(config: SimpleNamespace, student: Student) -> Heads:
    """The heads of a `config.json`."""
    sizes = config.heads["hidden"][0], config.heads["bottleneck"]
    teachers = {}
    for label, widths in config.dims:
        dims = FeatureDims(*widths)
        head = FeatureHead(lambda out: Head(student.width, out, *sizes, False), dims)
        teachers[label] = RestoredHead(head, restoring(dims, config.normalize))
    return Heads(teachers)
