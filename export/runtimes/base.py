"""What every runtime does: run a graph by name, or bind it to its inputs so that the graph alone is
timed.

TF32 is off in all of them: float32 means float32 wherever outputs are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from contract.manifest import Precision
from export.modules import Part

Outputs = dict[str, np.ndarray]


class Bound(NamedTuple):
    """A graph with its inputs in place: `call` runs it and waits for it, `read` gives the outputs
    of the last call.
    """

    call: Callable[[], None]
    read: Callable[[], list[np.ndarray]]


@dataclass(frozen=True)
class Exported:
    """What an export has made so far, for the runtimes that check it."""

    precision: Precision
    graphs: dict[str, Path] | None = None
    """ONNX files by graph."""
    parts: Sequence[Part] = ()
    """The modules that the graphs were traced from."""
    engines: dict[str, dict[str, Path]] | None = None
    """Engine files by TensorRT flavour and graph."""


class Runtime:
    """Runs graphs by name. A new runtime is a subclass in a file of its own and one entry in
    `available.RUNTIMES`.
    """

    name: str
    """As parity records and tables have it."""

    @classmethod
    def checking(cls, exported: Exported) -> "list[Runtime]":
        """The runtimes of this kind that check an export on this machine: none, one, or one per
        flavour. What a GPU machine leaves out is logged with the reason.
        """
        raise NotImplementedError

    def has(self, graph: str) -> bool:
        """Whether this runtime has a graph of that name."""
        return True

    def bind(self, graph: str, feeds: Outputs) -> Bound:
        """Put a graph's inputs in place; raises UserError for inputs it does not take."""
        raise NotImplementedError

    def run(self, graph: str, feeds: Outputs) -> list[np.ndarray]:
        """Outputs of a graph, in its order; raises UserError, in one line, for any complaint of the
        runtime.
        """
        bound = self.bind(graph, feeds)
        bound.call()
        return bound.read()


def on_cpu(runtime: Runtime, precision: Precision) -> Runtime:
    """The runtime, its name saying that CPUs compute fp16 and bf16 graphs in float32."""
    if precision in ("fp16", "bf16"):
        runtime.name += " (fp32 arithmetic)"
    return runtime
