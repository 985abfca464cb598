"""The printed tables, and figures of names that users give."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from contract.detection import Detections
from distill.evaluate.boxes import Boxes
from distill.evaluate.outcome import Outcome
from distill.evaluate.pictures import boxes_figure
from distill.evaluate.report import draw_scores, print_scores, read_scores, write_json
from distill.evaluate.representation import tsne_picture

NAME = "a $_$ b"
"""Not a formula that matplotlib could set."""


def test_imagenet_9_has_a_table_of_its_own(capsys):
    sets = {"original": 0.96, "mixed_same": 0.89, "mixed_rand": 0.81, "BG-gap": 0.08}
    scores = {"imagenet-a top1": 0.11} | {f"imagenet-9 {name}": v for name, v in sets.items()}
    gap = scores | {"imagenet-9 BG-gap": 0.05}
    print_scores(
        {
            "student": {"robustness": Outcome(scores)},
            "teacher": {"robustness": Outcome(gap)},
            "other": {},
        }
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["student", "0.110"] in lines and ["imagenet-a", "top1"] == lines[1][1:]
    start = lines.index(["ImageNet-9", "student", "teacher", "other"])
    assert lines[start + 1 :] == [
        ["original", "0.960", "0.960"],
        ["mixed_same", "0.890", "0.890"],
        ["mixed_rand", "0.810", "0.810"],
        ["BG-gap,", "lower", "is", "better", "0.080", "0.050"],
    ]


def test_without_imagenet_9_there_is_one_table(capsys):
    print_scores({"student": {"knn": Outcome({"top1": 0.5})}})
    assert "ImageNet-9" not in capsys.readouterr().out
    print_scores({"student": {"robustness": Outcome({"imagenet-9 original": 0.5})}})
    assert capsys.readouterr().out.startswith("ImageNet-9")


def test_evaluations_at_once_lose_no_scores_of_one_another(tmp_path):
    def write(number: int) -> None:
        outcome = Outcome({"top1": number / 10})
        write_json(tmp_path / "evaluation.json", f"row {number}", "knn", outcome, {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(8)))
    assert len(read_scores(tmp_path / "evaluation.json")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_names_may_hold_dollar_signs(tmp_path):
    draw_scores(tmp_path / "scores.png", {NAME: {"knn": Outcome({"top1": 0.5})}}, {"knn": "quick"})
    edges, labels = np.array([[1.0, 2.0, 9.0, 8.0]]), np.array([0])
    boxes = Boxes(edges, labels, np.array([48.0]), np.array([False]))
    found = Detections(np.array([0.9]), labels, edges / 10)
    row = Image.new("RGB", (10, 10)), boxes, found
    boxes_figure(tmp_path / "boxes.png", [row], [NAME], 0.5)
    features = np.random.default_rng(0).normal(size=(8, 4))
    tsne_picture(features, np.arange(8) % 2, [NAME, "b"], tmp_path / "tsne.png", 2, 0)
    assert len(list(tmp_path.glob("*.png"))) == 3
