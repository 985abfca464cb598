"""Masks, cells and overlapping crops for self-supervision: pure functions of the sample."""

import numpy as np
import pytest
import torch
from PIL import Image

from distill.config import DataConfig
from distill.data.batches import StreamBatches, make_loader
from distill.data.crops import MAIN, CropDataset, View, plain_name, shift_towards, surrounding
from distill.data.masks import BlockMask, WindowCells
from distill.data.photometric import RECIPES, photometric
from distill.data.pictures import FolderPictures
from tests.conftest import small_recipe


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_a_mask_hides_at_most_its_share_in_blocks():
    mask = BlockMask(14, ratios=(0.3,), spreads=(0.2,))
    shares = []
    for seed in range(300):
        drawn = mask.draw(rng(seed))
        assert drawn.shape == (14, 14) and drawn.dtype == bool
        shares.append(drawn.mean())
    assert max(shares) <= 0.5 and 0.2 < np.mean(shares) <= 0.3
    hidden = [mask.draw(rng(seed)) for seed in range(50)]
    # neighbours of a hidden patch are hidden far more often than by chance
    together = np.mean([(m[:, :-1] & m[:, 1:]).sum() / max(1, m[:, :-1].sum()) for m in hidden])
    assert together > 0.7


def test_half_of_the_crops_have_no_mask_at_ibot_s_ratios():
    empty = np.mean([not BlockMask(14).draw(rng(seed)).any() for seed in range(400)])
    assert 0.4 < empty < 0.6


def test_no_ratio_means_no_mask_and_small_grids_end():
    assert not BlockMask(14, (0.0,), (0.0,)).draw(rng(0)).any()
    for side in (1, 2, 3, 4):
        assert BlockMask(side, (0.5,), (0.0,)).draw(rng(0)).mean() <= 0.5


@pytest.mark.parametrize(("grid", "window", "number"), [(14, 3, 16), (6, 2, 9), (4, 4, 1)])
def test_one_cell_of_every_window(grid, window, number):
    cells = WindowCells(grid, window)
    assert cells.cells == number
    starts = {0, grid % window}
    for seed in range(100):
        drawn = cells.draw(rng(seed))
        rows, columns = np.divmod(drawn, grid)
        assert drawn.max() < grid**2
        assert any(
            len(set(zip((rows - top) // window, (columns - left) // window, strict=True))) == number
            for top in starts
            for left in starts
        )


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10)),  # overlaps already
        ((30, 0, 40, 10), (15, 0, 25, 10)),  # moves left until half of it is inside
        ((0, 90, 10, 100), (0, 15, 10, 25)),
        ((70, 70, 170, 170), (10, 10, 110, 110)),  # larger: half of the anchor is covered
    ],
)
def test_a_crop_moves_as_little_as_overlap_needs(box, expected):
    assert shift_towards(box, (0, 0, 20, 20)) == expected


def test_the_box_around_boxes():
    assert surrounding([(0, 5, 10, 10), (3, 0, 20, 7)]) == (0, 0, 20, 10)


@pytest.fixture
def dataset(photo_folder):
    def make(*views: View, **changes) -> CropDataset:
        config = DataConfig(**(small_recipe(photo_folder)["data"] | changes))
        return CropDataset(FolderPictures(photo_folder), config, views, seed=0)

    return make


UDI_VIEWS = (
    View("global", 64, 2, (0.1, 0.3), boxes=True, near="global", cells=WindowCells(4, 2)),
    View("local", 32, 3, (0.05, 0.1), boxes=True, near="global", mask=BlockMask(2)),
)


def test_crops_near_a_view_overlap_it_in_every_direction(dataset):
    for picture in range(12):
        views = dataset(*UDI_VIEWS)[MAIN, picture, 0].views
        # [crops, (x, y), (low, high)]; a mirrored box has its sides swapped
        first, second = spans(views["global.box"])
        around = torch.stack(
            (torch.minimum(first, second)[:, 0], torch.maximum(first, second)[:, 1])
        )
        pairs = [(second, first), *((local, around.T) for local in spans(views["local.box"]))]
        for (low, high), (start, end) in ((box.T, anchor.T) for box, anchor in pairs):
            overlap = torch.minimum(high, end) - torch.maximum(low, start)
            assert (overlap >= torch.minimum(high - low, end - start) / 2 - 1e-5).all()
            assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6


def spans(boxes: torch.Tensor) -> torch.Tensor:
    return boxes.unflatten(1, (2, 2)).transpose(1, 2).sort(-1).values


def test_a_plain_copy_is_the_crop_without_photometric_augmentation(dataset):
    plain = View("image", 32, scale=(0.3, 1.0))
    changed = plain._replace(photometric=("dino_global_1",), plain=True)
    sample = dataset(changed)[MAIN, 3, 0].views
    assert torch.equal(sample[plain_name("image")], dataset(plain)[MAIN, 3, 0].views["image"])
    assert not torch.equal(sample["image"], sample[plain_name("image")])


def test_shapes_of_a_view_are_those_of_its_batches(dataset):
    views = (UDI_VIEWS[0]._replace(plain=True, photometric=("udi_global",)), UDI_VIEWS[1])
    made = dataset(*views)
    (batch,) = make_loader(made, StreamBatches(12, 1, {MAIN: 4}, 1), 0, False, 0)
    declared = {}
    for view in views:
        declared |= view.shapes(4)
    assert {n: (tuple(t.shape), t.dtype) for n, t in batch.views.items()} == declared


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_and_cells_do_not_depend_on_workers(dataset, workers):
    made = dataset(*UDI_VIEWS)
    loader = make_loader(made, StreamBatches(12, 1, {MAIN: 4}, 2), workers, False, 1 << 20)
    batches = [batch.views for batch in loader]
    again = [b.views for b in make_loader(made, StreamBatches(12, 1, {MAIN: 4}, 2), 0, False, 0)]
    for batch, other in zip(batches, again, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


@pytest.mark.parametrize("name", RECIPES)
def test_photometric_recipes_are_functions_of_the_generator(name):
    layer = Image.effect_mandelbrot((48, 48), (-2, -1, 1, 1), 50)
    crop = Image.merge("RGB", [layer, layer.rotate(90), layer.rotate(180)])
    first, again = (np.array(photometric(crop, name, rng(5))) for _ in range(2))
    assert np.array_equal(first, again) and first.dtype == np.uint8 and first.shape == (48, 48, 3)
    if name != "none":
        changed = [np.array(photometric(crop, name, rng(s))) for s in range(5)]
        assert any(not np.array_equal(pixels, np.array(crop)) for pixels in changed)
