"""The tasks of `distill.evaluate`. To add one: a function from `Context` to `Outcome`, and a line
in TASKS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from distill.evaluate import (
    depth,
    detection,
    finetune,
    knn,
    linear_probe,
    retrieval,
    robustness,
    segmentation,
    transfer,
    video,
    zero_shot,
)
from distill.evaluate.archives import open_labelled
from distill.evaluate.attention import attention_figure, attention_rows, has_attention
from distill.evaluate.classification import FrozenSplits, frozen_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import family_root
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Outcome
from distill.evaluate.protocols import apply_protocol
from distill.evaluate.representation import cluster_scores, tsne_picture


@dataclass
class Context:
    """Input of every task: one encoder and one data root.

    Extracted features are kept in `cache`; pictures and `heads/` are written to `folder`.
    """

    encoder: Encoder
    data: Path
    config: EvaluationConfig
    cache: Path
    folder: Path

    @property
    def binding(self) -> dict:
        """Metadata that binds a head to the network it was trained on."""
        encoder = self.encoder
        return {
            "network": encoder.name,
            "reads": encoder.read_out,
            "student_sha256": encoder.weights_sha256,
            "image_size": encoder.image_size,
        }

    def settings(self, task: str) -> EvaluationConfig:
        """The settings of a task under its protocol."""
        return apply_protocol(self.config, task).config

    @cached_property
    def splits(self) -> FrozenSplits:
        return frozen_splits(self.encoder, self.data, self.config, self.cache)


def _run_knn(c: Context) -> Outcome:
    return knn.evaluate(c.splits, c.settings("knn"))


def _run_linear(c: Context) -> Outcome:
    return linear_probe.evaluate(
        c.splits, c.settings("linear"), c.folder, {**c.binding, "output": "summary"}
    )


def _run_finetune(c: Context) -> Outcome:
    return finetune.evaluate(c.encoder, c.data, c.settings("finetune"), c.folder)


def _run_zero_shot(c: Context) -> Outcome:
    return zero_shot.evaluate(c.encoder, c.data, c.settings("zero-shot"), c.cache)


def _run_segmentation(c: Context) -> Outcome:
    return segmentation.evaluate(
        c.encoder, c.data, c.settings("segmentation"), c.cache, c.folder, c.binding
    )


def _run_depth(c: Context) -> Outcome:
    return depth.evaluate(c.encoder, c.data, c.settings("depth"), c.cache, c.folder, c.binding)


def _run_detection(c: Context) -> Outcome:
    return detection.evaluate(c.encoder, c.data, c.settings("detection"), c.folder)


def _run_transfer(c: Context) -> Outcome:
    return transfer.evaluate(
        c.encoder, family_root(c.data, "transfer"), c.settings("transfer"), c.cache
    )


def _run_retrieval(c: Context) -> Outcome:
    return retrieval.evaluate(
        c.encoder, family_root(c.data, "retrieval"), c.settings("retrieval"), c.folder, c.cache
    )


def _run_video(c: Context) -> Outcome:
    return video.evaluate(c.encoder, family_root(c.data, "video"), c.settings("video"), c.folder)


def _run_robustness(c: Context) -> Outcome:
    """ImageNet's variants, by the linear probe of this encoder, the network's own classifier or the
    fine-tuned network.
    """
    config = c.settings("robustness")
    if config.robustness.classifier == "own":
        logits_of = robustness.live(robustness.own_classifier(c.encoder), config)
    elif config.robustness.classifier == "finetuned":
        classify = finetune.finetuned_classifier(c.encoder, c.folder / finetune.FINETUNED)
        logits_of = robustness.live(classify, config)
    else:
        probe = linear_probe.imagenet_probe(
            c.encoder, c.folder / "heads" / "classification.safetensors"
        )
        logits_of = robustness.cached(probe, c.encoder, c.cache, config)
    return robustness.evaluate_variants(
        logits_of, c.encoder.image_size, family_root(c.data, "robustness"), config
    )


def _run_clusters(c: Context) -> Outcome:
    """NMI and silhouette of the validation split, a t-SNE picture, and attention maps where the
    network is a ViT.
    """
    settings = c.settings("clusters").representation
    order = torch.randperm(
        len(c.splits.val), generator=torch.Generator().manual_seed(c.config.seed)
    )
    chosen = order[: settings.images].to(c.splits.val.device)
    features = c.splits.val[chosen].cpu().numpy()
    labels = c.splits.val_labels[chosen].cpu().numpy()
    scores = cluster_scores(features, labels, len(c.splits.classes), c.config.seed)
    few = slice(settings.tsne_images)
    files = [
        tsne_picture(
            features[few],
            labels[few],
            c.splits.classes,
            c.folder / "tsne.png",
            settings.perplexity,
            c.config.seed,
        )
    ]
    if has_attention(c.encoder):
        val = open_labelled(c.data, "val", c.splits.classes)
        photos = [val.picture(number) for number in range(0, len(val), max(1, len(val) // 4))[:4]]
        rows = attention_rows(c.encoder, photos, "picture", c.config.seed)
        files.append(attention_figure(c.folder / "attention.png", rows))
    return Outcome(scores, {"pictures": len(features)}, tuple(files))


@dataclass(frozen=True)
class _Task:
    """`shown`: scores in the printed table; `does`: a line of help."""

    run: Callable[[Context], Outcome]
    shown: tuple[str, ...]
    does: str


TASKS: dict[str, _Task] = {
    "knn": _Task(_run_knn, ("top1",), "k-NN by cosine, weighted votes"),
    "linear": _Task(_run_linear, ("top1",), "linear probe, 45 rates at once"),
    "finetune": _Task(_run_finetune, ("top1",), "all weights, layer decay; LP-FT: init=probe"),
    "transfer": _Task(_run_transfer, (), "mean linear probe of several data sets"),
    "zero-shot": _Task(_run_zero_shot, ("top1",), "nearest class embedding"),
    "segmentation": _Task(_run_segmentation, ("mIoU",), "linear head on patches or UPerNet, mIoU"),
    "depth": _Task(_run_depth, ("rmse", "delta1"), "linear or DPT head, RMSE in metres"),
    "detection": _Task(_run_detection, ("AP", "AP50", "AP75"), "zero-shot boxes, COCO's AP"),
    "retrieval": _Task(_run_retrieval, ("mAP medium", "mAP hard"), "revisited Oxford and Paris"),
    "video": _Task(_run_video, ("J&F",), "DAVIS-2017 label propagation"),
    "robustness": _Task(_run_robustness, (), "ImageNet-A, -R, -V2, -C and -9"),
    "clusters": _Task(
        _run_clusters, ("NMI", "silhouette"), "NMI, silhouette, t-SNE, attention maps"
    ),
}
