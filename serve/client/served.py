"""A model as the server describes it, and checks of its answers."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import triton_to_np_dtype

from contract.errors import near_names
from contract.views import ViewPolicy
from serve.errors import BadRequest, NotFinite, WrongAnswer, shorten

FRONT_DOOR, ENCODED, DECODER = "features", "features_encoded", "decode"
"""Triton's names of the models a client talks to; the decoder's configuration says the model's
size.
"""


Outputs = Sequence[str] | str | None
"""Names of outputs, or of one; None: all."""


@dataclass(frozen=True)
class Port:
    """An input or output: Triton's name of its type, its shape without the batch (-1 where it
    varies).
    """

    name: str
    kind: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """What a client needs to know of a model. `max_batch` is 0 for models whose first axis is
    theirs.
    """

    name: str
    max_batch: int
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    parameters: dict[str, str]

    @classmethod
    def read(cls, config: ModelConfig) -> "Served":
        def ports(listed: Iterable[Any]) -> dict[str, Port]:
            kinds = {
                port.name: DataType.Name(port.data_type).removeprefix("TYPE_") for port in listed
            }
            kinds = {name: "BYTES" if kind == "STRING" else kind for name, kind in kinds.items()}
            return {
                port.name: Port(port.name, kinds[port.name], tuple(port.dims)) for port in listed
            }

        parameters = {key: value.string_value for key, value in config.parameters.items()}
        return cls(
            config.name,
            config.max_batch_size,
            ports(config.input),
            ports(config.output),
            parameters,
        )

    def choose(self, outputs: Outputs) -> tuple[str, ...]:
        """Outputs by name, all for None; raises BadRequest for one that is not there, naming the
        nearest.
        """
        if outputs is None:
            return tuple(self.outputs)
        listed = [outputs] if isinstance(outputs, str) else outputs
        if not isinstance(listed, Iterable) or isinstance(listed, (bytes, bytearray)):
            raise BadRequest(f"outputs are of type {type(outputs).__name__}: give a list of names")
        listed = list(listed)
        for name in listed:
            if not isinstance(name, str):
                raise BadRequest(f"an output is of type {type(name).__name__}: give its name")
        names = tuple(dict.fromkeys(listed))
        if not names:
            raise BadRequest(
                f"no outputs were requested of '{self.name}' (it has {', '.join(self.outputs)})"
            )
        for name in names:
            if name not in self.outputs:
                name = shorten(name, 60)
                raise BadRequest(
                    f"output '{name}': '{self.name}' has no such "
                    f"output{nearest(name, self.outputs)}; it has {', '.join(self.outputs)}"
                )
        return names

    def facts(self, key: str) -> Any:
        """A parameter of the configuration that holds JSON, or None."""
        try:
            return json.loads(self.parameters[key])
        except (KeyError, ValueError):
            return None

    def size(self) -> tuple[int, int] | None:
        """Height and width of the pictures it takes; where they vary, the usual ones;
        None if it does not say.
        """
        image = self.inputs.get("image")
        if image is not None and min(image.dims[-3:-1]) > 0:
            return image.dims[-3], image.dims[-2]
        message = self.facts("about") or {name: self.facts(name) for name in ("height", "width")}
        height, width = message.get("height"), message.get("width")
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def takes(self, size: tuple[int, int] | None) -> bool:
        """Whether pictures of a height and width are answered as they are, as far as the server
        says which are.
        """
        about = self.facts("about") or {}
        if size is None:
            return False
        if not {"stride", "height", "width", "min_height", "min_width"} <= set(about):
            return True
        return all(
            about[f"min_{axis}"] <= side <= about[axis] and side % about["stride"] == 0
            for side, axis in zip(size, ("height", "width"), strict=True)
        )


def whole_view(about: Mapping[str, Any]) -> str | None:
    """The view= to ask for one vector of a picture with, of a server that says `about` of itself:
    a letterbox where the bundle's view is tiles, which have none, and else None, the bundle's own.
    """
    try:
        view = ViewPolicy.parse(about.get("view") or "squash")
    except ValueError:  # of another version: the request says what is wrong with it
        return None
    return "letterbox" if view.kind == "tiles" else None


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` if one of the known names is near, "" otherwise."""
    result = near_names(name.replace(".", "_"), known)
    return f": did you mean '{result[0]}'?" if result else ""


_Reader = Callable[[str], np.ndarray | None]
"""Gives an output of an answer as an array."""


def read_answer(
    served: Served,
    names: Sequence[str],
    rows: int,
    read: _Reader,
    returned: Sequence[str],
    request_id: str,
) -> dict[str, np.ndarray]:
    """The arrays of an answer for `rows` pictures, after checking them; `returned` are the names it
    came with.

    Raises WrongAnswer for a name too few or too many, a type or shape other than the model's
    configuration says, another number of rows, and NotFinite for NaN or infinity.
    """
    if sorted(returned) != sorted(names):
        raise WrongAnswer(
            f"'{served.name}' was asked for {', '.join(names)} but returned {', '.join(returned)}",
            request_id,
        )
    result = {}
    for name in names:
        port, value = served.outputs[name], read(name)
        if value is None or value.dtype != np.dtype(triton_to_np_dtype(port.kind)):
            kind = "nothing" if value is None else value.dtype
            raise WrongAnswer(
                f"output '{name}' is {kind} where '{served.name}' promises {port.kind}", request_id
            )
        expected = (-1, *port.dims) if served.max_batch else port.dims
        matches = len(expected) == value.ndim and all(
            e in (-1, a) for e, a in zip(expected, value.shape, strict=False)
        )
        # class names are a list of their own; everything else has a row a picture
        if not matches or (port.kind != "BYTES" and len(value) != rows):
            raise WrongAnswer(
                f"output '{name}' is {list(value.shape)} for {rows} pictures where '{served.name}' "
                f"promises {list(expected)}",
                request_id,
            )
        # a sum is NaN or infinite if any summand is, at a fraction of isfinite's cost
        if value.dtype.kind == "f" and not np.isfinite(value.sum(dtype=np.float64)):
            error = NotFinite(f"output '{name}' holds NaN or infinity", request_id)
            error.output = name
            raise error
        result[name] = value
    return result
