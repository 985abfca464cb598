"""Scores at every patch become maps of the picture's size. Used by clients and, copied, by the
server; numpy only.
"""

from itertools import product

import numpy as np

BAND = 32
"""Rows of pixels whose scores are held at a time."""


def grid_of(
    positions: int, height: int, width: int, stride: float | None = None
) -> tuple[int, int]:
    """Rows and columns of `positions` cells over a picture of height x width; ValueError if they
    are none.

    `stride` is a cell's side in pixels, of which the picture need not be a multiple: DPT's depth
    over patches of 14 has cells of 4. Without it the cells tile the picture squarely, or are those
    of a pyramid of strides 4 to 32, whose sides round up.
    """
    if stride:
        rows, columns = int(height / stride + 0.5), int(width / stride + 0.5)
        if rows * columns != positions:
            raise ValueError(
                f"{positions} positions do not form a grid of cells of {stride:g} px over a "
                f"picture of {height}x{width}"
            )
        return rows, columns
    rows = round((positions * height / width) ** 0.5)
    if rows >= 1 and positions % rows == 0 and height * (positions // rows) == width * rows:
        return rows, positions // rows
    for cell in (4, 8, 16, 32):
        rows, columns = -(-height // cell), -(-width // cell)
        if rows * columns == positions:
            return rows, columns
    raise ValueError(
        f"{positions} positions do not form a grid of square cells over a picture of "
        f"{height}x{width}"
    )


def interpolation(size: int, cells: int) -> np.ndarray:
    """Matrix [size, cells] of bilinear interpolation between cells' centres (torch's
    align_corners=False).
    """
    centre = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
    left = np.minimum(centre.astype(int), cells - 1)
    right = np.minimum(left + 1, cells - 1)
    weight = (centre - left).astype(np.float32)
    matrix = np.zeros((size, cells), np.float32)
    np.add.at(matrix, (np.arange(size), left), 1 - weight)
    np.add.at(matrix, (np.arange(size), right), weight)
    return matrix


def upsample(
    values: np.ndarray, height: int, width: int, stride: float | None = None
) -> np.ndarray:
    """Bilinear [B, positions, C] -> float32 [B, height, width, C]."""
    batch, positions, channels = values.shape
    rows, columns = grid_of(positions, height, width, stride)
    cells = values.reshape(batch, rows, columns, channels)
    tall = np.einsum("hr,brcd->bhcd", interpolation(height, rows), cells, optimize=True)
    return np.einsum("wc,bhcd->bhwd", interpolation(width, columns), tall, optimize=True)


def class_map(
    logits: np.ndarray, height: int, width: int, stride: float | None = None
) -> np.ndarray:
    """Most likely class of every pixel: float32 [B, positions, C] -> int32 [B, height, width].

    Scores of all pixels and classes together would take 160 MB for one picture of 518 px and 150
    classes, so that they are made a band of rows at a time.
    """
    batch, positions, channels = logits.shape
    rows, columns = grid_of(positions, height, width, stride)
    cells = logits.reshape(batch, rows, columns, channels)
    down, across = interpolation(height, rows), interpolation(width, columns)
    result = np.empty((batch, height, width), np.int32)
    for picture, start in product(range(batch), range(0, height, BAND)):
        tall = np.einsum("hr,rcd->hcd", down[start : start + BAND], cells[picture], optimize=True)
        result[picture, start : start + BAND] = np.einsum(
            "wc,hcd->hwd", across, tall, optimize=True
        ).argmax(-1)
    return result


def depth_map(
    depth: np.ndarray, height: int, width: int, stride: float | None = None
) -> np.ndarray:
    """Metres at every pixel: float32 [B, positions] -> float32 [B, height, width]."""
    return upsample(depth[..., None], height, width, stride)[..., 0]
