"""Teacher features as regression targets: raw as in UMT, or brought to one scale.

UMT's MSE losses see the teachers' own scales, which differ by orders of magnitude. `standardize`
divides every channel by its own deviation; `phi-s` (PHI-S, of the RADIO line) rotates so that every
channel has the same variance and divides all by one number, which keeps angles and ratios of
distances; `layernorm` needs no statistics. Statistics are estimated once, before training, and live
in buffers, so the checkpoint and the student file carry them.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from distill.features import FeatureDims, Features
from distill.methods.hadamard import hadamard, has_hadamard
from distill.methods.lengths import Restoring

EPS = 1e-6

MIN_DEVIATION = 0.05
"""Smallest deviation that a channel is divided by, as a share of the channels' root mean
square.
"""


class Moments:
    """Streaming count, sum and second moments of vectors, in float64."""

    def __init__(self, width: int, full: bool) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros((width, width) if full else width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in vectors [..., d]."""
        rows = x.detach().flatten(0, -2).double().cpu()
        self.count += rows.shape[0]
        self.sum += rows.sum(0)
        self.square += rows.T @ rows if self.square.ndim == 2 else rows.square().sum(0)

    def reduce(self, device: torch.device) -> None:
        """Add up over the processes of a distributed run."""
        if dist.is_available() and dist.is_initialized():
            for name in ("count", "sum", "square"):
                value = getattr(self, name).to(device)  # NCCL sums on the device only
                dist.all_reduce(value)
                setattr(self, name, value.cpu())

    def mean(self) -> Tensor:
        """Mean vector [d]."""
        return self.sum / self.count

    def covariance(self) -> Tensor:
        """Population covariance [d, d], or the variances [d] where only those were kept."""
        mean = self.mean()
        return self.square / self.count - (
            torch.outer(mean, mean) if self.square.ndim == 2 else mean.square()
        )


class TargetNormalizer(nn.Module):
    """Normalises one kind of feature of width `width`: targets forward, predictions back."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.width, self.mode = width, mode
        if mode in ("standardize", "phi-s"):
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("scale", torch.ones(width if mode == "standardize" else ()))
        if mode == "phi-s":
            self.register_buffer("rotation", torch.eye(width))

    @property
    def needs_fit(self) -> bool:
        """Whether the mode works with statistics of the data."""
        return self.mode in ("standardize", "phi-s")

    def moments(self) -> Moments:
        """An empty accumulator for this normaliser's statistics."""
        return Moments(self.width, full=self.mode == "phi-s")

    def fit(self, moments: Moments) -> None:
        """Set the buffers from the statistics of the data."""
        self.mean.copy_(moments.mean())
        covariance = moments.covariance()
        if self.mode == "standardize":
            deviation = covariance.clamp_min(0).sqrt()
            # A channel that slept through the few batches seen here may wake later: divided by its
            # own tiny deviation it would outweigh all others.
            floor = MIN_DEVIATION * deviation.square().mean().sqrt().clamp_min(EPS)
            self.scale.copy_(deviation.clamp_min(floor))
        else:
            values, vectors = torch.linalg.eigh(covariance)
            # H U^T gives every channel the mean of all eigenvalues as its variance
            mixing = hadamard(self.width) / self.width**0.5
            self.rotation.copy_(mixing @ vectors.T)
            self.scale.copy_(values.clamp_min(0).mean().clamp_min(EPS**2).sqrt())
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise features [..., d]."""
        if self.mode == "none":
            return x
        if self.mode == "layernorm":
            return F.layer_norm(x, (self.width,), eps=EPS)
        centred = x - self.mean
        return (centred if self.mode == "standardize" else centred @ self.rotation.T) / self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """Bring normalised features [..., d] back to the teacher's units; layernorm has lost them:
        unchanged.
        """
        if not self.needs_fit:
            return y
        scaled = y * self.scale
        return (scaled if self.mode == "standardize" else scaled @ self.rotation) + self.mean


class FeatureNormalizer(Restoring):
    """The normalisers of one teacher's summary and patches."""

    def __init__(self, label: str, dims: FeatureDims, mode: str) -> None:
        super().__init__()
        kinds = {"patches": dims.patches}
        if dims.summary is not None:
            kinds = {"summary": dims.summary} | kinds
        for width in kinds.values():
            if mode == "phi-s" and not has_hadamard(width):
                raise UserError(
                    f"teacher '{label}': targets.normalize = phi-s needs a Hadamard matrix of its "
                    f"width {width}, and none is known (set targets.normalize=standardize)"
                )
        for kind, width in kinds.items():
            setattr(self, kind, TargetNormalizer(width, mode))

    def forward(self, features: Features) -> Features:
        """Normalise a teacher's features; further maps stay as they are."""
        summary = None if features.summary is None else self.summary(features.summary)
        return features._replace(summary=summary, patches=self.patches(features.patches))


def fit_normalizers(
    normalizers: nn.ModuleDict,
    batches: Iterable,
    look: Callable[..., dict[str, Features]],
    device: torch.device,
) -> None:
    """Estimate every teacher's statistics from `batches`, whose features `look` gives; a no-op
    where none are needed.
    """
    parts = {
        (label, kind): part
        for label, normalizer in normalizers.items()
        for kind, part in normalizer.named_children()
        if getattr(part, "needs_fit", False)
    }
    if not parts:
        return
    moments = {key: part.moments() for key, part in parts.items()}
    for batch in batches:
        features = look(batch)
        for label, kind in parts:
            moments[label, kind].add(getattr(features[label], kind))
    for key, part in parts.items():
        moments[key].reduce(device)
        part.fit(moments[key])
