"""The length of what heads predict whose loss compares directions alone.

Such a head is free to predict y or 3y. Put back into the teacher's units as y x deviation + mean
(`targets`), the two differ in direction too. So one factor a head and kind of output is fitted
after training, by least squares in the teacher's units, and is applied in `Restoring.restore`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from distill.features import Features
from distill.methods.losses import Prediction, align_maps

Kind = Literal["token", "patches"]


class Lengths(nn.Module):
    """Factors on what one head predicts, 1 until they are fitted."""

    def __init__(self) -> None:
        super().__init__()
        for kind in ("token", "patches"):
            self.register_buffer(kind, torch.ones(()))
            self.register_buffer(f"{kind}_fitted", torch.zeros((), dtype=torch.bool))

    def is_fitted(self, kind: str) -> bool:
        """Whether there is a factor for a kind of output; further maps have none."""
        return kind in ("token", "patches") and bool(getattr(self, f"{kind}_fitted"))


def with_lengths(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict of `network` from before there were lengths, with those of no fit."""
    added = {}
    for path, module in network.named_modules():
        if isinstance(module, Lengths):
            added |= {f"{path}.{name}": value for name, value in Lengths().state_dict().items()}
    return added | dict(state)


class Restoring(nn.Module):
    """A teacher's normalisers `patches` and, where it has one, `summary`, and the way back from
    what a student predicts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lengths = Lengths()

    def restore(self, prediction: Prediction) -> Prediction:
        """Bring a student's prediction to the teacher's units; further maps stay as they are."""
        token, summary = prediction.token, prediction.summary
        lengths = self.lengths
        return prediction._replace(
            token=None if token is None else self.summary.inverse(token * lengths.token),
            patches=self.patches.inverse(prediction.patches * lengths.patches),
            summary=None if summary is None else self.patches.inverse(summary * lengths.patches),
        )


class FreeHead(NamedTuple):
    """A head with outputs of free length, and what brings them to its teacher's units."""

    normalizer: Restoring
    kinds: tuple[Kind, ...]


@torch.no_grad()
def fit_lengths(
    heads: Mapping[str, FreeHead],
    pairs: Iterable[tuple[Mapping[str, Prediction], Mapping[str, Features]]],
) -> None:
    """Fit the lengths of `heads` to `pairs`: what they predict, restored, and the teachers'
    features of the same pictures, both by teacher label. A length that would turn a direction
    round stays free.
    """
    sums = {(label, kind): [0.0, 0.0] for label, head in heads.items() for kind in head.kinds}
    for predictions, targets in pairs:
        for label, kind in sums:
            own, taught = _compared(
                heads[label].normalizer, kind, predictions[label], targets[label]
            )
            if own is not None:
                sums[label, kind][0] += float((own * taught).sum())
                sums[label, kind][1] += float(own.square().sum())
    for (label, kind), (product, square) in sums.items():
        lengths = heads[label].normalizer.lengths
        if product > 0 and square > 0:
            getattr(lengths, kind).mul_(product / square)
            getattr(lengths, f"{kind}_fitted").fill_(True)


def _compared(
    normalizer: Restoring, kind: Kind, prediction: Prediction, target: Features
) -> tuple[Tensor | None, Tensor | None]:
    """A prediction and a teacher's features in its units, float64, both from where a prediction of
    zeros is put; None without a summary.
    """
    part: Callable[[Tensor], Tensor] = normalizer.patches
    own, taught = prediction.patches, target.patches
    if kind == "token":
        if prediction.token is None or target.summary is None:
            return None, None
        part, own, taught = normalizer.summary, prediction.token, target.summary
    else:
        own, taught = align_maps(own.float(), taught.float(), "teacher")
    zero = part.inverse(torch.zeros_like(taught[:1])).double()
    # the normaliser and back: a mode that loses the teacher's units does so here too
    return own.double() - zero, part.inverse(part(taught)).double() - zero
