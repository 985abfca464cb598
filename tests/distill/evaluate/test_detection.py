"""Zero-shot detection: data as COCO has it, AP, and a detector that reads a student's maps."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from contract.detection import Detections, detections
from contract.errors import UserError
from distill.evaluate import finetune
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.boxes import open_boxes
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.detection import Detector, average_precision, fitted
from distill.evaluate.detection import evaluate as evaluate_detection
from distill.evaluate.encoder import RunEncoder, named_encoder
from distill.evaluate.outcome import NotApplicable
from distill.features import FeatureDims, resize_map
from distill.methods import build_method
from distill.models.grounding_dino import load_detector
from distill.recipe_io import make_recipe
from distill.runs import Run, load_run
from distill.tiny import SWIN
from tests.conftest import run_here
from tests.distill.methods.test_kpu import kpu_recipe, train_with_detector

SIZES = [(120, 90), (90, 120), (100, 100)]
NAMES = {3: "cat", 7: "dog", 20: "person"}
BOXES = [  # picture, category, x, y, width, height, crowd
    (10, 3, 10, 20, 30, 25, 0),
    (10, 7, 60, 5, 50, 60, 0),
    (11, 20, 0, 0, 90, 120, 0),
    (12, 3, 40, 40, 20, 20, 0),
    (12, 7, 0, 0, 100, 100, 1),
]


def write(root, name="val2017", below=".") -> dict:
    """Three drawn pictures with boxes; returns the content of the file of annotations."""
    pictures = root / below / name
    pictures.mkdir(parents=True)
    images = []
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        width, height = size
        images.append(
            {"id": 10 + number, "file_name": f"{number}.png", "width": width, "height": height}
        )
    content = {
        "images": images,
        "categories": [{"id": key, "name": label} for key, label in NAMES.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd}
            for n, (i, c, *box, crowd) in enumerate(BOXES)
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "coco")
    return tmp_path / "coco"


# ---- data ----------------------------------------------------------------------------------------


def test_a_data_set_is_read_as_coco_has_it(data):
    pictures = open_boxes(data)
    assert (len(pictures), pictures.classes) == (3, ("cat", "dog", "person"))
    assert [pictures.picture(number).size for number in range(3)] == SIZES
    first, last = pictures.boxes[0], pictures.boxes[2]
    assert first.edges.tolist() == [[10, 20, 40, 45], [60, 5, 110, 65]]
    assert first.labels.tolist() == [0, 1] and first.areas.tolist() == [750, 3000]
    assert last.crowd.tolist() == [False, True]


def test_other_places_of_pictures_and_files_are_found(tmp_path):
    write(tmp_path / "detection", "val", "images")
    write(tmp_path / "detection", "train", "images")
    assert open_boxes(tmp_path).files[0].parent == tmp_path / "detection" / "images" / "val"
    named = open_boxes(tmp_path, "instances_train.json")
    assert named.files[0].parent.name == "train"
    write(tmp_path / "detection", "validation2", "images")
    with pytest.raises(UserError, match="set detection.annotations to one of them"):
        open_boxes(tmp_path)
    with pytest.raises(UserError, match="detection.annotations = other.json"):
        open_boxes(tmp_path, "other.json")


def changed(**parts):
    return lambda content: content | parts


def edited(part, **values):
    def edit(content):
        content[part][1] |= values
        return content

    return edit


WRONG = {
    "no list": (lambda content: [content], "not in COCO's format: it has no images"),
    "no images": (changed(images=[]), "it has no images"),
    "no boxes": (changed(annotations=[]), "it has no boxes"),
    "no categories": (changed(categories=[]), "categories need names"),
    "an empty name": (edited("categories", name=" "), "categories need names"),
    "one id twice": (edited("categories", id=3), "two of its categories have one id"),
    "two images alike": (edited("images", id=10), "two of its images have one id"),
    "another folder": (edited("images", file_name="../1.png"), "leaves the folder"),
    "an absolute name": (edited("images", file_name="/etc/passwd"), "leaves the folder"),
    "a name of no text": (edited("images", file_name=3), "not in COCO's format"),
    "no size": (edited("images", width=0), "image 11 has no size"),
    "an unknown image": (edited("annotations", image_id=99), "annotation 1 is of an image"),
    "an unknown category": (edited("annotations", category_id=99), "annotation 1 is of an image"),
    "half a box": (edited("annotations", bbox=[1, 2]), "not in COCO's format"),
    "a negative box": (edited("annotations", bbox=[1, 2, -3, 4]), "annotation 1 has box"),
    "an endless box": (edited("annotations", bbox=[1, 2, math.inf, 4]), "annotation 1 has box"),
    "no annotations": (lambda c: {**c, "annotations": None}, "not in COCO's format"),
    "a missing picture": (edited("images", file_name="9.png"), "9.png is missing: 1 of the 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line(case, data):
    edit, words = WRONG[case]
    path = data / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(UserError) as raised:
        open_boxes(data)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_missing_and_damaged_files_are_one_line(data):
    path = data / "annotations" / "instances_val2017.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        open_boxes(data)
    path.unlink()
    with pytest.raises(UserError, match="no annotations/instances_"):
        open_boxes(data)
    write(data, "val")
    Image.new("RGB", (5, 5)).save(data / "val" / "1.png")
    with pytest.raises(UserError, match=r"1.png is 5x5, but instances_val.json has 90x120"):
        open_boxes(data).picture(1)
    shutil.rmtree(data / "val")
    with pytest.raises(UserError, match="no pictures for instances_val.json"):
        open_boxes(data)


# ---- scores --------------------------------------------------------------------------------------


def as_detected(pictures, shift: float = 0.0) -> list[Detections]:
    """The true boxes, moved by a share of their sides."""
    results = []
    for boxes, size in zip(pictures.boxes, pictures.sizes, strict=True):
        sides = np.tile(boxes.edges[:, 2:] - boxes.edges[:, :2], 2)
        edges = (boxes.edges + shift * sides) / np.array(size * 2)
        scores = np.linspace(0.9, 0.5, len(edges)).astype(np.float32)
        results.append(Detections(scores, boxes.labels, edges.astype(np.float32)))
    return results


def test_the_truth_scores_one_and_what_is_beside_it_less(data):
    pictures = open_boxes(data)
    scores, per_class = average_precision(pictures, as_detected(pictures))
    assert scores == pytest.approx(
        {"AP": 1, "AP50": 1, "AP75": 1, "AP small": 1, "AP medium": 1, "AP large": 1}
    )
    assert per_class == pytest.approx({"cat": 1, "dog": 1, "person": 1})
    # a shift of a tenth along both sides leaves an overlap of 0.81 / 1.19, 0.68
    scores, _ = average_precision(pictures, as_detected(pictures, 0.1))
    assert scores["AP50"] == pytest.approx(1) and scores["AP75"] == 0
    assert scores["AP"] == pytest.approx(0.4)  # thresholds 0.5 to 0.65 of ten
    empty = Detections(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
    assert average_precision(pictures, [empty] * 3)[0]["AP"] == 0


def test_pictures_keep_their_shape_up_to_a_longest_side():
    assert fitted(640, 480, 800, 1) == (1067, 800)
    assert fitted(480, 640, 798, 14) == (798, 1064)
    assert fitted(1000, 100, 800, 1) == (1333, 133)
    assert fitted(10_000, 1, 800, 14) == (1330, 14)


# ---- detectors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(made_once, photo_folder, tiny_detector):
    return train_with_detector(made_once, photo_folder, tiny_detector)


@pytest.mark.slow
def test_students_and_their_detectors_are_scored_alike(run, data, tiny_detector, tmp_path):
    output = tmp_path / "output"
    words = ("--data", data, "--tasks", "detection", "detection.size=98")
    done = run_here(run, *words, "--with-teachers", "--output", output, command=evaluate)
    assert done.returncode == 0, done.stderr
    assert "left out  teacher clip (vit_tiny_patch16_224), detection: " in done.stdout
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    assert list(rows) == ["student backbone", "teacher detector (grounding_dino)"]
    for row in rows.values():
        scores, details = row["detection"]["scores"], row["detection"]["details"]
        assert scores.keys() >= {"AP", "AP50", "AP75"} and all(map(math.isfinite, scores.values()))
        assert details["pictures"] == 3 and details["detector"] == str(tiny_detector)
        with Image.open(row["detection"]["files"][0]) as figure:
            assert figure.width > 100
    alone = tmp_path / "alone"
    name = f"grounding_dino@{tiny_detector}"
    done = run_here(name, *words, "--output", alone, command=evaluate)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((alone / "evaluation.json").read_text())["rows"].values()
    teacher = rows["teacher detector (grounding_dino)"]
    assert row["detection"]["scores"] == teacher["detection"]["scores"]


@pytest.mark.slow
@torch.no_grad()
def test_a_detector_finds_what_its_whole_network_finds(data, tiny_detector):
    from transformers import BertTokenizerFast

    labels = ("person", "cat", "dog")
    encoder = named_encoder(f"grounding_dino@{tiny_detector}")
    picture = open_boxes(data).picture(0)
    result = Detector(str(tiny_detector), labels, "labels").detect(encoder, picture, 90, 300)
    # the pictures have the size that they become, so that nothing is resampled
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    pixels = (pixels - encoder.preprocess.mean) / encoder.preprocess.std
    tokenizer = BertTokenizerFast(vocab=str(tiny_detector / "vocab.txt"))
    ids = tokenizer("person. cat. dog.", return_tensors="pt").input_ids
    whole = load_detector(str(tiny_detector), "source")(pixels, ids)
    label_map = np.zeros((3, ids.shape[1]), np.float32)
    label_map[range(3), [1, 3, 5]] = 1
    expected = detections(whole.logits[0].numpy(), whole.pred_boxes[0].numpy(), label_map)
    assert len(result.scores) == 60 and result.scores.max() > result.scores.min()
    assert result.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-4)
    np.testing.assert_allclose(result.boxes, expected.boxes, atol=1e-5)


@pytest.mark.slow
def test_a_students_maps_are_those_that_it_ships(run, tiny_detector):
    encoder, images = RunEncoder(load_run(run), "detector"), torch.randint(256, (1, 3, 70, 98))
    predicted = load_run(run).method.deploy()(images / 255)["detector"]
    maps = encoder.detector_maps(images)
    assert [level.shape[1:3] for level in maps] == [(9, 13), (5, 7), (3, 4)]
    assert all(map(torch.equal, maps, (predicted.patches, *predicted.maps)))
    with pytest.raises(NotApplicable, match="'clip' does not give"):
        evaluate_detection(RunEncoder(load_run(run), "clip"), run, EvaluationConfig(), run)


@pytest.mark.slow
def test_maps_of_one_grid_are_brought_to_those_of_the_detector(tiny_detector):
    detector = Detector(str(tiny_detector), ("cat", "dog"), "labels")
    maps = [torch.randn(1, 5, 7, width) for width in detector.widths]
    grids = [(9, 13), (5, 7), (3, 4)]
    there = [resize_map(level, grid) for level, grid in zip(maps, grids, strict=True)]
    with torch.inference_mode():
        for mine, other in zip(detector(maps, (70, 98)), detector(there, (70, 98)), strict=True):
            assert torch.equal(mine, other)
    with pytest.raises(UserError, match=r"\(32, 64, 128\) wide, .* are \(32, 64\): name"):
        detector(maps[:2], (70, 98))


def lengthen(folder, word: str, count: int) -> None:
    """Put lines before the last word of the vocabulary, whose number they raise."""
    path = folder / "vocab.txt"
    *lines, last = path.read_text().splitlines()
    numbered = [word and f"{word}{number}" for number in range(count)]
    path.write_text("\n".join([*lines, *numbered, last]) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "vocab.txt").unlink(), "its vocab.txt is missing"),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "not a vocabulary of BERT's"),
        (lambda f: lengthen(f, "another", 50), "the vocabulary it was trained with"),
        (lambda f: lengthen(f, "", 10), "the vocabulary it was trained with"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
        (lambda f: shutil.rmtree(f), "no such folder"),
    ],
)
def test_a_broken_detector_is_one_line(break_it, words, tiny_detector, tmp_path):
    folder = shutil.copytree(tiny_detector, tmp_path / "detector")
    break_it(folder)
    with pytest.raises(UserError) as raised:
        Detector(str(folder), ("cat",), "labels")
    message = str(raised.value)
    assert message.startswith(f"detection.checkpoint = {folder}: ") and words in message
    assert "\n" not in message


@pytest.mark.slow
def test_pictures_that_are_too_small_and_boxes_of_nan_are_one_line(tiny_detector, monkeypatch):
    encoder = named_encoder(f"grounding_dino@{tiny_detector}")
    detector = Detector(str(tiny_detector), ("cat",), "labels")
    picture = Image.new("RGB", (36, 24))
    # 3 x 5, 2 x 3, 1 x 2 and 1 x 1 positions: enough for 20 boxes, but not for its norms
    with pytest.raises(UserError, match=r"becomes 36x24 pixels, too few .* more than 1 value"):
        detector.detect(encoder, picture, 24, 300)
    words = r"a picture becomes 27x16 pixels, which have 12 .* 20 boxes: use a larger size"
    with pytest.raises(UserError, match=words):
        detector.detect(encoder, Image.new("RGB", (270, 160)), 16, 300)
    one_grid = [torch.randn(1, 2, 3, width) for width in detector.widths]
    with pytest.raises(UserError, match=words):
        detector(one_grid, (16, 27))
    broken = [torch.full((1, 9, 9, width), torch.nan) for width in detector.widths]
    monkeypatch.setattr(encoder, "detector_maps", lambda images: broken)
    with pytest.raises(UserError, match="its boxes hold NaN"):
        detector.detect(encoder, picture, 72, 300)


@pytest.mark.slow
def test_another_detector_than_the_teacher_is_warned_of(data, tiny_detector, tmp_path, caplog):
    name, other = f"grounding_dino@{tiny_detector}", shutil.copytree(tiny_detector, tmp_path / "a")
    encoder = named_encoder(name)
    for checkpoint, told in ((None, False), (f"{tiny_detector}/", False), (str(other), True)):
        caplog.clear()
        given = {"detection": {"checkpoint": checkpoint, "size": 90}}
        evaluate_detection(encoder, data, EvaluationConfig.model_validate(given), tmp_path)
        told_of = f"'detector' was {tiny_detector}, not {other}: boxes are only right if"
        assert (told_of in caplog.text) == told


def test_a_student_of_two_detectors_is_asked_which(data, photo_folder):
    recipe = kpu_recipe(photo_folder)
    _, detector = recipe["teachers"]
    recipe["teachers"] = [detector | {"alias": name} for name in ("small", "large")]
    recipe["teachers"][1]["kwargs"] = SWIN | {"window_size": 2}
    dims = {"small": FeatureDims(None, 5, (7, 9)), "large": FeatureDims(None, 6, (7, 9))}
    recipe = make_recipe(recipe)
    method = build_method(recipe, dims)
    for head in method.heads.values():
        head.remember([1, 2, 3])
    whole = Run(data, recipe, dims, method.eval(), None, "0" * 64)
    with pytest.raises(
        UserError, match=r"two detectors \(small, large\): add --features small or "
    ):
        evaluate_detection(RunEncoder(whole, "backbone"), data, EvaluationConfig(), data)
    (one,) = RunEncoder(whole, "small").detectors
    assert one.label == "small"


@pytest.mark.slow
def test_a_detectors_backbone_trains_and_layers_nothing(data, tiny_detector):
    encoder = named_encoder(f"grounding_dino@{tiny_detector}")
    with pytest.raises(NotApplicable, match="finetune trains a timm network alone"):
        finetune.evaluate(encoder, data, EvaluationConfig(), data)
    with pytest.raises(NotApplicable, match=r"give four layers: set depth.head=linear"):
        encoder.layers(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.slow
def test_labels_that_a_prompt_cannot_hold_are_one_line(tiny_detector):
    many = [f"thing {number}" for number in range(100)]
    with pytest.raises(UserError, match=r"^coco.json: its categories: .* more than 256 tokens"):
        Detector(str(tiny_detector), many, "coco.json")


def test_without_a_detector_or_its_libraries_it_is_one_line(data, tiny_vit, monkeypatch):
    with pytest.raises(NotApplicable, match="train with a teacher of role detector"):
        evaluate_detection(tiny_vit, data, EvaluationConfig(), data)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(tiny_vit, "detectors", (tiny_vit.teacher.config,), raising=False)
    with pytest.raises(UserError, match="set detection.checkpoint"):
        evaluate_detection(tiny_vit, data, EvaluationConfig(), data)
    given = EvaluationConfig.model_validate({"detection": {"checkpoint": "somewhere"}})
    with pytest.raises(UserError, match=r"pip install 'vfm-distill\[detection\]'"):
        evaluate_detection(tiny_vit, data, given, data)
