"""Parity judges every position and every picture's neighbours: faults that the cosine and the
length of a whole picture's output do not notice.
"""

import numpy as np
import pytest

from contract.manifest import read_manifest
from contract.parity_record import ParityRecord
from contract.positions import (
    far_positions,
    map_problem,
    position_errors,
    rows_of,
    shifted,
    variation,
)
from distill.data.pictures import PackagedPhotos
from export.agreement import POSITIONS, RELATIVE, TOLERANCE, agreement, judge
from export.graph import build_parts, open_student
from export.neighbours import crops, judge_neighbours, neighbours, summaries
from export.parity import _record, measure
from tests.export.test_parity import Altered

ROUNDING = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.5e-2, "int8": 6e-2}
"""Error over length of healthy exports."""


def smooth(pictures: int = 2, side: int = 32, width: int = 48) -> np.ndarray:
    """Maps [B, side * side, width] in which neighbours are alike, as features are."""
    random = np.random.default_rng(0)
    coarse = random.normal(size=(pictures, 5, 5, width))
    places = np.linspace(0, 3.999, side)
    low, part = places.astype(int), places % 1
    rows = coarse[:, low] * (1 - part)[:, None, None] + coarse[:, low + 1] * part[:, None, None]
    part = part[:, None]
    full = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
    return full.reshape(pictures, -1, width) + 2 * random.normal(size=width)


def rounded(wanted: np.ndarray, precision: str) -> np.ndarray:
    scale = np.linalg.norm(wanted, axis=-1, keepdims=True) / wanted.shape[-1] ** 0.5
    noise = np.random.default_rng(1).normal(size=wanted.shape)
    return wanted + ROUNDING[precision] * scale * noise


def noise_in_one(got: np.ndarray, wanted: np.ndarray) -> None:
    length = np.linalg.norm(wanted[1, 700]) / wanted.shape[-1] ** 0.5
    got[1, 700] += length * np.random.default_rng(2).normal(size=wanted.shape[-1])


def zero_in_one(got: np.ndarray, wanted: np.ndarray) -> None:
    got[1, 700] = 0


def artifacts(got: np.ndarray, wanted: np.ndarray) -> None:
    got[1, [3, 400, 900]] *= 2.2


def moved(got: np.ndarray, wanted: np.ndarray) -> None:
    got[1] = np.roll(got[1], 1, axis=0)


def moved_down(got: np.ndarray, wanted: np.ndarray) -> None:
    got[1] = np.roll(got[1], 32, axis=0)


BREAKAGES = (noise_in_one, zero_in_one, artifacts, moved, moved_down)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_fault_of_few_positions_is_found(precision, breakage):
    wanted = smooth()
    got = rounded(wanted, precision)
    assert judge(agreement(got, wanted, None), precision)[1] == ""
    breakage(got, wanted)
    picture, problem = judge(agreement(got, wanted, None), precision)
    assert picture == 1 and problem


def test_a_smooth_map_beside_its_place_is_found_though_no_position_is_far_off():
    wanted = smooth(side=64)
    got = rounded(wanted, "fp16")
    moved(got, wanted)
    result = agreement(got, wanted, None)
    assert result.cosine.min() > TOLERANCE["int8"] and result.relative.max() < RELATIVE["int8"]
    assert (result.errors[1, 64:] < POSITIONS["int8"].near).mean() > 0.95, "edges of rows apart"
    edges = result._replace(errors=np.minimum(result.errors, 0.01))
    assert "of the positions beside" in judge(edges, "int8")[1]


def even(side: tuple[int, int] = (14, 14)) -> np.ndarray:
    """A map [1, P, 48] that varies by 5 % of its length, as a grid [1, h, w, 48]."""
    places = np.stack(np.meshgrid(*(np.linspace(0, 2, n) for n in side), indexing="ij"), -1)
    random = np.random.default_rng(4)
    waves = np.sin(places @ random.normal(size=(2, 48)) * 2 + random.normal(size=48))
    return (waves - waves.mean((0, 1)))[None] * 0.05 + random.choice([-0.7, 0.7], 48)


TURNS = {
    "transposed": lambda grid: grid.swapaxes(1, 2),
    "mirrored": lambda grid: grid[:, :, ::-1],
    "two positions on": lambda grid: np.roll(grid, 2, 2),
    "constant": lambda grid: grid.mean((1, 2), keepdims=True) + 0 * grid,
}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_map_that_hardly_varies_is_judged_by_how_it_does(precision, turn):
    grid = even()
    wanted, wrong = (values.reshape(1, -1, 48) for values in (grid, TURNS[turn](grid)))
    assert judge(agreement(rounded(wanted, precision), wanted, None), precision)[1] == ""
    result = agreement(rounded(wrong, precision) if precision == "fp16" else wrong, wanted, None)
    assert far_positions(result.errors, POSITIONS["int8"])[1] == ""
    assert judge(result, precision)[1] != ""
    assert map_problem(wrong, wanted, POSITIONS[precision])[1] != "", "so does a server"


def test_columns_of_oblong_maps_are_tried_too():
    grid = even((12, 20))
    wanted, down = (values.reshape(1, -1, 48) for values in (grid, np.roll(grid, 1, 1)))
    assert shifted(down, wanted).all() and not shifted(rounded(wanted, "int8"), wanted).any()


def test_variation_under_much_rounding_is_kept():
    """Six times the variation says nothing, twice it nothing wrong."""
    wanted = even().reshape(1, -1, 48)
    length = np.linalg.norm(wanted, axis=-1, keepdims=True) / 48**0.5
    for times, least, most in ((0.08, 0.7, 1.3), (0.4, np.nan, np.nan)):
        noise = times * length * np.random.default_rng(1).normal(size=wanted.shape)
        (kept,), (spread,) = variation(wanted + noise, wanted)
        assert 0.02 < spread < 0.06 and (np.isnan(kept) if np.isnan(least) else least < kept < most)


@pytest.mark.parametrize("precision", POSITIONS)
def test_what_the_whole_picture_may_be_off_by_every_position_may(precision):
    assert POSITIONS[precision].near >= RELATIVE[precision]
    wanted = smooth()
    noise = np.random.default_rng(1).normal(size=wanted.shape)
    noise -= wanted * (noise * wanted).sum(-1, keepdims=True) / (wanted**2).sum(-1, keepdims=True)
    share = 0.9 * min(RELATIVE[precision], (2 - 2 * TOLERANCE[precision]) ** 0.5)
    noise *= np.linalg.norm(wanted, axis=-1, keepdims=True) / np.linalg.norm(
        noise, axis=-1, keepdims=True
    )
    assert judge(agreement(wanted + share * noise, wanted, None), precision)[1] == ""


@pytest.mark.parametrize("breakage", [noise_in_one, zero_in_one])
def test_the_cosine_of_the_picture_would_let_one_position_pass(breakage):
    wanted = smooth()
    got = rounded(wanted, "fp16")
    breakage(got, wanted)
    result = agreement(got, wanted, None)
    assert result.cosine.min() > TOLERANCE["fp16"] and result.relative.max() < RELATIVE["fp16"]
    assert "at position 700 of 1024" in judge(result, "fp16")[1]


def test_too_many_positions_beyond_the_tighter_bound_are_too_many():
    wanted, bounds = smooth(), POSITIONS["int8"]
    got = rounded(wanted, "int8")
    some = np.random.default_rng(3).choice(1024, int(bounds.share * 1024) + 40, replace=False)
    got[0, some] *= 1 + (bounds.near + bounds.worst) / 2
    result = agreement(got, wanted, None)
    assert result.errors.max() < bounds.worst
    assert "positions are off by more than" in judge(result, "int8")[1]


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_of_a_precision_passes(precision):
    wanted = smooth()
    assert judge(agreement(rounded(wanted, precision), wanted, None), precision)[1] == ""


def test_a_constant_map_with_rounding_is_not_taken_to_be_moved():
    wanted = np.ones((2, 64, 8)) * np.arange(1, 9)
    assert not shifted(rounded(wanted, "int8"), wanted).any()


def test_positions_are_counted_by_the_bounds_they_are_judged_by():
    wanted = smooth()
    got = rounded(wanted, "fp32")
    got[:, :100] *= 1.01
    result = agreement(got, wanted, None)
    inexact = result._replace(own=np.full(2, 2e-3), own_position=np.full(2, 4e-3))
    pictures = [("a", None), ("b", None)]
    for given, beyond in ((result, 100), (inexact, 0)):
        key = ("onnxruntime-cpu", "backbone", "features")
        row = _record(key, given, None, pictures, 2, (32, 32), "fp32")
        assert row.positions_beyond == beyond and row.passed == (beyond == 0), row.problem


def test_errors_by_hand():
    wanted = np.zeros((1, 4, 2))
    wanted[0, :, 0] = (1, 2, 4, 0)  # median 1.5
    got = wanted.copy()
    got[0, 0, 1], got[0, 2, 1], got[0, 3, 1] = 0.3, 1, np.nan
    np.testing.assert_allclose(position_errors(got, wanted), [[0.2, 0, 0.25, np.inf]])
    assert rows_of("depth", np.ones((2, 9))).shape == (2, 9, 1)
    assert rows_of("cls_token", np.ones((2, 9))) is None
    assert rows_of("spaces", np.ones((2, 5, 3, 7))).shape == (2, 15, 7)


def gallery(groups: int = 24, each: int = 2, width: int = 64) -> np.ndarray:
    """Features [groups * each, width]: pictures of a group are nearest to one another."""
    random = np.random.default_rng(0)
    common, own = random.normal(size=width), random.normal(size=(groups, 1, width))
    near = own + 0.45 * random.normal(size=(groups, each, width))
    return (2 * common + 0.5 * near).reshape(-1, width)


def test_neighbours_that_are_lost_while_every_cosine_is_kept_are_found():
    wanted = gallery(groups=12, each=4)
    noise = np.random.default_rng(1).normal(size=wanted.shape)
    got = wanted + 0.1 * np.linalg.norm(wanted, axis=1, keepdims=True) / 8 * noise
    assert judge(agreement(got, wanted, wanted.mean(0)), "int8")[1] == ""
    figures = neighbours(got, wanted, "int8")
    assert figures.telling and figures.nearest <= 0.9
    assert "have another nearest neighbour" in judge_neighbours(figures, "int8")


def test_neighbours_of_two_pictures_of_ten_that_change_places_are_found():
    wanted = gallery()
    got = wanted.copy()
    got[[0, 2, 4, 6]] = wanted[[2, 0, 6, 4]]
    figures = neighbours(got, wanted, "int8")
    assert figures.nearest == pytest.approx(1 - 8 / 48) and judge_neighbours(figures, "int8")


@pytest.mark.parametrize("precision", ROUNDING)
def test_rounding_keeps_neighbours(precision):
    wanted = gallery()
    figures = neighbours(rounded(wanted, precision), wanted, precision)
    assert judge_neighbours(figures, precision) == "" and figures.pictures == 48


def test_features_that_are_alike_for_all_pictures_have_no_neighbours_to_keep():
    wanted = 20 * np.random.default_rng(0).normal(size=64) + gallery() * 0.5
    figures = neighbours(np.random.default_rng(1).permutation(wanted), wanted, "int8")
    assert figures.nearest < 0.5 and judge_neighbours(figures, "int8") == ""
    assert neighbours(wanted[:5], wanted[:5], "int8") is None
    assert neighbours(np.repeat(wanted[:1], 20, 0), np.repeat(wanted[:1], 20, 0), "int8") is None


def test_few_photographs_get_more_crops():
    photos = [PackagedPhotos().load(number) for number in range(2)]
    assert len(list(crops(photos))) == 6 and len(list(crops(photos * 10))) == 40
    assert len(list(crops(photos * 16))) == 32


@pytest.fixture(scope="module")
def broken(small_bundle):
    """A function that compares the small bundle's graphs, one output changed."""
    files = {graph.name: small_bundle / graph.file for graph in read_manifest(small_bundle).graphs}
    student = open_student(small_bundle.parent / "run")
    parts, source = build_parts(student, 64, 64), PackagedPhotos()
    photos = [(source.name(number), source.load(number)) for number in range(6)]

    def broken(output, change) -> list[ParityRecord]:
        runtime = Altered(files, output, change)
        return measure(student, parts, [runtime], photos, (3,), ((64, 64),), "fp32")

    return broken


def test_what_is_wrong_with_a_position_is_recorded_of_every_kind_of_map(broken):
    def change(value, image):
        value = value.copy()
        value[:, 5] = 0
        return value

    for output in ("dino_patches", "depth"):
        rows = [row for row in broken(output, change) if row.output == output]
        assert {row.graph for row in rows if not row.passed} == {row.graph for row in rows}
        assert all(row.position_error > 0.1 and row.positions == 16 for row in rows)
        assert all(row.positions_beyond == 1 for row in rows)


def test_neighbours_are_recorded_of_what_stands_for_a_picture(broken, small_bundle):
    rows = broken("", lambda value, image: value)
    named = {
        port.name for part in build_parts(open_student(small_bundle.parent / "run"), 64, 64)
        for port in part.signature.outputs if port.name in summaries([port])
    }  # fmt: skip
    assert named == {"backbone_global", "cls_token", "mae_token", "dino_token"}
    assert {row.output for row in rows if row.nearest is not None} == named
    assert {row.neighbours_of for row in rows if row.nearest is not None} == {24}
    assert all(row.passed and row.position_error is None for row in rows if row.output in named)
