"""The papers' values of every evaluation task, each with its source.

UMT, SeFA and KPU are the papers; where they are silent, the source says whose value stands in.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Value(NamedTuple):
    """A paper's value of a setting, and where it stands."""

    key: str
    paper: Any
    source: str


@dataclass(frozen=True)
class Paper:
    """A task in the papers: the values, and what this library does otherwise whatever is set.

    `when`: the choice (key, value) that these belong to; None: always.
    """

    values: tuple[Value, ...] = ()
    limits: tuple[str, ...] = ()
    when: tuple[str, Any] | None = None


def _values(source: str, **keys: Any) -> tuple[Value, ...]:
    """Values of one source; `__` stands for the dot of a key."""
    return tuple(Value(key.replace("__", "."), value, source) for key, value in keys.items())


_DINO = "silent; DINO's code"
_MAE = "silent; MAE's fine-tuning"
_MMSEG = "silent; MMSegmentation"
_RADIO = "RADIO's MMSegmentation config, which UMT A.1 follows"
_PROTEUS = "silent; Proteus's config, which UMT A.1 follows"

_CROPS = _values(_DINO, extract__view="centre-crop:0.875")
"""The pictures of every image-level score."""

_PROBE = Paper(
    values=(
        *_values("SeFA 4, B.2", probe__rates=45, probe__lowest=1e-4, probe__highest=10.0),
        *_values("SeFA Table 12", probe__epochs=100),
        *_values("SeFA 4: one probe of each pre-training", probe__runs=1),
        *_values("silent; the output features as they are", probe__standardize=False),
        *_values(_DINO, probe__batch_size=1024, probe__momentum=0.9),
        *_CROPS,
    ),
    limits=(
        "SeFA reports the best of 225, five pre-trainings (sets of hyper-parameters) by 45 rates; "
        "here it is one pre-training, and a held-out part of the training split chooses the rate",
        "features of centre crops, computed once (DINO's code crops and mirrors at random)",
    ),
)

_MMSEG_PIPELINE = _values(
    _MMSEG,
    dense__augment=True,
    dense__resize=(0.5, 2.0),
    dense__test="whole",
    dense__loss_stride=1,
    dense__mirror=False,
)

_DPT_TRAINING = (
    *_values("UMT A.1", dense__steps=25_000, dense__batch_size=16),
    *_values(
        _PROTEUS,
        dense__size=518,
        dense__lr=1e-4,
        dense__weight_decay=0.01,
        dense__warmup=1_500 / 25_000,
        dense__schedule="polynomial",
        dense__power=1.0,
        dense__augment=True,
        dense__resize=(0.8, 1.5),
        dense__loss_stride=1,
        dense__test="windows",
        dense__window_step=0.25,
        dense__mirror=True,
        depth__crop="eigen",
        depth__min_depth=1e-3,
        depth__max_depth=10.0,
        depth__loss_lambda=0.5,
    ),
)

_DEPTH_LIMITS = (
    "augmentation without Proteus's DepthMix, the network without its stochastic depth",
    "the loss is taken over a batch (Proteus's: over each picture)",
    "the last step is scored (Proteus's config keeps the best on the scored split)",
)

PAPERS: dict[str, tuple[Paper, ...]] = {
    "knn": (
        Paper(
            (
                *_values("no paper; DINO's code", knn__k=20, knn__temperature=0.07),
                *_CROPS,
            )
        ),
    ),
    "linear": (
        _PROBE,
        Paper(
            limits=("KPU trains its linear layer with all its decoders, by AdamW for 80,000 steps",)
        ),
    ),
    "transfer": (
        _PROBE,
        Paper(limits=("UMT is silent on how it scores Aircraft, Caltech101 and CUB2011",)),
    ),
    "finetune": (
        Paper(
            values=(
                *_values(
                    "UMT A.1",
                    finetune__warmup_epochs=1,
                    finetune__batch_size=512,
                    finetune__lr=1e-4,
                    finetune__layer_decay=0.8,
                ),
                *_values(
                    _MAE,
                    finetune__weight_decay=0.05,
                    finetune__label_smoothing=0.1,
                    finetune__crop_scale=(0.08, 1.0),
                ),
                *_CROPS,
            ),
            limits=(
                "the papers are silent on augmentation: random crops and mirroring alone (MAE's "
                "has RandAugment, mixup and cutmix)",
                "pictures have the network's own size; UMT's have 224 px (--size 224)",
            ),
        ),
        Paper(_values("UMT A.1", finetune__epochs=10), when=("finetune.init", "random")),
        Paper(
            _values("SeFA C.2", finetune__epochs=100),
            ("SeFA C.2 gives the 100 epochs alone: the other values are UMT's",),
            ("finetune.init", "probe"),
        ),
    ),
    "zero-shot": (
        Paper(
            _CROPS, limits=("KPU is silent on its prompts: the classes' embeddings are the file's",)
        ),
    ),
    "segmentation": (
        Paper(_values("UMT A.1", segmentation__head="linear")),
        Paper(
            (
                *_values("UMT A.1", segmentation__head="linear", dense__steps=80_000),
                *_values("UMT A.1", dense__batch_size=16, dense__size=512),
                *_values(
                    _RADIO,
                    dense__lr=1e-3,
                    dense__weight_decay=0.0,
                    dense__warmup=1_500 / 80_000,
                    dense__schedule="polynomial",
                    dense__power=1.0,
                    extract__precision="fp32",
                ),
                *(value._replace(source=_RADIO) for value in _MMSEG_PIPELINE),
            ),
            when=("segmentation.head", "linear"),
        ),
        Paper(
            (
                *_values("KPU", segmentation__head="upernet"),
                *_values("KPU (frozen features)", dense__steps=80_000),
                *_values("KPU", dense__lr=2e-4, dense__weight_decay=0.05, dense__schedule="cosine"),
                *_values(
                    _MMSEG,
                    dense__batch_size=16,
                    dense__size=512,
                    dense__warmup=1_500 / 80_000,
                    segmentation__width=512,
                ),
                *_MMSEG_PIPELINE,
            ),
            ("KPU trains its decoders together, on streams of their own: here each alone",),
            ("segmentation.head", "upernet"),
        ),
    ),
    "depth": (
        Paper(_values("UMT A.1", depth__head="dpt")),
        Paper(
            (
                *_values("UMT A.1", depth__backbone_lr=0.1),
                *_DPT_TRAINING,
                *_values(_PROTEUS, depth__width=256),
            ),
            (
                *_DEPTH_LIMITS,
                "the head resizes bilinearly, without batch norms, and ends in a sigmoid between "
                "depth.min_depth and depth.max_depth",
            ),
            ("depth.head", "dpt"),
        ),
        Paper(
            (*_DPT_TRAINING, *_values("silent; DINOv2's linear depth", depth__bins=256)),
            ("UMT's head is DPT; the values of its training", *_DEPTH_LIMITS),
            ("depth.head", "linear"),
        ),
    ),
    "detection": (
        Paper(
            _values("silent; GroundingDINO", detection__size=800, detection__top=300),
            (
                "KPU's tables train MaskDINO's decoder, which no library here has: these are the "
                "zero-shot boxes of its Figure 3",
            ),
        ),
    ),
    "retrieval": (
        Paper(
            _values(
                "silent, after DINO (SeFA B.4); DINO's code",
                retrieval__size=224,
                retrieval__shape="kept",
                retrieval__query="whole",
            ),
            ("sides are rounded to the stride (DINO's code leaves the rest of the pixels out)",),
        ),
    ),
    "video": (
        Paper(
            _values(
                "silent, after DINO (SeFA B.3); DINO's code",
                video__size=480,
                video__frames=7,
                video__neighbours=5,
                video__radius=12,
                video__temperature=0.1,
                video__multiple=64,
            ),
        ),
    ),
    "robustness": (
        Paper((*_values("SeFA 5, B.1", robustness__classifier="probe"), *_CROPS)),
        Paper(
            _values("SeFA Table 10", robustness__classifier="finetuned"),
            when=("robustness.classifier", "finetuned"),
        ),
    ),
    "clusters": (
        Paper(
            (
                *_values("SeFA G: the validation split", representation__images=50_000),
                *_values("SeFA G", representation__tsne_images=20_000),
                *_values("silent; scikit-learn", representation__perplexity=30.0),
                *_CROPS,
            ),
            ("the silhouette is that of 5,000 pictures",),
        ),
    ),
}
"""The papers' protocols by task. A later entry may belong to a choice of an earlier one's, and have
another value of the same key.
"""
