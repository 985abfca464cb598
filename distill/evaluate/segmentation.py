"""Semantic segmentation on frozen features by a linear head on patches (UMT A.1: ADE20K at 512 px,
mIoU), or by UPerNet on a pyramid of maps (KPU, "Evaluation Metrics").

`dense.augment` and `dense.test` make it MMSegmentation's training and test, as RADIO and the papers
use it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from contract.errors import UserError
from distill.distributed import Ranks
from distill.evaluate.augment import SEGMENTATION
from distill.evaluate.config import EvaluationConfig, SegmentationConfig
from distill.evaluate.datasets import (
    IGNORED,
    Pairs,
    label_names,
    open_pairs,
    read_mask,
    read_matched,
)
from distill.evaluate.decoded import decoder_reader
from distill.evaluate.dense import (
    PictureMaps,
    patch_reader,
    sharing,
    side_of,
    stored_patches,
    train_head,
    training_samples,
    whole_views,
)
from distill.evaluate.encoder import Encoder
from distill.evaluate.maps import Ignored, WrongLabel, explain_labels
from distill.evaluate.outcome import NotApplicable, Outcome, first_alone
from distill.evaluate.pictures import map_figure
from distill.evaluate.windows import WindowViews
from distill.heads import Head, LinearSegmenter, save_head
from distill.upernet import AUXILIARY_WEIGHT, SupervisedUPerNet, UPerNet

log = logging.getLogger(__name__)

_ADE_CLASSES = 150

_SHOWN = 4
"""Pictures in the figure."""


def evaluate(
    encoder: Encoder, data: Path, config: EvaluationConfig, cache: Path, folder: Path, binding: dict
) -> Outcome:
    """Train the head on the training split, score mIoU and pixel accuracy on the validation split.

    Writes `heads/segmentation.safetensors` and `segmentation.png`.
    """
    kind = config.segmentation.head
    if kind == "upernet":
        _check_pyramid(encoder, config)
    train, val = (open_pairs(data, s, "masks", config.dense.exif) for s in ("train", "val"))
    labels = _Labelling(train, val, config)
    size = side_of(encoder, config.dense)
    dense = config.dense
    views = {
        "train": WindowViews(train, size),
        "val": WindowViews(val, size, dense.window_step),
    }
    whole = whole_views(encoder, views["val"], config)
    stored = {}
    if kind == "linear":
        read = patch_reader(encoder, views["val"], config)
        stored = stored_patches(encoder, views, whole, config, cache)
    else:
        read = _pyramid_reader(encoder, views, dense.augment)
    torch.manual_seed(config.seed)  # the head's first weights must not depend on what ran before
    if kind == "linear":
        head = learner = LinearSegmenter(encoder.dims.patches, labels.classes)
    else:
        head = UPerNet(encoder.pyramid_widths, config.segmentation.width, labels.classes)
        learner = SupervisedUPerNet(head)
    device = encoder.device

    def loss(logits: Tensor | tuple[Tensor, Tensor], truth: Tensor) -> Tensor:
        if kind == "linear":
            return _cross_entropy(logits, truth)
        main, auxiliary = (_cross_entropy(each, truth) for each in logits)
        return main + AUXILIARY_WEIGHT * auxiliary

    samples, inputs = training_samples(
        views["train"], labels.read, read, stored.get("train"), config, SEGMENTATION
    )
    team = sharing(encoder, config, len(train), "segmentation")
    train_head(learner, inputs, samples, loss, config, device, ranks=team)
    maps = PictureMaps(head, read, views["val"], whole, dense.mirror, stored.get("val"))

    scores, iou, figure = _score(maps, val, labels, device, folder, team)
    about = {
        **binding,
        "output": "patches" if kind == "linear" else "maps",
        "classes": labels.names,
        "size": size,
        "scores": scores,
    }
    about["zero_is_ignored"] = labels.shift
    path = save_head(folder / "heads", "segmentation", head, about)
    test = config.dense.test if whole else "windows"
    details = {"size": size, "head": kind, "test": test, "iou": iou}
    return Outcome(scores, details, (figure, path))


def evaluate_decoder(
    encoder: Encoder, head: Head, data: Path, config: EvaluationConfig, folder: Path
) -> Outcome:
    """Score a teacher's decoder on an encoder's features; nothing is trained, and only the
    validation split is read.

    Raises UserError where the data set's classes are not as many as the decoder's.
    """
    count = len(head.about["classes"])
    if config.segmentation.classes not in (None, count):
        raise UserError(
            f"segmentation.classes = {config.segmentation.classes}: the decoder has {count} "
            "classes (leave it out)"
        )
    settings = config.segmentation.model_copy(update={"classes": count})
    config = config.model_copy(update={"segmentation": settings})
    val = open_pairs(data, "val", "masks", config.dense.exif)
    labels = _Labelling(val, val, config)
    size = side_of(encoder, config.dense)
    views = WindowViews(val, size, config.dense.window_step)
    whole = whole_views(encoder, views, config)
    read, answer = decoder_reader(encoder, head, config)
    maps = PictureMaps(answer, read, views, whole, config.dense.mirror)
    scores, iou, figure = _score(maps, val, labels, encoder.device, folder, encoder.ranks)
    test = config.dense.test if whole else "windows"
    details = {"size": size, "head": "decoder", "test": test, "iou": iou}
    return Outcome(scores, details, (figure,))


def _score(
    maps: PictureMaps,
    val: Pairs,
    labels: "_Labelling",
    device: torch.device,
    folder: Path,
    ranks: Ranks,
) -> tuple[dict[str, float], dict[str, float | None], Path]:
    """Mean IoU and pixel accuracy, the IoU of every class, and a figure of a few maps."""
    metric = MulticlassJaccardIndex(
        labels.classes,
        average="none",
        ignore_index=IGNORED,
        zero_division=float("nan"),
        sync_on_compute=False,  # which would wait for processes that have left
    ).to(device)
    right = counted = 0
    shown = []
    for number in ranks.deal(range(len(val))):
        picture, truth = read_matched(val, number), labels.read(val, number)
        predicted = maps(number, *picture.size).argmax(0)
        truth = torch.from_numpy(truth).to(device)
        shown_here = maps.shown(*picture.size)
        if shown_here is not None:
            predicted, truth = (
                torch.where(shown_here.to(device), each, IGNORED) for each in (predicted, truth)
            )
        metric.update(predicted.unsqueeze(0), truth.unsqueeze(0))
        valid = truth != IGNORED
        right, counted = right + int((predicted == truth)[valid].sum()), counted + int(valid.sum())
        if len(shown) < _SHOWN:
            shown.append((np.asarray(picture), truth.cpu().numpy(), predicted.cpu().numpy()))
    ranks.add(metric.confmat)
    right, counted = ranks.add(torch.tensor([right, counted], device=device)).tolist()
    shown = ranks.collect(shown)[:_SHOWN]
    first_alone(ranks)
    per_class = metric.compute().tolist()
    present = [value for value in per_class if not np.isnan(value)]
    scores = {"mIoU": sum(present) / len(present), "pixel_accuracy": right / max(1, counted)}
    figure = map_figure(folder / "segmentation.png", shown, labels.classes, IGNORED)
    iou = {
        name: None if np.isnan(value) else value
        for name, value in zip(labels.names, per_class, strict=True)
    }
    return scores, iou, figure


def _check_pyramid(encoder: Encoder, config: EvaluationConfig) -> None:
    """Raise NotApplicable for a network without maps, UserError for batches that its norms cannot
    average over.
    """
    if not encoder.pyramid_widths:
        raise NotApplicable(
            f"{encoder.name}: segmentation.head = upernet needs maps of several resolutions, which "
            f"'{encoder.read_out}' does not have: use the backbone of a run of method kpu, or "
            "segmentation.head=linear"
        )
    if config.dense.batch_size < 2:
        raise UserError(
            f"dense.batch_size = {config.dense.batch_size}: UPerNet's batch norms need 2 or more"
        )


def _pyramid_reader(
    encoder: Encoder, views: dict[str, WindowViews], augment: bool
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function from images to the frozen network's maps; kept, those would take over sixteen
    times the room of patches.
    """

    @torch.no_grad()
    def read(images: Tensor) -> tuple[Tensor, ...]:
        return encoder.pyramid(images.to(encoder.device))

    train = views["train"]
    if len(train.pairs if augment else train) < 2:
        raise UserError("segmentation.head = upernet: its batch norms need 2 or more pictures")
    if not all(torch.isfinite(level).all() for level in read(views["val"][0][None])):
        raise UserError(f"{encoder.name}: its maps hold NaN or infinity: check its weights")
    return read


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Of logits [B, C, h, w], at the resolution of the labels [B, p, p]."""
    logits = F.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)
    # a batch may have ignored pixels only: the mean over none would be NaN
    total = F.cross_entropy(logits, truth.long(), ignore_index=IGNORED, reduction="sum")
    return total / (truth != IGNORED).sum().clamp_min(1)


class _Labelling:
    """Meaning of the labels in a data set: the number of classes, and whether 0 is one."""

    def __init__(self, train: Pairs, val: Pairs, config: EvaluationConfig) -> None:
        settings = config.segmentation
        self._splits = (train, val)
        self.ignore: Ignored = 255
        if settings.ignore != "auto":
            self.ignore = tuple(np.atleast_1d(settings.ignore).tolist())
        self.shift = settings.zero == "ignore" or (settings.zero == "auto" and train.ade)
        self.classes = settings.classes or (_ADE_CLASSES if train.ade else None)
        known = self.classes is not None
        labels: set[int] = set()
        for number in range(len(train)):
            labels |= set(np.unique(self.read(train, number)).tolist()) - {IGNORED}
            if known and len(labels) > 1:
                break
        if len(labels) < 2:
            raise UserError(
                f"{train.maps[0].parent}: the training masks have only {len(labels)} class "
                f"({sorted(labels)}): segmentation needs at least two (check segmentation.zero and "
                "segmentation.ignore)"
            )
        if not known:
            self.classes = max(labels) + 1
            _check_guess(train, labels, settings)
        if not any((self.read(val, number) != IGNORED).any() for number in range(len(val))):
            raise UserError(
                f"{val.maps[0].parent}: every pixel of the validation masks is ignored, so there "
                "is nothing to score (check segmentation.zero and segmentation.ignore)"
            )
        self.names = label_names(train, self.classes)
        log.info(
            "masks     %d classes (%s), label 0 is %s",
            self.classes,
            train.maps[0].parent,
            "ignored, as in ADE20K" if self.shift else "the first",
        )

    def read(self, pairs: Pairs, number: int) -> np.ndarray:
        """Labels [H, W]; see `datasets.read_mask`."""
        try:
            return read_mask(pairs, number, self.shift, self.classes, self.ignore)
        except WrongLabel as error:
            paths = [path for split in self._splits for path in split.maps]
            rules = self.shift, self.classes, self.ignore
            raise explain_labels(error, paths, *rules) from error


def _check_guess(train: Pairs, labels: set[int], settings: SegmentationConfig) -> None:
    """Raise UserError where the labels of all training masks leave open which of them are
    classes.
    """
    folder, top = train.maps[0].parent, max(labels)
    if top == _ADE_CLASSES and 0 in labels and settings.zero == "auto":
        raise UserError(
            f"{folder} has labels 0 to {top}, as ADE20K, but {train.root} has no "
            "objectInfo150.txt: set segmentation.zero=ignore (ADE20K), or segmentation.zero=class"
        )
    if top == 255 and settings.ignore == "auto":  # in masks of 16 bits: in others it is ignored
        raise UserError(
            f"{folder} has masks of more than 8 bits with label 255, which is ignored in many: set "
            "segmentation.ignore=255, or segmentation.classes=256 if it is a class"
        )
    if top > 255 and len(labels) <= top // 2:
        raise UserError(
            f"{folder} has only {len(labels)} labels, the largest {top}: set "
            f"segmentation.ignore={top} if it is no class, or segmentation.classes={top + 1}"
        )
    if len(labels) <= top // 2:
        log.warning("masks     only %d of %d classes occur in %s", len(labels), top + 1, folder)
