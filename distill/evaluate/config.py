"""Settings of every evaluation task. The defaults are those of `protocol: quick`, which fit small
data and short runs; `protocol: paper` takes the papers' values (`distill.evaluate.papers`) for
every key that is not given.

`python -m distill.evaluate … protocol=paper probe.epochs=20 dense.size=448` sets any of them.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from contract.names import ViewText
from distill.config import Area, Auto, NonNegative, Positive, Section

_Above0 = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, lt=1)]

Protocol = Literal["quick", "paper"]


def _ordered(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the first must not exceed the second")
    return values


_Range = Annotated[tuple[_Above0, _Above0], AfterValidator(_ordered)]


class TaskSection(Section):
    """Settings of one task, which may have a protocol of its own."""

    protocol: Protocol | None = Field(
        None, description="values of the keys that are not given; default: as `protocol`"
    )


class ExtractConfig(Section):
    """One pass of the frozen network over a data set."""

    batch_size: Positive = Field(64, description="pictures per forward pass")
    workers: NonNegative = Field(2, description="decoding processes; 0 decodes in this one")
    view: ViewText | None = Field(
        None,
        description="what the network sees of a picture: squash, centre-crop:SHARE, letterbox or "
        "tiles:OVERLAP, then ,bilinear or ,no-antialias; default: that of the run's recipe, of "
        "other networks centre-crop:0.875 (224 of 256)",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on CUDA, fp32 on CPU"
    )
    shard_size: Positive = Field(
        512, description="pictures per shard; an interrupted pass resumes at a shard"
    )


class KNNConfig(TaskSection):
    """Weighted nearest neighbours (DINO's protocol)."""

    k: Positive = Field(20, description="neighbours that vote")
    temperature: _Above0 = Field(
        0.07, description="votes are weighted by exp(cosine / temperature)"
    )
    block_gib: _Above0 = Field(
        4.0, description="memory that one block of similarities may take, GiB"
    )


class ProbeConfig(TaskSection):
    """Linear probe, every learning rate at once (SeFA: 45 values in [1e-4, 10])."""

    rates: Positive = Field(45, description="learning rates, evenly spaced on a log scale")
    lowest: _Above0 = Field(1e-4, description="smallest learning rate")
    highest: _Above0 = Field(10.0, description="largest learning rate")
    epochs: Positive = Field(100, description="passes over the features (SeFA Table 12)")
    batch_size: Positive = Field(1024, description="features per step")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    held_out: _Share = Field(
        0.1, description="share of the training split that chooses the learning rate"
    )
    runs: Positive = Field(1, description="repetitions with other seeds, whose scores are averaged")
    standardize: bool = Field(
        False, description="scale every channel to zero mean and unit deviation first"
    )


class FinetuneConfig(TaskSection):
    """Full fine-tuning with layer-wise learning-rate decay (UMT A.1), or from the linear probe
    (LP-FT; SeFA Table 10).
    """

    init: Literal["random", "probe"] = Field(
        "random",
        description="first classifier; probe: heads/classification.safetensors of the linear task "
        "(LP-FT)",
    )
    epochs: Positive | None = Field(None, description="default: 10; with init=probe 100")
    warmup_epochs: NonNegative = 1
    batch_size: Positive = 512
    accumulate: Positive = Field(
        1, description="parts that a batch is computed in, one after another, to save memory"
    )
    lr: _Above0 = 1e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="rate of a layer over that of the next"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    crop_scale: Area = Field((0.08, 1.0), description="area of the random training crop")

    @property
    def passes(self) -> int:
        """Epochs: those that are set, or else UMT's 10 or SeFA's 100 (appendix C.2)."""
        return self.epochs or (100 if self.init == "probe" else 10)


class ZeroShotConfig(TaskSection):
    embeddings: str | None = Field(
        None,
        description="safetensors file: `embeddings` [C, d], and class names in its metadata as "
        "JSON `classes`",
    )


class DenseConfig(Section):
    """What segmentation and depth share: windows of pictures, a head trained on them."""

    size: Positive = Field(
        512,
        description="shorter side in pixels, rounded to the network's stride; unset with test=view "
        "the network's own",
    )
    steps: Positive = Field(2000, description="optimizer steps of the head")
    batch_size: Positive = Field(16, description="windows per step")
    lr: _Above0 = Field(1e-3, description="peak rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    exif: Literal["auto", "stored", "upright"] = Field(
        "auto",
        description="maps beside pictures that an EXIF tag turns are drawn on the pixels as they "
        "are stored, or upright; auto: what fits their size",
    )
    loss_stride: Positive = Field(
        4,
        description="pixels between two points of the training loss; scores are computed at "
        "every pixel",
    )
    warmup: _Share = Field(0.05, description="share of the steps for warm-up")
    schedule: Literal["polynomial", "cosine"] = Field(
        "polynomial", description="how the rate falls after the warm-up"
    )
    power: _Above0 = Field(0.9, description="exponent of the polynomial")
    augment: bool = Field(
        False,
        description="learn from random windows: resized, cut out, mirrored, with other colours. "
        "The network then runs every step; without, features are computed once",
    )
    resize: _Range = Field((0.5, 2.0), description="augment: the picture's shorter side, over size")
    test: Literal["windows", "whole", "view"] = Field(
        "windows",
        description="score by square windows, by whole pictures in one pass where the network "
        "takes any shape, or by extract.view at the network's own size, as servers see them",
    )
    window_step: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="largest distance between two square windows, over their side"
    )
    mirror: bool = Field(
        False, description="score by the mean of a picture's map and its mirrored picture's"
    )


class SegmentationConfig(TaskSection):
    """A head on frozen features (UMT: ADE20K at 512 px, mIoU; KPU: UPerNet)."""

    head: Literal["linear", "upernet", "decoder"] = Field(
        "linear",
        description="linear on the last patches, UPerNet on a pyramid of maps (students of kpu), "
        "or decoder: the one of distill.attach, which is scored as it is",
    )
    width: Annotated[int, Field(ge=2)] = Field(512, description="channels of UPerNet")

    classes: Positive | None = Field(
        None, description="number of classes; default: the largest label + 1"
    )
    ignore: int | list[int] | Auto = Field(
        "auto",
        description="label of pixels that are neither trained on nor scored, or a list of them; "
        "auto: 255 in masks of 8 bits unless it is a class's number, none in others",
    )
    zero: Literal["auto", "class", "ignore"] = Field(
        "auto",
        description="meaning of label 0; auto: ignored in ADE20K (objectInfo150.txt is there; its "
        "classes start at 1), else a class",
    )


class DepthConfig(TaskSection):
    """Binned depth on frozen features (UMT: NYUv2, RMSE)."""

    head: Literal["linear", "dpt", "decoder"] = Field(
        "linear",
        description="linear on the last patches, DPT on four layers, or decoder: the one of "
        "distill.attach, which is scored as it is",
    )
    bins: Positive = Field(256, description="depth candidates, evenly spaced")
    min_depth: _Above0 = Field(1e-3, description="metres; nearer pixels are ignored")
    max_depth: _Above0 = Field(10.0, description="metres; farther pixels are ignored")
    scale: _Above0 | None = Field(
        None,
        description="integer depth files contain metres times this; default: 1000, and to be set "
        "for files of 8 bits",
    )
    crop: Literal["none", "eigen"] = Field(
        "none", description="eigen: NYUv2's customary inner rectangle"
    )
    width: Positive = Field(256, description="channels of the DPT head")
    loss_lambda: _Share = Field(
        0.85, description="how far the scale-invariant log loss forgives a wrong scale"
    )
    backbone_lr: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="DPT: the backbone's rate over the head's (the papers' source uses 0.1); "
        "0 keeps it frozen; a head on a trained backbone cannot be served with other heads",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "DepthConfig":
        if self.min_depth >= self.max_depth:
            raise ValueError(
                f"depth.min_depth = {self.min_depth:g} is not below depth.max_depth = "
                f"{self.max_depth:g}: no pixel would count"
            )
        return self


class DetectionConfig(TaskSection):
    """Zero-shot detection by the decoder of the detector that taught a student (COCO, AP)."""

    checkpoint: str | None = Field(
        None,
        description="folder of the detector, or its name on the Hugging Face hub; default: the one "
        "of the run's recipe",
    )
    annotations: str | None = Field(
        None, description="file in annotations/; default: the only one, or that of val"
    )
    size: Positive = Field(800, description="shorter side in pixels; rounded to a student's stride")
    top: Positive = Field(300, description="boxes of a picture that are scored")
    threshold: _Share = Field(0.25, description="lowest score of the boxes in the picture drawn")


class RetrievalConfig(TaskSection):
    size: Positive = Field(
        224, description="longer side in pixels; both are rounded to the network's stride"
    )
    shape: Literal["square", "kept"] = Field(
        "square", description="of the pictures: squeezed into a square, or their own"
    )
    query: Literal["box", "whole"] = Field(
        "box",
        description="what is searched for: the box of the ground truth, or all of its picture",
    )


class VideoConfig(TaskSection):
    """Label propagation by patch similarity (DINO's settings)."""

    size: Positive = Field(
        480, description="shorter side in pixels; rounded to the network's stride"
    )
    frames: Positive = Field(7, description="previous frames used, in addition to the first")
    neighbours: Positive = Field(5, description="source patches that give a patch its label")
    radius: NonNegative = Field(
        12, description="patches searched in every direction; 0: everywhere"
    )
    temperature: _Above0 = Field(
        0.1, description="neighbours are weighted by exp(cosine / temperature)"
    )
    multiple: Positive | None = Field(
        None, description="the longer side is cut to a multiple of it first, in pixels"
    )


class RobustnessConfig(TaskSection):
    """ImageNet's variants, read with a classifier of ImageNet's 1000 classes."""

    classifier: Literal["probe", "own", "finetuned"] = Field(
        "probe",
        description="probe: heads/classification.safetensors of the linear task; own: the timm "
        "network's; finetuned: the network that the finetune task wrote",
    )


class RepresentationConfig(TaskSection):
    images: Positive = Field(10_000, description="pictures of the validation split that are used")
    tsne_images: Positive = Field(2_000, description="of these, points in the t-SNE picture")
    perplexity: _Above0 = 30.0


class EvaluationConfig(Section):
    protocol: Protocol = Field(
        "quick",
        description="of every task: quick, or the papers' values for the keys that are not given "
        "(their tables need these; listed below)",
    )
    # scikit-learn's bound, with room for runs of the probe
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    extract: ExtractConfig = Field(default_factory=ExtractConfig)
    knn: KNNConfig = Field(default_factory=KNNConfig)
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    zero_shot: ZeroShotConfig = Field(default_factory=ZeroShotConfig)
    dense: DenseConfig = Field(default_factory=DenseConfig)
    segmentation: SegmentationConfig = Field(default_factory=SegmentationConfig)
    depth: DepthConfig = Field(default_factory=DepthConfig)
    detection: DetectionConfig = Field(default_factory=DetectionConfig)
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    video: VideoConfig = Field(default_factory=VideoConfig)
    robustness: RobustnessConfig = Field(default_factory=RobustnessConfig)
    representation: RepresentationConfig = Field(default_factory=RepresentationConfig)
