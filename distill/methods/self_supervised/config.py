"""The recipe's section `ssl`: settings of the self-supervised objectives."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.config import Area, Fraction, NonNegative, Positive, Section

_Temperature = Annotated[float, Field(gt=0)]


class IBOTConfig(Section):
    """What iBOT adds to DINO (Zhou et al. 2022)."""

    mask_ratio: tuple[Fraction, ...] = Field(
        (0.0, 0.3),
        min_length=1,
        description="shares of hidden patches, of which each global crop draws one",
    )
    ratio_spread: tuple[Fraction, ...] = Field(
        (0.0, 0.2), description="each share varies by so much, up and down"
    )
    aspect: Annotated[float, Field(gt=0, le=1)] = Field(
        0.3, description="narrowest ratio of the sides of a hidden block"
    )
    shared_head: bool = Field(True, description="one head for class tokens and patches")
    patch_prototypes: Positive = Field(
        8192, description="prototypes of patches where the head is not shared"
    )


class UDIConfig(Section):
    """What UDI adds to DINO (Su & Ji 2024)."""

    alpha: Fraction = Field(
        0.5, description="share of the patches in the target of the second class token"
    )
    window: Positive = Field(3, description="cells a side, of which one is sampled; global crops")
    local_window: Positive = Field(2, description="the same in local crops")


class Config(Section):
    """Self-supervision beside distillation: objective, momentum teacher, crops."""

    TINY: ClassVar = {
        "prototypes": 64,
        "head_hidden": 32,
        "bottleneck": 16,
        "locals": 2,
        "local_size": None,
        "temp_warmup_epochs": 1,
    }

    kind: Literal["dino", "ibot", "udi"] = Field("dino", description="the objective")
    prototypes: Positive = Field(65536, description="K, outputs of the head")
    head_hidden: Positive = Field(2048, description="hidden width of the head")
    bottleneck: Positive = Field(256, description="width in front of the head's last layer")
    norm_last_layer: bool = Field(
        False, description="keep the last layer's rows at length 1 (advised for ViT-B)"
    )
    freeze_last_layer: NonNegative = Field(
        1, description="epochs in which the head's last layer does not train"
    )
    student_temp: _Temperature = Field(0.1, description="temperature of the student")
    teacher_temp: tuple[_Temperature, _Temperature] = Field(
        (0.04, 0.07), description="temperature of the momentum teacher, first and after warm-up"
    )
    temp_warmup_epochs: NonNegative = Field(
        30, description="epochs over which the teacher's temperature rises"
    )
    momentum: Fraction = Field(
        0.996, description="share the momentum teacher keeps in the first step, 1 in the last"
    )
    center_momentum: Fraction = Field(0.9, description="share the centre keeps in a step")
    locals: NonNegative = Field(8, description="local crops of a picture")
    local_size: Positive | None = Field(
        96, description="their side, pixels; null: half of student.image_size"
    )
    global_scale: Area = Field((0.4, 1.0), description="area range of the two global crops")
    local_scale: Area = Field((0.05, 0.4), description="area range of the local crops")
    ship: Literal["student", "ema"] = Field(
        "student", description="which network student.safetensors holds; ema.safetensors the other"
    )
    ibot: IBOTConfig = Field(default_factory=IBOTConfig)
    udi: UDIConfig = Field(default_factory=UDIConfig)
