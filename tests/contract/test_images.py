"""Decoding of picture files: JPEGs at a reduced scale, and limits. What the server does with files
is in test_bad_input.py.
"""

import numpy as np
import pytest
from PIL import Image

from contract.images import BadImage, Limits, decode, fit, read_pixels
from distill.data.pictures import PackagedPhotos
from tests.serve.raw_requests import encode

PHOTO = PackagedPhotos().load(0).convert("RGB").resize((640, 480))
JPEG = encode(PHOTO, "JPEG", quality=95)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((56, 56), (160, 120)),
        ((112, 112), (320, 240)),
        ((120, 160), (320, 240)),
        ((121, 160), (640, 480)),
        ((480, 640), (640, 480)),
        ((1000, 1000), (640, 480)),
        ((16, 300), (640, 480)),
    ],
)
def test_a_jpeg_is_decoded_at_a_scale_never_below_twice_the_size_it_is_fitted_to(size, scaled):
    assert decode(JPEG, size=size).size == scaled
    whole, quick = fit(PHOTO, *size).astype(int), read_pixels(JPEG, *size)
    assert quick.shape == (*size, 3)
    assert np.abs(whole - quick).mean() < 2


def test_a_picture_on_its_side_is_scaled_by_its_upright_size():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(PHOTO, "JPEG", exif=exif)
    assert decode(data).size == (480, 640)
    assert decode(data, size=(320, 40)).size == (480, 640)
    assert decode(data, size=(160, 40)).size == (240, 320)


def test_other_formats_are_decoded_whole():
    for kind in ("PNG", "WEBP"):
        assert decode(encode(PHOTO, kind), size=(32, 32)).size == PHOTO.size


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            Limits(max_bytes=1000),
            r"the picture has [\d,]+ bytes, more than the 1,000 that are taken: make it smaller",
        ),
        (
            Limits(max_pixels=640 * 480 - 1),
            "the picture has 640x480 pixels, more than the 307,199 that are taken",
        ),
    ],
)
def test_limits_are_inclusive_and_named(limits, words):
    assert decode(JPEG, Limits(len(JPEG), 640 * 480)).size == PHOTO.size
    with pytest.raises(BadImage, match=words):
        decode(JPEG, limits)
