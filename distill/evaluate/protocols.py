"""The papers' values of every evaluation task, each with its source, and what a run makes of them.

A task runs under a protocol: `quick` (the defaults, for small data and short runs) or `paper` (the
values below). A key that is given wins over either. UMT, SeFA and KPU are the papers; where they
are silent, the source says whose value stands in.
"""

import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distill.evaluate.config import EvaluationConfig
from distill.recipe_files import show


class _Value(NamedTuple):
    """A paper's value of a setting, and where it stands."""

    key: str
    paper: Any
    source: str


class _Difference(NamedTuple):
    """A setting that is not a paper's: the value used, and why."""

    key: str
    used: Any
    paper: Any
    reason: str


@dataclass(frozen=True)
class _Paper:
    """A task in the papers: the values, and what this library does otherwise whatever is set.

    `when`: the choice (key, value) that these belong to; None: always.
    """

    values: tuple[_Value, ...] = ()
    limits: tuple[str, ...] = ()
    when: tuple[str, Any] | None = None


SECTIONS = {
    "knn": "knn",
    "linear": "probe",
    "finetune": "finetune",
    "transfer": "probe",
    "zero-shot": "zero_shot",
    "segmentation": "segmentation",
    "depth": "depth",
    "detection": "detection",
    "retrieval": "retrieval",
    "video": "video",
    "robustness": "robustness",
    "clusters": "representation",
}
"""The section with the protocol of each task."""


def _values(source: str, **keys: Any) -> tuple[_Value, ...]:
    """Values of one source; `__` stands for the dot of a key."""
    return tuple(_Value(key.replace("__", "."), value, source) for key, value in keys.items())


_DINO = "silent; DINO's code"
_MAE = "silent; MAE's fine-tuning"
_MMSEG = "silent; MMSegmentation"
_RADIO = "RADIO's MMSegmentation config, which UMT A.1 follows"
_PROTEUS = "silent; Proteus's config, which UMT A.1 follows"

_PROBE = _Paper(
    values=(
        *_values("SeFA 4, B.2", probe__rates=45, probe__lowest=1e-4, probe__highest=10.0),
        *_values("SeFA Table 12", probe__epochs=100),
        *_values("SeFA 4: one probe of each pre-training", probe__runs=1),
        *_values("silent; the output features as they are", probe__standardize=False),
        *_values(_DINO, probe__batch_size=1024, probe__momentum=0.9, extract__crop=0.875),
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
)

_PAPERS: dict[str, tuple[_Paper, ...]] = {
    "knn": (
        _Paper(
            _values("no paper; DINO's code", knn__k=20, knn__temperature=0.07, extract__crop=0.875)
        ),
    ),
    "linear": (
        _PROBE,
        _Paper(
            limits=("KPU trains its linear layer with all its decoders, by AdamW for 80,000 steps",)
        ),
    ),
    "transfer": (_PROBE,),
    "finetune": (
        _Paper(
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
            ),
            limits=(
                "the papers are silent on augmentation: random crops and mirroring alone (MAE's "
                "has RandAugment, mixup and cutmix)",
                "pictures have the network's own size; UMT's have 224 px (--size 224)",
            ),
        ),
        _Paper(_values("UMT A.1", finetune__epochs=10), when=("finetune.init", "random")),
        _Paper(
            _values("SeFA C.2", finetune__epochs=100),
            ("SeFA C.2 gives the 100 epochs alone: the other values are UMT's",),
            ("finetune.init", "probe"),
        ),
    ),
    "zero-shot": (
        _Paper(limits=("KPU is silent on its prompts: the classes' embeddings are the file's",)),
    ),
    "segmentation": (
        _Paper(_values("UMT A.1", segmentation__head="linear")),
        _Paper(
            (
                *_values("UMT A.1", dense__steps=80_000, dense__batch_size=16, dense__size=512),
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
        _Paper(
            (
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
        _Paper(_values("UMT A.1", depth__head="dpt")),
        _Paper(
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
        _Paper(
            (*_DPT_TRAINING, *_values("silent; DINOv2's linear depth", depth__bins=256)),
            ("UMT's head is DPT; the values of its training", *_DEPTH_LIMITS),
            ("depth.head", "linear"),
        ),
    ),
    "detection": (
        _Paper(
            _values("silent; GroundingDINO", detection__size=800, detection__top=300),
            (
                "KPU's tables train MaskDINO's decoder, which no library here has: these are the "
                "zero-shot boxes of its Figure 3",
            ),
        ),
    ),
    "retrieval": (
        _Paper(
            _values(_DINO, retrieval__size=224),
            (
                "pictures become squares (DINO's code keeps their shape, the longer side 224 px)",
                "queries are cut out, as Radenović et al. ask (DINO's code reads them whole)",
            ),
        ),
    ),
    "video": (
        _Paper(
            _values(
                "silent, after DINO (SeFA B.3); DINO's code",
                video__size=480,
                video__frames=7,
                video__neighbours=5,
                video__radius=12,
                video__temperature=0.1,
            ),
            (
                "the longer side is the nearest multiple of the stride (DINO's code: of 64, "
                "rounded down)",
            ),
        ),
    ),
    "robustness": (
        _Paper(
            _values("SeFA B.1 (its Table 10: finetuned)", robustness__classifier="probe"),
        ),
    ),
    "clusters": (
        _Paper(
            (
                *_values("SeFA G: the validation split", representation__images=50_000),
                *_values("SeFA G", representation__tsne_images=20_000),
                *_values("silent; scikit-learn", representation__perplexity=30.0),
            ),
        ),
    ),
}
"""The papers' protocols by task. Later entries may belong to a choice that an earlier one makes."""


@dataclass(frozen=True)
class Applied:
    """What a task's numbers are made with: the protocol's name, the settings, the paper's values
    among them, and where they are not the paper's.
    """

    task: str
    name: str
    config: EvaluationConfig
    values: tuple[_Value, ...] = ()
    differences: tuple[_Difference, ...] = ()
    limits: tuple[str, ...] = field(default=())

    def about(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            "name": self.name,
            "paper": {
                value.key: {"value": value.paper, "source": value.source} for value in self.values
            },
            "differs": {
                key: {"used": used, "paper": paper, "reason": reason}
                for key, used, paper, reason in self.differences
            },
            "otherwise": list(self.limits),
        }

    def lines(self, whole: bool = True) -> list[str]:
        """For a terminal of 80 columns: the name, every value with the paper's where it differs,
        and what is done otherwise; without `whole` only what differs.
        """
        other = {difference.key: difference for difference in self.differences}
        texts = []
        for value in self.values:
            if value.key in other:
                used, paper = _show(other[value.key].used), _show(value.paper)
                reason = "given; " if other[value.key].reason == "given" else ""
                texts.append(f"{value.key}={used} ({reason}paper: {paper})")
            elif whole:
                texts.append(f"{value.key}={_show(value.paper)}")
        title = f"{self.task}: {self.name}"
        if not self.differences:
            title += ", the values of the papers"
        elif not whole:
            title += ", not as in the papers"
        text = ": ".join(filter(None, (title, ", ".join(texts))))
        lines = _wrap(text, "protocol  ")
        for limit in self.limits:
            lines += _wrap(f"otherwise than the papers: {limit}", "")
        return lines


def apply_protocol(config: EvaluationConfig, task: str) -> Applied:
    """The settings of a task under its protocol: `paper` sets every key that is not given."""
    name = getattr(config, SECTIONS[task]).protocol or config.protocol
    used = config
    values, limits = [], []
    for paper in _PAPERS[task]:
        if paper.when and _get(used, paper.when[0]) != paper.when[1]:
            continue
        for value in paper.values:
            if name == "paper" and not _is_given(config, value.key):
                used = _set(used, value.key, value.paper)
        values += paper.values
        limits += paper.limits
    differences = tuple(
        _Difference(
            value.key,
            _get(used, value.key),
            value.paper,
            "given" if _is_given(config, value.key) else name,
        )
        for value in values
        if _get(used, value.key) != value.paper
    )
    return Applied(task, name, used, tuple(values), differences, tuple(limits))


def describe_protocols() -> str:
    """Every paper's value by source, with the quick one where it differs, for a terminal of 80
    columns.
    """
    lines = []
    for task, papers in _PAPERS.items():
        lines.append(f"  {task}  ({SECTIONS[task]}.protocol)")
        for paper in papers:
            if paper.when:
                lines.append(f"    with {paper.when[0]}={paper.when[1]}")
            by_source: dict[str, list[str]] = {}
            for value in paper.values:
                by_source.setdefault(value.source, []).append(_with_quick(value))
            for source, texts in by_source.items():
                lines += _wrap(f"{source}: {', '.join(texts)}", "    ", 6)
            for limit in paper.limits:
                lines += _wrap(f"otherwise: {limit}", "    ", 6)
    return "\n".join(lines)


def _with_quick(value: _Value) -> str:
    quick, text = _get(EvaluationConfig(), value.key), f"{value.key}={_show(value.paper)}"
    # unset, the epochs are those of finetune.init
    same = quick == value.paper or value.key == "finetune.epochs"
    return text if same else f"{text} (quick: {_show(quick)})"


def _show(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


def _parts(key: str) -> tuple[str, str]:
    section, _, name = key.partition(".")
    return section, name


def _get(config: EvaluationConfig, key: str) -> Any:
    if key == "finetune.epochs":  # unset, they depend on finetune.init
        return config.finetune.passes
    section, name = _parts(key)
    return getattr(getattr(config, section), name)


def _is_given(config: EvaluationConfig, key: str) -> bool:
    section, name = _parts(key)
    return name in getattr(config, section).model_fields_set


def _set(config: EvaluationConfig, key: str, value: Any) -> EvaluationConfig:
    section, name = _parts(key)
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _wrap(text: str, first: str, indent: int = 10) -> list[str]:
    return textwrap.wrap(
        text,
        80,
        initial_indent=first or " " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
