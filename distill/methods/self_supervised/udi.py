"""UDI: DINO with a second class token whose target also has what patches say, and with patches of
two overlapping crops compared where they show the same place (Su & Ji 2024).

Both networks have two class tokens, cls and cls+, and a sampling module, which reads the last
block's patches through a map A: a row of A is a place in the picture, as weights over the grid. On
the student's side a row is one cell of the crop's grid, chosen at random in every window
(`data.masks.WindowCells`); on the momentum teacher's side the same place in the other crop, as
bilinear weights. Rows whose place the other crop does not show are invalid: zero on both sides.

Three levels, averaged: cls against cls of the other global crop; cls+ against
alpha * (mean of the valid patch scores) + (1 - alpha) * (scores of cls), mixed before the softmax;
and valid patches against patches, between global crops alone. Local crops are compared with both
global ones.
"""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Recipe
from distill.data.crops import View
from distill.data.masks import WindowCells
from distill.distributed import mean_over_ranks, sum_over_ranks, world_size
from distill.methods.self_supervised.dino import (
    DINO,
    GLOBAL,
    LOCAL,
    Encoded,
    cross_entropy,
    distribution_values,
    full_precision,
    local_size,
    move_center,
    spread,
)
from distill.models.student import Student

EPS = 1e-5
"""Added to the number of valid rows, as in the authors' code."""


class Sampling(nn.Module):
    """Reads tokens at the places of a map, by attention whose queries are at those places."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.out_norm = nn.LayerNorm(width, eps=1e-6)
        for module in (self.query, self.key_value, self.project):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Patches [N, L, d] at `places` [N, s, L]: [N, s, d]."""
        x = self.norm(tokens)
        places = places.to(x.dtype)
        query = places @ self.query(x)
        key, value = self.key_value(x).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.out_norm(self.project(attended) + places @ x)


def cell_places(boxes: Tensor, cells: Tensor, grid: int) -> Tensor:
    """Places [N, s, 2] (x, y over the picture's sides) of row-major `cells` [N, s] of a grid with
    `grid` cells a side in `boxes` [N, 4]; a mirrored box has left > right. The outer cells lie on
    its edges.
    """
    steps = torch.stack((cells % grid, cells // grid), dim=-1) / max(1, grid - 1)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    return low + (high - low) * steps


def bilinear_rows(places: Tensor, boxes: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Weights [N, s, grid * grid] that read `places` [N, s, 2] from the grid of `boxes` [N, 4], and
    which rows are valid, bool [N, s]: those strictly inside the box; the others are 0.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    inside = (places - low) / (high - low)
    valid = ((inside > 0) & (inside < 1)).all(-1)
    steps = torch.arange(grid, device=places.device, dtype=places.dtype)
    # a tent around each place: the two nearest columns and rows
    tents = (1 - ((inside * (grid - 1)).unsqueeze(-1) - steps).abs()).clamp_min(0)
    columns, rows = tents.unbind(-2)
    weights = rows.unsqueeze(-1) * columns.unsqueeze(-2)
    return weights.flatten(-2) * valid.unsqueeze(-1), valid


class Scores(NamedTuple):
    """Scores of K prototypes, crop by crop: B pictures, n local crops, s places a global crop.

    The student's rows of global crops are (first, second), the momentum teacher's are of the other
    crop, (second, first), so that rows answer each other. Student's scores are over tau_s.
    """

    cls: Tensor
    """Student's class token, [2 * B, K]."""
    plus: Tensor
    """Student's second class token, [2 * B, K]."""
    patches: Tensor
    """Student, [2 * B, s, K]."""
    local_cls: Tensor
    """Student, [n, B, K]."""
    local_plus: Tensor
    """Student, [n, B, K]."""
    teacher_cls: Tensor
    """[2 * B, K]."""
    teacher_patches: Tensor
    """[2 * B, s, K]."""
    valid: Tensor
    """Which of these rows are valid, bool [2 * B, s]."""
    local_sums: Tensor
    """Teacher, the sum over the valid places of a local crop in each global one, [n, 2 * B, K]."""
    local_counts: Tensor
    """How many those are, [n, 2 * B]."""


class Losses(NamedTuple):
    """UDI's loss, the parts it is averaged from, and the centres [3, K] of the batch."""

    total: Tensor
    cls: Tensor
    local_cls: Tensor
    plus: Tensor
    local_plus: Tensor
    patches: Tensor
    centers: Tensor


def udi_loss(scores: Scores, center: Tensor, temperature: Tensor | float, alpha: float) -> Losses:
    """The mean of the three levels, and the means of the scores they are compared with, over all
    ranks, for the centres `center` [3, K] of the next step.
    """
    locals_, batch = len(scores.local_cls), len(scores.cls) // 2
    valid = scores.valid.to(scores.cls.dtype)
    with torch.no_grad():
        teacher = scores.teacher_cls
        sums = (scores.teacher_patches * valid.unsqueeze(-1)).sum(1)
        mixed = _mix(sums, valid.sum(1), teacher, alpha)
        local_mixed = _mix(scores.local_sums, scores.local_counts, teacher, alpha)
        targets = ((teacher - center[0]) / temperature).softmax(-1)
        plus_targets = ((mixed - center[1]) / temperature).softmax(-1)
        local_plus_targets = ((local_mixed - center[1]) / temperature).softmax(-1)
        patch_targets = ((scores.teacher_patches - center[2]) / temperature).softmax(-1)
        patch_sum = sums.sum(0) + scores.local_sums.sum((0, 1))
        rows = sum_over_ranks(valid.sum())
        patch_rows = sum_over_ranks(valid.sum() + scores.local_counts.sum())
        plus_rows = len(mixed) + local_mixed.shape[0] * local_mixed.shape[1]
        plus_mean = (mixed.sum(0) + local_mixed.sum((0, 1))) / plus_rows
        means = torch.stack((teacher.mean(0), plus_mean))
        centers = torch.cat(
            (mean_over_ranks(means), (sum_over_ranks(patch_sum) / patch_rows.clamp_min(1))[None])
        )
    cls = cross_entropy(targets, scores.cls).mean()
    plus = cross_entropy(plus_targets, scores.plus).mean()
    patches = (cross_entropy(patch_targets, scores.patches) * valid).sum()
    # mean over the ranks of what each returns: a mean over the valid rows of all
    patches = world_size() * patches / rows.clamp_min(1)

    def both(of_teacher: Tensor, of_student: Tensor) -> Tensor:
        """Local crops [n, B, K] against both global ones [2 * B, K] or [n, 2 * B, K]."""
        views = of_teacher.unflatten(-2, (2, batch))
        pattern = "gbk,nbk->gb" if views.ndim == 3 else "ngbk,nbk->gb"
        with full_precision(of_student):
            inner = torch.einsum(pattern, views, of_student)
        return of_student.logsumexp(-1).mean() - inner.sum() / (2 * locals_ * batch)

    local_cls = both(targets, scores.local_cls)
    local_plus = both(local_plus_targets, scores.local_plus)
    pairs = 2 + 2 * locals_
    levels = [
        (2 * cls + 2 * locals_ * local_cls) / pairs,
        (2 * plus + 2 * locals_ * local_plus) / pairs,
        patches,
    ]
    return Losses(sum(levels) / 3, cls, local_cls, plus, local_plus, patches, centers)


def _mix(sums: Tensor, counts: Tensor, cls: Tensor, alpha: float) -> Tensor:
    """alpha x the mean of the valid patch scores + (1 - alpha) x the scores of the class token."""
    return alpha * sums / (counts.unsqueeze(-1) + EPS) + (1 - alpha) * cls


class UDI(DINO):
    """DINO's parts, a sampling module a network, and a centre for each level."""

    kind = "udi"
    needs_blocks = True
    photometric = (("udi_global",), ("udi_local",))
    losses = ("ssl.loss", "ssl.cls", "ssl.plus", "ssl.patches", "ssl.valid")

    def __init__(self, recipe: Recipe, student: Student) -> None:
        super().__init__(recipe, student)
        self.grid = recipe.student.image_size // student.stride
        self.local_grid = local_size(recipe) // student.stride
        self.sampling = Sampling(student.width, student.net.blocks[0].attn.num_heads)
        self.momentum_sampling = copy.deepcopy(self.sampling).requires_grad_(False)
        self.center = torch.zeros(3, self.config.prototypes)  # cls, cls+, patches

    @classmethod
    def views(cls, recipe: Recipe, student: Student) -> tuple[View, ...]:
        """DINO's, overlapping, with their boxes and one cell of every window."""
        crops, local = super().views(recipe, student)
        udi, grid = recipe.ssl.udi, recipe.student.image_size // student.stride
        cells = WindowCells(grid, udi.window)
        local_cells = WindowCells(local_size(recipe) // student.stride, udi.local_window)
        return (
            crops._replace(boxes=True, near=GLOBAL, cells=cells),
            local._replace(boxes=True, near=GLOBAL, cells=local_cells),
        )

    def encode(
        self, student: Student, images: Mapping[str, Tensor], views: Mapping[str, Tensor]
    ) -> Encoded:
        """As DINO's, with three levels in place of one."""
        places = self._places(views)
        tokens = student.tokens(images[GLOBAL])
        features = student.read(student.net.norm(tokens), images[GLOBAL])
        local = student(images[LOCAL])
        sampled = self.sampling(tokens[:, student.prefix :], places.student)
        with torch.no_grad():
            teacher = self._score_teacher(images[GLOBAL], places)
        # one pass of the head for everything
        rows = (features.summary, features.second, local.summary, local.second)
        sizes = [len(part) for part in rows] + [sampled.shape[0] * sampled.shape[1]]
        scores = self.head(torch.cat((*rows, sampled.flatten(0, 1)))).float()
        scores = scores / self.config.student_temp
        cls, plus, local_cls, local_plus, patches = scores.split(sizes)
        count = self.config.locals
        result = udi_loss(
            Scores(
                cls,
                plus,
                patches.unflatten(0, sampled.shape[:2]),
                local_cls.unflatten(0, (count, -1)),
                local_plus.unflatten(0, (count, -1)),
                *teacher,
            ),
            self.center,
            self.temperature,
            self.config.udi.alpha,
        )
        targets = ((teacher[0] - self.center[0]) / self.temperature).softmax(-1)
        values = distribution_values(targets, mean_over_ranks(targets.mean(0)), result.cls.detach())
        if self.training:
            move_center(self.center, result.centers, self.config.center_momentum)
        values |= {
            "ssl.loss": result.total.detach(),
            "ssl.cls": result.cls.detach(),
            "ssl.plus": result.plus.detach(),
            "ssl.patches": result.patches.detach(),
            "ssl.valid": places.valid.float().mean(),
        }
        return Encoded(features, result.total, values | spread(features))

    def _places(self, views: Mapping[str, Tensor]) -> "_Places":
        """The maps of a batch, from its boxes and cells."""
        boxes, local_boxes = views[f"{GLOBAL}.box"], views[f"{LOCAL}.box"]
        first, second = boxes.chunk(2)
        others = torch.cat((second, first))
        cells = views[f"{GLOBAL}.cells"].repeat(2, 1)
        teacher, valid = bilinear_rows(cell_places(boxes, cells, self.grid), others, self.grid)
        student = F.one_hot(cells, self.grid**2) * valid.unsqueeze(-1)
        count = self.config.locals
        local_cells = views[f"{LOCAL}.cells"].repeat(count, 1)
        places = cell_places(local_boxes, local_cells, self.local_grid)  # [n * B, s', 2]
        places = places.unflatten(0, (count, -1)).repeat(1, 2, 1, 1).flatten(0, 1)
        rows, local_valid = bilinear_rows(places, others.repeat(count, 1), self.grid)
        return _Places(
            student,
            teacher,
            valid,
            rows.unflatten(0, (count, -1)),
            local_valid.unflatten(0, (count, -1)),
        )

    def _score_teacher(self, images: Tensor, places: "_Places") -> tuple[Tensor, ...]:
        """The teacher's part of `Scores`, from one pass over the global crops."""
        first, second = images.chunk(2)
        others = torch.cat((second, first))
        tokens = self.momentum.tokens(others)
        summary = self.momentum.read(self.momentum.net.norm(tokens), others).summary
        count, spots = len(places.local), places.local.shape[2]
        local = places.local.transpose(0, 1).flatten(1, 2)  # [2 * B, n * s', L]
        rows = torch.cat((places.teacher, local), dim=1)
        sampled = self.momentum_sampling(tokens[:, self.momentum.prefix :], rows)
        head, split = self.momentum_head, places.teacher.shape[1]
        embedded = head.embed(sampled)
        # scores are linear in the embedding: the sum over a crop's places needs one row, not s'
        local_embedded = embedded[:, split:].unflatten(1, (count, spots)).transpose(0, 1)
        weights = places.local_valid.to(embedded.dtype)
        local_sums = (local_embedded * weights.unsqueeze(-1)).sum(2)
        return (
            head(summary).float(),
            head.prototypes(embedded[:, :split]).float(),
            places.valid,
            head.prototypes(local_sums).float(),
            places.local_valid.sum(2).float(),
        )

    def _followers(self) -> list[nn.Parameter]:
        return [*super()._followers(), *self.momentum_sampling.parameters()]

    def _leaders(self) -> list[nn.Parameter]:
        return [*super()._leaders(), *self.sampling.parameters()]

    def _check(self, recipe: Recipe, student: Student) -> None:
        super()._check(recipe, student)
        if not (student.has_class_token and student.second_token):
            raise UserError(
                f"ssl.kind = udi: student '{recipe.student.name}' needs a second class token: set "
                "student.kwargs.reg_tokens=1"
            )
        for name, window, grid in (
            ("window", recipe.ssl.udi.window, recipe.student.image_size // student.stride),
            ("local_window", recipe.ssl.udi.local_window, local_size(recipe) // student.stride),
        ):
            if window > grid:
                raise UserError(
                    f"ssl.udi.{name} = {window}: crops have {grid} cells a side: set at most {grid}"
                )


class _Places(NamedTuple):
    """Maps of a batch: L cells of a global crop, s places of it, s' of a local one."""

    student: Tensor
    """Rows of global crops (first, second) on their own grid, [2 * B, s, L]."""
    teacher: Tensor
    """The same places on the other crop's grid, [2 * B, s, L]."""
    valid: Tensor
    """Bool [2 * B, s]."""
    local: Tensor
    """Places of local crops on the grids of (second, first), [n, 2 * B, s', L]."""
    local_valid: Tensor
    """Bool [n, 2 * B, s']."""
