"""Class folders, fine-tuning and zero-shot on crops of two real photographs."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from contract.errors import UserError
from distill.evaluate import finetune, zero_shot
from distill.evaluate.classification import frozen_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.finetune import build_classifier
from distill.evaluate.knn import knn_votes


def settings(**sections) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"extract": {"workers": 0}} | sections)


def test_knn_tells_the_photographs_apart(tiny_vit, class_folders, tmp_path):
    config = settings(knn={"k": 3})
    splits = frozen_splits(tiny_vit, class_folders, config, tmp_path)
    assert (
        splits.classes == ("chelsea", "coins") and len(splits.train) == 12 and len(splits.val) == 6
    )
    votes = knn_votes(splits.train, splits.train_labels, splits.val, 2, config.knn)
    assert (votes.argmax(1) == splits.val_labels).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_cnn"])
def test_finetuning_learns_and_leaves_the_encoder_alone(kind, class_folders, request, tmp_path):
    encoder = request.getfixturevalue(kind)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    epochs = 40 if kind == "tiny_vit" else 12
    config = settings(
        finetune={"epochs": epochs, "batch_size": 6, "lr": 3e-3, "crop_scale": [0.8, 1.0]}
    )
    found = finetune.evaluate(encoder, class_folders, config, tmp_path)
    assert found.scores["top1"] == 1.0
    assert found.details["last_loss"] < 0.6
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_finetuning_is_the_same_every_time(tiny_vit, class_folders, tmp_path):
    config = settings(finetune={"epochs": 2, "batch_size": 6, "lr": 1e-3})
    losses = {
        finetune.evaluate(tiny_vit, class_folders, config, tmp_path).details["last_loss"]
        for _ in range(2)
    }
    assert len(losses) == 1


def test_layers_learn_at_decaying_rates(tiny_vit):
    """0.8 a layer, from the classifier down to the patch embedding, as the optimizer gets them."""
    from timm.optim import create_optimizer_v2

    net = build_classifier(tiny_vit, 3)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.8)
    rate = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(net.head.weight)] == 1.0
    assert rate[id(net.blocks[1].attn.qkv.weight)] == pytest.approx(0.8)
    assert rate[id(net.blocks[0].attn.qkv.weight)] == pytest.approx(0.64)
    assert rate[id(net.patch_embed.proj.weight)] == pytest.approx(0.512)


def embeddings_file(path, values, classes=None):
    text = classes if isinstance(classes, str) else json.dumps(classes)
    save_file({"embeddings": values}, path, metadata={"classes": text} if classes else None)
    return path


def test_zero_shot_takes_the_nearest_embedding_whatever_its_length(
    tiny_vit, class_folders, tmp_path
):
    splits = frozen_splits(tiny_vit, class_folders, settings(), tmp_path)
    means = torch.stack([splits.train[splits.train_labels == label].mean(0) for label in (1, 0)])
    path = embeddings_file(
        tmp_path / "e.safetensors", means * torch.tensor([[5.0], [0.1]]), ["coins", "chelsea"]
    )
    config = settings(zero_shot={"embeddings": str(path)})
    found = zero_shot.evaluate(tiny_vit, class_folders, config, tmp_path)
    cosine = torch.nn.functional.cosine_similarity(splits.val[:, None], means[[1, 0]][None], dim=-1)
    assert (
        found.scores["top1"] == float((cosine.argmax(1) == splits.val_labels).float().mean()) == 1.0
    )


@pytest.mark.parametrize(
    ("shape", "classes", "words"),
    [
        ((2, 7), None, "48-d"),
        ((3, 48), None, "has 3 embeddings without names"),
        ((2, 48), ["chelsea", "dog"], "no embedding of class 'coins'"),
        (None, None, "no such file"),
        ("nan", None, "NaN or infinity"),
        ("", None, "needs class embeddings"),
        ((2, 48), "chelsea,coins", "is not JSON"),
        ((2, 48), ["a", "b", "c"], "a list of 2 names"),
    ],
)
def test_embeddings_that_do_not_fit_are_one_line(
    tiny_vit, class_folders, tmp_path, shape, classes, words
):
    path = tmp_path / "e.safetensors"
    if shape == "nan":
        embeddings_file(path, torch.full((2, 48), float("nan")))
    elif isinstance(shape, tuple):
        embeddings_file(path, torch.randn(shape), classes)
    config = settings(zero_shot={"embeddings": str(path) if shape != "" else None})
    with pytest.raises(UserError, match=words) as caught:
        zero_shot.evaluate(tiny_vit, class_folders, config, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("one class", "has 1 class folders"),
        ("empty", "is empty"),
        ("no val", "has no val split"),
        ("unknown class", "no class 'dog'"),
        ("truncated", "cannot be read"),
        ("one class with pictures", "of only 1 class"),
    ],
)
def test_broken_class_folders_are_one_line(tiny_vit, class_folders, tmp_path, how, words):
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    if how == "one class":
        shutil.rmtree(data / "train" / "coins")
    elif how == "empty":
        for path in data.glob("train/*/*"):
            path.unlink()
    elif how == "one class with pictures":
        for path in data.glob("train/coins/*"):
            path.unlink()
    elif how == "no val":
        shutil.rmtree(data / "val")
    elif how == "unknown class":
        (data / "val" / "dog").mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "val" / "dog" / "a.png")
    else:
        path = data / "train" / "coins" / "0.png"
        path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(UserError, match=words) as caught:
        frozen_splits(tiny_vit, data, settings(), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_class_without_validation_pictures_keeps_its_number(class_folders, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    shutil.rmtree(data / "val" / "chelsea")
    train = open_classes(data, "train")
    assert set(open_classes(data, "val", train.classes).labels.tolist()) == {1}
