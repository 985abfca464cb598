"""Types of fields that recipes and settings share, and the base of their sections."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from contract.licences import LICENCE, LicenceId

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


SOURCES = ("hf-hub", "local-dir", "hf", "python")
"""Prefixes of a network's name: timm's of a hub and of a folder, transformers' of either, and own
code.
"""


def source_of(name: str) -> tuple[str, str]:
    """The prefix of a network's name and what follows it; an empty prefix for a name of timm's."""
    prefix, colon, place = name.partition(":")
    return (prefix, place) if colon and prefix in SOURCES else ("", name)


def _network_name(value: str) -> str:
    """A network's name, timm's without its repository on the hub."""
    value = re.sub("^hf_hub:", "hf-hub:", value)
    prefix, place = source_of(value)
    if not prefix:
        return value.removeprefix("timm/")
    if not place.strip():
        raise ValueError(f"name = {value}: nothing follows {prefix}: (see docs/teachers.md)")
    if prefix == "hf-hub" and place.startswith("timm/"):
        return place.removeprefix("timm/").partition("@")[0]
    if prefix == "hf-hub" and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", place):
        raise ValueError(
            f"name = {value}: a hub's repository is OWNER/NAME: write hf-hub:OWNER/NAME, or "
            "local-dir:FOLDER for a folder"
        )
    if prefix == "python" and not re.fullmatch(
        r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", place
    ):
        raise ValueError(
            f"name = {value}: write python:package.module:function, as Python imports it"
        )
    return value


NetworkName = Annotated[str, AfterValidator(_network_name)]


def _plain_licence(value: object) -> object:
    if not isinstance(value, str):
        return value
    name = value.strip().lower()
    if not re.search(LICENCE, name):
        raise ValueError(f"'{value}' is not a licence's name: write SPDX's, such as apache-2.0")
    return name


Licence = Annotated[LicenceId, BeforeValidator(_plain_licence)]
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


def check_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for arguments of timm's that a recipe sets by keys of its own."""
    for name in value:
        if name in _OWN_KEYS:
            raise ValueError(f"{name} is not one of timm's arguments here: set {_OWN_KEYS[name]}")
    return value


TimmArguments = Annotated[dict[str, Any], AfterValidator(check_arguments)]
