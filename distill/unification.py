"""KPU's unification of teachers: their maps in the student's space (t2s, Eq 2).

The paper ("Effects of Unified Knowledge Transfer") measures by it how far teachers are apart: the
deviation of GroundingDINO's features is 33.4 times that of CLIP's in their own spaces, and 4.5
times in the shared one.
"""

import pickle
from collections.abc import Mapping

from torch import Tensor, nn

from contract.errors import UserError, first_line
from distill.features import Features
from distill.methods.alignment import Translator, maps_of
from distill.methods.kpu import KPU
from distill.runs import Run
from distill.training.checkpoint import load_checkpoint


class Unifier(nn.Module):
    """One teacher's way into the student's space, as in training."""

    def __init__(self, normalizer: nn.Module, translator: Translator) -> None:
        super().__init__()
        self.normalizer, self.translator = normalizer, translator

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """The teacher's maps [B, h_l, w_l, d] of the student's width d, on their own grids."""
        maps = maps_of(self.normalizer(features))
        return tuple(layer(map_) for layer, map_ in zip(self.translator.maps, maps, strict=True))


def load_unifiers(run: Run) -> tuple[nn.ModuleDict, str]:
    """The unifier of every teacher of a KPU run, in eval mode, from its newest checkpoint, as what
    ships has none. Otherwise there are none, and in a line why ("" for other methods, which never
    have any).

    Raises UserError for a checkpoint that is damaged or does not fit the run.
    """
    if not isinstance(run.method, KPU) or len(run.dims) < 2:
        return nn.ModuleDict(), ""
    config, folder = run.method.config, run.folder / "checkpoint"
    if not config.unify:
        return nn.ModuleDict(), "kpu.unify = false: this run has no translations to unify teachers"
    try:
        saved = load_checkpoint(folder)
        if saved is None:
            return nn.ModuleDict(), (
                f"{folder} has no checkpoint, which alone holds the translations that unify "
                "teachers (t2s)"
            )
        weights = _weights(saved)
        width = run.method.student.width
        hidden = width if config.hidden == "auto" else config.hidden
        unifiers = {}
        for label, dims in run.dims.items():
            translator = Translator(dims, width, hidden, into_student=True)
            prefix = f"t2s.{label}."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            translator.load_state_dict(own, strict=True)
            unifiers[label] = Unifier(run.method.normalizers[label], translator)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the newest checkpoint in {folder} does not fit the run ({first_line(error)}): move "
            "the folder away, or train again"
        ) from error
    return nn.ModuleDict(unifiers).eval().requires_grad_(False), ""


def _weights(saved: Mapping) -> dict[str, Tensor]:
    """The method's state as it ships: averaged where the run averages its weights."""
    if "average" not in saved:
        return saved["model"]
    return {name.removeprefix("module."): value for name, value in saved["average"].items()}
