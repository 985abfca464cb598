"""The tasks that heads of `distill.evaluate` are trained for, and what is made of their outputs.

Export, the model repository, the client, the demo and the trial all read this table. A new task is
an entry here, a head (`distill.heads.KINDS`) with its training, and, if pixels are what it is
about, a function in contract/dense.py that makes a map of the head's output.
"""

from dataclasses import dataclass
from typing import Literal

POSITIONS, CLASSES = "positions", "classes"
"""Axes whose size depends on the picture and on the head."""


@dataclass(frozen=True)
class Map:
    """A map of the picture's size, [B, H, W, *axes]: output `name` of the Triton model that has the
    task's name.
    """

    name: str
    function: str
    """In contract/dense.py: takes values [B, positions, ...], height, width and cell size."""
    dtype: Literal["int32", "float32"]
    kind: Literal["classes", "scalar", "vector"]
    """How clients describe and draw it: with a legend; with a scale; unit vectors of three
    components as red, green and blue.
    """
    array: str
    """Its name in the files that serve.client writes."""
    axes: tuple[int, ...] = ()
    unit: str = ""
    """Of a scalar, singular, unless the head says another."""


@dataclass(frozen=True)
class Task:
    """A head's output: name, axes after the batch, meaning (`{cell}`: what a position is), the
    facts of the head that clients get, and the map made of it.
    """

    name: str
    output: str
    axes: tuple[str | int, ...]
    meaning: str
    facts: tuple[str, ...]
    map: Map | None = None

    @property
    def dense(self) -> bool:
        """Whether there is a value at every position, not one for the picture."""
        return POSITIONS in self.axes

    @property
    def title(self) -> str:
        """The task as a heading."""
        return self.name.capitalize()


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            output="classification_logits",
            axes=(CLASSES,),
            meaning="a score per class",
            facts=("classes",),
        ),
        Task(
            name="segmentation",
            output="segmentation_logits",
            axes=(POSITIONS, CLASSES),
            meaning="a score per {cell} and class, row-major",
            facts=("classes", "stride"),
            map=Map("class_map", "class_map", "int32", "classes", array="class_map"),
        ),
        Task(
            name="depth",
            output="depth",
            axes=(POSITIONS,),
            meaning="metres at every {cell}, row-major",
            facts=("unit", "stride"),
            map=Map("depth_map", "depth_map", "float32", "scalar", array="depth", unit="metre"),
        ),
    )
}
"""In the order of the outputs."""


def map_tasks() -> list[Task]:
    """The tasks that a server answers with a map."""
    return [task for task in TASKS.values() if task.map is not None]
