"""The tasks of `distill.evaluate`. To add one: a function from `Context` to `Outcome`, and a line
in TASKS.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
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
from distill.evaluate.cast import Row
from distill.evaluate.classification import FrozenSplits, frozen_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import family_root
from distill.evaluate.decoded import HeadFiles, open_decoder
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Left, NotApplicable, Outcome, first_alone
from distill.evaluate.protocols import apply_protocol
from distill.evaluate.representation import cluster_scores, tsne_picture

log = logging.getLogger(__name__)


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
    heads: HeadFiles | None = None
    """Those of the run that is scored."""
    _splits: dict[str, FrozenSplits] = field(default_factory=dict, repr=False)

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

    def dense_binding(self, settings: EvaluationConfig) -> dict:
        """The same for a head of maps, which has a view where it is scored by one."""
        if settings.dense.test != "view":
            return self.binding
        return self.binding | {"view": str(self.encoder.view_of(settings.extract))}

    def settings(self, task: str) -> EvaluationConfig:
        """The settings of a task under its protocol."""
        return apply_protocol(self.config, task).config

    def splits(self, task: str) -> FrozenSplits:
        """Features of both splits as a task's protocol shows it the pictures."""
        config = self.settings(task)
        view = str(self.encoder.view_of(config.extract))
        if view not in self._splits:
            self._splits[view] = frozen_splits(self.encoder, self.data, config, self.cache)
        return self._splits[view]


def _run_knn(c: Context) -> Outcome:
    return knn.evaluate(c.splits("knn"), c.settings("knn"), c.encoder.ranks)


def _run_linear(c: Context) -> Outcome:
    settings = c.settings("linear")
    binding = {**c.binding, "output": "summary", "view": str(c.encoder.view_of(settings.extract))}
    return linear_probe.evaluate(c.splits("linear"), settings, c.folder, binding, c.encoder.ranks)


def _run_finetune(c: Context) -> Outcome:
    return finetune.evaluate(c.encoder, c.data, c.settings("finetune"), c.folder)


def _run_zero_shot(c: Context) -> Outcome:
    return zero_shot.evaluate(c.encoder, c.data, c.settings("zero-shot"), c.cache)


def _run_segmentation(c: Context) -> Outcome:
    settings = c.settings("segmentation")
    if settings.segmentation.head == "decoder":
        head = open_decoder(c.heads, "segmentation", c.encoder)
        return segmentation.evaluate_decoder(c.encoder, head, c.data, settings, c.folder)
    binding = c.dense_binding(settings)
    return segmentation.evaluate(c.encoder, c.data, settings, c.cache, c.folder, binding)


def _run_depth(c: Context) -> Outcome:
    settings = c.settings("depth")
    if settings.depth.head == "decoder":
        head = open_decoder(c.heads, "depth", c.encoder)
        return depth.evaluate_decoder(c.encoder, head, c.data, settings, c.folder)
    binding = c.dense_binding(settings)
    return depth.evaluate(c.encoder, c.data, settings, c.cache, c.folder, binding)


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
    config, ranks = c.settings("robustness"), c.encoder.ranks
    view = c.encoder.view_of(config.extract)
    if config.robustness.classifier == "own":
        logits_of = robustness.live(robustness.own_classifier(c.encoder), config, ranks)
    elif config.robustness.classifier == "finetuned":
        classify = finetune.finetuned_classifier(c.encoder, c.folder / finetune.FINETUNED)
        logits_of = robustness.live(classify, config, ranks)
    else:
        probe = linear_probe.imagenet_probe(
            c.encoder, c.folder / "heads" / "classification.safetensors", view
        )
        logits_of = robustness.cached(probe, c.encoder, c.cache, config)
    return robustness.evaluate_variants(
        logits_of,
        c.encoder.image_size,
        family_root(c.data, "robustness"),
        config,
        view,
    )


def _run_clusters(c: Context) -> Outcome:
    """NMI and silhouette of the validation split, a t-SNE picture, and attention maps where the
    network is a ViT.
    """
    settings, splits = c.settings("clusters").representation, c.splits("clusters")
    first_alone(c.encoder.ranks, "clusters")
    order = torch.randperm(len(splits.val), generator=torch.Generator().manual_seed(c.config.seed))
    chosen = order[: settings.images].to(splits.val.device)
    features = splits.val[chosen].cpu().numpy()
    labels = splits.val_labels[chosen].cpu().numpy()
    scores = cluster_scores(features, labels, len(splits.classes), c.config.seed)
    few = slice(settings.tsne_images)
    files = [
        tsne_picture(
            features[few],
            labels[few],
            splits.classes,
            c.folder / "tsne.png",
            settings.perplexity,
            c.config.seed,
        )
    ]
    if has_attention(c.encoder):
        val = open_labelled(c.data, "val", splits.classes)
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
    "segmentation": _Task(_run_segmentation, ("mIoU",), "linear head, UPerNet or a decoder, mIoU"),
    "depth": _Task(_run_depth, ("rmse", "delta1"), "linear, DPT or a decoder, RMSE in metres"),
    "detection": _Task(_run_detection, ("AP", "AP50", "AP75"), "zero-shot boxes, COCO's AP"),
    "retrieval": _Task(_run_retrieval, ("mAP medium", "mAP hard"), "revisited Oxford and Paris"),
    "video": _Task(_run_video, ("J&F",), "DAVIS-2017 label propagation"),
    "robustness": _Task(_run_robustness, (), "ImageNet-A, -R, -V2, -C and -9"),
    "clusters": _Task(
        _run_clusters, ("NMI", "silhouette"), "NMI, silhouette, t-SNE, attention maps"
    ),
}


def run_task(context: Context, task: str, row: Row) -> Outcome | None:
    """Run a task on a row in all of its processes, and wait for them. Its outcome in the first one;
    None in others that left the rest to that, and for an optional row without the output that the
    task needs.
    """
    outcome = None
    try:
        outcome = TASKS[task].run(context)
    except NotApplicable as error:
        if not row.optional:
            raise
        log.info("left out  %s, %s: %s", row.name, task, error)
    except Left:
        pass
    context.encoder.ranks.barrier()
    return outcome
