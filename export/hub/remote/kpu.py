"""KPU's heads, on the levels of the student's maps that each was trained on."""

from types import SimpleNamespace

from distill.features import FeatureDims
from distill.methods.alignment import LevelHead, Translator
from distill.methods.deployment import RestoredHead
from export.hub.remote.fitted import restoring
from export.hub.remote.heads import Heads
from export.hub.remote.student import Student


def build_heads(config: SimpleNamespace, student: Student) -> Heads:
    """The heads of a `config.json`."""
    teachers = {}
    for label, (summary, patches, *maps) in config.dims:
        dims = FeatureDims(summary, patches, tuple(maps))
        parts = Translator(dims, student.width, config.heads["hidden"], into_student=False)
        head = LevelHead(parts.summary, parts.maps, config.heads["levels"][label])
        teachers[label] = RestoredHead(head, restoring(dims, config.normalize))
    return Heads(teachers)
