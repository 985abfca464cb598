"""Masks and depth maps as people have them: layouts, labels, bits, turned pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contract.errors import UserError
from distill.evaluate import depth
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import depth_scale, open_pairs, read_mask, read_matched
from distill.evaluate.maps import map_size, read_map
from distill.evaluate.segmentation import _Labelling

RAMP = (np.arange(12 * 16).reshape(12, 16) % 256).astype(np.uint8)
"""A picture that looks different whichever way it is turned."""


def data_set(root: Path, maps: list[np.ndarray], pictures="{}/images", places="{}/masks", **save):
    """The same maps and pictures in both splits, called train and val, or training and
    validation.
    """
    for split in ("training", "validation") if "{}" in pictures[-2:] else ("train", "val"):
        for folder in (pictures, places):
            (root / folder.format(split)).mkdir(parents=True)
        for number, values in enumerate(maps):
            picture = Image.fromarray(np.resize(RAMP, values.shape))
            picture.save(root / pictures.format(split) / f"{number}.png", **save)
            place = root / places.format(split) / str(number)
            if values.dtype.kind == "i":
                np.save(place.with_suffix(".npy"), values)
            else:
                Image.fromarray(values).save(place.with_suffix(".png"))
    return root


def labelling(root: Path, **changes) -> _Labelling:
    config = EvaluationConfig(segmentation=changes)
    return _Labelling(*(open_pairs(root, s, "masks") for s in ("train", "val")), config)


def labels(*values: int, kind=np.uint8) -> np.ndarray:
    return np.resize(np.array(values, kind), (12, 16))


def test_a_layout_alone_does_not_make_ade20k(tmp_path):
    lies = {"pictures": "images/{}", "places": "annotations/{}"}
    plain = labelling(data_set(tmp_path / "plain", [labels(0, 1, 2)], **lies))
    assert (plain.classes, plain.shift) == (3, False)
    alike = data_set(tmp_path / "alike", [labels(0, 3, 150)], **lies)
    with pytest.raises(UserError, match="segmentation.zero=ignore .ADE20K., or .*zero=class"):
        labelling(alike)
    assert labelling(alike, zero="class").classes == 151
    assert labelling(alike, zero="ignore").classes == 150
    rows = ["Idx\tName", *(f"{number}\tn{number}" for number in range(1, 151))]
    (alike / "objectInfo150.txt").write_text("\n".join(rows))
    ade = labelling(alike)
    assert (ade.classes, ade.shift, ade.names[149]) == (150, True, "n150")


def test_every_remedy_of_a_wrong_label_holds_for_the_whole_data_set(tmp_path):
    root = data_set(tmp_path / "neg", [labels(0, 1, -1, kind=np.int16), labels(0, 1, 2, kind=int)])
    with pytest.raises(UserError, match=r"has label -1: .*, or set segmentation.ignore=-1$"):
        labelling(root)
    assert labelling(root, ignore=-1).classes == 3
    mixed = data_set(tmp_path / "mixed", [labels(0, 1, 5), labels(1, 9, 255)])
    words = r"has label 5, but segmentation.classes is 2: .*classes=10 or .*ignore=\[5,9,255\]$"
    with pytest.raises(UserError, match=words):
        labelling(mixed, classes=2)
    assert labelling(mixed, classes=10).classes == 10
    assert labelling(mixed, classes=2, ignore=[5, 9, 255]).classes == 2


def test_255_is_a_class_of_masks_with_more_than_8_bits(tmp_path):
    many = data_set(
        tmp_path / "many",
        [
            labels(*range(192), kind=np.uint16),
            np.full((9, 16), 255, np.uint16),
            labels(*range(192, 300), kind=np.uint16),
        ],
    )
    assert labelling(many).classes == 300
    assert (read_mask(open_pairs(many, "val", "masks"), 1, False, None, 255) == 255).all()
    void = data_set(tmp_path / "void", [labels(0, 1, 255, kind=np.uint16)])
    with pytest.raises(UserError, match="segmentation.ignore=255, or segmentation.classes=256"):
        labelling(void)
    assert labelling(void, ignore=255).classes == 2
    assert labelling(void, ignore=255, classes=4).classes == 4
    most = data_set(tmp_path / "most", [labels(0, 1, 65535, kind=np.uint16)])
    with pytest.raises(UserError, match="segmentation.ignore=65535 if it is no class"):
        labelling(most)


def test_255_is_a_class_where_there_are_that_many(tmp_path):
    full = data_set(
        tmp_path / "full", [RAMP, np.resize(np.arange(192, 256, dtype=np.uint8), (9, 16))]
    )
    pairs = open_pairs(full, "val", "masks")
    for ignore, classes, counted in (("auto", 256, 9), ("auto", None, 0), (255, 256, 0)):
        made = labelling(full, ignore=ignore, classes=classes)
        assert ((made.read(pairs, 1) == 255).any(), made.classes) == (counted > 0, classes or 255)
    # labels from 1 on: the class of 255 is number 254
    shifted = labelling(full, classes=255, zero="ignore")
    assert (shifted.read(pairs, 1) == 254).any()
    assert not (labelling(full, classes=255).read(pairs, 1) == 254).all()


def test_two_files_of_one_name_are_refused(tmp_path):
    root = data_set(tmp_path, [labels(0, 1)])
    np.save(root / "train/masks/0.npy", labels(1, 0))
    with pytest.raises(UserError, match="masks/0.npy and 0.png have one name"):
        open_pairs(root, "train", "masks")
    Image.fromarray(RAMP).save(root / "val/images/0.jpg")
    with pytest.raises(UserError, match="images/0.jpg and 0.png have one name"):
        open_pairs(root, "val", "masks")


@pytest.mark.parametrize("tag", [3, 5, 6, 7, 8])
def test_a_tiff_map_is_read_as_stored_whatever_its_tag_says(tmp_path, tag):
    for bits, side in ((np.uint8, (12, 16)), (np.uint16, (12, 12))):
        root = tmp_path / bits.__name__
        values = np.resize(RAMP, side).astype(bits)
        exif = Image.Exif()
        exif[0x0112] = tag
        data_set(root, [np.resize(RAMP, side)], exif=exif)
        for split in ("train", "val"):
            (root / split / "masks/0.png").unlink()
            Image.fromarray(values).save(root / split / "masks/0.tif", tiffinfo={0x0112: tag})
        pairs = open_pairs(root, "train", "masks")
        assert map_size(pairs.maps[0]) == side[::-1]
        assert np.array_equal(read_map(pairs.maps[0]), values)
        assert np.array_equal(np.asarray(read_matched(pairs, 0))[..., 0], np.resize(RAMP, side))
        # a picture that is not to be turned
        Image.fromarray(np.resize(RAMP, side)).save(root / "train/images/0.png")
        with pytest.raises(UserError, match=f"EXIF orientation {tag}.*dense.exif=stored"):
            read_matched(pairs, 0)
        stored = open_pairs(root, "train", "masks", "stored")
        assert np.array_equal(np.asarray(read_matched(stored, 0))[..., 0], np.resize(RAMP, side))


@pytest.mark.parametrize("tag", [3, 6])
def test_a_turned_picture_stays_with_its_map(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    root = data_set(tmp_path, [RAMP], exif=exif)
    turned = np.rot90(RAMP, {3: 2, 6: -1}[tag])

    def seen(way: str) -> np.ndarray:
        return np.asarray(read_matched(open_pairs(root, "train", "masks", way), 0))[..., 0]

    assert np.array_equal(seen("stored"), RAMP)
    if tag == 3:  # both are of one size
        assert np.array_equal(seen("upright"), turned)
        with pytest.raises(UserError, match="EXIF orientation 3.*dense.exif=stored.*upright"):
            seen("auto")
    else:
        assert np.array_equal(seen("auto"), RAMP)
        Image.fromarray(turned.copy()).save(root / "train/masks/0.png")
        assert np.array_equal(seen("auto"), turned)


def test_depth_maps_of_8_bits_need_a_scale_and_no_others_beside_them(tmp_path, tiny_vit):
    metres = np.linspace(1, 9, 12 * 16).reshape(12, 16)
    lies = {"places": "{}/depth"}
    eight = data_set(tmp_path / "8", [(metres * 25.5).astype(np.uint8)], **lies)
    sixteen = data_set(tmp_path / "16", [(metres * 1000).astype(np.uint16)], **lies)
    splits = [open_pairs(root, "train", "depth") for root in (eight, sixteen)]
    assert depth_scale(splits[1:], None) == 1000 and depth_scale(splits[:1], 25.5) == 25.5
    with pytest.raises(UserError, match="8-bit depth map.*set depth.scale"):
        depth.evaluate(tiny_vit, eight, EvaluationConfig(), tmp_path, tmp_path / "out", {})
    with pytest.raises(UserError, match="8-bit depth map, but .* has 16 bits"):
        depth_scale(splits, 1000)
