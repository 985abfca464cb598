"""The papers' training and test of dense heads: random windows under one geometry with their maps,
whole pictures, mirrored ones.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from contract.errors import UserError
from contract.images import read_views
from distill.evaluate import depth, segmentation
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.augment import DEPTH, SEGMENTATION, AugmentedPairs, Style
from distill.evaluate.config import DenseConfig, EvaluationConfig
from distill.evaluate.datasets import Pairs, open_pairs, read_depth
from distill.evaluate.dense import PictureMaps, side_of, train_head, whole_views
from distill.evaluate.encoder import parse_model, teacher_encoder
from distill.evaluate.windows import WholeViews, WindowViews, cut_windows
from distill.heads import load_head
from tests.conftest import run_here


@pytest.fixture(scope="module")
def painted(tmp_path_factory) -> Pairs:
    """Two pictures of 96x64, and one of 40x120, whose red channel is their own depth: it rises to
    the right and, twice as fast, to the bottom.
    """
    root = tmp_path_factory.mktemp("painted")
    for kind in ("images", "depth"):
        (root / "val" / kind).mkdir(parents=True)
    for name, (width, height) in {"a": (96, 64), "b": (96, 64), "c": (40, 120)}.items():
        x, y = np.arange(width), np.arange(height)[:, None]
        level = np.minimum(10 + x / 2 + y, 255)
        picture = np.stack([level] * 3, axis=-1).round().astype(np.uint8)
        Image.fromarray(picture).save(root / "val" / "images" / f"{name}.png")
        np.save(root / "val" / "depth" / f"{name}.npy", level.astype(np.float32))
    return open_pairs(root, "val", "depth")


def windows_of(pairs: Pairs, points: int = 64, seed: int = 0, **style) -> AugmentedPairs:
    return AugmentedPairs(
        pairs,
        lambda pairs, number: read_depth(pairs, number, 1.0, 255.0),
        (64, points),
        (0.5, 2.0),
        Style(0, **style),
        seed,
    )


def test_pixels_and_labels_go_through_one_geometry(painted):
    windows = windows_of(painted)
    padded = mirrored = larger = 0
    for step in range(12):
        for number in range(3):
            pixels, labels = windows[step, number]
            assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
            outside = labels == 0
            assert torch.equal(pixels[0] == 0, outside), "black exactly where nothing is labelled"
            # half a level of rounding, and half a pixel of the picture to the nearest label
            error = (pixels[0].float() - labels)[~outside].abs()
            assert error.max() <= 1.5 and error.mean() < 0.6
            rows, columns = (~outside).any(1).sum(), (~outside).any(0).sum()
            assert not outside[:rows, :columns].any(), "padded at the right and the bottom alone"
            padded += bool(outside.any())
            across = labels[0, columns - 1] - labels[0, 0]
            mirrored += bool(across < 0)
            larger += bool(across.abs() / columns < 0.4)  # half a level a pixel, if not resized
    assert 6 <= padded <= 30 and 9 <= mirrored <= 27 and 9 <= larger <= 33


def test_a_window_is_a_function_of_seed_step_and_picture(painted):
    same, again = (
        windows_of(painted, colours=DEPTH.colours),
        windows_of(painted, colours=DEPTH.colours),
    )
    assert all(torch.equal(a, b) for a, b in zip(same[3, 1], again[3, 1], strict=True))
    others = same[4, 1], same[3, 0], windows_of(painted, seed=-1, colours=DEPTH.colours)[3, 1]
    assert not any(torch.equal(same[3, 1][0], other[0]) for other in others)
    fine, coarse = windows_of(painted)[3, 1], windows_of(painted, points=16)[3, 1]
    assert torch.equal(fine[0], coarse[0]) and coarse[1].shape == (16, 16)
    assert torch.equal(coarse[1], fine[1][2::4, 2::4])


def test_windows_of_one_class_are_drawn_again(painted):
    def read(pairs: Pairs, number: int) -> np.ndarray:
        return np.where(np.arange(96) < 70, 0, 1)[None].repeat(64, 0)

    covered = []
    for cap in (None, 0.75):
        windows = AugmentedPairs(
            painted, read, (64, 64), (2.0, 2.0), Style(SEGMENTATION.fill, cap=cap), 0
        )
        labels = torch.stack([windows[step, 0][1] for step in range(20)])
        covered.append(((labels == 0).float().mean((1, 2)) > 0.75).sum())
    assert covered[0] >= 8 and covered[1] <= covered[0] / 2


@pytest.mark.parametrize("style", [SEGMENTATION, DEPTH])
def test_colours_change_colours_alone(style):
    ramp = np.arange(60, 188, dtype=np.uint8)
    grey = Image.fromarray(np.stack([ramp[None].repeat(8, 0)] * 3, axis=-1))
    red = Image.new("RGB", (8, 8), (200, 40, 40))
    greys, reds = [], []
    for seed in range(24):
        changed = np.asarray(style.colours(grey, np.random.default_rng(seed))).astype(int)
        if style is SEGMENTATION:  # a factor: grey stays grey. The other one adds saturation
            assert (changed[..., 0] == changed[..., 1]).all()
            assert (np.diff(changed[0, :, 0]) >= 0).all()
        greys.append(changed[0, 64, 0] - 124)
        reds.append(tuple(np.asarray(style.colours(red, np.random.default_rng(seed)))[0, 0]))
    assert np.abs(greys).max() <= 110 and sum(value != 0 for value in greys) >= 12
    assert len(set(reds)) >= 12 and all(max(red) == red[0] for red in reds)


def test_whole_pictures_are_padded_and_cut_again(painted):
    whole = WholeViews(painted, 40, 16)
    assert whole.inner == [(40, 60), (40, 60), (120, 40)]
    assert whole.shapes() == {(48, 64), (128, 48)}
    view = whole[0]
    assert view.shape == (3, 48, 64)
    assert (view[:, 40:] == 0).all() and (view[:, :, 60:] == 0).all() and (view[:, :40, :60]).all()
    # a map that rises with the view's own pixels rises with the picture's
    x = (torch.arange(16) * 4 + 2.0).expand(1, 1, 12, 16)
    restored = whole.restore(x, 0, 96, 64)
    assert restored.shape == (1, 64, 96)
    expected = (torch.arange(96) + 0.5) * 60 / 96
    torch.testing.assert_close(restored[0, 20, 8:88], expected[8:88], atol=0.1, rtol=0)


@pytest.mark.parametrize("text", ["squash", "centre-crop:0.875", "letterbox", "tiles:0.25"])
def test_maps_are_scored_by_the_view_that_is_served(painted, tiny_vit, text):
    """The map of a head that repeats what it is shown is the picture where the view shows it."""
    config = EvaluationConfig.model_validate({"dense": {"test": "view"}, "extract": {"view": text}})
    windows = WindowViews(painted, 64)
    whole = whole_views(tiny_vit, windows, config)
    assert str(whole.view).startswith(text)
    maps = PictureMaps(
        lambda seen: seen, lambda images: images[:, :1].float(), windows, whole, True
    )
    for number, (width, height) in enumerate([(96, 64), (96, 64), (40, 120)]):
        level = read_depth(painted, number, 1.0, 255.0)
        found, shown = maps(number, width, height)[0], maps.shown(width, height)
        assert found.shape == (height, width) and torch.equal(shown, ~found.isnan())
        if text == "centre-crop:0.875":
            assert abs(shown.float().mean() - (0.875 * min(width, height)) ** 2 / level.size) < 0.03
        else:
            assert shown.all()
        wrong = (found - torch.from_numpy(level))[shown].abs()
        # a mirrored view of an odd number of pixels lies half of one beside it
        assert wrong.mean() < 1.5 and wrong.max() < 12


def test_a_view_is_scored_on_the_pixels_that_are_served(tmp_path, tiny_vit):
    """A JPEG is decoded smaller there, and the side is the network's own."""
    for kind in ("images", "depth"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8)
    path = tmp_path / "val" / "images" / "a.jpg"
    Image.fromarray(noise).save(path)
    np.save(tmp_path / "val" / "depth" / "a.npy", np.ones((300, 420), np.float32))
    pairs = open_pairs(tmp_path, "val", "depth")
    config = EvaluationConfig.model_validate({"dense": {"test": "view"}})
    side = side_of(tiny_vit, config.dense)
    assert side == tiny_vit.image_size == 64
    assert side_of(tiny_vit, DenseConfig(test="view", size=96)) == 96
    whole = whole_views(tiny_vit, WindowViews(pairs, side), config)
    served = read_views(path.read_bytes(), whole.view, side, side)
    assert torch.equal(whole[0], torch.from_numpy(served).permute(0, 3, 1, 2))
    np.save(tmp_path / "val" / "depth" / "a.npy", np.ones((420, 300), np.float32))
    with pytest.raises(UserError, match="is 300x420, but its picture is 420x300"):
        whole[0]


def test_windows_follow_each_other_as_closely_as_asked():
    assert len(cut_windows(0, 640, 480)) == 2
    boxes = [window.box[0] for window in cut_windows(0, 640, 480, 0.25)]
    assert boxes == [0, 80, 160]


def test_a_mirrored_map_is_the_mean_of_both(painted):
    def see(images: torch.Tensor) -> torch.Tensor:
        return images[:, :1, ::4, ::4].float() / 100

    def head(seen: torch.Tensor) -> torch.Tensor:
        return seen + torch.arange(16.0)  # depends on the place in the window

    views = WindowViews(painted, 64)
    one, both = (PictureMaps(head, see, views, None, mirror)(0, 96, 64) for mirror in (False, True))
    assert one.shape == both.shape == (1, 64, 96)
    # the place counts as its mean everywhere, so what is left hardly depends on the column
    assert one[0, 32, 60] - one[0, 32, 4] > 4
    assert (both[0, 32, 60] - both[0, 32, 4]).abs() < 0.6
    assert both.mean().item() == pytest.approx(one.mean().item(), abs=0.1)


def test_norms_of_a_trained_backbone_do_not_decay():
    weights = {name: nn.Parameter(torch.ones(2)) for name in ("blocks.0.norm1.weight", "fc.weight")}
    head = nn.Linear(1, 1)
    dense = {"steps": 2, "batch_size": 2, "lr": 0.1, "weight_decay": 0.5}
    config = EvaluationConfig.model_validate({"dense": dense})

    class Points:
        keep = True

        def __len__(self) -> int:
            return 4

        def __getitem__(self, key):
            return torch.zeros(1), torch.zeros(1)

    def loss(output, truth):
        return output.sum() + 0 * sum(weight.sum() for weight in weights.values())

    train_head(
        head,
        lambda batch: batch,
        Points(),
        loss,
        config,
        torch.device("cpu"),
        (list(weights.items()), 1.0),
    )
    norm, other = (weight.detach() for weight in weights.values())
    assert torch.equal(norm, torch.ones(2)) and (other < 1).all()


@pytest.fixture(scope="module")
def wide(scenes, tmp_path_factory) -> Path:
    """Six scenes to learn from and two to score, 64x48 pixels."""
    root = tmp_path_factory.mktemp("wide")
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "masks", "depth"):
            (root / split / kind).mkdir(parents=True)
            for path in sorted((scenes / "dense" / split / kind).iterdir())[:count]:
                with Image.open(path) as image:
                    image.crop((0, 8, 64, 56)).save(root / split / kind / path.name)
    return root


FEW = {"size": 64, "steps": 3, "batch_size": 2}


def test_a_head_of_the_papers_protocol(tiny_vit, wide, tmp_path):
    """Frozen features of augmented windows, whole pictures, twice the same."""
    dense = {**FEW, "augment": True, "test": "whole", "loss_stride": 1}
    config = EvaluationConfig.model_validate({"dense": dense, "extract": {"workers": 0}})
    runs = []
    for name in ("a", "b"):
        outcome = segmentation.evaluate(
            tiny_vit, wide, config, tmp_path / "cache", tmp_path / name, {"student_sha256": "s"}
        )
        head = load_head(tmp_path / name / "heads" / "segmentation.safetensors", "s")
        runs.append((outcome.scores, head.module.linear.weight.clone()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert outcome.details["test"] == "whole"
    assert not (tmp_path / "cache").exists(), "no window is seen twice, so none is kept"
    seeded = config.model_copy(update={"seed": 1})
    other = segmentation.evaluate(tiny_vit, wide, seeded, tmp_path / "c", tmp_path / "c", {})
    assert math.isfinite(other.scores["mIoU"])


def test_a_network_of_one_size_is_tested_by_windows(wide, tmp_path, caplog):
    config = parse_model("beit_base_patch16_224@random")
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    encoder = teacher_encoder(config.model_copy(update={"kwargs": kwargs}), size=64, name="fixed")
    dense = {**FEW, "augment": True, "test": "whole"}
    config = EvaluationConfig.model_validate({"dense": dense, "extract": {"workers": 0}})
    with caplog.at_level("WARNING"):
        outcome = depth.evaluate(encoder, wide, config, tmp_path / "cache", tmp_path, {})
    assert outcome.details["test"] == "windows" and outcome.scores["rmse"] > 0
    assert "fixed does not take pictures of 96x64: square windows" in caplog.text


@pytest.mark.slow
def test_the_protocol_is_printed_and_stored(wide, tmp_path):
    done = run_here(
        *("resnet10t@random", "--size", 64, "--data", wide, "--tasks", "segmentation,depth"),
        *("--output", tmp_path, "protocol=paper", "depth.width=8", "extract.workers=0"),
        *(f"dense.{key}={value}" for key, value in FEW.items()),
        command=evaluate,
    )
    assert done.returncode == 0, done.stderr
    head, report = (" ".join(part.split()) for part in done.stdout.split("rmse", 1))
    assert (
        "protocol segmentation: paper: " in head and "dense.steps=3 (given; paper: 80000)" in head
    )
    assert "dense.augment=true" in head and "otherwise than the papers: " in head
    assert "protocol depth: paper, not as in the papers: " in report
    assert "dense.steps=3 (given; paper: 25000)" in report
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"].values()
    entry = row["depth"]
    assert entry["protocol"]["name"] == "paper" and entry["details"]["head"] == "dpt"
    assert entry["protocol"]["differs"]["dense.steps"]["reason"] == "given"
    assert entry["protocol"]["paper"]["depth.backbone_lr"] == {"value": 0.1, "source": "UMT A.1"}
    assert entry["settings"]["depth"]["backbone_lr"] == 0.1
    assert row["segmentation"]["settings"]["dense"]["test"] == "whole"
    assert row["segmentation"]["details"]["test"] == "whole"
    assert not (tmp_path / "heads" / "depth.safetensors").exists(), "its backbone was trained too"
