"""Windows over pictures of any shape: they cover, they line up with their labels, they merge
back.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from distill.evaluate.datasets import open_pairs, read_depth
from distill.evaluate.windows import WindowLabels, WindowViews, cut_windows, merge_windows


@pytest.mark.parametrize(
    ("width", "height", "count"),
    [(64, 64, 1), (100, 64, 2), (64, 200, 4), (128, 64, 2), (65, 64, 2)],
)
def test_windows_are_squares_that_cover_the_picture(width, height, count):
    windows = cut_windows(0, width, height)
    assert len(windows) == count
    covered = np.zeros((height, width), bool)
    for window in windows:
        left, top, right, bottom = window.box
        assert right - left == bottom - top == min(width, height)
        assert left >= 0 and top >= 0 and right <= width + 1e-6 and bottom <= height + 1e-6
        covered[round(top) : round(bottom), round(left) : round(right)] = True
    assert covered.all()


def test_merging_maps_that_agree_gives_the_whole_map():
    # a plane that rises from left to right is linear, so resizing keeps it away from the borders
    width, height = 100, 40
    windows = cut_windows(0, width, height)
    x = torch.arange(width) + 0.5
    plane = x.expand(1, height, width)
    cut = torch.stack([plane[:, :, round(w.box[0]) : round(w.box[2])] for w in windows])
    torch.testing.assert_close(merge_windows(cut, windows, width, height), plane)


def test_overlaps_are_averaged():
    windows = cut_windows(0, 96, 64)
    merged = merge_windows(
        torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]), windows, 96, 64
    )
    assert merged[0, 10, 5] == 0 and merged[0, 10, 90] == 1 and merged[0, 10, 48] == 0.5


def test_labels_lie_under_their_pixels(tmp_path):
    """A picture whose red channel is its own depth: every window's pixels and labels must agree."""
    for kind in ("images", "depth"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    ramp = np.tile(np.arange(20, 180, dtype=np.uint8), (64, 1))
    Image.fromarray(np.stack([ramp] * 3, axis=-1)).save(tmp_path / "val" / "images" / "a.png")
    np.save(tmp_path / "val" / "depth" / "a.npy", ramp.astype(np.float32) / 100)
    pairs = open_pairs(tmp_path, "val", "depth")
    views = WindowViews(pairs, 64)
    labels = WindowLabels(views, lambda n: read_depth(pairs, n, 1.0, 10.0), 64)
    assert len(views) == len(labels) == 3
    for number in range(3):
        np.testing.assert_allclose(views[number][0].float() / 100, labels[number], atol=0.011)
    assert views.of_picture() == [[0, 1, 2]]


def test_views_are_the_same_for_masks_and_depth_of_one_data_set(scenes):
    masks, depth = (
        WindowViews(open_pairs(scenes, "train", kind), 64) for kind in ("masks", "depth")
    )
    assert masks.fingerprint() == depth.fingerprint(), "so features are computed once"
