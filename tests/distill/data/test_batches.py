"""Pictures, crops and their order: determinism, resuming, ranks, and damaged files."""

import io
import logging
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from contract.errors import UserError
from distill.config import DataConfig
from distill.data.batches import CorruptLedger, StreamBatches, collate, make_loader
from distill.data.crops import IMAGE, MAIN, CropDataset, View, centre_crop, random_crop, take_crop
from distill.data.pictures import FolderPictures, PackagedPhotos, WebDatasetPictures, open_pictures
from tests.conftest import small_recipe


def config(photos, **changes) -> DataConfig:
    return DataConfig(**(small_recipe(photos)["data"] | changes))


VIEW = View(IMAGE, 32, scale=(0.3, 1.0))


def order(pictures=10, batch_size=4, repeats=1, **changes) -> list[list[tuple[int, int]]]:
    """Pictures and view numbers of every micro-batch of one stream."""
    batches = StreamBatches(pictures, repeats, {MAIN: batch_size}, **({"steps": 9} | changes))
    return [[(picture, number) for _, picture, number in batch] for batch in batches]


def test_a_folder_is_read_in_sorted_order_however_it_is_nested(photo_folder, tmp_path):
    pictures = FolderPictures(photo_folder)
    assert len(pictures) == 12
    assert [pictures.name(i) for i in range(12)] == sorted(
        str(p) for p in photo_folder.rglob("*.jpg")
    )
    deep = tmp_path / "a" / "ü b" / "c"
    deep.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(deep / "ß.PNG")
    (deep / "notes.txt").write_text("no picture")
    assert FolderPictures(tmp_path).name(0).endswith("ß.PNG") and len(FolderPictures(tmp_path)) == 1


def test_a_folders_fingerprint_follows_its_files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = FolderPictures(tmp_path).fingerprint()
    assert FolderPictures(tmp_path).fingerprint() == before
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    assert FolderPictures(tmp_path).fingerprint() != before


def test_missing_and_empty_folders_and_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        FolderPictures(tmp_path / "gone")
    with pytest.raises(UserError, match="has no images"):
        FolderPictures(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        FolderPictures(tmp_path / "file")


@pytest.fixture
def unprivileged():
    """Run as an ordinary user for a while if this is root, whom no permission stops."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_that_may_not_be_read_is_an_error(unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder, "locked")
        (locked / "inside").mkdir(parents=True)
        locked.chmod(0o000)
        try:
            for path in (Path(folder), locked, locked / "inside"):
                with pytest.raises(UserError, match="cannot read .*locked.*: Permission denied"):
                    FolderPictures(path)
        finally:
            locked.chmod(0o755)


@pytest.fixture
def shards(photo_folder, tmp_path):
    """Two tar files of six photographs each, with labels beside them, as WebDataset writes them."""
    files = sorted(photo_folder.rglob("*.jpg"))
    for number in range(2):
        with TarWriter(str(tmp_path / f"shard-{number:04d}.tar")) as tar:
            for path in files[number * 6 : number * 6 + 6]:
                tar.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": 3})
    return tmp_path


def test_tar_shards_hold_the_same_pictures_as_the_folder_they_were_made_from(shards, photo_folder):
    folder, tars = (
        FolderPictures(photo_folder),
        WebDatasetPictures(str(shards / "shard-{0000..0001}.tar")),
    )
    assert len(tars) == 12 and "shard-0000.tar:" in tars.name(0)
    for number in (0, 5, 6, 11):
        assert np.array_equal(np.asarray(tars.load(number)), np.asarray(folder.load(number)))
    assert len(WebDatasetPictures(str(shards / "*.tar"))) == 12
    assert len(WebDatasetPictures([str(shards / "shard-0001.tar")])) == 6


def test_broken_and_missing_tar_files_are_named(shards):
    (shards / "bad.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UserError, match="bad.tar"):
        WebDatasetPictures(str(shards / "bad.tar"))
    with pytest.raises(UserError, match="no file .*shard-0002.tar"):
        WebDatasetPictures(str(shards / "shard-{0001..0002}.tar"))
    with tarfile.open(shards / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"), io.BytesIO())
    with pytest.raises(UserError, match="no images"):
        WebDatasetPictures(str(shards / "empty.tar"))


def test_packaged_photographs_are_real_sized_and_decode():
    photos = PackagedPhotos()
    assert len(photos) >= 18
    for number in range(len(photos)):
        image = photos.load(number)
        assert image.mode == "RGB" and min(image.size) >= 190 and np.asarray(image).std() > 5


def test_each_kind_of_data_opens_its_source(photo_folder, shards):
    assert isinstance(open_pictures(config(photo_folder)), FolderPictures)
    assert isinstance(open_pictures(DataConfig(kind="packaged-photos")), PackagedPhotos)
    with pytest.raises(UserError, match="data.path = /photos is not read with data.kind"):
        open_pictures(DataConfig(kind="packaged-photos", path="/photos"))
    assert isinstance(
        open_pictures(DataConfig(kind="webdataset", path=str(shards / "*.tar"))), WebDatasetPictures
    )
    with pytest.raises(UserError, match="one folder"):
        open_pictures(DataConfig(kind="folder", path=["a", "b"]))


def test_random_crops_lie_inside_and_cover_the_share_they_should():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, right, bottom = random_crop((300, 200), rng, (0.2, 0.5), (0.75, 4 / 3))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        assert 0.74 < (right - left) / (bottom - top) < 1.35
        shares.append((right - left) * (bottom - top) / 60000)
    assert 0.19 < min(shares) and max(shares) < 0.51 and abs(np.mean(shares) - 0.35) < 0.02
    # a strip has no crop of such ratios covering all of it: the largest centred one is taken
    assert random_crop((1000, 10), rng, (1.0, 1.0), (0.75, 4 / 3)) == pytest.approx(
        (493.33, 0, 506.67, 10), abs=0.01
    )


def test_a_crop_is_the_boxs_pixels_mirrored_if_asked():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop = take_crop(image, (2, 1, 6, 5), 4, flip=False)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), pixels[1:5, 2:6])
    assert torch.equal(take_crop(image, (2, 1, 6, 5), 4, flip=True), crop.flip(2))
    assert centre_crop(image, 6).shape == (3, 6, 6)


def test_samples_depend_on_seed_picture_and_view_alone(photo_folder):
    pictures, settings = FolderPictures(photo_folder), config(photo_folder)
    dataset = CropDataset(pictures, settings, [VIEW], seed=5)
    again = CropDataset(FolderPictures(photo_folder), settings, [VIEW], seed=5)
    dataset[MAIN, 3, 1]  # a sample drawn in between changes nothing
    crop = dataset[MAIN, 2, 4].views[IMAGE]
    assert crop.shape == (1, 3, 32, 32) and torch.equal(crop, again[MAIN, 2, 4].views[IMAGE])
    reseeded = CropDataset(pictures, settings, [VIEW], seed=6)
    others = [dataset[MAIN, 2, 5], dataset[MAIN, 3, 4], reseeded[MAIN, 2, 4]]
    assert not any(torch.equal(crop, other.views[IMAGE]) for other in others)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_batches_of_one_process(photo_folder, workers):
    dataset = CropDataset(FolderPictures(photo_folder), config(photo_folder), [VIEW], seed=0)
    batches = StreamBatches(12, 2, {MAIN: 6}, 5, accumulate=2)
    alone, many = (list(make_loader(dataset, batches, n, False, 1 << 20)) for n in (0, workers))
    assert len(alone) == len(many) == 10
    for a, b in zip(alone, many, strict=True):
        assert (
            torch.equal(a.views[IMAGE], b.views[IMAGE])
            and torch.equal(a.pictures[MAIN], b.pictures[MAIN])
            and torch.equal(a.numbers[MAIN], b.numbers[MAIN])
        )


def two_streams(photo_folder, **changes) -> CropDataset:
    views = [
        View(IMAGE, 32, scale=(0.3, 1.0)),
        View("global", 32, crops=2, scale=(0.5, 1.0), photometric=("dino_global_1", "unic")),
        View("local", 16, crops=3, scale=(0.05, 0.3), boxes=True),
        View("detector", 24, scale=(0.5, 1.0), stream="det"),
    ]
    pictures = FolderPictures(photo_folder)
    return CropDataset(pictures, config(photo_folder, **changes), views, seed=0)


def test_the_views_of_a_stream_share_its_pictures_and_a_batch_holds_them_crop_by_crop(photo_folder):
    dataset = two_streams(photo_folder)
    keys = [(MAIN, 3, 0), (MAIN, 5, 1), ("det", 7, 2)]
    batch = collate([dataset[key] for key in keys])
    shapes = {name: tuple(view.shape) for name, view in batch.views.items()}
    assert shapes == {
        IMAGE: (2, 3, 32, 32),
        "global": (4, 3, 32, 32),
        "local": (6, 3, 16, 16),
        "local.box": (6, 4),
        "detector": (1, 3, 24, 24),
    }
    assert batch.pictures[MAIN].tolist() == [3, 5] and batch.numbers["det"].tolist() == [2]
    for crop in range(2):  # the first crop of both pictures, then the second
        for row, key in enumerate(keys[:2]):
            expected = dataset[key].views["global"][crop]
            assert torch.equal(batch.views["global"][2 * crop + row], expected)


def test_crops_of_one_view_differ_and_another_view_changes_none_of_them(photo_folder):
    dataset = two_streams(photo_folder)
    crops = dataset[MAIN, 3, 0].views
    assert not torch.equal(crops["global"][0], crops["global"][1])
    alone = CropDataset(dataset.pictures, dataset.config, [dataset.views[1]], seed=0)
    assert torch.equal(alone[MAIN, 3, 0].views["global"], crops["global"])
    assert torch.equal(dataset[MAIN, 3, 0].views["global"], crops["global"])


def test_boxes_are_the_crops_share_of_the_picture_and_mirrored_where_the_crop_is(photo_folder):
    for flip in (0.0, 1.0):
        dataset = two_streams(photo_folder, flip=flip)
        image = dataset.pictures.load(3)
        sample = dataset[MAIN, 3, 0].views
        for crop, box in zip(sample["local"], sample["local.box"].tolist(), strict=True):
            left, top, right, bottom = box
            assert (left > right) == bool(flip)
            pixels = [min(left, right), top, max(left, right), bottom]
            pixels = [side * (image.width, image.height)[i % 2] for i, side in enumerate(pixels)]
            again = take_crop(image, [round(side) for side in pixels], 16, flip=bool(flip))
            # training does not decode the whole picture at its full size
            assert (again.float() - crop.float()).abs().mean() < 3


def test_a_stream_of_its_own_batch_size_has_its_own_order_and_length():
    batches = list(StreamBatches(12, 1, {MAIN: 4, "det": 2}, 6, accumulate=2, rank=0, world=1))
    of = {s: [(p, n) for batch in batches for t, p, n in batch if t == s] for s in (MAIN, "det")}
    assert len(of[MAIN]) == 24 and len(of["det"]) == 12
    assert sorted(p for p, _ in of["det"]) == list(range(12)) and {n for _, n in of["det"]} == {0}
    assert [p for p, _ in of["det"]] != [p for p, _ in of[MAIN][:12]]
    alone = StreamBatches(12, 1, {MAIN: 4}, 6, accumulate=2)
    assert [(p, n) for batch in alone for _, p, n in batch] == of[MAIN]


def test_a_batch_size_of_a_stream_that_does_not_fit_is_named():
    with pytest.raises(UserError, match="batch_size of teacher 'det' = 3 does not divide over 2"):
        StreamBatches(12, 1, {MAIN: 4, "det": 3}, 6, world=2)


def test_an_epoch_sees_every_picture_once_and_the_next_in_another_order():
    batches = order(pictures=12, batch_size=4, steps=6)
    first, second = (sum(batches[i : i + 3], []) for i in (0, 3))
    assert sorted(p for p, _ in first) == sorted(p for p, _ in second) == list(range(12))
    assert [p for p, _ in first] != [p for p, _ in second]
    assert {view for _, view in first} == {0} and {view for _, view in second} == {1}


def test_repeats_give_each_picture_several_views_an_epoch_and_a_finite_set_of_views_comes_round():
    entries = sum(order(pictures=5, batch_size=5, steps=6, repeats=3), [])
    assert sorted(entries) == [(p, v) for p in range(5) for v in range(6)]
    wrapped = sum(order(pictures=5, batch_size=5, steps=6, repeats=3, views=2), [])
    assert wrapped == [(p, v % 2) for p, v in entries]


@pytest.mark.parametrize("start", [1, 3, 4, 8])
def test_starting_at_a_step_continues_the_very_same_order(start):
    assert order(start=start, accumulate=2) == order(accumulate=2)[2 * start :]


def test_ranks_and_accumulation_split_the_same_global_batches():
    whole = order(pictures=16, batch_size=8)
    ranks = [
        order(pictures=16, batch_size=8, rank=rank, world=2, accumulate=2) for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][2 * step + micro] for rank in range(2) for micro in range(2)]
        assert all(len(part) == 2 for part in parts)
        assert sorted(sum(parts, [])) == sorted(batch)


def test_impossible_batches_name_the_nearest_possible_one():
    with pytest.raises(UserError, match="data.repeats=4 or train.batch_size=10"):
        order(pictures=10, batch_size=32)
    with pytest.raises(UserError, match="over 4 processes .* use 8"):
        order(pictures=10, batch_size=7, world=4)


def test_an_unreadable_picture_is_replaced_by_the_next_and_reported(tmp_path, photo_folder, caplog):
    for path in photo_folder.rglob("*.jpg"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.jpg").write_bytes(b"broken")
    dataset = CropDataset(FolderPictures(tmp_path), config(tmp_path), [VIEW], seed=0)
    sample = dataset[MAIN, 3, 0]
    assert sample.picture == 3 and sample.skipped[0][0].endswith("03.jpg")
    assert dataset[MAIN, 4, 0].skipped == () and sample.views[IMAGE].float().std() > 0
    ledger = CorruptLedger(12, 0.1)
    with caplog.at_level(logging.WARNING):
        ledger.add(sample.skipped)
        ledger.add(dataset[MAIN, 3, 7].skipped)
    assert len(ledger) == 1 and caplog.text.count("03.jpg") == 1
    with pytest.raises(
        UserError, match="2 of 12 pictures are unreadable.*data.max_corrupt_fraction = 0.1.*03.jpg"
    ):
        ledger.add([("04.jpg", "broken too")])


def test_a_folder_of_nothing_but_damaged_pictures_stops(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="3 pictures in a row are unreadable"):
        CropDataset(FolderPictures(tmp_path), config(tmp_path), [VIEW], seed=0)[MAIN, 1, 0]
