"""The sentinel inside its adapter: numbers of parameters, equality at the start, odd sizes,
attention against slow references.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from contract.errors import UserError
from distill.config import StudentConfig
from distill.models import deformable
from distill.models.deformable import DeformableAttention, PlainAttention, sample_rows
from distill.models.meta import building
from distill.models.student import Student
from distill.models.vit_adapter import AdapterConfig, ViTAdapter, _ConvMLP

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
WITHOUT_CLASS = {"class_token": False, "global_pool": "avg"}
SMALL = {"blocks": 2, "heads": 2, "points": 2, "width": 32}


def student_config(**changes: object) -> StudentConfig:
    values = {"name": "vit_small_patch14_dinov2", "image_size": 56, "kwargs": VIT}
    return StudentConfig(**values | changes)


def adapted(adapter: dict | None = None, **changes: object) -> ViTAdapter:
    torch.manual_seed(0)
    return ViTAdapter(student_config(**changes), AdapterConfig(**SMALL | (adapter or {})))


def open_gates(student: ViTAdapter) -> ViTAdapter:
    for interaction in student.interactions:
        nn.init.normal_(interaction.injector.gate)
    return student


def test_a_base_sentinel_has_the_papers_numbers_of_parameters():
    config = StudentConfig(name="vit_base_patch14_dinov2", image_size=518)
    with building():
        student = ViTAdapter(config, AdapterConfig())
    sizes = [(p.numel(), p.requires_grad) for p in student.parameters()]
    assert sum(number for number, trains in sizes if trains) == 13_680_608
    assert sum(number for number, _ in sizes) == 100_260_320


@pytest.mark.parametrize("attention", ["deformable", "plain"])
@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("vit_small_patch14_dinov2", VIT, 56),
        ("vit_small_patch14_dinov2", VIT, 70),
        ("vit_small_patch14_dinov2", VIT, 224),
        ("vit_small_patch14_dinov2", VIT, 266),
        ("vit_small_patch14_dinov2", VIT, 518),
        ("vit_small_patch14_reg4_dinov2", VIT, 42),
        ("vit_tiny_patch16_224", VIT, 80),
    ],
)
def test_an_untrained_student_says_what_its_sentinel_says(name, kwargs, size, attention):
    config = {"name": name, "kwargs": kwargs, "image_size": size}
    student = adapted({"attention": attention}, **config).train()
    alone = Student(student_config(**config)).eval()
    alone.net.load_state_dict(student.net.state_dict())
    images = torch.randn(1 if size > 100 else 2, 3, size, size)
    features, expected = student(images), alone(images)
    assert torch.equal(features.summary, expected.summary)
    assert torch.equal(features.patches, expected.patches)
    for mine, other in zip(student.layers(images)[1], alone.layers(images)[1], strict=True):
        assert torch.equal(mine.patches, other.patches)
        assert torch.equal(mine.summary, other.summary)


@pytest.mark.parametrize("size", [(42, 42), (42, 70), (98, 56), (64 * 7, 14)])
def test_maps_of_every_multiple_of_the_patch_round_up(size):
    student = open_gates(adapted())
    features = student(torch.randn(1, 3, *size))
    sides = [tuple(math.ceil(side / stride) for side in size) for stride in student.map_strides]
    assert [level.shape[1:3] for level in features.maps] == sides
    assert [level.shape[-1] for level in features.maps] == list(student.map_widths)
    assert features.patches.shape[1:3] == (size[0] // 14, size[1] // 14)
    assert all(level.isfinite().all() for level in features.maps)


def test_layers_and_blocks_go_through_the_adapter():
    student = open_gates(adapted()).eval()
    images = torch.randn(1, 3, 56, 56)
    features, layers = student.layers(images)
    expected = student(images)
    for mine, other in zip(features.named().values(), expected.named().values(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(layers[-1].patches, expected.patches)
    raw = student.every_layer(images)
    assert len(raw) == 4
    assert torch.equal(student.net.norm(raw[-1].patches), expected.patches)
    _, bare = Student.layers(student, images)  # as timm's network alone has them
    assert not torch.allclose(layers[1].patches, bare[1].patches, atol=1e-2)


def test_a_convolution_sees_each_level_at_its_real_size():
    grids = [(7, 5), (4, 3), (2, 2)]
    mlp = _ConvMLP(8, 6).double()
    maps = [torch.randn(2, 8, *grid, dtype=torch.float64) for grid in grids]
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
    out = mlp(tokens, grids).split([h * w for h, w in grids], dim=1)
    for level, got in zip(maps, out, strict=True):
        hidden = mlp.up(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = nn.functional.gelu(mlp.convolution(hidden)).permute(0, 2, 3, 1)
        assert torch.allclose(got.unflatten(1, level.shape[2:]), mlp.down(hidden))


def read_slowly(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`sample`, a number at a time."""
    count, channels, rows, columns = values.shape
    queries, points = positions.shape[1:3]
    result = values.new_zeros(count, channels, queries, points)
    for n in range(count):
        for q in range(queries):
            for p in range(points):
                x = float(positions[n, q, p, 0]) * columns - 0.5
                y = float(positions[n, q, p, 1]) * rows - 0.5
                for row in range(rows):
                    for column in range(columns):
                        weight = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                        result[n, :, q, p] += weight * values[n, :, row, column]
    return result


def sample_by_gathers(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`sample` by `sample_rows`, a point at a time, behind rows that are not the maps'."""
    count, channels, *grid = values.shape
    cells = values.flatten(2).transpose(1, 2).flatten(0, 1)
    table = torch.cat((torch.full((3, channels), torch.nan, dtype=values.dtype), cells))
    first = 3 + torch.arange(count) * grid[0] * grid[1]
    one = torch.ones(*positions.shape[:2], 1, dtype=values.dtype)
    read = [
        sample_rows(table, first, tuple(grid), positions[:, :, point, None], one)
        for point in range(positions.shape[2])
    ]
    return torch.stack(read, -1).transpose(1, 2)


@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (1, 4)])
@pytest.mark.parametrize("read", [deformable.sample, sample_by_gathers])
def test_maps_are_read_bilinearly_with_zeros_outside(read: Callable, shape):
    values = torch.randn(2, 3, *shape, dtype=torch.float64)
    positions = torch.rand(2, 7, 4, 2, dtype=torch.float64) * 1.6 - 0.3
    positions[0, 0] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [-5.0, 9.0]])
    torch.testing.assert_close(read(values, positions), read_slowly(values, positions))


def test_both_ways_to_read_agree_in_float32():
    values, positions = torch.randn(3, 8, 25, 19), torch.rand(3, 200, 4, 2) * 1.4 - 0.2
    difference = deformable.sample(values, positions) - sample_by_gathers(values, positions)
    # positions of a map of 25 cells are known to 25 x 2^-24, and neighbours differ by a few
    assert difference.abs().max() <= 1e-5
    near = torch.rand(3, 200, 4, 2)
    values = torch.rand(3, 8, 8, 6)
    difference = deformable.sample(values, near) - sample_by_gathers(values, near)
    assert difference.abs().max() <= 1.5e-6


def attend_slowly(
    attention: DeformableAttention, queries: torch.Tensor, source: torch.Tensor, grid, grids
) -> torch.Tensor:
    """Deformable attention by its definition, a query and head at a time."""
    heads, points = attention.heads, attention.points
    values = attention.value(source)
    width = values.shape[-1] // heads
    rows = []
    for q in range(queries.shape[1]):
        query = queries[:, q]
        offsets = attention.offsets(query).view(-1, heads, len(grids), points, 2)
        weights = attention.weights(query).view(-1, heads, len(grids) * points).softmax(-1)
        centre = torch.tensor(
            [(q % grid[1] + 0.5) / grid[1], (q // grid[1] + 0.5) / grid[0]], dtype=queries.dtype
        )
        outputs = []
        for head in range(heads):
            total, start = 0.0, 0
            for level, (h, w) in enumerate(grids):
                part = values[:, start : start + h * w, head * width : (head + 1) * width]
                start += h * w
                place = centre + offsets[:, head, level] / torch.tensor([w, h])
                seen = read_slowly(part.transpose(1, 2).unflatten(2, (h, w)), place[:, None])
                weight = weights[:, head, level * points : (level + 1) * points]
                total = total + (seen[:, :, 0] * weight[:, None]).sum(-1)
            outputs.append(total)
        rows.append(attention.out(torch.cat(outputs, -1)))
    return torch.stack(rows, 1)


@torch.no_grad()
def test_deformable_attention_is_what_its_definition_says():
    attention = DeformableAttention(16, levels=2, heads=2, points=3, value_ratio=0.5).double()
    attention.initialize()
    for layer in (attention.offsets, attention.weights):
        nn.init.normal_(layer.weight, std=0.5)
    grid, grids = (3, 2), [(4, 3), (2, 1)]
    queries = torch.randn(2, 6, 16, dtype=torch.float64)
    source = torch.randn(2, 14, 16, dtype=torch.float64)
    result = attention(queries, source, [grid], grids)
    torch.testing.assert_close(result, attend_slowly(attention, queries, source, grid, grids))


@torch.no_grad()
def test_deformable_attention_agrees_with_transformers():
    grounding_dino = pytest.importorskip("transformers.models.grounding_dino")
    theirs = grounding_dino.modeling_grounding_dino.MultiScaleDeformableAttention()
    attention = DeformableAttention(32, levels=3, heads=4, points=2, value_ratio=0.5).double()
    attention.initialize()
    for layer in (attention.offsets, attention.weights):
        nn.init.normal_(layer.weight, std=0.3)
    grid, grids = (5, 4), [(8, 6), (4, 3), (2, 2)]
    queries = torch.randn(2, 20, 32, dtype=torch.float64)
    source = torch.randn(2, 64, 32, dtype=torch.float64)
    shapes = torch.tensor(grids)
    offsets = attention.offsets(queries).view(2, 20, 4, 3, 2, 2)
    centres = deformable.cell_centres(grid, queries)[:, None, None, None]
    read = theirs(
        attention.value(source).unflatten(-1, (4, -1)),
        shapes,
        grids,
        torch.tensor([0, 48, 60]),
        centres + offsets / shapes.flip(1)[:, None],
        attention.weights(queries).view(2, 20, 4, 6).softmax(-1).view(2, 20, 4, 3, 2),
        64,
    )
    expected = attention.out(read)
    torch.testing.assert_close(attention(queries, source, [grid], grids), expected)


def test_points_start_in_a_ring():
    attention = DeformableAttention(32, levels=3, heads=4, points=2, value_ratio=0.5)
    attention.initialize()
    ring = attention.offsets.bias.view(4, 3, 2, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(2):
        away = (point + 1) * expected[:, None].expand(-1, 3, -1)
        assert torch.allclose(ring[:, :, point], away, atol=1e-6)
    assert not attention.offsets.weight.any() and not attention.weights.weight.any()


def test_places_stay_exact_in_mixed_precision(monkeypatch):
    seen, sample = [], deformable.sample

    def watched(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append((values.dtype, positions.dtype))
        return sample(values, positions)

    monkeypatch.setattr(deformable, "sample", watched)
    images = torch.randn(1, 3, 42, 42)
    with torch.autocast("cpu", torch.bfloat16):
        adapted()(images)
    adapted().to(torch.bfloat16)(images.bfloat16())
    assert seen and set(seen) == {(torch.float32, torch.float32)}


def test_plain_attention_is_softmax_attention():
    attention = PlainAttention(16, heads=2, value_ratio=0.5).double()
    attention.initialize()
    queries = torch.randn(2, 6, 16, dtype=torch.float64)
    source = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (
        layer(tokens).view(2, -1, 2, 4).transpose(1, 2)
        for layer, tokens in (
            (attention.query, queries),
            (attention.key, source),
            (attention.value, source),
        )
    )
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(queries, source, [(2, 3)], [(5, 1)]), expected)


def total_of(student: ViTAdapter, images: torch.Tensor) -> torch.Tensor:
    return sum(
        (value * torch.randn_like(value)).sum() for value in student(images).named().values()
    )


@pytest.mark.parametrize("adapter", [{}, {"norm": "batch"}, {"attention": "plain"}])
def test_every_weight_but_the_sentinels_gets_a_gradient(adapter):
    student = adapted(adapter).train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        total_of(student, torch.randn(2, 3, 70, 70)).backward()
        gradients = {n: p.grad for n, p in student.named_parameters()}
        optimizer.step()
    assert all(gradients[n] is None for n in gradients if n.startswith("net."))
    trained = {n: g for n, g in gradients.items() if not n.startswith("net.")}
    # softmax does not see what is added to every key, nor norms what is added to a channel alone
    free = ("key.bias",)
    assert all(g.any() for n, g in trained.items() if not n.endswith(free))


def test_recomputing_interactions_changes_nothing_but_memory():
    gradients = []
    for recompute in (False, True):
        student = open_gates(adapted({"grad_checkpointing": recompute})).train()
        torch.manual_seed(1)
        total_of(student, torch.randn(2, 3, 56, 56)).backward()
        gradients.append([p.grad for p in student.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_sentinel_never_trains():
    student = adapted({"drop_path": 0.5}).train()
    assert student.training and not any(module.training for module in student.net.modules())
    images = torch.randn(2, 3, 42, 42)
    assert not torch.equal(student(images).maps[0], student(images).maps[0])
    assert torch.equal(student.eval()(images).maps[0], student(images).maps[0])


@pytest.mark.parametrize(
    ("adapter", "changes", "words"),
    [
        ({}, {"name": "resnet10t", "kwargs": {}}, "student.name = resnet10t: .* plain ViT"),
        (
            {},
            {"name": "vit_tiny_patch16_224", "kwargs": VIT | WITHOUT_CLASS},
            "student.name = vit_tiny_patch16_224: .* class token",
        ),
        ({"blocks": 3}, {}, "kpu.adapter.blocks = 3 .* 4 blocks .* use 1, 2, 4"),
        ({"heads": 3}, {}, "kpu.adapter.heads = 3 .* 16"),
        ({"width": 24}, {}, "kpu.adapter.width = 24 .* 32 groups"),
        ({}, {"kwargs": VIT | {"embed_dim": 48}}, "the width of .* = 48 .* kpu.adapter.norm"),
        ({}, {"image_size": 60}, "student.image_size = 60"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, changes, words):
    changes = {"image_size": 64} | changes if "name" in changes else changes
    with pytest.raises(UserError, match=words):
        adapted(adapter, **changes)
