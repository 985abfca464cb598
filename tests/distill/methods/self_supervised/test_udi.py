"""UDI's loss against the reference implementation's numbers, and its maps against hand-made boxes
and a loop.
"""

import pytest
import torch

from distill.methods.self_supervised.udi import (
    Sampling,
    Scores,
    bilinear_rows,
    cell_places,
    udi_loss,
)
from tests.distill.methods.self_supervised.objectives import build, double, reference


def scores_of(case: dict, step: dict) -> tuple[Scores, list[torch.Tensor]]:
    """The scores of a recorded step, and the student's that need a gradient."""
    temperature, batch = case["student_temp"], case["images"]
    cls, plus, patches = (double(level) for level in step["student_global"])
    local_cls, local_plus = (
        double(level).squeeze(1).unflatten(0, (case["locals"], batch))
        for level in step["student_local"]
    )
    plus, patches = plus.squeeze(1).requires_grad_(), patches.squeeze(0).requires_grad_()
    valid, local_valid = (double(mask).squeeze(-1) for mask in step["teacher_patch_masks"])
    local_rows = double(step["teacher_local_patch"])
    scores = Scores(
        cls.squeeze(1) / temperature,
        plus / temperature,
        patches / temperature,
        local_cls / temperature,
        local_plus / temperature,
        double(step["teacher_global_cls"]).squeeze(1),
        double(step["teacher_global_patch"]).squeeze(0),
        valid.squeeze(0).bool(),
        (local_rows * local_valid.unsqueeze(-1)).sum(2),
        local_valid.sum(2),
    )
    return scores, [plus, patches]


def test_losses_gradients_and_centres_are_the_reference_s():
    case = reference("udi_loss")
    for step in case["steps"]:
        scores, leaves = scores_of(case, step)
        center = double(step["center_before"])
        result = udi_loss(scores, center, step["teacher_temp"], case["alpha"])
        expected = {
            "total": result.total,
            "cls_global": result.cls,
            "cls2_global": result.plus,
            "patch_global": result.patches,
            "cls_local": result.local_cls,
            "cls2_local": result.local_plus,
        }
        for name, value in expected.items():
            assert value.item() == pytest.approx(step[name], abs=1e-6), name
        plus, patches = torch.autograd.grad(result.total, leaves)
        assert torch.allclose(plus, double(step["grad_global_cls2"]).squeeze(1), atol=1e-8)
        assert torch.allclose(patches, double(step["grad_patch"]).squeeze(0), atol=1e-8)
        after = center.lerp(result.centers, 1 - case["center_momentum"])
        assert torch.allclose(after, double(step["center_after"]), atol=1e-8)


def test_places_of_cells_follow_the_box_and_its_mirror():
    boxes = torch.tensor([[0.0, 0.2, 0.5, 0.8], [0.5, 0.2, 0.0, 0.8]])
    cells = torch.tensor([[0, 2, 8], [0, 2, 8]])  # corners of a grid of 3
    places = cell_places(boxes, cells, 3)
    assert torch.allclose(places[0], torch.tensor([[0.0, 0.2], [0.5, 0.2], [0.5, 0.8]]))
    assert torch.allclose(places[1], torch.tensor([[0.5, 0.2], [0.0, 0.2], [0.0, 0.8]]))


def test_bilinear_rows_equal_a_loop():
    torch.manual_seed(0)
    grid, boxes = 4, torch.tensor([[0.1, 0.0, 0.9, 0.7], [0.8, 0.3, 0.2, 1.0]])
    places = torch.rand(2, 30, 2)
    weights, valid = bilinear_rows(places, boxes, grid)
    for n in range(2):
        left, top, right, bottom = boxes[n].tolist()
        for s in range(30):
            x = (places[n, s, 0].item() - left) / (right - left)
            y = (places[n, s, 1].item() - top) / (bottom - top)
            expected = torch.zeros(grid, grid)
            if 0 < x < 1 and 0 < y < 1:
                column, row = x * (grid - 1), y * (grid - 1)
                c, r = int(column), int(row)
                for dr, wr in ((0, 1 - (row - r)), (1, row - r)):
                    for dc, wc in ((0, 1 - (column - c)), (1, column - c)):
                        expected[r + dr, c + dc] += wr * wc
            assert valid[n, s].item() == (expected.sum() > 0).item()
            assert torch.allclose(weights[n, s].view(grid, grid), expected, atol=1e-5)
    sums = weights.sum(-1)[valid]
    assert torch.allclose(sums, torch.ones_like(sums)) and valid.any() and not valid.all()


def test_a_place_is_read_from_the_feature_that_shows_it():
    """A picture whose features are their own places: both crops must read the same ones."""
    grid = 5
    boxes = torch.tensor([[0.1, 0.1, 0.7, 0.9], [0.9, 0.2, 0.3, 0.8]])  # the second is mirrored
    everything = torch.arange(grid**2).repeat(2, 1)
    coordinates = cell_places(boxes, everything, grid)  # features of each crop
    cells = torch.tensor([[6, 12, 18, 8]])
    places = cell_places(boxes[:1], cells, grid)
    weights, valid = bilinear_rows(places, boxes[1:], grid)
    read = weights @ coordinates[1:]
    assert valid.any() and torch.allclose(read[valid], places[valid], atol=1e-6)


def test_sampling_of_an_empty_row_is_finite_and_of_one_cell_attends_from_there():
    torch.manual_seed(0)
    module = Sampling(16, 2)
    tokens = torch.randn(2, 9, 16)
    rows = torch.zeros(2, 3, 9)
    rows[:, 0, 4] = 1
    out = module(tokens, rows)
    assert out.isfinite().all()
    x = module.norm(tokens)
    key, value = module.key_value(x).chunk(2, -1)
    query = module.query(x)[:, 4]
    heads = []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        scores = (query[:, None, part] * key[..., part]).sum(-1) / 8**0.5
        heads.append((scores.softmax(-1)[..., None] * value[..., part]).sum(1))
    expected = module.out_norm(module.project(torch.cat(heads, -1)) + x[:, 4])
    assert torch.allclose(out[:, 0], expected, atol=1e-5)


def test_the_teacher_s_local_sums_equal_sums_of_its_scores():
    udi, student = build("udi", with_student=True)
    images = torch.randn(4, 3, 64, 64)
    boxes = torch.tensor([[0.0, 0.0, 0.7, 0.7], [0.1, 0.1, 0.9, 0.8]] * 2)
    views = {
        "global.box": boxes,
        "global.cells": torch.tensor([[0], [5]]),
        "local.box": torch.tensor([[0.2, 0.2, 0.5, 0.5]] * 4),
        "local.cells": torch.tensor([[0], [3]]),
    }
    places = udi._places(views)
    cls, patches, valid, sums, counts = udi._score_teacher(images, places)
    others = torch.cat((images[2:], images[:2]))
    tokens = udi.momentum.tokens(others)[:, 2:]
    for crop in range(2):
        sampled = udi.momentum_sampling(tokens, places.local[crop])
        rows = udi.momentum_head(sampled) * places.local_valid[crop].unsqueeze(-1)
        assert torch.allclose(sums[crop], rows.sum(1), atol=1e-5)
        assert torch.equal(counts[crop], places.local_valid[crop].sum(1).float())
    assert cls.shape == (4, 12) and patches.shape == (4, 1, 12) and valid.shape == (4, 1)
