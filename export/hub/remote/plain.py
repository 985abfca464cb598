"""The heads of the plain method."""

from types import SimpleNamespace

from distill.features import FeatureDims
from distill.methods.deployment import RestoredHead
from distill.methods.plain import TeacherHead
from export.hub.remote.fitted import restoring
from export.hub.remote.heads import Heads
from export.hub.remote.student import Student


def build_heads(config: SimpleNamespace, student: Student) -> Heads:
    """The heads of a `config.json`."""
    teachers = {}
    for label, widths in config.dims:
        dims = FeatureDims(*widths)
        head = TeacherHead(student.width, config.heads["hidden"], dims)
        teachers[label] = RestoredHead(head, restoring(dims, config.normalize))
    return Heads(teachers)
