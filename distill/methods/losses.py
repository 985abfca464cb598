"""UMT's alignment losses (paper 3.4 and A.3), as pure functions on tensors.

Token loss L^m: mean squared error for every teacher. Feature loss L^f, by the teacher's role:

| role | loss | on |
|---|---|---|
| classification, clip | 1 - cosine | features averaged over positions |
| mae | mean squared error | every patch |
| dino | 1 - cosine | every patch |

Reductions are means over everything but nothing else, so the loss of a batch is the mean of its
halves. At the end, the loss of UNIC and SeFA, which is kept apart for every image.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config import Role, TeacherConfig
from distill.features import Features, resize_map


class Prediction(NamedTuple):
    """What the student says in one teacher's space.

    `token` [B, d_summary] predicts the teacher's summary (None for a teacher without one, and in
    the ablation without a model token); `patches` [B, h, w, d] predicts its map; `summary` [B, d]
    is the map's own image-level vector (class position of a ViT student, mean of a CNN's), in the
    space of `patches`, None where the student has none; `maps` [B, h_l, w_l, d_l] predict the
    teacher's further maps, finest first.
    """

    token: Tensor | None
    patches: Tensor
    summary: Tensor | None
    maps: tuple[Tensor, ...] = ()
    second: Tensor | None = None


def token_mse(token: Tensor, summary: Tensor) -> Tensor:
    """Mean squared error between a predicted and a teacher's summary, both [B, d] (L^m of A.3)."""
    return F.mse_loss(token, summary)


def pooled_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of position-averaged maps [B, h, w, d]; the two grids may differ."""
    return (
        1
        - F.cosine_similarity(student.mean(dim=(1, 2)), teacher.mean(dim=(1, 2)), dim=-1, eps=1e-6)
    ).mean()


def patch_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between two maps [B, h, w, d] on the same grid."""
    return F.mse_loss(student, teacher)


def patch_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine at every position of two maps [B, h, w, d] on the same grid,
    averaged.
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6)).mean()


FEATURE_LOSS: dict[Role, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": pooled_cosine,
    "clip": pooled_cosine,
    "mae": patch_mse,
    "dino": patch_cosine,
}


def free_length_of_role(role: Role) -> tuple[str, ...]:
    """Kinds of output ("patches") whose length is free, for the feature loss of a role compares
    directions only.
    """
    return ("patches",) if FEATURE_LOSS[role] in (pooled_cosine, patch_cosine) else ()


def align_maps(
    student: Tensor, teacher: Tensor, grid: Literal["teacher", "student"]
) -> tuple[Tensor, Tensor]:
    """Bring two maps [B, h, w, d] to one grid: the teacher's (the student is resampled) or the
    student's.
    """
    if grid == "teacher":
        return resize_map(student, tuple(teacher.shape[1:3])), teacher
    return student, resize_map(teacher, tuple(student.shape[1:3]))


def alignment_losses(
    predictions: Mapping[str, Prediction],
    targets: Mapping[str, Features],
    teachers: tuple[TeacherConfig, ...],
    grid: Literal["teacher", "student"],
) -> dict[str, Tensor]:
    """Sum every teacher's token and feature loss (UMT 3.4: L = sum_i L^m_i + L^f_i).

    Returns scalars: `loss` (weighted, with gradient) and, detached and unweighted as in the paper's
    Tables 2-3, `loss.token`, `loss.patches`, `loss.<teacher>.token`, `loss.<teacher>.patches`.
    """
    # Every part starts from the first teacher's, so that dtype and device need no naming.
    total, token_sum, feature_sum, parts = None, None, None, {}
    for teacher in teachers:
        prediction, target = predictions[teacher.label], targets[teacher.label]
        loss_of = FEATURE_LOSS[teacher.role]
        student_map, teacher_map = prediction.patches.float(), target.patches.float()
        if loss_of is not pooled_cosine:
            student_map, teacher_map = align_maps(student_map, teacher_map, grid)
        feature = loss_of(student_map, teacher_map)
        weighted = teacher.weight * teacher.feature_weight * feature
        parts[f"loss.{teacher.label}.patches"] = feature.detach()
        feature_sum = feature.detach() if feature_sum is None else feature_sum + feature.detach()
        if prediction.token is not None and target.summary is not None:
            token = token_mse(prediction.token.float(), target.summary.float())
            weighted = weighted + teacher.weight * teacher.token_weight * token
            parts[f"loss.{teacher.label}.token"] = token.detach()
            token_sum = token.detach() if token_sum is None else token_sum + token.detach()
        total = weighted if total is None else total + weighted
    if token_sum is not None:
        parts["loss.token"] = token_sum
    return {"loss": total, "loss.patches": feature_sum, **parts}


def alignment_loss_names(labels: Sequence[str], with_token: Sequence[str]) -> list[str]:
    """Names that `alignment_losses` returns beside "loss", for teachers `labels` of which those
    `with_token` have a token loss.
    """
    names = ["loss.patches", *(f"loss.{label}.patches" for label in labels)]
    if with_token:
        names += ["loss.token", *(f"loss.{label}.token" for label in with_token)]
    return names


class Similarity(NamedTuple):
    """Both parts of L_sim for every image, [N] (SeFA Eq 1)."""

    cosine: Tensor
    """One minus the cosine."""
    smooth_l1: Tensor

    def weighted(self, cosine_weight: float) -> Tensor:
        """alpha x cosine + (1 - alpha) x smooth L1, [N]."""
        return cosine_weight * self.cosine + (1 - cosine_weight) * self.smooth_l1


def similarity(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Similarity:
    """Compare vectors [N, d] or, averaged over positions, maps [N, h, w, d] on the same grid (SeFA
    Eq 1 and 6; smooth L1 with beta = 1). `weights` [N, h, w] of the positions, default equal.
    """
    cosine = 1 - F.cosine_similarity(student, teacher, dim=-1)
    smooth = F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)
    if cosine.ndim == 1:
        return Similarity(cosine, smooth)
    if weights is None:
        return Similarity(cosine.mean((1, 2)), smooth.mean((1, 2)))
    total = weights.sum((1, 2)).clamp_min(1e-6)
    return Similarity(
        (cosine * weights).sum((1, 2)) / total, (smooth * weights).sum((1, 2)) / total
    )


def similarity_losses(
    predictions: Mapping[str, Prediction],
    targets: Mapping[str, Features],
    cosine_weight: float,
    grid: Literal["teacher", "student"],
    weights: Tensor | None = None,
    apart: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_sim of every teacher and image, [T, N] (SeFA Eq 1): the mean of its summary's and of its
    map's, their sum if they train `apart`, or the one there is.

    `weights` [N, h, w] of the student's positions, default equal. Also returns, detached and
    averaged over images, `loss.<teacher>.token` and `loss.<teacher>.patches`, each with its parts
    `.cosine` and `.smooth_l1`.
    """
    rows, parts = [], {}
    for label, target in targets.items():
        prediction = predictions[label]
        maps = align_maps(prediction.patches.float(), target.patches.float(), grid)
        at_positions = weights
        if weights is not None:
            at_positions = resize_map(weights.unsqueeze(-1), tuple(maps[0].shape[1:3])).squeeze(-1)
        kinds = {"patches": similarity(*maps, at_positions)}
        if prediction.token is not None and target.summary is not None:
            kinds["token"] = similarity(prediction.token.float(), target.summary.float())
        losses = {kind: value.weighted(cosine_weight) for kind, value in kinds.items()}
        both = torch.stack(list(losses.values()))
        rows.append(both.sum(0) if apart else both.mean(0))
        for kind, loss in losses.items():
            name = f"loss.{label}.{kind}"
            parts[name] = loss.detach().mean()
            parts[f"{name}.cosine"] = kinds[kind].cosine.detach().mean()
            parts[f"{name}.smooth_l1"] = kinds[kind].smooth_l1.detach().mean()
    return torch.stack(rows), parts


def free_length_of_similarity(cosine_weight: float) -> tuple[str, ...]:
    """Kinds of output whose length is free: all without smooth L1."""
    return ("token", "patches") if cosine_weight == 1 else ()


def similarity_loss_names(labels: Sequence[str], with_token: Sequence[str]) -> list[str]:
    """Names of the parts that `similarity_losses` returns."""
    names = [
        f"loss.{label}.{kind}"
        for label in labels
        for kind in (("patches", "token") if label in with_token else ("patches",))
    ]
    return [f"{name}{part}" for name in names for part in ("", ".cosine", ".smooth_l1")]
