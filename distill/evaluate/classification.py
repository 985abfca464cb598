"""What every classification protocol shares: frozen features of two splits, top-1/top-5, the report
per class.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.metrics import classification_report
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from contract.errors import UserError
from distill.evaluate.archives import open_labelled
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import Labelled
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import PolicyViews, extract


@dataclass(frozen=True)
class FrozenSplits:
    """Features [n, d] and labels [n] of a training and a validation split, and the names of the
    classes.
    """

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    classes: tuple[str, ...]


def open_splits(data: Path) -> tuple[Labelled, Labelled]:
    """The training and the validation split below `data`, with one numbering of the classes."""
    train = open_labelled(data, "train")
    return train, open_labelled(data, "val", train.classes)


def frozen_splits(
    encoder: Encoder, data: Path, config: EvaluationConfig, cache: Path
) -> FrozenSplits:
    """Extract both splits below `data` at the encoder's own size; on its device, where it is a
    GPU.
    """
    return freeze(encoder, *open_splits(data), config, cache)


def freeze(
    encoder: Encoder, train: Labelled, val: Labelled, config: EvaluationConfig, cache: Path
) -> FrozenSplits:
    """`frozen_splits` of two splits that are open."""
    features = [
        extract(
            encoder,
            PolicyViews(split, encoder.image_size, encoder.view_of(config.extract)),
            cache,
            config.extract,
            what=name,
        )
        for split, name in ((train, "train split"), (val, "val split"))
    ]
    return FrozenSplits(
        features[0].summaries().to(encoder.device),
        torch.from_numpy(train.labels).to(encoder.device),
        features[1].summaries().to(encoder.device),
        torch.from_numpy(val.labels).to(encoder.device),
        train.classes,
    )


def accuracy(
    scores: Tensor, labels: Tensor, classes: tuple[str, ...]
) -> tuple[dict[str, float], dict]:
    """Top-1, top-5 (where there are more than five classes), and precision, recall, F1 and support
    of every class.

    `scores` [n, C] are logits or votes, `labels` [n]. Raises UserError for scores that are not
    finite.
    """
    if not torch.isfinite(scores).all():
        raise UserError(
            "the classifier's scores contain NaN or infinity: lower the learning rate or check the "
            "features"
        )
    scores, labels = scores.float().cpu(), labels.cpu()
    result = {"top1": float((scores.argmax(1) == labels).double().mean())}
    if scores.shape[1] > 5:
        result["top5"] = float(
            multiclass_accuracy(scores, labels, scores.shape[1], average="micro", top_k=5)
        )
    report = classification_report(
        labels.numpy(),
        scores.argmax(1).numpy(),
        labels=range(len(classes)),
        target_names=classes,
        output_dict=True,
        zero_division=0.0,
    )
    return result, {name: report[name] for name in classes}
