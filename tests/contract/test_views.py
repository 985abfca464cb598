"""View policies: the pixels are timm's, and maps and boxes come back where they were."""

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from contract.picture_headers import own_size
from contract.views import EVALUATED, MOST_TILES, SQUASH, UNSEEN, ViewPolicy
from distill.data.pictures import PackagedPhotos

SIZE = (64, 64)
TEXTS = ("squash", "centre-crop:0.875", "letterbox", "tiles:0.25")
PICTURES = {
    "portrait": (141, 97),
    "landscape": (97, 203),
    "smaller than the model": (23, 31),
    "the model's own size": SIZE,
    "wide": (40, 170),
}


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("squash", {"crop_mode": "squash", "crop_pct": 1.0}),
        ("centre-crop:0.875", {"crop_mode": "center", "crop_pct": 0.875}),
        ("centre-crop:0.9,bilinear", {"crop_mode": "center", "crop_pct": 0.9}),
        ("letterbox", {"crop_mode": "border", "crop_pct": 1.0}),
    ],
)
def test_pixels_are_those_of_timm(text, config):
    view = ViewPolicy.parse(text)
    photos = PackagedPhotos()
    for size, numbers in (((224, 224), range(len(photos))), ((64, 96), (3, 9, 14))):
        transform = transforms_imagenet_eval(
            size, normalize=False, interpolation=view.interpolation, **config
        )
        for number in numbers:
            photo = photos.load(number)
            expected = np.asarray(transform(photo)).transpose(1, 2, 0)
            assert np.array_equal(view.pixels(photo, *size), expected), (number, size)


@pytest.mark.parametrize("text", [*TEXTS, "centre-crop:0.5", "centre-crop:1", "tiles"])
@pytest.mark.parametrize("smooth", ["", ",bilinear", ",no-antialias"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_mask_goes_there_and_comes_back(text, smooth, name):
    """What the views show of a picture of two colours is its mask; undone, it lies where it was,
    but for a line along the boundary: a pixel of the view on either side.
    """
    view, (height, width) = ViewPolicy.parse(text + smooth), PICTURES[name]
    rows, columns = np.mgrid[:height, :width]
    mask = rows / height + 0.3 * np.sin(5 * columns / width) > 0.55
    picture = Image.fromarray(np.repeat((255 * mask)[..., None], 3, -1).astype(np.uint8))
    views = view.every(picture, *SIZE)
    assert views.shape == (len(view.places((height, width), SIZE)), *SIZE, 3)
    shares = views[..., 0].astype(np.float32) / 255
    scores = np.stack([0.5 - shares, shares - 0.5], -1)
    back = view.undo(scores, (height, width), scores=True)
    assert back.shape == (height, width) and back.dtype == np.int32
    seen = back != UNSEEN
    if view.kind == "centre-crop":
        kept = min(1, view.share) ** 2 * min(height, width) ** 2 / (height * width)
        assert abs(seen.mean() - kept) < 0.06
    else:
        assert seen.all()
    place = view.places((height, width), SIZE)[0]
    reach = max(height / place.height, width / place.width, 1) * 1.5
    near = _near_boundary(mask, reach)
    assert ((back == mask) | near | ~seen).all(), "only the boundary may move"
    assert (back != mask)[seen].mean() < 0.06
    # as numbers, too: a map of shares stays within the shares around it
    numbers = view.undo(shares, (height, width))
    assert np.isnan(numbers[~seen]).all() and not np.isnan(numbers[seen]).any()
    assert ((numbers > 0.5) == mask)[seen & ~near].all()
    if len(views) == 1:
        classes = view.undo((shares > 0.5).astype(np.int32), (height, width), nearest=True)
        assert np.array_equal(classes, back)
    else:
        with pytest.raises(ValueError, match="give their scores"):
            view.undo((shares > 0.5).astype(np.int32), (height, width), nearest=True)


def _near_boundary(mask: np.ndarray, reach: float) -> np.ndarray:
    """Pixels at most `reach` from one of another value."""
    steps = int(np.ceil(reach))
    padded = np.pad(mask, steps, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * steps + 1,) * 2)
    return windows.any((2, 3)) != windows.all((2, 3))


def test_boxes_come_back_in_the_picture():
    for name, (height, width) in PICTURES.items():
        for text in TEXTS[:3]:
            view = ViewPolicy.parse(text)
            left, top, right, bottom = box = (0.4, 0.45, 0.6, 0.7)
            pixels = np.zeros((height * 8, width * 8, 3), np.uint8)
            pixels[
                round(top * height * 8) : round(bottom * height * 8),
                round(left * width * 8) : round(right * width * 8),
            ] = 255
            views = view.pixels(Image.fromarray(pixels), *SIZE)[..., 0]
            # the ground of a letterbox is grey
            rows, columns = (np.flatnonzero((views > 150).any(axis)) for axis in (1, 0))
            found = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]) / 64
            back = view.boxes(found.astype(np.float32), (height * 8, width * 8), SIZE)
            assert back.dtype == np.float32
            place = view.places((height * 8, width * 8), SIZE)[0]
            assert np.abs(back[0] - box).max() < 1.5 / min(place.height, place.width), (name, text)
    beyond = ViewPolicy.parse("letterbox").boxes(np.array([[0.0, 0, 1, 1]]), (100, 400), SIZE)
    assert np.array_equal(beyond, [[0, 0, 1, 1]])


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (1, 1), (2, 3)])
def test_extreme_shapes_are_shown_or_refused(size):
    picture = Image.fromarray(np.full((*size, 3), 77, np.uint8))
    for text in TEXTS:
        view = ViewPolicy.parse(text)
        if view.kind == "tiles" and max(size) > 3:
            with pytest.raises(ValueError, match=f"tiles, at most {MOST_TILES} are made: choose"):
                view.every(picture, *SIZE)
            continue
        views = view.every(picture, *SIZE)
        assert (views == 77).all() or view.kind == "letterbox"
        back = view.undo(views[..., 0].astype(np.float32), size)
        near = np.isclose(back, 77)
        assert back.shape == size and (np.isnan(back) | near).all()
        assert near.any() or (view.kind == "centre-crop" and max(size) > 3)


def test_a_long_picture_is_not_resized_whole():
    """Its resized form would have 64 * 64 * 3000 pixels; the crop is made of its box alone."""
    picture = PackagedPhotos().load(0).resize((1200, 40))
    view = ViewPolicy.parse("centre-crop:1")
    whole = picture.resize((1920, 64), Image.Resampling.BICUBIC).crop((928, 0, 992, 64))
    found = view.pixels(picture, 64, 64).astype(int)
    assert np.abs(found - np.asarray(whole)).max() <= 2  # Pillow's boxes are float32


def test_texts_say_all_of_a_policy():
    texts = [*TEXTS, "letterbox:7c7468", "squash,bilinear", "centre-crop:0.95,bilinear"]
    for text in (*texts, "tiles:0,no-antialias", "squash,bilinear,no-antialias"):
        view = ViewPolicy.parse(text)
        assert str(view) == text and ViewPolicy.parse(str(view)) == view
    assert str(ViewPolicy.parse(" centre-crop , bicubic, antialias")) == str(EVALUATED)
    assert ViewPolicy.parse("letterbox").on((0.485, 0.456, 0.406)).fill == (124, 116, 104)
    assert ViewPolicy.parse("letterbox:000000").on((0.5,) * 3).fill == (0, 0, 0)
    assert SQUASH.on((0.5,) * 3) == SQUASH
    for text, match in {
        "crop": "view 'crop': choose squash, centre-crop, letterbox, tiles",
        "squash:0.5": "squash takes no number",
        "centre-crop:0": "give a share from 0.05 to 1",
        "centre-crop:nan": "give a share",
        "centre-crop:x": "'x' is not a number",
        "tiles:0.9": "from 0 to 0.75",
        "letterbox:red": "six hexadecimal digits",
        "squash,nearest": "'nearest' is not known",
        "": "view '': choose",
    }.items():
        with pytest.raises(ValueError, match=match) as error:
            ViewPolicy.parse(text)
        assert "\n" not in str(error.value)


def test_a_share_is_written_as_exactly_as_it_was_read():
    """Rounded, it would move the crop by a pixel."""
    view = ViewPolicy.parse("centre-crop:0.9032258064516129")
    again = ViewPolicy.parse(str(view))
    assert again == view and again.places((400, 400), (224, 224))[0].height == 248


def test_without_antialiasing_pixels_are_sampled():
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    picture = Image.fromarray(stripes)
    smooth = ViewPolicy.parse("squash,bilinear").pixels(picture, *SIZE)
    sampled = ViewPolicy.parse("squash,bilinear,no-antialias")
    assert np.ptp(smooth) < 20 and sampled.reads(*SIZE) is None
    rough = sampled.pixels(PackagedPhotos().load(9), *SIZE).astype(int)
    fine = ViewPolicy.parse("squash,bilinear").pixels(PackagedPhotos().load(9), *SIZE).astype(int)
    assert 1 < np.abs(rough - fine).mean() < 20


def test_tiles_overlap_and_cover():
    view = ViewPolicy.parse("tiles:0.25")
    places = view.places((100, 260), SIZE)
    lefts = [place.left for place in places]
    assert lefts[0] == 0 and lefts[-1] + 64 == places[0].width
    assert max(np.diff(lefts)) <= 48 and {place.top for place in places} == {0}
    # where tiles disagree, the mean is taken
    maps = np.stack([np.full(SIZE, float(n), np.float32) for n in range(len(places))])
    back = view.undo(maps, (100, 260))
    assert back[50, 0] == 0 and back[50, -1] == len(places) - 1
    middle = round((lefts[1] + 5) * 260 / places[0].width)
    assert back[50, middle] == pytest.approx(0.5)
    # one by one they give the same, and neither a tile too few nor one too many
    assert np.array_equal(view.undo(iter(maps), (100, 260)), back)
    for wrong in (maps[:0], maps[:-1], [*maps, maps[0]]):
        with pytest.raises(ValueError, match="maps"):
            view.undo(iter(wrong), (100, 260))


def test_the_own_size_of_a_file_is_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert own_size(path.read_bytes()) == (30, 20)
