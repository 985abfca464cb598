"""UMT's cross-space and intra-space modules (paper 3.3, A.2).

All of them map `[B, N, M, c]` to the same shape: B images, N positions (a CNN's h*w; a ViT's class
token and h*w patches), M spaces, c = space_dim + d_m channels, the feature part first and the model
token's part after it. A cross-space module mixes the M spaces; an intra-space module is one set of
weights applied to each space alone.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Grid = tuple[int, int]


def interleave_groups(x: Tensor, groups: int) -> Tensor:
    """View [..., C] as [..., groups, C/groups] where group g holds channels g, g+groups,
    g+2*groups, ….

    A channel shuffle. Channels come space by space, each as (features | token); taken with a
    stride, every group gets a share of every section. Taken contiguously instead, as the paper's
    text has it, nearly every group lies inside one section, and a grouped 1x1 convolution then
    mixes neither spaces nor token and features.
    """
    return x.unflatten(-1, (-1, groups)).transpose(-1, -2)


def undo_interleave(x: Tensor) -> Tensor:
    """Inverse of `interleave_groups`: [..., groups, C/groups] back to [..., C]."""
    return x.transpose(-1, -2).flatten(-2)


class GroupedLinear(nn.Module):
    """A linear map that is block-diagonal over groups: the 1x1 group convolution of A.2, channels
    last.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(groups, out_channels // groups, in_channels // groups)
        )
        self.bias = nn.Parameter(torch.zeros(groups, out_channels // groups))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., groups, in/groups] to [..., groups, out/groups]."""
        # One batched matrix product over groups; cuDNN's grouped convolutions are slower at such
        # group sizes. Not as an einsum: ONNX has none in bf16.
        rows = x.movedim(-2, 0)  # [groups, ..., in/groups]
        y = torch.bmm(rows.flatten(1, -2), self.weight.transpose(1, 2))
        return y.unflatten(1, rows.shape[1:-1]).movedim(0, -2) + self.bias


class ConvInteraction(nn.Module):
    """The module of CNN students (A.2): x + Conv1x1_G(GELU(DWConv3x3(LayerNorm(x)))) on [B, N,
    C].
    """

    def __init__(self, channels: int, groups: int, interleave: bool) -> None:
        super().__init__()
        self.groups, self.interleave = groups, interleave
        self.norm = LayerNorm(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = GroupedLinear(channels, channels, groups)
        nn.init.trunc_normal_(self.depthwise.weight, std=0.02)
        nn.init.zeros_(self.depthwise.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Mix the channels of [B, h*w, C] on the map `grid` = (h, w)."""
        # Channels stay last in memory; the permuted view is what PyTorch calls channels_last.
        y = self.norm(x).unflatten(1, grid).permute(0, 3, 1, 2)
        y = F.gelu(self.depthwise(y)).permute(0, 2, 3, 1).flatten(1, 2)
        if self.interleave:
            y = undo_interleave(self.pointwise(interleave_groups(y, self.groups)))
        else:
            y = self.pointwise(y.unflatten(-1, (self.groups, -1))).flatten(-2)
        return x + y


class AttentionInteraction(nn.Module):
    """The module of ViT students (A.2): a norm-attention-norm-ffn block on [B, N, C]."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.block = Block(
            channels, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=LayerNorm
        )
        for module in self.modules():  # as timm's ViTs, which a block alone does not do
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attend among the N positions; `grid` is not needed."""
        return self.block(x)


class GroupedAttentionInteraction(nn.Module):
    """The same block with every linear map block-diagonal over interleaved groups: cost linear in
    M, not quadratic.
    """

    def __init__(self, channels: int, groups: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = groups * int(channels // groups * mlp_ratio)
        self.groups, self.heads = groups, heads
        self.norm1, self.norm2 = LayerNorm(channels), LayerNorm(channels)
        self.qkv = nn.ModuleList(GroupedLinear(channels, channels, groups) for _ in range(3))
        self.proj = GroupedLinear(channels, channels, groups)
        self.fc1 = GroupedLinear(channels, hidden, groups)
        self.fc2 = GroupedLinear(hidden, channels, groups)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attend among the N positions of [B, N, C]; heads lie inside groups; `grid` is not
        needed.
        """
        y = interleave_groups(self.norm1(x), self.groups)
        # [B, N, groups, C/groups] -> [B, heads, N, head width]
        q, k, v = (
            linear(y).flatten(-2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in self.qkv
        )
        y = (
            F.scaled_dot_product_attention(q, k, v)
            .transpose(1, 2)
            .flatten(-2)
            .unflatten(-1, (self.groups, -1))
        )
        x = x + undo_interleave(self.proj(y))
        y = interleave_groups(self.norm2(x), self.groups)
        return x + undo_interleave(self.fc2(F.gelu(self.fc1(y))))


class CrossSpace(nn.Module):
    """psi_C (Eq 2-3): lets the M spaces see one another. `fold` says what a sequence of the block
    is.

    channel: N positions of M*c channels, the paper's. token: N*M positions of c channels, one
    shared block. axial: at each position a sequence of its M spaces.
    """

    def __init__(self, block: nn.Module, fold: Literal["channel", "token", "axial"]) -> None:
        super().__init__()
        self.block, self.fold = block, fold

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map [B, N, M, c] to the same shape."""
        if self.fold == "channel":
            return self.block(x.flatten(2), grid).reshape(x.shape)
        if self.fold == "token":
            return self.block(x.flatten(1, 2), grid).reshape(x.shape)
        return self.block(x.flatten(0, 1), grid).reshape(x.shape)


class IntraSpace(nn.Module):
    """phi_I (3.3): one block shared by all spaces, which are folded into the batch: one call, not
    M.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map [B, N, M, c] to the same shape."""
        # by sizes that an exported graph takes from its input: what a head and a task on its output
        # have in common is found equal and kept once
        batch, positions, spaces, channels = x.shape
        y = x.transpose(1, 2).reshape(batch * spaces, positions, channels)
        y = self.block(y, grid).reshape(batch, spaces, positions, channels)
        return y.transpose(1, 2)


def default_heads(channels: int) -> int:
    """Heads of 64 channels where 64 divides, else the divisor of `channels` nearest to that
    many.
    """
    wanted = max(1, round(channels / 64))
    return min(
        (h for h in range(1, channels + 1) if channels % h == 0), key=lambda h: (abs(h - wanted), h)
    )


def gcd_groups(channels: int) -> int:
    """The largest number of groups, at most 64, that the paper's grouped convolution can use for
    any M.
    """
    return math.gcd(64, channels)
