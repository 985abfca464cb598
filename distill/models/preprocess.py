"""From the shared uint8 crop to what one network expects: its size, its mean and standard
deviation.

Runs on the device, so a batch crosses to it once, as bytes, however many networks look at it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Preprocess(nn.Module):
    """Resize to `size` pixels, scale to [0, 1], subtract `mean`, divide by `std`."""

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = size
        # Not persistent: these come from the recipe or the teacher's data config, never from a
        # checkpoint.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, size: int | None = None) -> Tensor:
        """Turn uint8 images [B, 3, H, W] into normalised float32 ones [B, 3, size, size]; `size` is
        `self.size` if none is given.
        """
        size = size or self.size
        pixels = images.float().div(255)
        if pixels.shape[-2:] != (size, size):
            # The clamp undoes nothing: antialiased bilinear weights are convex, so values stay in
            # [0, 1].
            pixels = F.interpolate(
                pixels,
                size=(size, size),
                mode="bilinear",
                align_corners=False,
                antialias=True,
            )
        return self.normalize(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalise float RGB [B, 3, H, W] in [0, 1] of any size, without resizing."""
        return (pixels - self.mean) / self.std
