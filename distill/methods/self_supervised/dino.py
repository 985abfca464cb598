"""DINO: a student learns to say of one crop what a momentum network says of another (Caron et al.
2021).

Both networks end in a head that scores K prototypes. Of the momentum network's scores z_t, of the
two global crops, a running centre c is subtracted; q = softmax((z_t - c) / tau). The loss is the
cross-entropy of the student's softmax(z_s / tau_s), of every crop but the one q comes from,
averaged over pairs and pictures. The momentum network follows the student:
theta_t <- m theta_t + (1 - m) theta_s.

Crops are stacked crop by crop: rows 0 ... B-1 are the first crop of every picture.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Recipe
from distill.data.crops import View
from distill.distributed import mean_over_ranks
from distill.features import Features
from distill.methods.method import Progress, cosine
from distill.methods.projectors import initialize
from distill.models.layout import nearest_multiples
from distill.models.student import Student

GLOBAL, LOCAL = "global", "local"
"""Names of the views."""


class Head(nn.Module):
    """Scores of K prototypes: a three-layer MLP to `bottleneck` dimensions, length 1, and a linear
    layer without bias whose rows have a learnt length (or length 1).
    """

    def __init__(
        self, width: int, prototypes: int, hidden: int, bottleneck: int, norm_last_layer: bool
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.apply(initialize)
        self.prototypes = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., K] of features [..., width]."""
        return self.prototypes(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """Unit vectors [..., bottleneck], of which the scores are a linear function."""
        return F.normalize(self.mlp(x), dim=-1)


class Prototypes(nn.Module):
    """A linear layer whose row k is `length[k] * direction[k] / |direction[k]|`."""

    def __init__(self, width: int, number: int, unit: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(width, number, bias=False).weight.detach())
        self.length = nn.Parameter(torch.ones(number, 1), requires_grad=not unit)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., number] of vectors [..., width]."""
        return F.linear(x, self.length * F.normalize(self.direction, dim=-1))


class Rates(NamedTuple):
    """What changes over a run."""

    temperature: float
    """Of the momentum teacher, tau."""
    momentum: float
    """Share that the momentum teacher keeps, m."""


def teacher_temperature(epoch: int, first: float, last: float, warmup_epochs: int) -> float:
    """tau of an epoch: a straight line from `first` to `last` over the warm-up, constant inside an
    epoch (DINO's `teacher_temp_schedule`).
    """
    if epoch >= warmup_epochs:
        return last
    return first + (last - first) * epoch / max(1, warmup_epochs - 1)


def momentum_rate(step: int, steps: int, first: float) -> float:
    """m of a step: a cosine from `first` to 1 (DINO's `momentum_schedule`)."""
    return cosine(first, 1, step / steps)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy [...] of distributions [..., K] with logits [..., K]."""
    # equal to -sum q log softmax(z) without another tensor of K columns
    return logits.logsumexp(-1) - (targets * logits).sum(-1)


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Context without autocast, which would round the factors of an inner product."""
    if tensor.is_meta:  # of the plan, which has no autocast
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def move_center(center: Tensor, mean: Tensor, momentum: float) -> None:
    """c <- momentum x c + (1 - momentum) x mean, in place; stays where the batch is not finite, as
    weights do.
    """
    mean = mean.to(center)
    center.lerp_(torch.where(mean.isfinite(), mean, center), 1 - momentum)


def dino_loss(student: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the pairs of different crops.

    `student` [V, B, K]: logits over tau_s of all crops, the global ones first; `targets` [G, B, K]:
    the momentum teacher's distributions of the global crops.
    """
    pairs = len(targets) * (len(student) - 1)
    normalizer = student.logsumexp(-1).mean(1)  # [V]
    with full_precision(student):
        # [G, V], each the mean over pictures of <q, z>
        inner = torch.einsum("gbk,vbk->gv", targets, student) / student.shape[1]
    losses = normalizer.unsqueeze(0) - inner
    return (losses.sum() - losses.diagonal().sum()) / pairs


def follow(followers: Sequence[Tensor], leaders: Sequence[Tensor], momentum: float) -> None:
    """Move every follower towards its leader, in place."""
    torch._foreach_lerp_(list(followers), list(leaders), 1 - momentum)


class Encoded(NamedTuple):
    """What an objective returns: the student's features of the global crops, for distillation, the
    loss and what is logged of it, and which patches it hid.
    """

    features: Features
    loss: Tensor
    values: dict[str, Tensor]
    mask: Tensor | None = None


class DINO(nn.Module):
    """Head, momentum network and centre; with `encode`, the objective."""

    kind = "dino"
    needs_blocks = False
    """Whether the student must be a ViT whose patches can be hidden and sampled."""
    photometric = (("dino_global_1", "dino_global_2"), ("dino_local",))
    """Augmentation of the global crops and of the local ones."""
    losses: tuple[str, ...] = ("ssl.loss",)

    def __init__(self, recipe: Recipe, student: Student) -> None:
        super().__init__()
        self.config = recipe.ssl
        self._check(recipe, student)
        self.head = self._build_head(student.width)
        # as the student, but without stochastic depth and dropout. It stays in training mode, for
        # batch norms: their running statistics are not averaged
        settings = recipe.student
        kwargs = {name: v for name, v in settings.kwargs.items() if "drop" not in name}
        quiet = {"drop_path": 0.0, "kwargs": kwargs, "pretrained": False, "checkpoint": None}
        quiet["grad_checkpointing"] = False  # it has no backward pass
        self.momentum = Student(settings.model_copy(update=quiet))
        self.momentum.second_token = student.second_token
        self.momentum.load_state_dict(student.state_dict())
        self.momentum_head = copy.deepcopy(self.head)
        self.momentum.requires_grad_(False)
        self.momentum_head.requires_grad_(False)
        self.register_buffer("center", torch.zeros(self.config.prototypes))
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    @classmethod
    def views(cls, recipe: Recipe, student: Student) -> tuple[View, ...]:
        """Two global crops, and the local ones."""
        ssl, kinds = recipe.ssl, cls.photometric
        crops = [View(GLOBAL, None, 2, ssl.global_scale, kinds[0])]
        if ssl.locals:
            crops.append(View(LOCAL, local_size(recipe), ssl.locals, ssl.local_scale, kinds[1]))
        return tuple(crops)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The last layer, which does not train in the first epochs."""
        return [
            parameter
            for module in self.modules()
            if isinstance(module, Prototypes)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def rates(self, progress: Progress) -> Rates:
        """tau and m of a step."""
        ssl = self.config
        return Rates(
            teacher_temperature(progress.epoch, *ssl.teacher_temp, ssl.temp_warmup_epochs),
            momentum_rate(progress.step, progress.steps, ssl.momentum),
        )

    def before_step(self, progress: Progress) -> None:
        """Set the momentum teacher's temperature."""
        self.temperature.fill_(self.rates(progress).temperature)

    @torch.no_grad()
    def after_step(self, student: Student, progress: Progress) -> None:
        """Let the momentum network and head follow the student's parameters."""
        followers = [*self.momentum.parameters(), *self._followers()]
        leaders = [*student.parameters(), *self._leaders()]
        follow(followers, leaders, self.rates(progress).momentum)

    def encode(
        self, student: Student, images: Mapping[str, Tensor], views: Mapping[str, Tensor]
    ) -> Encoded:
        """Encode the crops `images`, normalised and in the student's sizes, and compare; `views`
        has what else the views request.
        """
        features = student(images[GLOBAL])
        summaries = torch.cat([features.summary, *self._local_summaries(student, images)])
        with torch.no_grad():
            followed = self.momentum_head(self.momentum(images[GLOBAL]).summary).float()
        loss, values = self.compare(self.head(summaries).float(), followed)
        return Encoded(features, loss, {"ssl.loss": loss.detach(), **values, **spread(features)})

    def compare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss of student scores [V * B, K] and momentum scores [2 * B, K], crop by crop,
        and what is logged; moves the centre.
        """
        batch = len(teacher) // 2
        logits = student.unflatten(0, (-1, batch)) / self.config.student_temp
        targets = ((teacher - self.center) / self.temperature).softmax(-1)
        loss = dino_loss(logits, targets.unflatten(0, (2, batch)))
        with torch.no_grad():
            mean, mean_target = mean_over_ranks(torch.stack((teacher.mean(0), targets.mean(0))))
            if self.training:
                move_center(self.center, mean, self.config.center_momentum)
            values = distribution_values(targets, mean_target, loss.detach())
        return loss, values

    def _local_summaries(self, student: Student, images: Mapping[str, Tensor]) -> Iterator[Tensor]:
        if LOCAL in images:
            yield student(images[LOCAL]).summary

    def _build_head(self, width: int) -> Head:
        ssl = self.config
        return Head(width, ssl.prototypes, ssl.head_hidden, ssl.bottleneck, ssl.norm_last_layer)

    def _followers(self) -> list[nn.Parameter]:
        return list(self.momentum_head.parameters())

    def _leaders(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def _check(self, recipe: Recipe, student: Student) -> None:
        """Raise UserError where the student cannot learn this way."""
        if self.needs_blocks and not student.has_blocks:
            kind = "CNN" if student.family == "cnn" else type(student.net).__name__
            raise UserError(
                f"ssl.kind = {self.kind}: masking and sampling need tokens, and student "
                f"'{recipe.student.name}' is a {kind}: set ssl.kind=dino or take a ViT"
            )
        # maps of any size are averaged; tokens have to make a grid
        patch, size = student.stride, local_size(recipe)
        if recipe.ssl.locals and student.family == "vit" and size % patch:
            raise UserError(
                f"ssl.local_size = {size}: the student's patch of {patch} pixels does not divide "
                f"it (use {nearest_multiples(size, patch)})"
            )


def local_size(recipe: Recipe) -> int:
    """Side of the local crops in pixels."""
    return recipe.ssl.local_size or recipe.student.image_size // 2


def distribution_values(targets: Tensor, mean: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """What shows a collapse, in nats.

    The entropy of `mean` [K], the mean of `targets` [N, K] over all ranks; its excess over the mean
    of their entropies, what a picture tells of its prototype: 0 both for a constant and for a
    uniform teacher; and KL from the momentum teacher to the student.
    """
    entropy = -torch.special.xlogy(mean, mean).sum()
    each = -torch.special.xlogy(targets, targets).sum(-1).mean()
    return {"ssl.entropy": entropy, "ssl.information": entropy - each, "ssl.kl": loss - each}


DISTRIBUTION_NAMES = ("ssl.entropy", "ssl.information", "ssl.kl", "ssl.deviation")


def spread(features: Features) -> dict[str, Tensor]:
    """Deviation of the channels of unit summaries [N, d], times sqrt(d): near 1 where pictures
    differ, 0 where they are all alike.
    """
    summary = F.normalize(features.summary.detach().float(), dim=-1)
    deviation = summary.std(0, correction=0).mean() * summary.shape[-1] ** 0.5
    return {"ssl.deviation": deviation}
