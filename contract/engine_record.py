"""What is known of an engine: how it was built, what it takes and gives. No torch: manifests hold
it.
"""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from contract.errors import UserError, one_line


class Record(BaseModel):
    """Base of everything in a manifest: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineOptions(Record):
    """How to build; made by keyword, a wrong value is a one-line `UserError`."""

    flavour: Literal["tensorrt", "tensorrt-rtx"]
    compute_capabilities: tuple[str, ...] = ()
    """GPUs the engine shall run on, such as "8.9"; empty: the one in this machine. Several:
    tensorrt-rtx only.
    """
    workspace_gib: float | None = Field(None, gt=0)
    """Most scratch memory a layer may use, in GiB; None: all there is."""
    optimization_level: int | None = Field(None, ge=0, le=5)
    """0 builds fastest, 5 runs fastest; None: TensorRT's own choice, 3."""
    timing_cache: Path | None = None
    """Measured kernel times, read if the file is there and written back; tensorrt-rtx measures none
    and ignores it.
    """
    tf32: bool = True
    """Whether float32 matrices may be multiplied at 10 bits of mantissa, as TensorRT does unless
    set otherwise.
    """
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"engine options: {first_problem(error)}") from error

    @field_validator("compute_capabilities")
    @classmethod
    def _spelt(cls, capabilities: tuple[str, ...]) -> tuple[str, ...]:
        for capability in capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise ValueError(
                    f"'{capability}' is not a compute capability (write major.minor, such as 8.9)"
                )
        if len(set(capabilities)) < len(capabilities):
            raise ValueError(f"{', '.join(capabilities)} names one twice (name each once)")
        return capabilities


class ShapeRange(NamedTuple):
    """The smallest, the favoured and the largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Profile(Record):
    """An optimisation profile: the shapes of every input with dynamic dimensions."""

    shapes: dict[str, ShapeRange]


class EngineTensor(Record):
    """An input or output of the engine; dynamic dimensions are -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class EngineRecord(Record):
    """The sidecar of an engine: all that is known about it where it cannot be opened."""

    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    profiles: tuple[Profile, ...]
    dtypes: tuple[str, ...]
    """Types of all tensors in the network, sorted: the precision it computes in."""
    compute_capabilities: tuple[str, ...]
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt_version: str
    graph_sha256: dict[str, str]
    """By file name: the graph, and its external weights if it has some."""
    engine_sha256: str
    options: EngineOptions
    """As they took effect; of the timing cache the file name only."""

    @property
    def built(self) -> str:
        """By what and for which GPUs, in words."""
        return f"{self.flavour} {self.tensorrt_version} for {', '.join(self.compute_capabilities)}"


def first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic's, with the field's name and value, on one line of bounded
    length.
    """
    problem = error.errors()[0]
    place, message = (
        ".".join(map(str, problem["loc"]))[:200],
        problem["msg"].removeprefix("Value error, ")[:600],
    )
    given = (
        ""
        if problem["type"] in ("missing", "value_error")
        else f" (given: {str(problem['input'])[:60]})"
    )
    return one_line([f"{place}: {message}{given}" if place else f"{message}{given}"])
