"""UMT's interaction as it serves: what does not depend on the picture is computed once, and every
head carries the last block of its own space.

In front of the first cross-space block a position is x = (R f + r, t): the re-projected features
of the student and the model token, the same t everywhere. The block reads it through a LayerNorm
and a linear map, W (g * (x - mean(x)) / s + b) + c, and taking the mean away is linear too. So the
map is (A f + a) / s + d with constant A, a and d, and s, the deviation of x, is all that is left of
the norm. With all M spaces in one position A is as wide as the student, where W is M times as wide.

What cannot be folded: t / s differs between positions, so that the token's part of a key does not
cancel in the softmax (that of b and c in the keys does); behind the first block the token's part
has read the picture; and a CNN's block begins with a depthwise convolution, which needs the norm's
output. Its interaction serves as it is.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.features import Features
from distill.methods.deployment import ShippedHead
from distill.methods.interaction import (
    ConvInteraction,
    CrossSpace,
    Grid,
    GroupedAttentionInteraction,
    interleave_groups,
    undo_interleave,
)
from distill.methods.losses import Prediction

if TYPE_CHECKING:
    from distill.methods.umt import SpaceHead, SpaceInteraction


class FoldedProjection(nn.Module):
    """(A f + a) / s + d: queries, keys and values of a first block from the student's features.

    `project` maps [n, C], behind the norm, to [n, K]; `source` and `offset` are R and (r, t), so
    that x = f R' + offset.
    """

    def __init__(
        self,
        project: Callable[[Tensor], Tensor],
        norm: nn.LayerNorm,
        source: Tensor,
        offset: Tensor,
    ) -> None:
        super().__init__()
        width = norm.normalized_shape[0]
        kind = norm.weight.dtype
        bias = project(torch.zeros(1, width, dtype=kind))
        weight = (project(torch.eye(width, dtype=kind)) - bias).T.double()  # [K, C]
        scaled = weight * norm.weight.double()
        centred = scaled - scaled.mean(dim=1, keepdim=True)
        self.linear = nn.Linear(source.shape[1], weight.shape[0])
        self.linear.weight = nn.Parameter((centred @ source.double()).to(kind))
        self.linear.bias = nn.Parameter((centred @ offset.double()).to(kind))
        self.shift = nn.Parameter((weight @ norm.bias.double() + bias[0].double()).to(kind))
        self.eps = norm.eps

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        """[..., K] of features [..., d] and the x [..., C] that they make."""
        # as layer norms do in half precision; of operators that ONNX has, so that it is traced once
        wide = x if x.dtype == torch.float64 else x.float()
        apart = wide - wide.mean(dim=-1, keepdim=True)
        variance = (apart * apart).mean(dim=-1, keepdim=True)
        rate = torch.rsqrt(variance + self.eps).to(x.dtype)
        return self.linear(features) * rate + self.shift


class FoldedBlock(nn.Module):
    """The first cross-space block, whose sequence is the N positions of M * c channels each."""

    def __init__(self, block: nn.Module, source: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.grouped = isinstance(block, GroupedAttentionInteraction)
        self.block = block if self.grouped else block.block
        self.heads = block.heads if self.grouped else self.block.attn.num_heads
        project = self._grouped if self.grouped else self.block.attn.qkv
        self.qkv = FoldedProjection(project, self.block.norm1, source, offset)

    def _grouped(self, y: Tensor) -> Tensor:
        y = interleave_groups(y.unsqueeze(0), self.block.groups)
        return torch.cat([linear(y).flatten(-2) for linear in self.block.qkv], dim=-1)[0]

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        """[B, N, C] of features [B, N, d] and the x [B, N, C] that they make."""
        block, qkv = self.block, self.qkv(features, x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        if not self.grouped:
            x = x + block.attn.proj(y)
            return x + block.mlp(block.norm2(x))
        x = x + undo_interleave(block.proj(y.unflatten(-1, (block.groups, -1))))
        y = interleave_groups(block.norm2(x), block.groups)
        return x + undo_interleave(block.fc2(F.gelu(block.fc1(y))))


class SharedInteraction(nn.Module):
    """The interaction up to its last cross-space block, whose output all heads read: features to
    [B, N, M, c].
    """

    def __init__(self, whole: "SpaceInteraction") -> None:
        super().__init__()
        self.spaces, self.space_dim, self.token_dim = (
            whole.spaces,
            whole.space_dim,
            whole.token_dim,
        )
        self.whole = whole
        first = whole.cross[0]
        # beside a single space's width the student's is no smaller, and dividing by s costs more
        # than the token's channels
        wide = isinstance(first, CrossSpace) and first.fold == "channel"
        self.first = FoldedBlock(first.block, *self._map()) if wide else None

    def counterpart(self, other: nn.Module) -> nn.Module:
        """The part of another form of the same interaction whose output this one's is."""
        return other if isinstance(other, SharedInteraction) else other.cross[-1]

    def _map(self) -> tuple[Tensor, Tensor]:
        """R [M * c, d] and (r, t) [M * c], with zeros where the token and its source would be."""
        whole, shape = self.whole, (self.spaces, self.space_dim)
        source = F.pad(whole.reproject.weight.unflatten(0, shape), (0, 0, 0, self.token_dim))
        offset = whole.reproject.bias.unflatten(0, shape)
        if self.token_dim:
            offset = torch.cat((offset, whole.model_token.expand(self.spaces, -1)), dim=-1)
        return source.flatten(0, 1), offset.flatten()

    def forward(self, features: Features) -> Tensor:
        """Re-project, attach the model token, and alternate but for the last intra-space block."""
        whole, grid = self.whole, tuple(features.patches.shape[1:3])
        positions = whole.positions(features)
        spaces = whole.separate(positions)
        for number, cross in enumerate(whole.cross):
            if number:
                spaces = whole.intra[number - 1](spaces, grid)
            if number or self.first is None:
                spaces = cross(spaces, grid)
            else:
                spaces = self.first(positions, spaces.flatten(2)).reshape(spaces.shape)
        return spaces


class OwnSpaceHead(nn.Module):
    """A teacher's head with the last intra-space block, on that teacher's space alone: a request
    for one teacher pays for one space.
    """

    def __init__(self, intra: nn.Module, head: "SpaceHead") -> None:
        super().__init__()
        self.intra, self.head = intra, head

    @property
    def normalizer(self) -> nn.Module:
        """What brings its predictions to the teacher's units."""
        return self.head.normalizer

    def forward(self, spaces: Tensor, grid: Grid) -> Prediction:
        """Map [B, N, M, c], behind the last cross-space block, to token, patches and summary."""
        number = self.head.read_out.order[self.head.label]
        space = self.intra(spaces[:, :, number : number + 1], grid)
        return self.head.of_space(space[:, :, 0], grid)


def fold(
    whole: "SpaceInteraction", heads: Mapping[str, ShippedHead]
) -> tuple[nn.Module, dict[str, ShippedHead]]:
    """An interaction and its heads as they serve; they share the weights of the originals."""
    last = whole.intra[-1]
    # a head in a graph of its own does not know the grid, which convolutions need
    if any(isinstance(part, ConvInteraction) for part in whole.modules()):
        return whole, dict(heads)
    folded = {
        label: head._replace(module=OwnSpaceHead(last, head.module))
        for label, head in heads.items()
    }
    return SharedInteraction(whole), folded
