"""Running standardisation of teacher features (UNIC, Sariyildiz et al. 2024; SeFA 3.1 cites Heo et
al. 2019): every channel is centred and divided by its deviation, both estimated while training.

Unlike `targets.FeatureNormalizer` nothing is fitted beforehand: the first batch is seen raw, the
second with the first one's statistics, and so on. Other than in UNIC's code no channel is divided
by less than a share of the typical deviation: one that was silent in the batch before (of a CNN
after its ReLU, say) would outweigh all others.
"""

import torch
from torch import Tensor, nn

from distill.distributed import sum_over_ranks
from distill.features import FeatureDims, Features
from distill.methods.lengths import Restoring
from distill.methods.targets import MIN_DEVIATION

EPS = 1e-6


class RunningStandardizer(nn.Module):
    """Standardises one kind of feature of width `width`, and brings predictions back."""

    needs_fit = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise features [..., d] with the statistics of the batches before."""
        return (x - self.mean) / self._scale()

    @torch.no_grad()
    def update(self, x: Tensor, momentum: Tensor | float) -> None:
        """Move the statistics towards those of a batch [..., d], of all ranks together:
        `momentum` 1 replaces them.
        """
        rows = x.flatten(0, -2)
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        count = torch.full_like(mean[:1], rows.shape[0])
        count, total = sum_over_ranks(torch.cat((count, count * mean))).split((1, mean.numel()))
        overall = total / count
        squares = sum_over_ranks(rows.shape[0] * (variance + (mean - overall).square()))
        deviation = (squares / (count - 1).clamp_min(1)).sqrt() + EPS
        for statistic, new in ((self.mean, overall), (self.deviation, deviation)):
            new = new.to(statistic)
            # a batch that is not finite changes nothing, as it changes no weights
            statistic.lerp_(torch.where(new.isfinite(), new, statistic), momentum)

    def inverse(self, y: Tensor) -> Tensor:
        """Bring standardised features [..., d] back to the teacher's units."""
        return y * self._scale() + self.mean

    def _scale(self) -> Tensor:
        typical = self.deviation.square().mean().sqrt()
        return torch.maximum(self.deviation + EPS, MIN_DEVIATION * typical)


class FeatureStandardizer(Restoring):
    """The standardisers of one teacher's summary, where it has one, and patches."""

    def __init__(self, dims: FeatureDims) -> None:
        super().__init__()
        self.summary = None if dims.summary is None else RunningStandardizer(dims.summary)
        self.patches = RunningStandardizer(dims.patches)

    def forward(self, features: Features) -> Features:
        """Standardise a teacher's features; further maps stay as they are."""
        summary = None if self.summary is None else self.summary(features.summary)
        return features._replace(summary=summary, patches=self.patches(features.patches))

    def update(self, features: Features, momentum: Tensor | float) -> None:
        """Take in the batch that `forward` has standardised."""
        if self.summary is not None:
            self.summary.update(features.summary, momentum)
        self.patches.update(features.patches, momentum)
