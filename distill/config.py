"""The recipe: every setting of a distillation run, validated once, frozen afterwards.

Defaults live here and nowhere else. A recipe is a YAML file (`distill/recipes/*.yaml`) that sets
what differs; `distill/recipe_io.py` reads it and applies `key=value` overrides from the command
line.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, create_model, field_validator, model_validator

from contract.names import ViewText
from contract.views import EVALUATED
from distill.fields import (
    Area,
    Auto,
    Beta,
    Deviation,
    Fraction,
    Licence,
    NetworkName,
    NonNegative,
    Positive,
    Section,
    Seed,
    TimmArguments,
    check_arguments,
    source_of,
)
from distill.monitor_config import MonitorConfig

Role = Literal["classification", "clip", "mae", "dino", "detector"]
"""What a teacher was trained for: decides the feature loss (UMT A.3, distill/methods/losses.py)."""

LoggerName = Literal["tensorboard", "wandb", "mlflow"]
"""Where measurements go beside metrics.jsonl (`distill/training/loggers.py`)."""

DETECTOR = "grounding_dino"
"""Name of the teachers of role `detector`."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class StudentConfig(Section):
    name: NetworkName = Field(
        "vit_base_patch16_224",
        description="timm architecture with spatial features (ViT or CNN), or local-dir:FOLDER or "
        "hf-hub:OWNER/NAME that timm has saved",
    )
    image_size: Positive = Field(224, description="side of the square training image, pixels")
    kwargs: TimmArguments = Field(
        default_factory=dict, description="further timm arguments, e.g. {depth: 6}"
    )
    pretrained: bool = Field(
        False, description="start from timm's weights; the papers start from random ones"
    )
    checkpoint: str | None = Field(
        None,
        description="start from a .safetensors or weights-only .pth file, 'package:NAME', or an "
        "earlier run: its folder (heads too, where they fit) or its student.safetensors (the "
        "network alone)",
    )
    licence: Licence | None = Field(
        None, description="of those weights, where their publisher's is not known: mit, …"
    )
    drop_path: Fraction = Field(0.0, description="stochastic depth rate")
    grad_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, to save memory"
    )
    mean: tuple[float, float, float] = Field(
        _IMAGENET_MEAN,
        description="RGB mean subtracted from images in [0, 1]; of a student that starts from "
        "weights what those were trained with, unless it is set",
    )
    std: tuple[Deviation, Deviation, Deviation] = Field(
        _IMAGENET_STD, description="RGB standard deviation divided by; as mean"
    )


class TeacherConfig(Section):
    name: NetworkName = Field(
        description="timm model name, with its pretrained tag; local-dir:FOLDER or "
        "hf-hub:OWNER/NAME for timm's config.json; hf:FOLDER or hf:OWNER/NAME for transformers; "
        "python:package.module:function for own code; 'run' for a student of this project; "
        "'grounding_dino' for the backbone of a detector (docs/teachers.md)"
    )
    role: Role = Field(
        description="classification | clip | mae | dino | detector: decides the feature loss"
    )
    alias: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="name in outputs and logs; the role if none is given",
    )
    checkpoint: str | None = Field(
        None,
        description="weights: a .safetensors or weights-only .pth file, the index of its shards, "
        "'package:NAME', or a run "
        "folder; of a detector a folder of transformers' or its name on the Hugging Face hub",
    )
    pretrained: bool = Field(
        True, description="without a checkpoint: fetch timm's weights (false: random weights)"
    )
    licence: Licence | None = Field(
        None,
        description="of its weights, where their publisher's is not known: apache-2.0, …",
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="further timm arguments, e.g. {embed_dim: 128}; of a random detector those of "
        "its Swin Transformer; of hf: keys of its config.json; of python: the function's",
    )
    image_size: Positive | None = Field(
        None, description="input side, pixels; default: the model's own data config"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="default: what its weights were trained with (docs/teachers.md)"
    )
    std: tuple[Deviation, Deviation, Deviation] | None = Field(
        None, description="default: what its weights were trained with (docs/teachers.md)"
    )
    block: int | None = Field(
        None, description="read features after this block (0-based); default: last, normalised"
    )
    summary: bool = Field(True, description="false: use its map alone, as of a detector's backbone")
    dim: Positive | None = Field(
        None, description="expected width of the patch features; checked when given"
    )
    batch_size: Positive | None = Field(
        None,
        description="pictures of its own stream per step, over all ranks; for methods whose "
        "teachers see pictures of their own (default: train.batch_size)",
    )
    student_size: Positive | Auto = Field(
        "auto",
        description="side at which the student sees this teacher's own stream, pixels; auto: the "
        "multiple of its patch that is nearest to the side of the crops, by default the teacher's",
    )
    weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="scales both losses of this teacher"
    )
    token_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="scales its token loss L^m"
    )
    feature_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="scales its feature loss L^f"
    )

    @field_validator("kwargs")
    @classmethod
    def _of_timm(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        own = source_of(info.data.get("name", ""))[0] == "python"
        return value if own else check_arguments(value)

    @model_validator(mode="after")
    def _detector_has_its_role(self) -> "TeacherConfig":
        if (self.role == "detector") != (self.name == DETECTOR):
            raise ValueError(
                f"name = {self.name} with role = {self.role}: role detector is that of name "
                f"{DETECTOR} alone, which has no other"
            )
        return self

    def settings(self) -> dict[str, Any]:
        """All that its features depend on beside its weights, as plain data."""
        return self.model_dump(mode="json", exclude=_NOT_THE_FEATURES)

    @property
    def label(self) -> str:
        """The name used in outputs (`<label>.token`) and logs."""
        return self.alias or self.role


class TeacherRuntime(Section):
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on CUDA, and on CPUs that have it where a teacher's features "
        "keep a cosine of 0.9999 with fp32; else fp32",
    )
    compile: bool = Field(False, description="torch.compile every teacher")


class TeacherCacheConfig(Section):
    """Teacher features computed once over a finite set of augmented views (0 views: no cache)."""

    views: NonNegative = Field(
        0, description="fixed augmented views per picture; 0 disables the cache"
    )
    path: str | None = Field(None, description="folder of the cache; default: RUN/teacher_cache")
    shard_size: Positive = Field(256, description="views in one shard")
    dtype: Literal["float16", "int8"] = Field(
        "float16",
        description="int8: half the room, with one scale for every vector; its error is logged",
    )


class TargetConfig(Section):
    """How teacher features become regression targets."""

    normalize: Literal["none", "layernorm", "standardize", "phi-s"] = Field(
        "none", description="UMT uses raw targets"
    )
    batches: Positive = Field(
        16, description="batches from which the statistics are estimated, once"
    )


class AlignConfig(Section):
    """What happens where student and teacher grids differ (UMT does not specify it)."""

    grid: Literal["teacher", "student"] = Field(
        "teacher",
        description="teacher: resize the student's map to the teacher's grid; student: the reverse",
    )


class DataConfig(Section):
    """Where pictures come from and how one shared geometric crop is taken."""

    kind: Literal["folder", "webdataset", "packaged-photos"] = Field("folder")
    path: str | list[str] | None = Field(
        None,
        description="folder: its path; webdataset: tar files, globs or brace patterns "
        "({0000..0146})",
    )
    images: Positive | None = Field(None, description="their number, for --dry-run without them")
    image_size: Positive | Auto = Field(
        "auto", description="side of the shared crop; auto: the largest input needed"
    )
    crop_scale: Area = Field((0.08, 1.0), description="area range of the random resized crop")
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), description="aspect-ratio range of the crop"
    )
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    repeats: Positive = Field(1, description="views of each picture in one epoch")
    workers: NonNegative = Field(
        4, description="decoding processes per rank; 0 decodes in the training process"
    )
    changed: Literal["refuse", "accept"] = Field(
        "refuse", description="what --resume does if pictures were added, removed or changed"
    )
    max_corrupt_fraction: Fraction = Field(0.01, description="stop beyond this unreadable share")

    @field_validator("crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        return value

    @model_validator(mode="after")
    def _has_a_path(self) -> "DataConfig":
        if self.kind != "packaged-photos" and not self.path:
            raise ValueError(
                f"data.path is empty and data.kind is '{self.kind}': set data.path to your images"
            )
        return self


class TrainConfig(Section):
    """The optimisation (UMT 4.1, A.1; what the paper leaves out has the defaults of ViT
    pre-training).
    """

    steps: Positive | None = Field(None, description="optimizer steps; give steps or epochs")
    epochs: Positive | None = Field(None, description="passes over the data; give steps or epochs")
    schedule: Literal["default", "dino"] = Field(
        "default",
        description="of learning rate and weight decay; dino: from 0, and ends a step later, as in "
        "DINO's and UNIC's code",
    )
    batch_size: Positive = Field(
        1024, description="images per optimizer step over all ranks and accumulations"
    )
    accumulate: Positive = Field(1, description="micro-batches per optimizer step")
    lr: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="peak learning rate (absolute, not scaled by batch)"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(
        1e-6, description="learning rate at the last step"
    )
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(
        5.0, description="linear warm-up; ignored if warmup_steps"
    )
    warmup_steps: NonNegative | None = Field(None, description="linear warm-up in steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="none on norms, biases and tokens"
    )
    weight_decay_end: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay at the last step, by a cosine; default: constant"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW")
    clip_grad: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest norm of the gradients; 0: no clipping"
    )
    clip_mode: Literal["global", "parameter"] = Field(
        "global", description="what clip_grad bounds: the norm of all gradients, or of each one"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="weight averaging; 0: off"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type of the student"
    )
    tf32: bool | Auto = Field(
        "auto",
        description="CUDA: round the factors of fp32 products to 10 bits, several times as fast; "
        "auto: as torch does, in convolutions alone",
    )
    cudnn_benchmark: bool = Field(
        False, description="CUDA: try several algorithms for convolutions; not the same each time"
    )
    channels_last: bool | Auto = Field(
        "auto", description="memory format; auto: for CNN students on CUDA"
    )
    compile: bool = Field(False, description="torch.compile the method")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="what torchrun's ranks do: DDP or FSDP2"
    )
    allowed_licences: tuple[Licence, ...] | None = Field(
        None,
        description="refuse weights of other and of unknown licences before training; null: any",
    )
    seed: Seed = Field(0, description="seeds weights, sample order and crops")
    device: Literal["auto", "cpu", "cuda"] = Field("auto")
    max_bad_steps: Positive = Field(
        20, description="abort after so many steps in a row with non-finite gradients"
    )
    log_every: Positive = Field(10, description="steps between two lines of metrics.jsonl")
    loggers: tuple[LoggerName, ...] = Field(
        (),
        description="also write measurements to any of tensorboard, wandb and mlflow (extras of "
        "these names; each reads its own variables, WANDB_MODE or MLFLOW_TRACKING_URI)",
    )
    tensorboard: bool = Field(False, description="the same as loggers=[tensorboard]")

    @property
    def all_loggers(self) -> tuple[str, ...]:
        """Names of the loggers, each once."""
        return tuple(dict.fromkeys([*self.loggers, *["tensorboard"] * self.tensorboard]))

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "set exactly one of train.steps and train.epochs (and the other to null)"
            )
        return self

    @model_validator(mode="after")
    def _average_is_whole(self) -> "TrainConfig":
        if self.ema_decay and self.parallel == "fsdp":
            raise ValueError(
                "train.ema_decay needs unsharded weights, but train.parallel = fsdp shards them: "
                "set train.ema_decay=0 or train.parallel=ddp"
            )
        return self

    @model_validator(mode="after")
    def _clipped_whole(self) -> "TrainConfig":
        if self.clip_mode == "parameter" and self.parallel == "fsdp":
            raise ValueError(
                "train.clip_mode = parameter needs unsharded gradients, but train.parallel = fsdp "
                "shards them: set train.parallel=ddp"
            )
        return self


class CheckpointConfig(Section):
    """Resumable state; the final weights are a file of their own."""

    every_steps: Positive = Field(1000, description="steps between two checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")


_NOT_THE_SOURCE = {
    "alias",
    "licence",
    "weight",
    "token_weight",
    "feature_weight",
    "batch_size",
    "student_size",
}
"""What may differ between two entries of one and the same teacher."""

_NOT_THE_FEATURES = _NOT_THE_SOURCE | {"dim", "checkpoint", "pretrained"}
"""Fields of a teacher that its features do not depend on, given its weights. Named by exclusion: a
new field counts until it is known not to."""


def refuse_repeats(teachers: Sequence[TeacherConfig], ignored: Set[str]) -> None:
    """Raise ValueError for two teachers that are equal in all but the fields `ignored`."""
    sources = [teacher.model_dump(exclude=set(ignored)) for teacher in teachers]
    for number, source in enumerate(sources):
        first = sources.index(source)
        # random weights differ
        if first < number and (source["checkpoint"] or source["pretrained"]):
            raise ValueError(
                f"teachers {first} and {number} are the same network, {teachers[number].name}: "
                "remove one"
            )


class Recipe(Section):
    """A complete distillation run; `recipe_io.make_recipe` makes one of plain data.

    Its class also has the section of its method, named as the method is (see `with_sections`).
    """

    method: str = Field("umt", description="how the student learns; the file in distill/methods/")
    student: StudentConfig = Field(default_factory=StudentConfig)
    view: ViewText = Field(
        str(EVALUATED), description="of pictures in evaluation and serving (docs/training.md)"
    )
    teachers: tuple[TeacherConfig, ...]
    teacher_runtime: TeacherRuntime = Field(default_factory=TeacherRuntime)
    teacher_cache: TeacherCacheConfig = Field(default_factory=TeacherCacheConfig)
    targets: TargetConfig = Field(default_factory=TargetConfig)
    align: AlignConfig = Field(default_factory=AlignConfig)
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @field_validator("teachers")
    @classmethod
    def _distinct_teachers(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        labels = [t.label for t in teachers]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"two teachers are called '{label}': set a different alias for each"
                )
            if label == "backbone":
                raise ValueError(
                    "'backbone' names the student's own outputs: choose another alias for the "
                    "teacher"
                )
        refuse_repeats(teachers, _NOT_THE_SOURCE)
        return teachers


def with_sections(sections: Mapping[str, type[Section]]) -> type[Recipe]:
    """The recipe's class with the sections of some methods, by the methods' names."""
    fields = {name: (kind, Field(default_factory=kind)) for name, kind in sections.items()}
    return create_model("Recipe", __base__=Recipe, **fields)
