"""Attention from tokens on some grids to tokens on others: deformable (Zhu et al. 2021), or plain.

A deformable query looks at a few points around its own place on every map of the source. Between
cells a map is read bilinearly, in one of two forms that agree: `grid_sample` in training and four
gathers in exported graphs, since TensorRT computes GridSample wrongly in such graphs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns of a map."""


def sample(values: Tensor, positions: Tensor) -> Tensor:
    """Read maps [N, C, h, w] bilinearly at `positions` [N, Q, P, 2]: x and y, from 0 at the left or
    upper edge to 1 at the other one. Outside there are zeros. Returns [N, C, Q, P].
    """
    if values.is_meta:  # where grid_sample takes a thousand small operations
        return _Unread.apply(values, positions)
    return F.grid_sample(values, 2 * positions - 1, padding_mode="zeros", align_corners=False)


class _Unread(torch.autograd.Function):
    """`sample` for shapes and memory alone: keeps what `grid_sample` keeps, and reads nothing."""

    @staticmethod
    def forward(ctx, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(values, positions)
        return values.new_empty(*values.shape[:2], *positions.shape[1:3])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(tensor.new_empty(tensor.shape) for tensor in ctx.saved_tensors)


def sample_rows(
    table: Tensor, first: Tensor, grid: Grid, positions: Tensor, weights: Tensor
) -> Tensor:
    """The sum over points of what `sample` reads times `weights` [N, Q, P], without `grid_sample`.

    `table` [R, C] has a row for every cell; those of map n, of size `grid`, begin at row
    `first[n]`. Returns [N, Q, C].
    """
    # an index of rows is small, where one of numbers repeats itself for every channel
    rows, columns = grid
    x = positions[..., 0:1] * columns - 0.5
    y = positions[..., 1:2] * rows - 0.5
    # the four cells around a point: upper left, upper right, lower left, lower right
    at_x = x.floor() + x.new_tensor((0, 1, 0, 1))
    at_y = y.floor() + y.new_tensor((0, 0, 1, 1))
    share = (1 - (x - at_x).abs()) * (1 - (y - at_y).abs())
    inside = (at_x >= 0) & (at_x <= columns - 1) & (at_y >= 0) & (at_y <= rows - 1)
    share = share * inside.to(share.dtype) * weights.unsqueeze(-1)
    cell = at_y.clamp(0, rows - 1).long() * columns + at_x.clamp(0, columns - 1).long()
    seen = F.embedding(cell.flatten(2) + first[:, None, None], table)
    return (share.flatten(2).unsqueeze(-2) @ seen).squeeze(-2)


def gather_maps(
    values: Tensor, grids: Sequence[Grid], places: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """What every query reads of `values` [B, S, heads, c], the cells of all maps one after another,
    by gathers alone; [B * heads, Q, c].

    Of every map, `places` [B * heads, Q, P, 2] as `sample` has them, and `shares` [B * heads, Q, P]
    that what is read there has in the sum.
    """
    table = values.transpose(1, 2).flatten(0, 2)
    first = torch.arange(places[0].shape[0], device=values.device) * values.shape[1]
    read = None
    for grid, place, share in zip(grids, places, shares, strict=True):
        seen = sample_rows(table, first, grid, place, share)
        read = seen if read is None else read + seen
        first = first + grid[0] * grid[1]
    return read


def _sample_maps(
    values: Tensor, grids: Sequence[Grid], places: Sequence[Tensor], shares: Sequence[Tensor]
) -> Tensor:
    """`gather_maps` as training has it."""
    read = None
    parts = split_maps(values.permute(0, 2, 3, 1), grids, dim=-1)
    for grid, part, place, share in zip(grids, parts, places, shares, strict=True):
        seen = sample(part.unflatten(-1, grid).flatten(0, 1), place)
        seen = (seen * share.unsqueeze(1)).sum(-1)
        read = seen if read is None else read + seen
    return read.transpose(1, 2)


def split_maps(tokens: Tensor, grids: Sequence[Grid], dim: int) -> list[Tensor]:
    """The tokens of each map, where those of all `grids` follow one another along `dim`."""
    # slices, since ONNX has no sequences of bf16, which `split` would become
    parts, start = [], 0
    for rows, columns in grids:
        parts.append(tokens.narrow(dim, start, rows * columns))
        start = start + rows * columns
    return parts


def cell_centres(grid: Grid, like: Tensor) -> Tensor:
    """Centres (x, y) of a grid's cells in [0, 1], [h * w, 2], of the type and device of `like`."""
    y, x = (
        (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side for side in grid
    )
    return torch.stack((x.expand(grid[0], -1), y.unsqueeze(1).expand(-1, grid[1])), -1).flatten(
        0, 1
    )


class DeformableAttention(nn.Module):
    """Queries that read `points` places on each of `levels` maps, for every one of `heads`.

    Values have `value_ratio` x `width` channels. Places and what is read there are float32 even
    where the linear layers compute in half precision: half a thousandth of a side is too coarse.
    """

    def __init__(
        self, width: int, levels: int, heads: int, points: int, value_ratio: float
    ) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        inner = round(width * value_ratio)
        self.value = nn.Linear(width, inner)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.out = nn.Linear(inner, width)

    def initialize(self) -> None:
        """Point k of a head starts k + 1 cells away, in the head's own direction; all points of all
        maps weigh the same.
        """
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        away = torch.arange(1, self.points + 1, dtype=torch.float32)
        ring = directions[:, None, None] * away[None, None, :, None]
        with torch.no_grad():
            self.offsets.bias.copy_(ring.expand(-1, self.levels, -1, -1).flatten())
        _xavier(self.value, self.out)

    def forward(
        self,
        queries: Tensor,
        source: Tensor,
        query_grids: Sequence[Grid],
        source_grids: Sequence[Grid],
    ) -> Tensor:
        """Attend from `queries` [B, Q, d] to `source` [B, S, d], both the tokens of maps one after
        another; returns [B, Q, d].
        """
        values = self.value(source)
        exact = torch.promote_types(values.dtype, torch.float32)
        values = values.to(exact).unflatten(-1, (self.heads, -1))
        offsets, weights = self.offsets(queries).to(exact), self.weights(queries).to(exact)
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        weights = weights.unflatten(-1, (self.heads, self.levels * self.points)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        centres = torch.cat([cell_centres(grid, offsets) for grid in query_grids])[:, None, None]
        places = []
        for level, grid in enumerate(source_grids):
            # of cells, hence relative to the map's own size
            x = offsets[..., level, :, 0] / grid[1]
            y = offsets[..., level, :, 1] / grid[0]
            places.append((centres + torch.stack((x, y), -1)).transpose(1, 2).flatten(0, 1))
        # a head's weights [B * heads, Q, points] of every level
        shares = list(weights.transpose(1, 2).flatten(0, 1).unbind(-2))
        read = gather_maps if torch.compiler.is_exporting() else _sample_maps
        seen = read(values, source_grids, places, shares)
        seen = seen.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return self.out(seen.to(queries.dtype))


class PlainAttention(nn.Module):
    """Cross-attention of every query to every token of the source, for small pictures: its cost
    grows with the product of both numbers.
    """

    def __init__(self, width: int, heads: int, value_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        inner = round(width * value_ratio)
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)

    def initialize(self) -> None:
        """Xavier's weights and no biases, as the values of deformable attention have."""
        _xavier(self.query, self.key, self.value, self.out)

    def forward(
        self,
        queries: Tensor,
        source: Tensor,
        query_grids: Sequence[Grid],
        source_grids: Sequence[Grid],
    ) -> Tensor:
        """`DeformableAttention.forward`; the grids do not matter."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.query, queries), (self.key, source), (self.value, source))
        )
        read = F.scaled_dot_product_attention(query, key, value)
        return self.out(read.transpose(1, 2).flatten(2))


def _xavier(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
