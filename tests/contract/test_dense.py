"""Scores of cells become maps of pixels as torch's bilinear interpolation makes them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contract.dense import class_map, depth_map, grid_of, upsample


@pytest.mark.parametrize(
    ("grid", "size", "stride"),
    [((7, 7), (112, 112), 16), ((3, 5), (48, 80), None), ((11, 18), (42, 70), 4)],
)
def test_maps_are_those_of_torch(grid, size, stride):
    values = np.random.default_rng(0).standard_normal((2, grid[0] * grid[1], 5)).astype(np.float32)
    cells = torch.from_numpy(values).reshape(2, *grid, 5).permute(0, 3, 1, 2)
    wanted = (
        F.interpolate(cells, size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    )
    np.testing.assert_allclose(upsample(values, *size, stride), wanted, atol=1e-5)
    np.testing.assert_allclose(depth_map(values[..., 0], *size, stride), wanted[..., 0], atol=1e-5)
    assert (class_map(values, *size, stride) == wanted.argmax(-1)).mean() > 0.9999


def test_positions_that_are_no_grid_are_refused():
    assert grid_of(588, 448, 336) == (28, 21)
    assert grid_of(9 * 13, 70, 98) == (9, 13) and grid_of(3 * 4, 70, 98) == (3, 4)
    with pytest.raises(
        ValueError,
        match="50 positions do not form a grid of square cells over a picture of 112x112",
    ):
        grid_of(50, 112, 112)
    with pytest.raises(
        ValueError,
        match="49 positions do not form a grid of cells of 14 px over a picture of 112x112",
    ):
        grid_of(49, 112, 112, 14)
