"""How losses of several tasks become one: FAMO (Liu et al. 2023), for KPU's Figure 4."""

import torch
from torch import Tensor, nn

from distill.distributed import mean_over_ranks

_BETAS, _EPS = (0.9, 0.999), 1e-8
"""Of Adam, and what keeps logarithms finite: those of FAMO's code."""


class Famo(nn.Module):
    """Weights with which every one of `count` losses falls at the same relative rate.

    Logits start at zero and follow, by Adam with learning rate `lr` and L2 penalty `decay`, how far
    each loss's logarithm fell in a step. All state is in buffers, and losses are averaged over the
    processes first, so that all of them agree.
    """

    def __init__(self, count: int, lr: float, decay: float) -> None:
        super().__init__()
        self.lr, self.decay = lr, decay
        for name in ("logits", "mean", "square", "before"):
            self.register_buffer(name, torch.zeros(count))
        self.register_buffer("steps", torch.zeros(()))

    @property
    def weights(self) -> Tensor:
        """The present weights [T], which sum to one."""
        return self.logits.softmax(0)

    def forward(self, losses: Tensor) -> Tensor:
        """The weighted sum of the logarithms of `losses` [T], over the sum of weight over loss."""
        whole = mean_over_ranks(losses.detach()) + _EPS
        self.before.copy_(whole)
        weights = self.weights
        scale = (weights / whole).sum()
        # the gradient of a process is that of its share of the mean
        loss = (weights / whole / scale * losses).sum()
        return loss + ((weights * whole.log()).sum() / scale - loss).detach()

    @torch.no_grad()
    def update(self, losses: Tensor) -> None:
        """Move the weights, given the losses [T] after the optimizer's step: of the same pictures,
        or, roughly, of the next ones.
        """
        fell = self.before.log() - (mean_over_ranks(losses.detach()) + _EPS).log()
        # a step of non-finite losses was not taken
        fell = torch.where(fell.isfinite().all(), fell, torch.zeros_like(fell))
        weights = self.weights
        gradient = weights * (fell - (weights * fell).sum()) + self.decay * self.logits
        self.steps += 1
        self.mean.lerp_(gradient, 1 - _BETAS[0])
        self.square.lerp_(gradient.square(), 1 - _BETAS[1])
        mean = self.mean / (1 - _BETAS[0] ** self.steps)
        square = self.square / (1 - _BETAS[1] ** self.steps)
        self.logits -= self.lr * mean / (square.sqrt() + _EPS)
