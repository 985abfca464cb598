"""Each interaction module against a direct, loop-written reference of the paper's equations, and
who sees whom.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from distill.methods.interaction import (
    AttentionInteraction,
    ConvInteraction,
    CrossSpace,
    GroupedAttentionInteraction,
    IntraSpace,
    default_heads,
    interleave_groups,
    undo_interleave,
)

B, M, C = 2, 3, 8
GRID = (3, 2)
N = GRID[0] * GRID[1]


def spaces(positions: int = N) -> torch.Tensor:
    return torch.randn(B, positions, M, C)


def perturb(module: torch.nn.Module) -> torch.nn.Module:
    """Random biases and norm weights, so that a dropped one shows."""
    torch.manual_seed(7)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def layer_norm(vector: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def reference_conv(
    x: torch.Tensor, module: ConvInteraction, grid: tuple[int, int], interleave: bool
) -> torch.Tensor:
    """x + Conv1x1_G(GELU(DWConv3x3(LN(x)))), one position, one channel, one tap at a time (A.2)."""
    height, width = grid
    channels, groups = x.shape[1], module.groups
    size = channels // groups
    normed = torch.stack([layer_norm(position, module.norm) for position in x])
    mixed = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                total = module.depthwise.bias[channel].clone()
                for down in (-1, 0, 1):
                    for right in (-1, 0, 1):
                        if 0 <= row + down < height and 0 <= column + right < width:
                            tap = module.depthwise.weight[channel, 0, down + 1, right + 1]
                            total = (
                                total + tap * normed[(row + down) * width + column + right, channel]
                            )
                mixed[row * width + column, channel] = F.gelu(total)
    out = x.clone()
    for position in range(x.shape[0]):
        for group in range(groups):
            members = [group + groups * i if interleave else group * size + i for i in range(size)]
            for target in range(size):
                value = module.pointwise.bias[group, target].clone()
                for source in range(size):
                    value = (
                        value
                        + module.pointwise.weight[group, target, source]
                        * mixed[position, members[source]]
                    )
                out[position, members[target]] = out[position, members[target]] + value
    return out


def reference_attention(x: torch.Tensor, qkv, heads: int) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v, one head and one query at a time; `qkv` gives the three [N, C]
    matrices of x.
    """
    q, k, v = qkv(x)
    width = q.shape[1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for query in range(x.shape[0]):
            scores = torch.stack(
                [q[query, part] @ k[key, part] / math.sqrt(width) for key in range(x.shape[0])]
            )
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            for key in range(x.shape[0]):
                out[query, part] = out[query, part] + weights[key] * v[key, part]
    return out


def reference_block(x: torch.Tensor, module: AttentionInteraction, heads: int) -> torch.Tensor:
    """norm-attention-norm-ffn with residuals on one sequence [N, C] (A.2)."""
    block, channels = module.block, x.shape[1]

    def qkv(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joint = torch.stack([block.attn.qkv.weight @ row + block.attn.qkv.bias for row in y])
        return joint[:, :channels], joint[:, channels : 2 * channels], joint[:, 2 * channels :]

    normed = torch.stack([layer_norm(row, block.norm1) for row in x])
    attended = reference_attention(normed, qkv, heads)
    x = x + torch.stack([block.attn.proj.weight @ row + block.attn.proj.bias for row in attended])
    out = []
    for row in x:
        hidden = F.gelu(block.mlp.fc1.weight @ layer_norm(row, block.norm2) + block.mlp.fc1.bias)
        out.append(row + block.mlp.fc2.weight @ hidden + block.mlp.fc2.bias)
    return torch.stack(out)


@pytest.mark.parametrize("interleave", [True, False])
def test_cnn_cross_space_module_is_the_equation_of_a2(interleave):
    module = perturb(ConvInteraction(M * C, groups=4, interleave=interleave))
    x = spaces().double()
    fast = CrossSpace(module, "channel")(x, GRID)
    for image in range(B):
        slow = reference_conv(x[image].flatten(1), module, GRID, interleave)
        torch.testing.assert_close(fast[image].flatten(1), slow)


@pytest.mark.parametrize("interleave", [True, False])
def test_cnn_intra_space_module_runs_the_same_weights_on_each_space_alone(interleave):
    module = perturb(ConvInteraction(C, groups=2, interleave=interleave))
    x = spaces().double()
    fast = IntraSpace(module)(x, GRID)
    for image in range(B):
        for space in range(M):
            slow = reference_conv(x[image, :, space], module, GRID, interleave)
            torch.testing.assert_close(fast[image, :, space], slow)


def test_vit_cross_space_module_attends_over_positions_at_the_joint_width():
    module = perturb(AttentionInteraction(M * C, heads=M * 2, mlp_ratio=1.5))
    x = spaces(1 + N).double()
    fast = CrossSpace(module, "channel")(x, GRID)
    for image in range(B):
        torch.testing.assert_close(
            fast[image].flatten(1), reference_block(x[image].flatten(1), module, M * 2)
        )


def test_vit_intra_space_module_runs_the_same_weights_on_each_space_alone():
    module = perturb(AttentionInteraction(C, heads=2, mlp_ratio=2.0))
    x = spaces(1 + N).double()
    fast = IntraSpace(module)(x, GRID)
    for image in range(B):
        for space in range(M):
            torch.testing.assert_close(
                fast[image, :, space], reference_block(x[image, :, space], module, 2)
            )


def test_token_mode_attends_over_the_concatenated_sequences_of_all_spaces():
    module = perturb(AttentionInteraction(C, heads=2, mlp_ratio=1.0))
    x = spaces(1 + N).double()
    fast = CrossSpace(module, "token")(x, GRID)
    for image in range(B):
        sequence = torch.stack([x[image, n, m] for n in range(1 + N) for m in range(M)])
        slow = reference_block(sequence, module, 2)
        torch.testing.assert_close(fast[image].flatten(0, 1), slow)


def test_axial_mode_attends_over_the_spaces_at_each_position():
    module = perturb(AttentionInteraction(C, heads=2, mlp_ratio=1.0))
    x = spaces(1 + N).double()
    fast = CrossSpace(module, "axial")(x, GRID)
    for image in range(B):
        for position in range(1 + N):
            torch.testing.assert_close(
                fast[image, position], reference_block(x[image, position], module, 2)
            )


def test_grouped_mode_is_the_attention_block_with_block_diagonal_linear_maps():
    heads, channels = M * 2, M * C
    module = perturb(GroupedAttentionInteraction(channels, groups=M, heads=heads, mlp_ratio=1.5))
    x = spaces(1 + N).double()
    fast = CrossSpace(module, "channel")(x, GRID)
    size = channels // M
    order = [
        group + M * i for group in range(M) for i in range(size)
    ]  # interleaved position -> channel

    def linear(vector: torch.Tensor, layer) -> torch.Tensor:
        width = layer.weight.shape[2]
        parts = [
            layer.weight[g] @ vector[g * width : (g + 1) * width] + layer.bias[g] for g in range(M)
        ]
        return torch.cat(parts)

    def back(vector: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(vector)
        for position, channel in enumerate(order):
            out[channel] = vector[position]
        return out

    for image in range(B):
        rows = x[image].flatten(1)
        shuffled = torch.stack([layer_norm(row, module.norm1)[order] for row in rows])
        attended = reference_attention(
            shuffled,
            lambda y: tuple(torch.stack([linear(row, part) for row in y]) for part in module.qkv),
            heads,
        )
        rows = torch.stack(
            [row + back(linear(a, module.proj)) for row, a in zip(rows, attended, strict=True)]
        )
        slow = [
            row
            + back(
                linear(F.gelu(linear(layer_norm(row, module.norm2)[order], module.fc1)), module.fc2)
            )
            for row in rows
        ]
        torch.testing.assert_close(fast[image].flatten(1), torch.stack(slow))


def test_interleaving_is_undone_exactly_and_gives_every_group_a_share_of_every_section():
    x = torch.arange(24.0).expand(2, 24)
    grouped = interleave_groups(x, 4)
    assert grouped.shape == (2, 4, 6)
    assert torch.equal(undo_interleave(grouped), x)
    sections = (grouped[0] // 8).long()  # three spaces of eight channels
    assert all(set(group.tolist()) == {0, 1, 2} for group in sections)


def influence(module, x: torch.Tensor, space: int) -> list[float]:
    """How much each space's input moves the output of `space`, through everything but LayerNorm's
    statistics.

    LayerNorm couples all channels through its mean and variance whatever the order; with it
    replaced by the identity what is left is the mixing that the channel order decides.
    """
    x = x.clone().requires_grad_()
    module(x, GRID)[:, :, space].square().sum().backward()
    return [x.grad[:, :, other].abs().sum().item() for other in range(M)]


def without_norms(module: torch.nn.Module) -> torch.nn.Module:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.LayerNorm):
            setattr(module, name, torch.nn.Identity())
        else:
            without_norms(child)
    return module


def cross_modules() -> dict[str, torch.nn.Module]:
    return {
        "cnn": CrossSpace(ConvInteraction(M * C, 4, True), "channel"),
        "channel": CrossSpace(AttentionInteraction(M * C, M * 2, 1.0), "channel"),
        "token": CrossSpace(AttentionInteraction(C, 2, 1.0), "token"),
        "axial": CrossSpace(AttentionInteraction(C, 2, 1.0), "axial"),
        "grouped": CrossSpace(GroupedAttentionInteraction(M * C, M, M * 2, 1.0), "channel"),
    }


@pytest.mark.parametrize("kind", ["cnn", "channel", "token", "axial", "grouped"])
def test_every_cross_space_module_lets_each_space_see_each_other(kind):
    module = perturb(without_norms(cross_modules()[kind]))
    x = spaces().double()
    for space in range(M):
        assert min(influence(module, x, space)) > 1e-9


def test_the_papers_literal_channel_order_leaves_spaces_apart_in_the_grouped_convolution():
    # M * C = 24 channels in 3 groups: contiguous groups coincide with the spaces
    module = perturb(
        without_norms(CrossSpace(ConvInteraction(M * C, M, interleave=False), "channel"))
    )
    moved = influence(module, spaces().double(), 0)
    assert moved[0] > 0 and moved[1] == 0 and moved[2] == 0


@pytest.mark.parametrize("block", [ConvInteraction(C, 2, True), AttentionInteraction(C, 2, 1.0)])
def test_intra_space_modules_never_mix_spaces(block):
    moved = influence(perturb(IntraSpace(block)), spaces().double(), 1)
    assert moved[1] > 0 and moved[0] == 0 and moved[2] == 0


@pytest.mark.parametrize(("channels", "heads"), [(832, 13), (768, 12), (256, 4), (48, 1), (100, 2)])
def test_default_heads_divide_the_width_and_come_near_64_channels(channels, heads):
    assert default_heads(channels) == heads


@pytest.mark.parametrize(
    "block",
    [
        AttentionInteraction(192, 3, 1.0),
        GroupedAttentionInteraction(192, 3, 3, 1.0),
        ConvInteraction(192, 3, True),
    ],
    ids=lambda block: type(block).__name__,
)
def test_every_block_starts_from_weights_of_deviation_002_without_biases(block):
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim > 1:
            assert abs(float(parameter.detach().std()) / 0.02 - 1) < 0.1, name
            assert float(parameter.detach().abs().max()) < 0.2, name
