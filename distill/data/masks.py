"""What self-supervision needs beside the pixels of a crop: which patches are hidden from the
student (iBOT), and which cells of its grid are compared with other views (UDI).

Both are drawn from the sample's own generator, as crops are.
"""

import math
from typing import NamedTuple

import numpy as np


class BlockMask(NamedTuple):
    """Random blocks of hidden patches (BEiT's, with the ratio of iBOT, Zhou et al. 2022, 3.1)."""

    grid: int
    """Patches a side of the crop."""
    ratios: tuple[float, ...] = (0.0, 0.3)
    """Shares of hidden patches, of which a crop draws one."""
    spreads: tuple[float, ...] = (0.0, 0.2)
    """What is added to each ratio: uniform in +- spread."""
    aspect: float = 0.3
    """Narrowest ratio of a block's sides; log-uniform from there to its inverse."""

    TRIES = 10

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A mask bool [grid, grid], True where hidden; at most the drawn share is."""
        number = int(rng.integers(len(self.ratios)))
        ratio = self.ratios[number] + self.spreads[number] * (2 * rng.random() - 1)
        mask = np.zeros((self.grid, self.grid), dtype=bool)
        wanted = ratio * mask.size
        while (left := wanted - mask.sum()) > 0:
            block = self._block(rng, mask, left)
            if block is None:
                break
            mask[block] = True
        return mask

    def _block(
        self, rng: np.random.Generator, mask: np.ndarray, most: float
    ) -> tuple[slice, slice] | None:
        """A block that hides at least one more patch and at most `most`; None after `TRIES`."""
        least = (self.grid // 3) ** 2
        for _ in range(self.TRIES):
            area = least + (most - least) * rng.random()
            aspect = math.exp(math.log(self.aspect) * (2 * rng.random() - 1))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < self.grid and 0 < width < self.grid):
                continue
            top, left = (int(rng.integers(self.grid - side + 1)) for side in (height, width))
            block = slice(top, top + height), slice(left, left + width)
            if 0 < height * width - mask[block].sum() <= most:
                return block
        return None


class WindowCells(NamedTuple):
    """One random cell of every window of `window` x `window` cells (UDI's stratified sampling, Su &
    Ji 2024); where windows do not fill the grid they stand in a random corner.
    """

    grid: int
    window: int

    @property
    def cells(self) -> int:
        """Cells drawn."""
        return (self.grid // self.window) ** 2

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Row-major numbers int64 [cells] of cells in the grid."""
        windows = self.grid // self.window
        rest = self.grid - windows * self.window
        corner = rest * rng.integers(2, size=2)
        inside = rng.integers(self.window, size=(2, windows, windows))
        starts = np.arange(windows) * self.window
        rows = corner[0] + starts[:, None] + inside[0]
        columns = corner[1] + starts[None, :] + inside[1]
        return (rows * self.grid + columns).reshape(-1).astype(np.int64)
