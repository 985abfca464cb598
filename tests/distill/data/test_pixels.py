"""Crops of JPEGs that are not decoded whole: near those of whole pictures, and as strict."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from contract.images import TRUSTED, UnreadableImage, decode
from distill.data.crops import random_crop
from distill.data.pictures import PackagedPhotos
from distill.data.pixels import Crop, Decoded, open_picture

SIDE = 64

MEAN, WORST = 2.0, 5.0
"""The bound that docs/architecture.md states: of 255, over all crops and over those of one
picture."""


def jpeg(number: int, size: tuple[int, int], **save) -> bytes:
    file = io.BytesIO()
    photo = PackagedPhotos().load(number)
    photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", **({"quality": 90} | save))
    return file.getvalue()


def draw(size: tuple[int, int], count: int) -> list[Crop]:
    rng = np.random.default_rng(0)
    boxes = (random_crop(size, rng, (0.08, 1.0), (0.75, 4 / 3)) for _ in range(count))
    return [Crop(box, SIDE, bool(rng.random() < 0.5)) for box in boxes]


def whole(data: bytes) -> Decoded:
    return Decoded(decode(data, TRUSTED))


def differences(data: bytes, crops: list[Crop]) -> list[float]:
    """Mean absolute difference of each crop, alone, from that of the whole picture."""
    return [
        (open_picture(data, "a").crops([crop])[0].float() - whole(data).crops([crop])[0].float())
        .abs()
        .mean()
        .item()
        for crop in crops
    ]


@pytest.mark.parametrize("size", [(143, 107), (429, 286)])  # 500 and 1500 to 224 pixels
def test_crops_are_within_the_stated_bound_of_those_of_whole_pictures(size):
    errors = [differences(jpeg(number, size), draw(size, 6)) for number in range(19)]
    assert np.mean(errors) <= MEAN and max(map(np.mean, errors)) <= WORST
    if size[0] < 2 * SIDE + 16:  # nothing is reduced: both decoders give the same pixels
        assert np.mean(errors) <= 0.1


def test_fractional_boxes_are_not_moved_to_whole_pixels():
    size = (640, 480)
    data = jpeg(3, size)
    image = whole(data)
    for left, top in ((0.0, 0.0), (0.5, 1.25), (37.3, 41.7), (101.0, 55.0)):
        box = (left, top, left + 300.5, top + 301.25)
        (crop,) = open_picture(data, "a").crops([Crop(box, SIDE, False)])
        moved = [(left + dx, top, left + 300.5 + dx, top + 301.25) for dx in (-2, 2) if left >= 2]
        near, *far = (
            (crop.float() - image.crops([Crop(b, SIDE, False)])[0].float()).abs().mean()
            for b in (box, *moved)
        )
        assert near < 2 and all(near < other / 2 for other in far)


@pytest.mark.parametrize("tag", range(2, 9))
def test_turned_pictures_are_cut_upright(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    for size in ((320, 240), (323, 241)):  # the latter fill their last block up
        data = jpeg(3, size, exif=exif)
        opened = open_picture(data, "a")
        assert opened.size == whole(data).size == (size if tag < 5 else size[::-1])
        errors = differences(data, draw(opened.size, 4))
        assert np.mean(errors) < 1.5


def test_crops_do_not_depend_on_what_was_cut_before():
    data = jpeg(4, (429, 286))
    first, second = draw((429, 286), 2)
    opened = open_picture(data, "a")
    opened.crops([first])
    assert torch.equal(opened.crops([second])[0], open_picture(data, "a").crops([second])[0])


def test_grey_progressive_and_cmyk_pictures_look_as_they_do_decoded_whole():
    photo = PackagedPhotos().load(3).resize((160, 120))
    for mode, save in (("L", {}), ("RGB", {"progressive": True}), ("CMYK", {})):
        file = io.BytesIO()
        photo.convert(mode).save(file, "JPEG", quality=90, **save)
        crop = Crop((10.0, 20.0, 74.0, 84.0), SIDE, False)  # as large as it is wanted
        expected = whole(file.getvalue()).crops([crop])[0]
        assert torch.equal(open_picture(file.getvalue(), "a").crops([crop])[0], expected), mode


def test_damaged_pictures_fail_as_they_do_decoded_whole():
    data = jpeg(3, (160, 120))
    crop = Crop((0.0, 0.0, 64.0, 64.0), SIDE, False)
    for bad in (data[: len(data) // 2], data[:100], b"\xff\xd8\xff", b"", data[:-2] + b"xx"):
        try:
            expected = whole(bad).crops([crop])[0]
        except UnreadableImage as error:
            with pytest.raises(UnreadableImage, match=error.reason[:20]):
                open_picture(bad, "a").crops([crop])
        else:
            assert torch.equal(open_picture(bad, "a").crops([crop])[0], expected)
