"""Photometric augmentation of a crop: named lists of operations, each a pure function of a crop and
a random generator.

On Pillow images, as in the authors' code; the same operations on tensors take twice as long on a
CPU. Every draw comes from the sample's own generator, so that a crop depends on (seed,
picture, view, crop) alone and not on workers or on resuming.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter

_Operation = Callable[[Image.Image, np.random.Generator], Image.Image]


def photometric(crop: Image.Image, recipe: str, rng: np.random.Generator) -> Image.Image:
    """Apply the operations of `RECIPES[recipe]` to an RGB crop, in their order."""
    for operation in RECIPES[recipe]:
        crop = operation(crop, rng)
    return crop


def _jitter(probability: float, strengths: tuple[float, float, float, float]) -> _Operation:
    """Brightness, contrast, saturation (factors in 1 +- strength) and hue (+- strength, in turns),
    in random order.
    """
    brightness, contrast, saturation, hue = strengths

    def apply(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
        factors = [rng.uniform(max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
        shift = rng.uniform(-hue, hue)
        order = rng.permutation(4)
        if rng.random() >= probability:
            return crop
        changes: list[Callable[[Image.Image], Image.Image]] = [
            lambda x: TF.adjust_brightness(x, factors[0]),
            lambda x: TF.adjust_contrast(x, factors[1]),
            lambda x: TF.adjust_saturation(x, factors[2]),
            lambda x: TF.adjust_hue(x, shift),
        ]
        for number in order:
            crop = changes[number](crop)
        return crop

    return apply


def _grayscale(probability: float) -> _Operation:
    def apply(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
        return TF.to_grayscale(crop, 3) if rng.random() < probability else crop

    return apply


def _blur(probability: float, sigmas: tuple[float, float], kernel: int | None = None) -> _Operation:
    """Gaussian blur of a random deviation in pixels: Pillow's filter, or torchvision's of `kernel`
    pixels.
    """

    def apply(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
        sigma = rng.uniform(*sigmas)
        if rng.random() >= probability:
            return crop
        if kernel is None:
            return crop.filter(ImageFilter.GaussianBlur(sigma))
        # reflection at the border needs a picture wider than half the kernel
        width = min(kernel, 2 * (min(crop.size) - 1) + 1)
        return TF.gaussian_blur(crop, [width, width], [sigma, sigma])

    return apply


def _solarize(probability: float, threshold: int = 128) -> _Operation:
    def apply(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
        return TF.solarize(crop, threshold) if rng.random() < probability else crop

    return apply


def _either(first: Sequence[_Operation], second: Sequence[_Operation]) -> _Operation:
    """One of two lists of operations, at equal odds."""

    def apply(crop: Image.Image, rng: np.random.Generator) -> Image.Image:
        for operation in first if rng.random() < 0.5 else second:
            crop = operation(crop, rng)
        return crop

    return apply


_COLOUR = (_jitter(0.8, (0.4, 0.4, 0.2, 0.1)), _grayscale(0.2))
_DINO_BLUR = (0.1, 2.0)

RECIPES: dict[str, tuple[_Operation, ...]] = {
    "none": (),
    # DINO's two global crops and its local ones (Caron et al. 2021, their released configuration)
    "dino_global_1": (*_COLOUR, _blur(1.0, _DINO_BLUR)),
    "dino_global_2": (*_COLOUR, _blur(0.1, _DINO_BLUR), _solarize(0.2)),
    "dino_local": (*_COLOUR, _blur(0.5, _DINO_BLUR)),
    # UDI's crops: either of DINO's two kinds (Su & Ji 2024, their released configuration)
    "udi_global": (
        *_COLOUR,
        _either([_blur(1.0, _DINO_BLUR)], [_blur(0.1, _DINO_BLUR), _solarize(0.2)]),
    ),
    "udi_local": (
        *_COLOUR,
        _either([_blur(0.5, _DINO_BLUR)], [_blur(0.1, _DINO_BLUR), _solarize(0.2)]),
    ),
    # UNIC's one crop (Sariyildiz et al. 2024, their released configuration)
    "unic": (*_COLOUR, _blur(0.2, (0.1, 5.0), kernel=9), _solarize(0.2)),
}
"""Operations by the name a `View` gives them. To add one: a line here."""
