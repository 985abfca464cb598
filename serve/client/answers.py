"""Answers: arrays by name, and the reasons of missing ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from contract.dense import grid_of
from contract.views import SQUASH, ViewPolicy
from serve.errors import ClientError, WrongAnswer


@dataclass(frozen=True)
class Answer(Mapping[str, np.ndarray]):
    """Arrays by output, a row a picture in the order they were given; `size` is the (height, width)
    the model saw, `view` how pictures of another size were brought to it.
    """

    arrays: dict[str, np.ndarray]
    size: tuple[int, int]
    request_id: str
    missing: dict[str, ClientError] = field(default_factory=dict)
    """Reasons of requested outputs that are missing; only with `partial`.
    """
    view: ViewPolicy = SQUASH

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.missing:
            raise KeyError(f"'{name}' is missing from this partial answer: {self.missing[name]}")
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def grid(self, name: str) -> tuple[int, int]:
        """(h, w) of an output that has a row a patch, [B, h*w, d] or [B, h*w]; raises ValueError
        for others.
        """
        if self[name].ndim < 2:
            raise ValueError(f"'{name}' is {list(self[name].shape)}: it has no row per patch")
        return grid_of(self[name].shape[1], *self.size)


def join(
    parts: Sequence[tuple[dict[str, np.ndarray], dict[str, ClientError]]],
    size: tuple[int, int],
    request_id: str,
    view: ViewPolicy,
) -> Answer:
    """One answer of several requests' arrays; an output missing from one is missing from the whole.

    Lists of names (classes) are not joined: every part must have the same, or WrongAnswer is raised
    (a new version may have been loaded in between).
    """
    missing: dict[str, ClientError] = {}
    for _, reasons in parts:
        missing = reasons | missing
    arrays = {}
    for name in (name for name in parts[0][0] if name not in missing):
        values = [result[name] for result, _ in parts]
        if values[0].dtype == np.object_:
            if any(not np.array_equal(value, values[0]) for value in values):
                raise WrongAnswer(
                    f"output '{name}' changed between the parts of one batch: send the request "
                    "again",
                    request_id,
                )
            arrays[name] = values[0]
            continue
        if len({value.shape[1:] for value in values}) > 1:
            raise WrongAnswer(
                f"output '{name}' changed its shape between the parts of one batch: send the "
                "request again",
                request_id,
            )
        arrays[name] = np.concatenate(
            values
        )  # a copy in any case: tritonclient's arrays cannot be written to
    return Answer(arrays, size, request_id, missing, view)
