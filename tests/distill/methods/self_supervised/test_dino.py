"""DINO's head, loss, centre and schedules against the reference implementation's numbers and
against loops.
"""

import math

import pytest
import torch
from torch import nn

from distill.methods.method import Progress
from distill.methods.self_supervised.dino import (
    DINO,
    Head,
    cross_entropy,
    dino_loss,
    distribution_values,
    follow,
    momentum_rate,
    teacher_temperature,
)
from tests.distill.methods.self_supervised.objectives import build, double, reference


def test_the_head_is_the_reference_s():
    case = reference("dino_head")
    state = {name: double(value) for name, value in case["state"].items()}
    head = Head(4, 5, 6, 3, norm_last_layer=False).double()
    names = {
        "last_layer.weight_g": "prototypes.length",
        "last_layer.weight_v": "prototypes.direction",
    }
    head.load_state_dict({names.get(name, name): value for name, value in state.items()})
    assert torch.allclose(head(double(case["x"])), double(case["y"]), atol=1e-10, rtol=0)


def test_rows_of_the_last_layer_keep_length_one_where_asked():
    assert not Head(4, 5, 6, 3, norm_last_layer=True).prototypes.length.requires_grad
    assert Head(4, 5, 6, 3, norm_last_layer=False).prototypes.length.requires_grad


def objective(center: torch.Tensor, temperature: float, case: dict) -> DINO:
    """An objective with the numbers of a case in place of a trained state."""
    dino = build("dino").double()
    dino.center, dino.temperature = center.clone(), double(temperature)
    settings = {"student_temp": case["student_temp"]}
    dino.config = dino.config.model_copy(
        update=settings | {"center_momentum": case.get("center_momentum", 0.9)}
    )
    return dino


def test_loss_gradient_and_centre_are_the_reference_s():
    case = reference("dino_loss")
    for step in case["steps"]:
        dino = objective(double(step["center_before"]).flatten(), step["teacher_temp"], case)
        student = double(step["student"]).requires_grad_()
        loss, _ = dino.compare(student, double(step["teacher"]))
        assert loss.item() == pytest.approx(step["loss"], abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.allclose(gradient, double(step["grad_student"]), atol=1e-8)
        assert torch.allclose(dino.center, double(step["center_after"]).flatten(), atol=1e-8)


def test_loss_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    student = torch.randn(5, 3, 7, dtype=torch.float64)
    targets = torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    losses = []
    for i in range(2):
        for j in range(5):
            if i != j:
                scores = student[j].log_softmax(-1)
                losses.append(-(targets[i] * scores).sum(-1).mean())
    assert dino_loss(student, targets).item() == pytest.approx(sum(losses).item() / 8, abs=1e-12)
    other = -(targets[0] * student[1].log_softmax(-1)).sum(-1)
    assert torch.allclose(cross_entropy(targets[0], student[1]), other)


def test_temperature_rises_by_epochs_and_stays():
    for name in ("dino_loss", "ibot_loss", "udi_loss"):
        for step in reference(name)["steps"]:  # recorded with three epochs of warm-up
            mine = teacher_temperature(step["epoch"], 0.04, 0.07, 3)
            assert mine == pytest.approx(step["teacher_temp"], abs=1e-12)
    mine = [teacher_temperature(epoch, 0.04, 0.07, 4) for epoch in range(6)]
    assert mine == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert teacher_temperature(0, 0.04, 0.07, 0) == 0.07
    assert teacher_temperature(0, 0.04, 0.07, 1) == 0.04


def test_momentum_rises_to_one():
    assert momentum_rate(0, 10, 0.996) == pytest.approx(0.996)
    assert momentum_rate(5, 10, 0.9) == pytest.approx(0.95)
    assert momentum_rate(10, 10, 0.9) == 1


def test_the_momentum_network_follows_by_its_closed_form():
    leader, follower = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = follower.weight.detach().clone()
    with torch.no_grad():
        for momentum in (0.9, 0.8, 0.5):
            leader.weight += 1
            expected = momentum * expected + (1 - momentum) * leader.weight
            follow(list(follower.parameters()), list(leader.parameters()), momentum)
    assert torch.allclose(follower.weight, expected)


def test_the_momentum_network_starts_as_the_student_and_never_trains():
    dino, student = build("dino", with_student=True)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, dino.momentum.state_dict()[name])
    assert not any(p.requires_grad for p in dino.momentum.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    before = [p.clone() for p in dino.momentum.parameters()]
    dino.after_step(student, Progress(0, 10, 5))
    rate = momentum_rate(0, 10, dino.config.momentum)
    for old, new, leader in zip(
        before, dino.momentum.parameters(), student.parameters(), strict=True
    ):
        assert torch.allclose(new, rate * old + (1 - rate) * leader, atol=1e-6)


def test_constant_and_uniform_teachers_tell_nothing():
    pictures, prototypes = 8, 16
    uniform = torch.full((pictures, prototypes), 1 / prototypes)
    constant = torch.zeros(pictures, prototypes)
    constant[:, 3] = 1
    spread = torch.eye(prototypes)[:pictures]
    rows = {"uniform": uniform, "constant": constant, "spread": spread}
    values = {
        name: distribution_values(rows[name], rows[name].mean(0), torch.tensor(5.0))
        for name in rows
    }
    assert values["uniform"]["ssl.entropy"].item() == pytest.approx(math.log(prototypes), abs=1e-5)
    assert values["constant"]["ssl.entropy"].item() == 0
    for name in ("uniform", "constant"):
        assert values[name]["ssl.information"].item() == pytest.approx(0, abs=1e-5)
    assert values["spread"]["ssl.information"].item() == pytest.approx(math.log(pictures))
    assert values["spread"]["ssl.kl"].item() == 5


def test_autocast_does_not_round_the_loss():
    torch.manual_seed(0)
    student = torch.randn(4, 16, 512) * 3
    targets = (torch.randn(2, 16, 512) * 5).softmax(-1)
    exact = dino_loss(student, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dino_loss(student, targets), exact)


def test_a_centre_moves_in_training_alone_and_never_to_what_is_not_finite():
    dino = build("dino")
    dino.temperature.fill_(0.04)
    student, teacher = torch.randn(8, 12), torch.randn(4, 12)
    dino.eval().compare(student, teacher)
    assert not dino.center.any()
    teacher[0, 3] = torch.inf
    dino.train().compare(student, teacher)
    assert dino.center.isfinite().all() and dino.center[0] != 0 and dino.center[3] == 0
