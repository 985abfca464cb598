"""DAVIS label propagation: measures, the propagation itself, whole videos, mistakes."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor

from contract.errors import UserError
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.video import (
    boundary,
    boundary_f,
    evaluate,
    hard_mask,
    propagate,
    region_similarity,
)

PALETTE = [0, 0, 0, 200, 0, 0, 0, 200, 0]


def write_video(data: Path, name: str, frames: list[np.ndarray], masks: list[np.ndarray]) -> None:
    """Store frames [H, W, 3] as PNG (lossless) and masks [H, W] as palette PNG in DAVIS's
    layout.
    """
    for part in ("JPEGImages", "Annotations"):
        (data / part / "480p" / name).mkdir(parents=True)
    for index, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        Image.fromarray(frame).save(data / "JPEGImages" / "480p" / name / f"{index:05d}.png")
        palette = Image.fromarray(mask.astype(np.uint8), "L").convert("P")
        palette.putdata(mask.flatten().tolist())
        palette.putpalette(PALETTE)
        palette.save(data / "Annotations" / "480p" / name / f"{index:05d}.png")


def list_videos(data: Path, *names: str) -> None:
    (data / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (data / "ImageSets" / "2017" / "val.txt").write_text("\n".join(names) + "\n")


def texture(seed: int, height: int, width: int, low: int, high: int) -> np.ndarray:
    """Smooth coloured noise between two grey levels."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width, 3)), (3, 3, 0))
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return (low + noise * (high - low)).astype(np.uint8)


def moving_squares(count: int = 7, step: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two textured squares of 48 px that cross a textured 128 x 192 ground in opposite
    directions.
    """
    ground = texture(0, 128, 192, 60, 130)
    red, blue = texture(1, 48, 48, 0, 140), texture(2, 48, 48, 0, 140)
    red[..., 0], blue[..., 2] = 255, 255
    frames, masks = [], []
    for index in range(count):
        frame, mask = ground.copy(), np.zeros((128, 192), np.uint8)
        for label, square, top, left in (
            (1, red, 8, 16 + step * index),
            (2, blue, 72, 128 - step * index),
        ):
            frame[top : top + 48, left : left + 48] = square
            mask[top : top + 48, left : left + 48] = label
        frames.append(frame)
        masks.append(mask)
    return frames, masks


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    data = tmp_path / "DAVIS"
    write_video(data, "squares", *moving_squares())
    list_videos(data, "squares")
    return data


CONFIG = EvaluationConfig.model_validate({"video": {"size": 256}})


def test_region_similarity_by_hand():
    truth = np.zeros((4, 6), bool)
    truth[:2, :4] = True  # 8 pixels
    half = np.zeros_like(truth)
    half[:2, 2:6] = True  # 8 pixels, 4 shared
    empty = np.zeros_like(truth)
    assert region_similarity(truth, truth) == 1
    assert region_similarity(half, truth) == 4 / 12
    assert region_similarity(empty, truth) == 0
    assert region_similarity(empty, empty) == 1


def test_boundary_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    expected = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert boundary(mask).astype(int).tolist() == expected
    # Nothing lies beyond the picture: its edge is no boundary.
    assert not boundary(np.ones((3, 5), bool)).any()


def test_boundary_f_by_hand():
    left, right = np.zeros((8, 20), bool), np.zeros((8, 20), bool)
    left[:, :5], right[:, :8] = True, True  # boundaries are columns 4 and 7, three pixels apart
    assert boundary_f(left, right, 3) == 1
    assert boundary_f(left, right, 2) == 0
    both = left.copy()
    both[:, 15:] = (
        True  # a second boundary, at column 14, that nothing matches: precision 1/2, recall 1
    )
    assert boundary_f(both, left, 3) == pytest.approx(2 / 3)
    empty = np.zeros_like(left)
    assert boundary_f(empty, empty, 3) == 1
    assert boundary_f(left, empty, 3) == boundary_f(empty, left, 3) == 0


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    found = np.zeros_like(mask)
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                other = mask[min(y + dy, height - 1), min(x + dx, width - 1)]
                found[y, x] |= mask[y, x] != other
    return found


def slow_f(prediction: np.ndarray, truth: np.ndarray, tolerance: int) -> float:
    ours, theirs = slow_boundary(prediction), slow_boundary(truth)
    if not ours.any() and not theirs.any():
        return 1.0
    if not ours.any() or not theirs.any():
        return 0.0
    precision = (distance_transform_edt(~theirs)[ours] <= tolerance).mean()
    recall = (distance_transform_edt(~ours)[theirs] <= tolerance).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(30))
def test_measures_match_an_independent_implementation(seed: int):
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(5, 50, 2))
    blur = random.uniform(0, 4)
    prediction, truth = (
        gaussian_filter(random.normal(size=shape), blur) > random.normal() * 0.1 for _ in range(2)
    )
    tolerance = int(random.integers(1, 6))
    assert boundary_f(prediction, truth, tolerance) == pytest.approx(
        slow_f(prediction, truth, tolerance), abs=1e-12
    )
    pairs = list(zip(prediction.flat, truth.flat, strict=True))
    union = sum(a or b for a, b in pairs)
    expected = sum(a and b for a, b in pairs) / union if union else 1
    assert region_similarity(prediction, truth) == pytest.approx(expected)


def slow_propagate(target, sources, labels, neighbours, radius, temperature) -> Tensor:
    n, h, w, _ = sources.shape
    result = torch.zeros(h, w, labels.shape[-1], dtype=target.dtype)
    for y in range(h):
        for x in range(w):
            seen = []
            for s in range(n):
                for v in range(h):
                    for u in range(w):
                        if radius == 0 or max(abs(v - y), abs(u - x)) <= radius:
                            seen.append((float(target[y, x] @ sources[s, v, u]), labels[s, v, u]))
            seen = sorted(seen, key=lambda pair: -pair[0])[:neighbours]
            weights = [math.exp(cosine / temperature) for cosine, _ in seen]
            for weight, (_, label) in zip(weights, seen, strict=True):
                result[y, x] += weight / sum(weights) * label
    return result


@pytest.mark.parametrize("limit", [1, 500, 2**26])
@pytest.mark.parametrize(
    ("neighbours", "radius"), [(1, 1), (5, 2), (3, 0), (9, 1), (1000, 1), (1000, 0)]
)
def test_propagate_matches_loops(neighbours: int, radius: int, limit: int):
    torch.manual_seed(neighbours + radius)
    target = F.normalize(torch.randn(5, 4, 6, dtype=torch.float64), dim=-1)
    sources = F.normalize(torch.randn(3, 5, 4, 6, dtype=torch.float64), dim=-1)
    labels = torch.rand(3, 5, 4, 3, dtype=torch.float64)
    found = propagate(target, sources, labels, neighbours, radius, 0.1, limit)
    torch.testing.assert_close(
        found, slow_propagate(target, sources, labels, neighbours, radius, 0.1)
    )


def test_hard_mask_stretches_each_map():
    # The object's map peaks at 0.4: unstretched it would lose everywhere, stretched it wins at its
    # peak.
    soft = torch.tensor([[[1.0, 0.0], [0.6, 0.4]], [[1.0, 0.0], [1.0, 0.0]]])
    assert hard_mask(soft, (2, 2)).tolist() == [[0, 1], [0, 0]]
    filled = torch.tensor([0.0, 1.0]).expand(2, 2, 2)
    assert hard_mask(filled, (4, 4)).eq(1).all()


def test_a_static_video_is_perfect(tiny_vit, tmp_path):
    data = tmp_path / "DAVIS"
    frame = texture(3, 64, 128, 0, 255)
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 16:48], mask[:, 80:112] = 1, 2  # bands: bilinear masks keep straight edges, not corners
    write_video(data, "still", [frame] * 5, [mask] * 5)
    config = EvaluationConfig.model_validate({"video": {"size": 64, "neighbours": 1}})
    outcome = evaluate(tiny_vit, data, config, tmp_path / "out")
    assert outcome.scores == {"J&F": 1.0, "J": 1.0, "F": 1.0}
    assert outcome.details["sequences"]["still"]["frames"] == 3


def test_the_longer_side_may_be_cut_to_a_multiple(tiny_vit, davis, tmp_path):
    config = EvaluationConfig.model_validate({"video": {"size": 64, "multiple": 20}})
    seen = set()
    with tiny_vit.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape[2:]))):
        evaluate(tiny_vit, davis, config, tmp_path / "out")
    assert (64, 80) in seen and (64, 96) not in seen  # 128x192: 96 becomes 80


def test_moving_objects_are_followed(tiny_vit, davis, tmp_path):
    runs = []
    with tiny_vit.register_forward_hook(lambda *_: runs.append(1)):
        outcome = evaluate(tiny_vit, davis, CONFIG, tmp_path / "out")
    _, masks = moving_squares()
    assert len(masks) <= len(runs) <= len(masks) + 2, "once a frame, and to try both sides"
    still = np.mean(
        [region_similarity(masks[0] == o, mask == o) for mask in masks[1:-1] for o in (1, 2)]
    )
    assert outcome.scores["J"] > still + 0.3  # background everywhere scores 0
    assert outcome.scores["J&F"] > 0.8
    assert outcome.scores["J&F"] == pytest.approx((outcome.scores["J"] + outcome.scores["F"]) / 2)
    assert [row["object"] for row in outcome.details["sequences"]["squares"]["objects"]] == [1, 2]
    assert 0 <= outcome.details["J recall"] <= 1
    assert outcome.files == (tmp_path / "out" / "video_squares.png",)
    with Image.open(outcome.files[0]) as picture:
        assert picture.width > 500


def test_a_convolutional_network_runs_and_objects_are_averaged(tiny_cnn, davis, tmp_path):
    frames, masks = moving_squares()
    one = [np.where(mask == 1, 1, 0) for mask in masks]
    write_video(davis, "alone", frames, one)
    write_video(davis, "unlisted", frames, one)
    list_videos(davis, "squares", "alone")
    outcome = evaluate(tiny_cnn, davis, CONFIG, tmp_path / "out")
    sequences = outcome.details["sequences"]
    assert list(sequences) == ["squares", "alone"]
    every = [row["J"] for sequence in sequences.values() for row in sequence["objects"]]
    assert len(every) == 3 and outcome.scores["J"] == pytest.approx(np.mean(every))
    assert [path.name for path in outcome.files] == ["video_squares.png"]


def spoil_mask(data: Path, mask: np.ndarray, index: int = 0) -> None:
    Image.fromarray(mask).save(data / "Annotations" / "480p" / "squares" / f"{index:05d}.png")


def drop(data: Path, *parts: str) -> None:
    path = data.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


MISTAKES = {
    "no frames": (lambda d: drop(d, "JPEGImages"), "no folder JPEGImages/480p"),
    "no masks": (lambda d: drop(d, "Annotations"), "no folder Annotations/480p"),
    "empty list": (lambda d: list_videos(d), "val.txt lists no sequence"),
    "unknown": (lambda d: list_videos(d, "ghost"), "sequence ghost has no folder"),
    "first": (
        lambda d: drop(d, "Annotations", "480p", "squares", "00000.png"),
        "squares has no annotation of its first frame",
    ),
    "later": (
        lambda d: drop(d, "Annotations", "480p", "squares", "00003.png"),
        "lacks the annotation .*00003.png",
    ),
    "short": (
        lambda d: [drop(d, "JPEGImages", "480p", "squares", f"{i:05d}.png") for i in range(5)],
        "has 2 frames: 3 are needed",
    ),
    "size": (
        lambda d: spoil_mask(d, np.ones((64, 96), np.uint8)),
        "is 96x64, but its frame is 192x128",
    ),
    "size later": (
        lambda d: spoil_mask(d, np.ones((64, 96), np.uint8), 2),
        "is 96x64, but its frame is 192x128",
    ),
    "no object": (lambda d: spoil_mask(d, np.zeros((128, 192), np.uint8)), "has no object"),
    "void": (lambda d: spoil_mask(d, np.full((128, 192), 255, np.uint8)), "has no object"),
    "colour": (lambda d: spoil_mask(d, np.ones((128, 192, 3), np.uint8)), "has mode RGB"),
    "mask damaged": (
        lambda d: truncate(d / "Annotations" / "480p" / "squares" / "00000.png"),
        "cannot read the mask .*00000.png",
    ),
    "frame damaged": (
        lambda d: truncate(d / "JPEGImages" / "480p" / "squares" / "00002.png"),
        "00002.png cannot be read",
    ),
    "frame size": (
        lambda d: Image.new("RGB", (96, 64)).save(
            d / "JPEGImages" / "480p" / "squares" / "00002.png"
        ),
        "is 96x64, but the first mask is 192x128",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tiny_vit, davis, tmp_path):
    spoil, words = MISTAKES[mistake]
    spoil(davis)
    with pytest.raises(UserError) as error:
        evaluate(tiny_vit, davis, CONFIG, tmp_path / "out")
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_features_that_are_not_finite_are_named(tiny_vit, davis, tmp_path, monkeypatch):
    bias = tiny_vit.net.norm.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(
        UserError, match="tiny-vit returns features that are not finite for .*00000.png"
    ):
        evaluate(tiny_vit, davis, CONFIG, tmp_path / "out")
