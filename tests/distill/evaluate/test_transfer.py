"""Transfer: the mean of linear probes over data sets of several layouts."""

import json

import pytest
import torch

from contract.errors import UserError
from distill.evaluate import linear_probe, transfer
from distill.evaluate.__main__ import main
from distill.evaluate.classification import frozen_splits
from distill.evaluate.config import EvaluationConfig
from tests.conftest import run_here
from tests.distill.evaluate.published import (
    write_cifar10,
    write_cifar100,
    write_class_folders,
    write_flowers,
    write_pets,
)

CONFIG = EvaluationConfig.model_validate(
    {"extract": {"workers": 0}, "probe": {"rates": 4, "epochs": 10, "held_out": 0.3}}
)
NAMES = {
    "cifar-10-batches-py": write_cifar10,
    "cifar-100-python": write_cifar100,
    "flowers-102": write_flowers,
    "oxford-iiit-pet": write_pets,
}


@pytest.fixture
def four(tmp_path):
    """The paper's four data sets."""
    for name, write in NAMES.items():
        write(tmp_path / "sets" / name)
    (tmp_path / "sets" / ".hidden").mkdir()
    return tmp_path / "sets"


def accuracy_by_hand(head, splits) -> float:
    right = 0
    for feature, label in zip(splits.val, splits.val_labels.tolist(), strict=True):
        logits = [
            float(sum(w * x for w, x in zip(row, feature.tolist(), strict=True))) + bias
            for row, bias in zip(
                head.linear.weight.tolist(), head.linear.bias.tolist(), strict=True
            )
        ]
        right += logits.index(max(logits)) == label
    return right / len(splits.val)


def test_transfer_is_the_plain_mean_of_four_probes(tiny_vit, four, tmp_path):
    found = transfer.evaluate(tiny_vit, four, CONFIG, tmp_path / "cache")
    assert list(found.scores) == [*(f"{name} top1" for name in NAMES), "mean top1"]
    expected = []
    for name in NAMES:
        splits = frozen_splits(tiny_vit, four / name, CONFIG, tmp_path / "cache")
        head = linear_probe.train_probe(splits, CONFIG).head
        expected.append(accuracy_by_hand(head, splits))
        assert found.scores[f"{name} top1"] == pytest.approx(expected[-1])
    assert found.scores["mean top1"] == pytest.approx(sum(expected) / 4)
    assert found.scores["mean top1"] > 0.6  # colours are easily told apart: chance is 0.31
    assert found.details["flowers-102"]["layout"] == "Flowers-102"
    assert (found.details["flowers-102"]["train"], found.details["flowers-102"]["val"]) == (6, 6)


def test_the_scored_pictures_do_not_choose_the_rate(tiny_vit, four, tmp_path):
    splits = frozen_splits(tiny_vit, four / "oxford-iiit-pet", CONFIG, tmp_path)
    first = linear_probe.train_probe(splits, CONFIG)
    shuffled = splits.val_labels[torch.randperm(len(splits.val_labels))]
    other = linear_probe.train_probe(
        type(splits)(splits.train, splits.train_labels, splits.val, shuffled, splits.classes),
        CONFIG,
    )
    assert torch.equal(first.head.linear.weight, other.head.linear.weight)


def test_other_sets_have_another_mean(tiny_vit, tmp_path):
    write_pets(tmp_path / "sets" / "pets")
    write_class_folders(tmp_path / "sets" / "mine")
    found = transfer.evaluate(tiny_vit, tmp_path / "sets", CONFIG, tmp_path / "cache")
    mine, pets = found.scores["mine top1"], found.scores["pets top1"]
    assert found.scores == {
        "mine top1": mine,
        "pets top1": pets,
        "mean top1 of 2": pytest.approx((mine + pets) / 2),
    }
    assert found.details["mine"]["layout"] == "class folders"


def test_what_transfer_refuses_before_it_scores(tiny_vit, tmp_path):
    root = tmp_path / "sets"
    root.mkdir()
    with pytest.raises(UserError, match="sets has no data set: put cifar-10-batches-py, "):
        transfer.evaluate(tiny_vit, root, CONFIG, tmp_path / "cache")
    write_pets(root / "oxford-iiit-pet")
    (root / "stray").mkdir()
    with pytest.raises(UserError, match="stray is no data set: it has neither train/CLASS"):
        transfer.evaluate(tiny_vit, root, CONFIG, tmp_path / "cache")
    (root / "stray").rmdir()
    write_cifar10(root / "cifar-10-batches-py")
    (root / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(UserError, match="lacks test_batch"):
        transfer.evaluate(tiny_vit, root, CONFIG, tmp_path / "cache")
    for folder in (root / "oxford-iiit-pet", write_class_folders(tmp_path / "mine")):
        with pytest.raises(UserError, match="is one data set, but transfer averages several"):
            transfer.evaluate(tiny_vit, folder, CONFIG, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_command_writes_the_mean_and_leaves_heads_alone(tmp_path, four):
    arguments = ("--tasks", "transfer", "--size", 64, "--output", tmp_path / "out")
    quick = ("extract.workers=0", "probe.rates=2", "probe.epochs=2")
    done = run_here("resnet10t@random", "--data", four, *arguments, *quick, command=main)
    assert done.returncode == 0, done.stderr
    assert "transfer mean top1: " in done.stdout and "flowers-102" in done.stdout
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert len(found["resnet10t@random"]["transfer"]["scores"]) == 5
    assert not (tmp_path / "out" / "heads").exists()
    (four / "flowers-102" / "setid.mat").unlink()
    again = ("--tasks", "transfer", "--size", 64, "--output", tmp_path / "again")
    done = run_here("resnet10t@random", "--data", four, *again, *quick, command=main)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "flowers-102 lacks setid.mat" in done.stderr
    assert not (tmp_path / "again").exists()
