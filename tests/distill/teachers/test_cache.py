"""The cache of teacher features: right rows, interrupted fills, foreign caches, two ranks."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from contract.errors import UserError
from distill.config import DataConfig
from distill.data.batches import Batch, collate
from distill.data.crops import IMAGE, MAIN, CropDataset, View
from distill.data.pictures import FolderPictures
from distill.distributed import Ranks
from distill.features import Features
from distill.teachers.cache import Spec, TeacherCache, bytes_a_slot
from tests.conftest import metrics_of, run_here, small_recipe

VIEW = View(IMAGE, 32, scale=(0.3, 1.0))
SPECS = {
    "a": Spec(VIEW, {"summary": (3,), "patches": (2, 2, 3)}),
    "b": Spec(VIEW, {"summary": (3,), "patches": (1, 1, 3)}),
}
VIEWS, SHARD = 2, 5
ALONE = Ranks(0, 1, torch.device("cpu"))


class Counting:
    """Features that say which crop they are of, and how often they were computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch) -> dict[str, Features]:
        images = batch.views[IMAGE].float()
        self.calls += len(images)
        mean = images.mean(dim=(2, 3))
        pooled = torch.nn.functional.adaptive_avg_pool2d(images, 2).permute(0, 2, 3, 1)
        return {"a": Features(mean, pooled), "b": Features(mean + 1, mean[:, None, None])}


@pytest.fixture
def dataset(photo_folder) -> CropDataset:
    return CropDataset(
        FolderPictures(photo_folder),
        DataConfig(**small_recipe(photo_folder)["data"]),
        [VIEW],
        seed=0,
    )


def open_at(folder, dataset) -> TeacherCache:
    return TeacherCache(folder, VIEWS, len(dataset.pictures) * VIEWS, SHARD, SPECS)


def batch_of(dataset, keys) -> Batch:
    return collate([dataset[MAIN, *key] for key in keys])


def test_what_is_read_is_what_the_teachers_said_of_that_view_in_half_precision(tmp_path, dataset):
    cache, look = open_at(tmp_path, dataset), Counting()
    cache.fill(dataset, look, ALONE, workers=0)
    assert look.calls == 24 and cache.missing() == []
    dataset.features = cache.rows
    batch = batch_of(dataset, [(0, 0), (11, 1), (5, 1), (2, 1), (2, 0)])
    assert batch.features[MAIN].dtype == torch.uint8
    found, expected = cache.read(batch), look(batch)
    for label in SPECS:
        assert list(found[label].named()) == ["summary", "patches"]
        for kind, values in found[label].named().items():
            assert torch.equal(values, expected[label].named()[kind].half().float())


def test_every_crop_further_maps_and_a_missing_summary_are_kept(tmp_path, photo_folder, dataset):
    views = [
        View("pair", 32, crops=2, scale=(0.3, 1.0)),
        View("own", 16, scale=(0.3, 1.0), stream="det"),
    ]
    both = CropDataset(dataset.pictures, dataset.config, views, seed=0)

    def look(batch: Batch) -> dict[str, Features]:
        pair, own = (batch.views[name].float().permute(0, 2, 3, 1) for name in ("pair", "own"))
        return {
            "a": Features(pair.mean(dim=(1, 2)), pair[:, ::16, ::16]),
            "det": Features(None, own[:, ::8, ::8], (own[:, ::4, ::4], own[:, :1, :1])),
        }

    keys = [(MAIN, 4, 1), (MAIN, 2, 0), ("det", 9, 1)]
    expected = look(collate([both[key] for key in keys]))
    specs = {
        label: Spec(view, {k: tuple(v.shape[1:]) for k, v in expected[label].named().items()})
        for label, view in zip(("a", "det"), views, strict=True)
    }
    cache = TeacherCache(tmp_path, VIEWS, len(both.pictures) * VIEWS, SHARD, specs)
    cache.fill(both, look, ALONE, workers=0)
    both.features = cache.rows
    found = cache.read(collate([both[key] for key in keys]))
    assert found["det"].summary is None and len(found["det"].maps) == 2
    for label in specs:
        for kind, values in found[label].named().items():
            assert torch.equal(values, expected[label].named()[kind].half().float())


def test_an_interrupted_fill_computes_only_what_is_missing_and_ends_with_the_same_bytes(
    tmp_path, dataset, caplog
):
    whole, broken = open_at(tmp_path / "whole", dataset), open_at(tmp_path / "broken", dataset)
    whole.fill(dataset, Counting(), ALONE, workers=0)
    broken.fill(dataset, Counting(), ALONE, workers=0)
    for shard in (1, 4):
        (tmp_path / "broken" / f"shard_{shard:06d}.ok").unlink()
    (tmp_path / "broken" / "shard_000001.a.patches.npy").write_bytes(b"half-written")
    again, look = open_at(tmp_path / "broken", dataset), Counting()
    with caplog.at_level("INFO"):
        again.fill(dataset, look, ALONE, workers=0)
    assert look.calls == 5 + 4 and "15 of 24 views present (62 % hits), computed 9" in caplog.text
    for path in (tmp_path / "whole").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()


def test_two_ranks_fill_the_shards_that_the_first_lists(tmp_path, dataset):
    looks = [Counting(), Counting()]

    class Place(Ranks):
        """One of two processes, which run one after the other here."""

        def barrier(self) -> None:
            pass

        def gather(self, value: object) -> list[object]:
            return [list(range(5)), None] if value is None or isinstance(value, list) else [value]

    for rank, look in enumerate(looks):
        # the second finds a cache that is half full, as if another run filled it too
        cache = open_at(tmp_path, dataset)
        cache.fill(dataset, look, Place(rank, 2, torch.device("cpu")), workers=0)
    assert [look.calls for look in looks] == [5 + 5 + 4, 5 + 5]
    assert open_at(tmp_path, dataset).missing() == []


def test_a_shard_that_disappears_while_others_are_filled_is_an_error(tmp_path, dataset):
    look = Counting()
    cache = open_at(tmp_path, dataset)
    cache.fill(dataset, look, ALONE, workers=0)
    (tmp_path / "shard_000003.ok").unlink()

    def rival(batch: Batch) -> dict[str, Features]:
        (tmp_path / "shard_000001.ok").unlink()
        return look(batch)

    with pytest.raises(UserError, match=r"shard 1 \(1 of 5\) disappeared while"):
        cache.fill(dataset, rival, ALONE, workers=0)


def test_a_damaged_picture_is_replaced_as_in_training_and_named(tmp_path, dataset, caplog):
    dataset.pictures = FolderPictures(shutil.copytree(dataset.pictures.folder, tmp_path / "own"))
    Path(dataset.pictures.name(2)).write_bytes(b"no picture")
    cache, look = open_at(tmp_path / "cache", dataset), Counting()
    with pytest.raises(UserError, match="1 of 12 pictures are unreadable, more than"):
        cache.fill(dataset, look, ALONE, workers=0)
    dataset.config = dataset.config.model_copy(update={"max_corrupt_fraction": 0.1})
    caplog.clear()
    cache.fill(dataset, look, ALONE, workers=0)
    assert caplog.text.count("skipped ") == 1 and dataset.pictures.name(2) in caplog.text
    dataset.features = cache.rows
    batch = batch_of(dataset, [(2, 1), (3, 1)])
    expected = look(batch)["a"].summary.half().float()
    assert torch.equal(cache.read(batch)["a"].summary, expected)


def test_a_row_of_odd_length_is_read_alone(tmp_path, dataset):
    cache = TeacherCache(tmp_path, VIEWS, 24, SHARD, SPECS, "int8")
    cache.fill(dataset, Counting(), ALONE, workers=0)
    dataset.features = cache.rows
    batch = batch_of(dataset, [(0, 1)])  # of b 3 bytes of a summary, and then its scale
    expected = Counting()(batch)["b"].summary
    assert torch.allclose(cache.read(batch)["b"].summary, expected, rtol=0.02)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("decode_jpeg", MemoryError()),
        ("decode_jpeg", ValueError("Insufficient memory (case 4)")),
        ("decode_jpeg_header", MemoryError()),
    ],
)
def test_a_picture_is_not_replaced_where_memory_runs_out(dataset, monkeypatch, place, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"distill.data.pixels.simplejpeg.{place}", fail)
    with pytest.raises(UserError, match="cannot read .*jpg: Cannot allocate memory .free some"):
        dataset[MAIN, 0, 0]


def test_features_beyond_half_precision_are_refused_by_name(tmp_path, dataset):
    def look(batch: Batch) -> dict[str, Features]:
        size = len(batch.views[IMAGE])
        return {"loud": Features(torch.full((size, 3), 1e6), torch.zeros(size, 1, 1, 3))}

    cache = TeacherCache(tmp_path, VIEWS, 24, SHARD, {"loud": SPECS["b"]})
    with pytest.raises(UserError, match="teacher 'loud': its summary exceed float16"):
        cache.fill(dataset, look, ALONE, workers=0)


def test_a_damaged_shard_is_named_and_computed_again_alone(tmp_path, dataset):
    cache, look = open_at(tmp_path, dataset), Counting()
    cache.fill(dataset, look, ALONE, workers=0)
    whole = cache.rows(MAIN, 0, 0)
    path = tmp_path / "shard_000000.a.summary.npy"
    good = path.read_bytes()
    for bad in (good[:-1], good[:40], b"", None):
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(UserError, match=r"shard_000000.a.summary.npy .* shard_000000.ok"):
            open_at(tmp_path, dataset).rows(MAIN, 0, 0)
    (tmp_path / "shard_000000.ok").unlink()
    again = open_at(tmp_path, dataset)
    again.fill(dataset, look, ALONE, workers=0)
    assert look.calls == 24 + SHARD and torch.equal(again.rows(MAIN, 0, 0), whole)


def test_int8_takes_half_the_room_and_its_error_is_printed(tmp_path, dataset, caplog):
    shapes = {"summary": (64,), "patches": (2, 2, 64)}
    size = 5 * (64 + 2)  # of each vector a scale of two bytes

    def look(batch: Batch) -> dict[str, Features]:
        pixels = batch.views[IMAGE].flatten(1)[:, :64].float() - 128
        values = pixels[:, None] * torch.logspace(-6, 1, 5)[:, None]
        values[:, 1] = 0
        return {"a": Features(values[:, 0], values[:, 1:].unflatten(1, (2, 2)))}

    specs = {"a": Spec(VIEW, shapes)}
    assert bytes_a_slot(specs, "int8") == size and bytes_a_slot(specs, "float16") == 640
    cache = TeacherCache(tmp_path, VIEWS, len(dataset.pictures) * VIEWS, SHARD, specs, "int8")
    with caplog.at_level("INFO"):
        cache.fill(dataset, look, ALONE, workers=0)
    assert "24 views of int8" in caplog.text
    stated = re.findall(r"int8 changes a.(\w+) by ([0-9.]+) %", caplog.text)
    assert [kind for kind, _ in stated] == ["summary", "patches"]
    expected = look(batch_of(dataset, [(3, 1)]))["a"].named()
    dataset.features = cache.rows
    found = cache.read(batch_of(dataset, [(3, 1)]))["a"].named()
    for kind, share in stated:
        error = (found[kind] - expected[kind]).norm(dim=-1)
        assert (error <= 0.02 * expected[kind].norm(dim=-1) + 1e-9).all()
        assert 0.2 < float(share) < 1.5


def test_a_cache_that_does_not_fit_is_refused_before_it_is_filled(tmp_path, dataset):
    vast = {"a": Spec(VIEW, {"summary": (10**15,)})}
    cache = TeacherCache(tmp_path / "new", VIEWS, 24, SHARD, vast)
    with pytest.raises(UserError, match="needs 48000000.00 GB more, but .* GB are free"):
        cache.fill(dataset, Counting(), ALONE, workers=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_cache_of_other_teachers_or_crops_is_refused_naming_the_field(recipe_file, tmp_path):
    cached = {
        "teacher_cache": {"views": 2, "path": str(tmp_path / "cache")},
        "teacher_runtime": {"precision": "fp32"},
    }
    done = run_here(recipe_file(**cached), "--output", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "0 of 24 views present (0 % hits), computed 24" in done.stdout
    # another run of the same teachers and crops reads it as it is
    again = run_here(
        recipe_file(**cached, student={"drop_path": 0.0}), "--output", tmp_path / "two"
    )
    assert "24 of 24 views present (100 % hits), computed 0" in again.stdout
    different = (
        ("data.crop_scale=[0.1, 0.9]", "crop_scale"),
        ("train.seed=3", "seed"),
        ("teacher_cache.views=3", "views"),
        ("teachers.1.kwargs.act_layer=quick_gelu", "mae.kwargs"),
        ("teacher_runtime.precision=bf16", "cls.precision"),
    )
    for override, field in different:
        refused = run_here(recipe_file(**cached), override, "--output", tmp_path / field)
        assert refused.returncode == 2
        assert f"was made with {field} = " in refused.stderr
        assert "teacher_cache.path" in refused.stderr


@pytest.mark.slow
def test_a_cached_run_starts_from_the_losses_of_an_uncached_one(recipe_file, tmp_path):
    # raw targets: random teachers hardly vary, and divided by so small a deviation half precision's
    # rounding would show
    same = {"train": {"steps": 1}, "targets": {"normalize": "none"}}
    assert run_here(recipe_file(**same), "--output", tmp_path / "plain").returncode == 0
    assert (
        run_here(
            recipe_file(**same, teacher_cache={"views": 2}), "--output", tmp_path / "cached"
        ).returncode
        == 0
    )
    plain, cached = metrics_of(tmp_path / "plain")[0], metrics_of(tmp_path / "cached")[0]
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-3)
