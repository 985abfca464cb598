"""UMT's interaction and heads."""

from types import SimpleNamespace

from distill.features import FeatureDims
from distill.methods.umt import ReadOut, SpaceHead, SpaceInteraction
from export.hub.remote.fitted import restoring
from export.hub.remote.heads import Heads
from export.hub.remote.student import Student


def build_heads(config: SimpleNamespace, student: Student) -> Heads:
    """The heads of a `config.json`."""
    dims = {label: FeatureDims(*widths) for label, widths in config.dims}
    umt = SimpleNamespace(**config.heads)
    interaction = SpaceInteraction(umt, student, list(dims.values()))
    read_out = ReadOut(umt, dims, interaction.space_dim, interaction.token_dim)
    teachers = {
        label: SpaceHead(read_out, label, restoring(dim, config.normalize))
        for label, dim in dims.items()
    }
    return Heads(teachers, interaction)
