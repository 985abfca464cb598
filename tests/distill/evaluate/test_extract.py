"""Cached extraction: right, resumable, mended when damaged, honest about bad features."""

import json
import os

import numpy as np
import pytest
import torch

from contract.errors import UserError
from contract.views import EVALUATED, ViewPolicy
from distill.evaluate.config import ExtractConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.extract import PolicyViews, extract


@pytest.fixture
def views(class_folders):
    return PolicyViews(open_classes(class_folders, "train"), 64, EVALUATED)


CONFIG = ExtractConfig(batch_size=3, workers=0, shard_size=5)


class Counting(torch.nn.Module):
    """An encoder that notes how many pictures it was shown."""

    def __init__(self, encoder):
        super().__init__()
        self.inner, self.seen = encoder, 0
        self.name, self.read_out, self.device = encoder.name, encoder.read_out, encoder.device
        self.dims, self.ranks = encoder.dims, encoder.ranks

    def forward(self, images):
        self.seen += len(images)
        return self.inner(images)

    def fingerprint(self):
        return self.inner.fingerprint()

    def need_summary(self, what):
        self.inner.need_summary(what)


def test_features_are_those_of_the_encoder(tiny_vit, views, tmp_path):
    found = extract(tiny_vit, views, tmp_path, CONFIG, patches=True)
    with torch.inference_mode():
        direct = tiny_vit(torch.stack([views[n] for n in range(len(views))]))
    torch.testing.assert_close(found.summaries(), direct.summary, atol=1e-5, rtol=1e-4)
    order = [7, 0, 5, 4]
    torch.testing.assert_close(
        found.patches(order), direct.patches[order].half().float(), atol=2e-3, rtol=2e-3
    )


def test_second_pass_computes_nothing(tiny_vit, views, tmp_path):
    encoder = Counting(tiny_vit)
    first = extract(encoder, views, tmp_path, CONFIG).summaries()
    assert encoder.seen == len(views)
    torch.testing.assert_close(
        extract(encoder, views, tmp_path, CONFIG).summaries(), first, rtol=0, atol=0
    )
    assert encoder.seen == len(views)


def test_an_interrupted_pass_goes_on_where_it_stopped(tiny_vit, views, tmp_path):
    class Stops(Counting):
        def forward(self, images):
            if self.seen >= 6:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        extract(Stops(tiny_vit), views, tmp_path, CONFIG, patches=True)
    rest = Counting(tiny_vit)
    found = extract(rest, views, tmp_path, CONFIG, patches=True)
    assert rest.seen == len(views) - 5, "the first shard of five was kept"
    whole = extract(tiny_vit, views, tmp_path / "fresh", CONFIG, patches=True)
    torch.testing.assert_close(found.summaries(), whole.summaries(), rtol=0, atol=0)


def test_parts_that_killed_jobs_left_are_removed_and_not_those_of_others(tiny_vit, views, tmp_path):
    """Another job of several processes may be filling the same shards at this moment."""
    extract(tiny_vit, views, tmp_path, CONFIG)
    (marker,) = tmp_path.glob("*/shard_000000.json")
    marker.unlink()
    new, old = (marker.parent / f"shard_000000.from_2.{n}.summary.npy" for n in ("1a", "2b"))
    for path in (new, old):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    extract(tiny_vit, views, tmp_path, CONFIG)
    assert marker.is_file() and new.exists() and not old.exists()


def test_a_damaged_shard_is_computed_again(tiny_vit, views, tmp_path, caplog):
    before = extract(tiny_vit, views, tmp_path, CONFIG, patches=True).summaries()
    (path,) = tmp_path.glob("*/shard_000001.summary.npy")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(data)
    encoder = Counting(tiny_vit)
    after = extract(encoder, views, tmp_path, CONFIG, patches=True).summaries()
    assert encoder.seen == 5 and "does not match its sha256" in caplog.text
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["{", "{}", "[]", json.dumps({"summary": "0" * 64})])
def test_a_damaged_marker_is_not_trusted(tiny_vit, views, tmp_path, text):
    extract(tiny_vit, views, tmp_path, CONFIG, patches=True)
    (marker,) = tmp_path.glob("*/shard_000000.json")
    marker.write_text(text)
    encoder = Counting(tiny_vit)
    extract(encoder, views, tmp_path, CONFIG, patches=True)
    assert encoder.seen == 5


def test_other_pictures_or_sizes_are_other_features(tiny_vit, class_folders, tmp_path):
    folders = open_classes(class_folders, "train")
    others = ("centre-crop:1", "squash", "letterbox", "squash,bilinear", "squash,no-antialias")
    for size, view in ((96, EVALUATED), *((64, ViewPolicy.parse(text)) for text in others)):
        extract(tiny_vit, PolicyViews(folders, size, view), tmp_path, CONFIG)
    extract(tiny_vit, PolicyViews(folders, 64, EVALUATED), tmp_path, CONFIG)
    assert len(list(tmp_path.iterdir())) == 7
    with pytest.raises(UserError, match="no image-level vector: set extract.view="):
        PolicyViews(folders, 64, ViewPolicy.parse("tiles"))


@pytest.mark.parametrize("kind", ["summary", "patches"])
def test_features_that_are_no_numbers_are_refused(tiny_vit, views, tmp_path, kind):
    class Broken(Counting):
        def forward(self, images):
            found = super().forward(images)
            getattr(found, kind)[0] = float("nan")
            return found

    with pytest.raises(UserError, match=f"{kind} features contain NaN"):
        extract(Broken(tiny_vit), views, tmp_path, CONFIG, patches=True)
    assert not list(tmp_path.glob("*/*.json")), "nothing half-written counts"


def test_patches_beyond_float16_are_refused(tiny_vit, views, tmp_path):
    class Loud(Counting):
        def forward(self, images):
            found = super().forward(images)
            return found._replace(patches=found.patches * 1e9)

    with pytest.raises(UserError, match="65504"):
        extract(Loud(tiny_vit), views, tmp_path, CONFIG, patches=True)


def test_workers_give_the_same_features(tiny_vit, views, tmp_path):
    one = extract(tiny_vit, views, tmp_path / "one", CONFIG).summaries()
    two = extract(
        tiny_vit, views, tmp_path / "two", CONFIG.model_copy(update={"workers": 2})
    ).summaries()
    np.testing.assert_array_equal(one, two)
