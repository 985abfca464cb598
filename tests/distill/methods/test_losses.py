"""The losses of A.3: which formula, on which tensor, for which role."""

import pytest
import torch

from distill.config import TeacherConfig
from distill.features import Features, resize_map
from distill.methods.losses import (
    Prediction,
    align_maps,
    alignment_losses,
    patch_cosine,
    patch_mse,
    pooled_cosine,
    token_mse,
)

GRID, DIM, SUMMARY = (2, 3), 5, 4


def maps(*grid: int) -> torch.Tensor:
    return torch.randn(2, *grid, DIM, dtype=torch.float64)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)


def test_token_loss_is_the_mean_squared_error():
    a, b = torch.randn(2, SUMMARY), torch.randn(2, SUMMARY)
    expected = (
        sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        / a.numel()
    )
    assert token_mse(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_pooled_cosine_compares_the_means_over_positions_and_needs_no_common_grid():
    a, b = maps(2, 3), maps(4, 4)
    expected = [
        1 - cosine(x.mean((0, 1)).tolist(), y.mean((0, 1)).tolist())
        for x, y in zip(a, b, strict=True)
    ]
    assert pooled_cosine(a, b).item() == pytest.approx(sum(expected) / 2)


def test_patch_losses_compare_every_position():
    a, b = maps(*GRID), maps(*GRID)
    pairs = list(zip(a.flatten(0, 2).tolist(), b.flatten(0, 2).tolist(), strict=True))
    assert patch_cosine(a, b).item() == pytest.approx(
        sum(1 - cosine(x, y) for x, y in pairs) / len(pairs)
    )
    squares = [(x - y) ** 2 for pair in pairs for x, y in zip(*pair, strict=True)]
    assert patch_mse(a, b).item() == pytest.approx(sum(squares) / len(squares))


def losses_for(
    role: str, prediction: Prediction, target: Features, grid: str = "teacher", **weights: float
):
    teacher = TeacherConfig(name="any", role=role, alias="t", **weights)
    return alignment_losses({"t": prediction}, {"t": target}, (teacher,), grid)


@pytest.mark.parametrize(
    ("role", "formula"),
    [
        ("classification", pooled_cosine),
        ("clip", pooled_cosine),
        ("mae", patch_mse),
        ("dino", patch_cosine),
    ],
)
def test_each_role_gets_the_feature_loss_of_the_paper_beside_the_token_loss(role, formula):
    token, summary = torch.randn(2, SUMMARY), torch.randn(2, SUMMARY)
    student, teacher = maps(*GRID).float(), maps(*GRID).float()
    losses = losses_for(
        role, Prediction(token, student, student.mean((1, 2))), Features(summary, teacher)
    )
    feature, square = formula(student, teacher), token_mse(token, summary)
    torch.testing.assert_close(losses["loss.t.patches"], feature)
    torch.testing.assert_close(losses["loss.t.token"], square)
    torch.testing.assert_close(losses["loss"], feature + square)


def test_only_patch_losses_resample_the_map_and_they_resample_the_students_unless_told_otherwise():
    student, teacher = maps(2, 2).float(), maps(4, 4).float()
    prediction = Prediction(torch.zeros(2, SUMMARY), student, student.mean((1, 2)))
    target = Features(torch.zeros(2, SUMMARY), teacher)
    torch.testing.assert_close(
        losses_for("dino", prediction, target)["loss"],
        patch_cosine(resize_map(student, (4, 4)), teacher),
    )
    torch.testing.assert_close(
        losses_for("dino", prediction, target, grid="student")["loss"],
        patch_cosine(student, resize_map(teacher, (2, 2))),
    )
    torch.testing.assert_close(
        losses_for("clip", prediction, target)["loss"], pooled_cosine(student, teacher)
    )


def test_resizing_is_bilinear_and_keeps_a_constant_map():
    row = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    torch.testing.assert_close(
        resize_map(row, (1, 4)).flatten(), torch.tensor([0.0, 0.25, 0.75, 1.0])
    )
    constant = torch.full((1, 7, 7, 3), 2.5)
    torch.testing.assert_close(resize_map(constant, (4, 4)), torch.full((1, 4, 4, 3), 2.5))
    same = torch.randn(1, 3, 3, 2)
    assert align_maps(same, same, "teacher")[0] is same


def test_weights_scale_the_loss_but_not_the_logged_parts():
    student, teacher = maps(*GRID).float(), maps(*GRID).float()
    prediction = Prediction(torch.randn(2, SUMMARY), student, student.mean((1, 2)))
    target = Features(torch.randn(2, SUMMARY), teacher)
    plain = losses_for("mae", prediction, target)
    heavy = losses_for("mae", prediction, target, weight=2.0, token_weight=0.5, feature_weight=3.0)
    torch.testing.assert_close(
        heavy["loss"], 2 * (0.5 * plain["loss.t.token"] + 3 * plain["loss.t.patches"])
    )
    assert (
        heavy["loss.token"] == plain["loss.token"]
        and heavy["loss.patches"] == plain["loss.patches"]
    )


def test_without_a_model_token_there_is_no_token_loss():
    student = maps(*GRID).float()
    losses = losses_for(
        "dino", Prediction(None, student, student.mean((1, 2))), Features(torch.ones(2, 4), student)
    )
    assert "loss.token" not in losses and "loss.t.token" not in losses
    assert losses["loss"].abs() < 1e-6


def test_the_loss_of_a_batch_is_the_mean_of_its_halves():
    student, teacher = torch.randn(4, 2, 2, DIM), torch.randn(4, 2, 2, DIM)
    token, summary = torch.randn(4, SUMMARY), torch.randn(4, SUMMARY)

    def loss(part: slice) -> torch.Tensor:
        prediction = Prediction(token[part], student[part], student[part].mean((1, 2)))
        return losses_for("mae", prediction, Features(summary[part], teacher[part]))["loss"]

    torch.testing.assert_close(loss(slice(None)), (loss(slice(0, 2)) + loss(slice(2, 4))) / 2)
