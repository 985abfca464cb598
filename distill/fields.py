"""Types of fields that recipes and settings share, and the base of their sections."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("must be two shares of a picture's area, the smaller first")
    return value


Area = Annotated[tuple[float, float], AfterValidator(_shares)]
"""Range of a random crop's share of the picture's area."""


def _timm_name(value: str) -> str:
    """timm's name of a network, also where it is given as timm's own repository on the hub."""
    source, colon, rest = value.partition(":")
    if not colon:
        return value.removeprefix("timm/")
    if source not in ("hf-hub", "hf_hub", "local-dir"):
        return value
    if source != "local-dir" and rest.startswith("timm/"):
        return rest.removeprefix("timm/").partition("@")[0]
    where = f"{rest}/model.safetensors" if source == "local-dir" else "its file, downloaded"
    raise ValueError(
        f"name = {value}: only the hub's timm/… is read by name: set name to timm's architecture "
        f"and checkpoint to {where}"
    )


NetworkName = Annotated[str, AfterValidator(_timm_name)]
Deviation = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change after
    validation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1
        for item in value if isinstance(value, list | tuple) else (value,):
            kind = cls.model_fields[info.field_name].annotation
            if isinstance(item, bool) and not _may_be_switch(kind):
                raise ValueError(f"{str(item).lower()} is a switch, not a value of this key")
        return value


def _may_be_switch(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_may_be_switch, get_args(annotation)))


_OWN_KEYS = {
    "pretrained": "pretrained",
    "checkpoint_path": "checkpoint",
    "pretrained_cfg": "checkpoint",
}
"""Arguments of timm's that a recipe sets by keys of its own, which are checked."""


def _timm_arguments(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in _OWN_KEYS:
            raise ValueError(f"{name} is not one of timm's arguments here: set {_OWN_KEYS[name]}")
    return value


TimmArguments = Annotated[dict[str, Any], AfterValidator(_timm_arguments)]
