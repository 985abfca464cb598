"""The scene generator: its rays against marching, its labels against each other, its files."""

import json

import numpy as np
import pytest
from PIL import Image

from distill.scenes import CLASSES, MASK_NAMES, MAX_DEPTH, SOLIDS, Box, _boxes, main, render

INSIDE = {
    "ball": lambda p: (p[:, 0] ** 2 + (p[:, 1] - 0.5) ** 2 + p[:, 2] ** 2) < 0.25,
    "box": lambda p: (abs(p[:, 0]) < 0.4) & (p[:, 1] > 0) & (p[:, 1] < 0.8) & (abs(p[:, 2]) < 0.4),
    "cone": lambda p: (p[:, 1] > 0) & (np.hypot(p[:, 0], p[:, 2]) < 0.5 * (1.1 - p[:, 1]) / 1.1),
    "cylinder": lambda p: (np.hypot(p[:, 0], p[:, 2]) < 0.35) & (p[:, 1] > 0) & (p[:, 1] < 1),
}
"""Whether points [n, 3] lie inside: a description independent of the intersection formulas."""


@pytest.mark.parametrize("kind", INSIDE)
def test_every_solid_is_hit_where_marching_along_the_ray_enters_it(kind):
    rng = np.random.default_rng(0)
    origins = rng.normal(size=(200, 3)) * 0.3 + (0, 1.3, -2.5)
    rays = rng.normal(size=(200, 3)) * 0.12 + (0, -0.3, 1)
    distance, normal = SOLIDS[kind](origins, rays)
    steps = np.arange(0, 6, 0.002)
    inside = np.stack([INSIDE[kind](origins + rays * t) for t in steps])
    entered = np.where(inside.any(0), steps[inside.argmax(0)], np.inf)
    grazing = np.abs(inside.sum(0)) < 5  # rays that touch an edge may differ by less than a step
    assert np.isfinite(distance).sum() > 60
    np.testing.assert_allclose(distance[~grazing], entered[~grazing], atol=0.004)
    hit = np.isfinite(distance) & ~grazing
    np.testing.assert_allclose(np.linalg.norm(normal[hit], axis=1), 1, atol=1e-6)
    assert ((normal[hit] * rays[hit]).sum(1) < 0.05).all(), "normals face the viewer"


def test_the_ring_is_a_flat_ring():
    origins = np.array([[0.4, 0.5, -1.0], [0.0, 0.5, -1.0], [0.6, 0.5, -1.0]])
    distance, _ = SOLIDS["ring"](origins, np.array([[0, 0, 1.0]] * 3))
    np.testing.assert_array_equal(distance, [1.0, np.inf, np.inf])


def test_a_scene_depends_on_its_seed_and_number_alone():
    first, again, other = render(1, 5, 32), render(1, 5, 32), render(1, 6, 32)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.depth, again.depth)
    assert (first.image != other.image).any()


def test_labels_agree_with_each_other():
    for number in range(12):
        scene = render(0, number, 48)
        assert scene.image.shape == (48, 48, 3) and scene.image.dtype == np.uint8
        assert 0 < scene.depth.min() and scene.depth.max() < MAX_DEPTH
        areas = np.bincount(scene.mask.ravel(), minlength=len(MASK_NAMES))
        assert areas[0] > 0 and areas[1] > 0, "wall and floor are always seen"
        assert MASK_NAMES[2 + areas[2:].argmax()] == CLASSES[scene.label], (
            "the class is that of the largest solid"
        )
        # the floor comes nearer from the horizon down; the wall is nearly equally far everywhere
        column = np.flatnonzero(scene.mask[-1] == 1)
        assert (scene.depth[-1, column] < scene.depth[scene.mask == 0].min()).all()


def test_boxes_are_tight_around_what_the_mask_shows_of_each_solid():
    hidden = 0
    for number in range(12):
        scene = render(0, number, 48)
        for label in range(len(CLASSES)):
            rows, columns = np.nonzero(scene.mask == 2 + label)
            own = [box for box in scene.boxes if box.label == label]
            assert sum(box.area for box in own) == len(rows)
            if own:  # together they span the mask's pixels exactly
                left, top = np.min([box.box[:2] for box in own], axis=0)
                right, low = np.max([np.add(box.box[:2], box.box[2:]) for box in own], axis=0)
                assert (left, top) == (columns.min(), rows.min())
                assert (right, low) == (columns.max() + 1, rows.max() + 1)
            if len(own) == 1:
                hidden += own[0].area < own[0].box[2] * own[0].box[3]
        assert scene.boxes[0].label == scene.label and len(scene.boxes) <= 3
    assert hidden, "outlines are not all rectangles"


def test_a_hidden_solid_has_no_box_and_two_of_a_kind_have_two():
    counts = [len(render(0, number, 16).boxes) for number in range(40)]
    assert set(counts) == {1, 2, 3}
    owner = np.array([[-1, 0, 0], [-1, 2, 0], [-1, -1, -1]])
    assert _boxes(owner, [4, 1, 4]) == (Box(4, (1, 0, 2, 2), 3), Box(4, (1, 1, 1, 1), 1))


def test_a_plain_scene_has_the_same_labels_and_one_colour_a_surface():
    textured, plain = render(0, 1, 48), render(0, 1, 48, plain=True)
    np.testing.assert_array_equal(textured.mask, plain.mask)
    assert textured.boxes == plain.boxes
    wall = plain.mask == 0  # lit evenly, but for shadows
    spread = [np.median(abs(s.image[wall] - s.image[wall].mean(0))) for s in (textured, plain)]
    assert spread[1] < 5 < spread[0]


def test_all_classes_come_up():
    assert {render(0, number, 16).label for number in range(40)} == set(range(len(CLASSES)))


def test_command_writes_all_layouts_and_refuses_to_overwrite(tmp_path, capsys):
    folder = tmp_path / "scenes"
    wanted = ["--output", str(folder), "--train", "3", "--val", "2", "--size", "32"]
    assert main(wanted) == 0
    assert len(list(folder.glob("classification/train/*/*.png"))) == 3
    for kind in ("images", "masks", "depth"):
        assert len(list((folder / "dense" / "val" / kind).glob("*.png"))) == 2
    depth = np.asarray(Image.open(folder / "dense" / "val" / "depth" / "000003.png"))
    np.testing.assert_allclose(depth / 1000, render(0, 3, 32).depth, atol=6e-4)
    labels = json.loads((folder / "detection/annotations/instances_val2017.json").read_text())
    assert [category["name"] for category in labels["categories"]] == list(CLASSES)
    for picture in labels["images"]:
        copy = folder / "detection" / "val2017" / picture["file_name"]
        scene = render(0, picture["id"], 32)
        np.testing.assert_array_equal(np.asarray(Image.open(copy)), scene.image)
        assert (picture["width"], picture["height"]) == (32, 32)
        own = [a for a in labels["annotations"] if a["image_id"] == picture["id"]]
        found = [(a["category_id"] - 1, tuple(a["bbox"]), a["area"]) for a in own]
        assert found == list(scene.boxes)
    assert json.loads((folder / "scenes.json").read_text())["masks"] == list(MASK_NAMES)
    assert main(wanted) == 2
    assert "already has files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--train", "0"), ("--val", "-1"), ("--size", "8"), ("--seed", "-1")]
)
def test_nonsense_counts_are_one_line(tmp_path, capsys, option, value):
    assert main(["--output", str(tmp_path / "s"), option, value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{option} {value}" in error
    assert not (tmp_path / "s").exists()
