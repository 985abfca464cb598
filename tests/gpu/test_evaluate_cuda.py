"""Evaluation on a CUDA device says what it says on a CPU."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from contract.views import EVALUATED
from distill.evaluate.__main__ import main
from distill.evaluate.config import ExtractConfig, KNNConfig, ProbeConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.detection import Detector
from distill.evaluate.encoder import named_encoder
from distill.evaluate.extract import PolicyViews, extract
from distill.evaluate.knn import knn_votes
from distill.evaluate.linear_probe import train_sweep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, none is visible"
    ),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-2), ("bf16", 0.2)])
def test_features_are_the_cpus(tiny_vit, class_folders, tmp_path, precision, tolerance):
    views = PolicyViews(open_classes(class_folders, "train"), 64, EVALUATED)
    found = {}
    for device in ("cpu", "cuda"):
        config = ExtractConfig(workers=2, precision="fp32" if device == "cpu" else precision)
        found[device] = extract(tiny_vit.to(device), views, tmp_path / device, config).summaries()
    tiny_vit.to("cpu")
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=tolerance, rtol=tolerance)


def test_votes_and_probe_are_the_cpus():
    train, labels, queries = torch.randn(500, 32), torch.randint(5, (500,)), torch.randn(40, 32)
    votes = knn_votes(train, labels, queries, 5, KNNConfig())
    there = knn_votes(train.cuda(), labels.cuda(), queries.cuda(), 5, KNNConfig(block_gib=1e-5))
    torch.testing.assert_close(there.cpu(), votes, rtol=1e-2, atol=1e-2)
    config = ProbeConfig(rates=5, epochs=3, batch_size=64)
    here, there = (
        train_sweep(train.to(d), labels.to(d), 5, config, seed=0) for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=1e-2, atol=1e-3)


def test_a_detector_finds_what_it_finds_on_a_cpu(tiny_detector, photo_folder):
    encoder = named_encoder(f"grounding_dino@{tiny_detector}")
    detector = Detector(str(tiny_detector), ("cat", "dog"), "labels")
    picture = Image.open(next(photo_folder.rglob("*.jpg")))
    found = []
    for device in ("cpu", "cuda"):
        # 20 boxes of two labels, which may change places where they score alike
        result = detector.to(device).detect(encoder.to(device), picture, 96, 40)
        labels = 10 * result.labels[:, None]  # farther apart than any two boxes
        found.append(np.concatenate([labels, result.scores[:, None], result.boxes], axis=1))
    here, there = found
    assert here.shape == there.shape == (40, 6)
    distances = np.abs(here[:, None] - there[None]).max(axis=2)
    matched = distances[linear_sum_assignment(distances)]
    # of positions that score alike another may be among the 20 that boxes start from
    assert (matched < 1e-2).mean() >= 0.9, np.sort(matched)


def test_the_command_runs_every_frozen_task_and_finetuning(scenes, tmp_path):
    quick = (
        "probe.epochs=3",
        "dense.size=64",
        "dense.steps=20",
        "finetune.epochs=2",
        "finetune.batch_size=8",
        "finetune.init=probe",
    )
    tasks = "knn,linear,segmentation,depth,clusters,finetune"
    out = ("--output", str(tmp_path / "out"), "--device", "cuda", "--size", "64")
    status = main(["resnet10t@random", "--data", str(scenes), "--tasks", tasks, *out, *quick])
    assert status == 0
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"][
        "resnet10t@random"
    ]
    assert set(rows) == set(tasks.split(","))
