"""Names, dtypes and axes of every graph's inputs and outputs, stated once; no torch, so that
serving can read it.

The dot of `<teacher>.token` is an underscore here: ONNX and Triton names.

| graph | reads | gives |
|---|---|---|
| backbone | image | backbone_global, backbone_patches (for clients); features, features_global (for the other graphs) |
| backbone with a second class token | image | all that, and backbone_second (for clients) |
| backbone with further maps | image | all that, and of each backbone_s<stride> (for clients), features_s<stride> |
| backbone with a DPT head | image | all that, then layers_1, layers_1_global, … layers_4_global (for that head) |
| interaction | features, features_global | spaces (UMT's coupled modules; methods without have no such graph) |
| head_<teacher> | spaces, or features and features_global | <teacher>_token (if it has one), <teacher>_patches |
| head of a teacher with several maps | features_global (if it has a token) and features_s<stride> | all that, and of each further map <teacher>_s<stride> |
| <task> | the same as a head, or features alone, or (a DPT head) the layers | its task's output (contract/tasks.py) |
| fused | image | everything a client may ask for |
| text_detector | ids, self_mask, position_ids (contract/detection.py) | text |
| detector | the maps of a detector teacher's head, text, text_mask, self_mask, position_ids | logits, boxes |

`features` repeats `backbone_patches` under another name and shape on purpose: in a Triton ensemble
a tensor must not be both an output and another step's input. For the same reason the layers are for
graphs alone. The last two are no part of `fused`, nor of the front door: they need words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from contract.tasks import CLASSES, POSITIONS, TASKS, Task

IMAGE = "image"
FEATURES = "features"
FEATURES_GLOBAL = "features_global"
SPACES = "spaces"
MAP_OF_STRIDE = "features_s"
"""Before the stride, in the name of a further map of the student."""
BACKBONE = "backbone"
INTERACTION = "interaction"
FUSED = "fused"
IDENTITY = "identity"
"""A tensor that models of one bundle pass on: that bundle's number."""
TEXT_DETECTOR = "text_detector"
DETECTOR = "detector"
TEXT_TOKENS = "text_tokens"
"""The axis of a prompt's tokens."""
_AXES = ("height", "width", "rows", "columns", POSITIONS, "tokens", TEXT_TOKENS)
"""Sizes that vary beside the batch, of inputs and outputs."""
DType = Literal["uint8", "float32", "int64", "bool"]


class Port(NamedTuple):
    """An input or output: name, element type, axes (a number, or the name of what varies) and what
    it means.
    """

    name: str
    dtype: DType
    axes: tuple[int | str, ...]
    meaning: str


class Signature(NamedTuple):
    """Inputs and outputs of one graph, in order."""

    graph: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def head_graph(label: str) -> str:
    """Name of a teacher's head graph."""
    return f"head_{label}"


def image_port(height: int | str, width: int | str) -> Port:
    """The picture: RGB bytes, rows first."""
    return Port(
        IMAGE,
        "uint8",
        ("batch", height, width, 3),
        "RGB picture, 0-255; normalisation is inside the graph",
    )


def backbone_ports(width: int, positions: int | str) -> tuple[Port, ...]:
    """What clients get of the student itself."""
    return (
        Port("backbone_global", "float32", ("batch", width), "the student's image-level vector"),
        Port(
            "backbone_patches",
            "float32",
            ("batch", positions, width),
            "the student's map, row-major",
        ),
    )


def second_port(width: int) -> Port:
    """A second image-level vector, of students that learn one (UDI's second class token)."""
    return Port(
        "backbone_second", "float32", ("batch", width), "the student's second image-level vector"
    )


def feature_ports(width: int, rows: int | str, columns: int | str) -> tuple[Port, ...]:
    """What the other graphs get of the student."""
    return (
        Port(
            FEATURES,
            "float32",
            ("batch", rows, columns, width),
            "the map, for interaction, heads and tasks",
        ),
        Port(
            FEATURES_GLOBAL, "float32", ("batch", 1, width), "the image-level vector, for the same"
        ),
    )


def map_ports(stride: int, dim: int, height: int | None, width: int | None) -> tuple[Port, Port]:
    """A further map of the student, a position every `stride` pixels: for clients, and for heads.

    `height` and `width` are pixels, None where they vary.
    """
    rows, columns, positions = f"rows_{stride}", f"columns_{stride}", f"positions_{stride}"
    if height and width:
        # strided convolutions round up
        rows, columns = -(-height // stride), -(-width // stride)
        positions = rows * columns
    name = f"{MAP_OF_STRIDE}{stride}"
    cell = f"a position every {stride} pixels"
    return (
        Port(
            f"backbone_s{stride}",
            "float32",
            ("batch", positions, dim),
            f"the student's map of {cell}, row-major",
        ),
        Port(name, "float32", ("batch", rows, columns, dim), f"the map of {cell}, for heads"),
    )


def is_internal(name: str) -> bool:
    """Whether an output is for other graphs, not for clients."""
    return bool(re.fullmatch(r"features(_global|_s\d+)?|spaces|layers_\d+(_global)?", name))


def layer_names(count: int) -> list[str]:
    """Maps and image-level vectors of layers, in turn, shallow to deep."""
    return [f"layers_{number}{what}" for number in range(1, count + 1) for what in ("", "_global")]


def layer_ports(
    widths: Sequence[int],
    strides: Sequence[int],
    stride: int,
    height: int | None,
    width: int | None,
) -> tuple[Port, ...]:
    """What a DPT head gets of the student: the maps of (four) layers, shallow to deep, each with
    its vector.

    `strides` are the layers' pixels per position, `stride` the student's; `height` and `width`
    pixels, None where they vary.
    """
    ports: list[Port] = []
    names = layer_names(len(widths))
    for name, vector, dim, pixels in zip(names[::2], names[1::2], widths, strides, strict=True):
        rows, columns = (
            ("rows", "columns") if pixels == stride else (f"rows_{pixels}", f"columns_{pixels}")
        )
        if height and width:
            rows, columns = height // pixels, width // pixels
        meaning = f"a layer's map, a position every {pixels} pixels, for a DPT head"
        ports.append(Port(name, "float32", ("batch", rows, columns, dim), meaning))
        ports.append(
            Port(
                vector,
                "float32",
                ("batch", 1, dim),
                "that layer's image-level vector, for the same",
            )
        )
    return tuple(ports)


def layer_side(axis: str, rows: int, columns: int, stride: int) -> int:
    """Size of a map's axis `rows_N` or `columns_N` (a position every N pixels, rounded up), of a
    student's grid and stride.
    """
    side, _, pixels = axis.partition("_")
    return -(-stride * {"rows": rows, "columns": columns}[side] // int(pixels))


def check_axes(shapes: Mapping[str, Sequence[int | str]], read: bool) -> None:
    """Raise ValueError if tensors, by name, have axes that no graph has; `read`: a graph's inputs,
    whose sizes a server must know.
    """
    for name, (first, *others) in shapes.items():
        wrong = [axis for axis in others if isinstance(axis, str) and not _is_axis(axis, read)]
        if first != "batch" or wrong:
            raise ValueError(f"'{name}' may not have an axis '{(wrong or [first])[0]}' there")


def _is_axis(name: str, read: bool) -> bool:
    if name in _AXES or re.fullmatch(r"(rows|columns)_[1-9]\d{0,3}", name, re.ASCII):
        return True
    given = re.fullmatch(r"positions_[1-9]\d{0,3}", name, re.ASCII) or name in map(dpt_axis, TASKS)
    return bool(given) and not read


def dpt_axis(task: str) -> str:
    """The axis of what a DPT head says, whose positions are finer than patches."""
    return f"{task}_{POSITIONS}"


def text_ports() -> tuple[Port, ...]:
    """A detector's prompt; see contract/detection.py."""
    tokens = ("batch", TEXT_TOKENS)
    return (
        Port("ids", "int64", tokens, "a prompt in tokens of the vocabulary"),
        Port("self_mask", "bool", (*tokens, TEXT_TOKENS), "whether a token sees another"),
        Port("position_ids", "int64", tokens, "place in a phrase"),
    )


def detector_signatures(
    maps: Sequence[Port], width: int, queries: int, window: int
) -> tuple[Signature, Signature]:
    """Those of `text_detector` and `detector`, of text features `width` wide."""
    text = Port("text", "float32", ("batch", TEXT_TOKENS, width), "text features, for the detector")
    ids, *masks = text_ports()
    text_mask = Port("text_mask", "bool", ids.axes, "whether a token is text, not padding")
    logits = Port(
        "logits",
        "float32",
        ("batch", queries, window),
        "a score of every token for every box, -inf beyond the text",
    )
    boxes = Port(
        "boxes",
        "float32",
        ("batch", queries, 4),
        "centre x and y, width and height as shares of the picture",
    )
    return (
        Signature(TEXT_DETECTOR, (ids, *masks), (text,)),
        Signature(DETECTOR, (*maps, text, text_mask, *masks), (logits, boxes)),
    )


class FurtherMap(NamedTuple):
    """A further map that a head predicts: its stride in pixels, width and number of positions."""

    stride: int
    width: int
    positions: int | str


def further_names(label: str, strides: Sequence[int]) -> list[str]:
    """Outputs of the further maps that a head predicts; the second of one stride has a number."""
    names = [f"{label}_s{stride}" for stride in strides]
    return [
        f"{name}_{names[:place].count(name) + 1}" if name in names[:place] else name
        for place, name in enumerate(names)
    ]


TEACHERS = "in the teacher's units"
FITTED = f"{TEACHERS}; trained by cosine: one factor for all, fitted, gives its length"
FREE = "of free length (trained by cosine): compare directions"


def head_ports(
    label: str,
    token: int | None,
    patches: int,
    positions: int | str,
    units: Mapping[str, str],
    further: Sequence[FurtherMap] = (),
) -> tuple[Port, ...]:
    """A teacher's predictions; `units` says what the length of "token", "patches", "maps" means."""
    ports = [
        Port(
            f"{label}_patches",
            "float32",
            ("batch", positions, patches),
            f"predicts '{label}' at every patch, {units['patches']}",
        )
    ]
    if token is not None:
        meaning = f"predicts the image-level vector of '{label}', {units['token']}"
        ports.insert(0, Port(f"{label}_token", "float32", ("batch", token), meaning))
    names = further_names(label, [map_.stride for map_ in further])
    ports += [
        Port(
            name,
            "float32",
            ("batch", map_.positions, map_.width),
            f"predicts a further map of '{label}', a position every {map_.stride} pixels, "
            + units["maps"],
        )
        for name, map_ in zip(names, further, strict=True)
    ]
    return tuple(ports)


def task_port(task: Task, classes: int, positions: int | str, cell: str = "patch") -> Port:
    """The output of a task head of `distill.evaluate`; `cell` says what a position is."""
    sizes = {CLASSES: classes, POSITIONS: positions}
    axes = tuple(sizes.get(axis, axis) for axis in task.axes)
    return Port(task.output, "float32", ("batch", *axes), task.meaning.format(cell=cell))
