"""iBOT's patch loss against the reference implementation's numbers and a loop; masked forward."""

import pytest
import torch

from distill.methods.self_supervised.ibot import patch_loss
from tests.distill.methods.self_supervised.objectives import build, double, reference


def test_losses_gradient_and_centres_are_the_reference_s():
    case = reference("ibot_loss")
    for step in case["steps"]:
        ibot = build("ibot").double()
        ibot.config = ibot.config.model_copy(update={"student_temp": case["student_temp"]})
        ibot.temperature = double(step["teacher_temp"])
        ibot.center = double(step["center_before"])
        ibot.patch_center = double(step["center2_before"])
        cls, _ = ibot.compare(
            double(step["student_cls"] + step["student_local"]), double(step["teacher_cls"])
        )
        patches = double(step["student_patch"]).requires_grad_()
        masks = torch.tensor(step["masks"]).bool().flatten(0, 1)
        teacher = double(step["teacher_patch"])
        loss = ibot.compare_patches(patches, teacher, masks.flatten(1), teacher.mean((0, 1)))
        assert cls.item() == pytest.approx(step["cls"], abs=1e-6)
        assert loss.item() == pytest.approx(step["patch"], abs=1e-6)
        assert (cls + loss).item() == pytest.approx(step["loss"], abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, patches)
        assert torch.allclose(gradient, double(step["grad_patch"]), atol=1e-8)
        assert torch.allclose(ibot.center, double(step["center_after"]), atol=1e-8)
        assert torch.allclose(ibot.patch_center, double(step["center2_after"]), atol=1e-8)


def test_patch_loss_equals_a_loop_over_hidden_patches():
    torch.manual_seed(0)
    student = torch.randn(3, 6, 5, dtype=torch.float64)
    targets = torch.randn(3, 6, 5, dtype=torch.float64).softmax(-1)
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0] * 6, [0, 0, 0, 0, 0, 1]]).bool()
    losses = []
    for crop in range(3):
        hidden = [
            -(targets[crop, p] * student[crop, p].log_softmax(-1)).sum()
            for p in range(6)
            if mask[crop, p]
        ]
        losses.append(sum(hidden) / max(1, len(hidden)))
    expected = float(sum(losses)) / 3
    assert patch_loss(student, targets, mask).item() == pytest.approx(expected, abs=1e-12)


def test_tokens_without_a_mask_are_the_student_s_own():
    _, student = build("ibot", with_student=True)
    images = torch.randn(2, 3, 64, 64)
    tokens = student.tokens(images, torch.zeros(2, 4, 4, dtype=torch.bool), torch.ones(32))
    assert torch.equal(student.net.norm(tokens), student.net.forward_features(images))


def test_hidden_patches_do_not_reach_the_features():
    ibot, student = build("ibot", with_student=True)
    images = torch.randn(1, 3, 64, 64)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    changed = images.clone()
    changed[..., 16:32, 32:48] += 5
    hidden = [student.tokens(x, mask, ibot.filler) for x in (images, changed)]
    seen = [student.tokens(x) for x in (images, changed)]
    assert torch.equal(*hidden) and not torch.allclose(*seen)


def test_the_vector_in_place_of_hidden_patches_learns():
    ibot, student = build("ibot", with_student=True)
    ibot.temperature.fill_(0.04)
    images = {"global": torch.randn(4, 3, 64, 64), "local": torch.randn(4, 3, 32, 32)}
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[0, :2, :3] = True
    ibot.encode(student, images, {"global.mask": mask}).loss.backward()
    assert ibot.filler.grad.abs().max() > 0


def test_scoring_the_hidden_patches_alone_is_scoring_all_of_them():
    ibot, student = build("ibot", with_student=True)
    ibot.temperature.fill_(0.04)
    images = {"global": torch.randn(4, 3, 64, 64), "local": torch.randn(4, 3, 32, 32)}
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[0, :2, :3], mask[2, 3] = True, True
    result = ibot.encode(student, images, {"global.mask": mask})
    with torch.no_grad():
        tokens = student.tokens(images["global"], mask, ibot.filler)
        seen = ibot.momentum(images["global"]).patches.flatten(1, 2)
        teacher = ibot.momentum_head(seen)
        scores = ibot.head(student.net.norm(tokens)[:, 1:]) / ibot.config.student_temp
        expected = patch_loss(scores, (teacher / 0.04).softmax(-1), mask.flatten(1))
    assert result.values["ssl.patches"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ibot.patch_center, 0.1 * teacher.mean((0, 1)), atol=1e-6)
