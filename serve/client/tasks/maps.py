"""Tasks whose answer is a map of the picture's size, whichever contract/tasks.py has."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from contract import dense
from contract.tasks import TASKS, Task, map_tasks
from contract.views import Size, ViewPolicy
from serve.client.answers import Answer
from serve.client.calls import Calls
from serve.client.inputs import Images, Picture, list_pictures
from serve.client.options import RequestOptions
from serve.client.served import FRONT_DOOR
from serve.client.steps import Steps, Work
from serve.client.tasks import Side, check_side
from serve.errors import BadRequest, NotServed, WrongAnswer


class TaskMap(NamedTuple):
    """`values`: a map [h, w] or, of a vector map, [h, w, C] of each picture, of its own size. Those
    of a class map index `classes`; `unit` is a scalar map's. What a map does not have is empty.

    What the view did not show, around a centre crop, is contract.views.UNSEEN in a class map and
    NaN in others.
    """

    task: Task
    values: tuple[np.ndarray, ...]
    classes: tuple[str, ...]
    unit: str


def predict_map(
    client: Any,
    task: str,
    images: Images,
    options: RequestOptions = RequestOptions(),
    *,
    side: Side = "server",
    **changes: Any,
) -> TaskMap:
    """A task's map of pictures by the model of its name, or here from the head's output.

    Fields of `options` may be given as keyword arguments (`timeout`, `request_id`, `size`);
    `encoded` goes with side="client". Tiles (`view`) are put together here whatever the side: their
    scores are averaged where they overlap. Raises a ClientError, NotServed where the bundle has no
    such head.
    """
    return client.run(steps(client.calls, task, images, side, replace(options, **changes)))


def steps(
    calls: Calls, name: str, images: Images, side: Side, options: RequestOptions
) -> Steps[TaskMap]:
    """The task in steps; see serve.client.steps."""
    check_side(side)
    task = TASKS.get(name)
    if task is None or task.map is None:
        known = ", ".join(task.name for task in map_tasks())
        raise BadRequest(f"task '{name}' has no map: choose {known}")
    facts = yield from _task_facts(calls, task)
    limits = calls.options.limits
    pictures = list_pictures(images, limits)
    view = yield from calls.view_of(options)
    if view.kind == "tiles" and not options.encoded:
        answer, values = yield from _of_tiles(calls, task, pictures, view, facts, options)
    else:
        answer, values = yield from _of_views(calls, task, pictures, side, facts, options)
    classes: tuple[str, ...] = ()
    if task.map.kind == "classes":
        # another make of server may not list its classes
        most = max(int(value.max()) for value in values)
        classes = tuple(facts.get("classes") or (f"class {number}" for number in range(most + 1)))
        if most >= len(classes):
            raise WrongAnswer(
                f"class {most} of {len(classes)} that the server names: send the request again",
                answer.request_id,
            )
    return TaskMap(task, values, classes, facts.get("unit") or task.map.unit)


def _of_views(
    calls: Calls,
    task: Task,
    pictures: list[Picture],
    side: Side,
    facts: dict[str, Any],
    options: RequestOptions,
) -> Steps[tuple[Answer, tuple[np.ndarray, ...]]]:
    """Maps of pictures of which the model sees one view each."""
    if side == "server":
        options = replace(options, model=task.name)
        answer = yield from calls.features(pictures, [task.map.name], options)
        values = answer[task.map.name]
    else:
        answer = yield from calls.features(pictures, [task.output], options)
        cells, make = answer[task.output], getattr(dense, task.map.function)
        values = yield Work(lambda: make(cells, *answer.size, facts.get("stride")))
    whole = values.shape[1:] == (*answer.size, *task.map.axes)
    if not whole or (task.map.kind == "classes" and values.min() < 0):
        raise WrongAnswer(
            f"{task.map.name} is {list(values.shape)} for pictures of {answer.size}",
            answer.request_id,
        )

    nearest = task.map.kind != "scalar"  # between two unit vectors is none

    def own(picture: Picture, value: np.ndarray) -> np.ndarray:
        size = picture.own_size(calls.options.limits)
        view = picture.view(answer.size, answer.view, options.encoded)
        return view.undo(value[None], size, nearest)

    undone = yield Work(lambda: tuple(map(own, pictures, values)))
    return answer, undone


def _of_tiles(
    calls: Calls,
    task: Task,
    pictures: list[Picture],
    view: ViewPolicy,
    facts: dict[str, Any],
    options: RequestOptions,
) -> Steps[tuple[Answer, tuple[np.ndarray, ...]]]:
    """Maps of pictures by their tiles, each a row of the request."""
    limits = calls.options.limits
    served = yield from calls.describe(options.model, options.timeout)
    size = yield from calls.size_of(served, pictures, options.complete(calls.options))
    tiles = yield Work(lambda: [picture.views(size, view, limits) for picture in pictures])
    answer = yield from calls.features(
        np.concatenate(tiles), [task.output], replace(options, size=size)
    )
    cells, ends = answer[task.output], np.cumsum([len(views) for views in tiles])

    def own(picture: Picture, part: np.ndarray) -> np.ndarray:
        seen, whole = picture.view(size, view), picture.own_size(limits)
        return map_of_tiles(task, part, seen, size, whole, facts.get("stride"))

    undone = yield Work(lambda: tuple(map(own, pictures, np.split(cells, ends[:-1]))))
    return answer, undone


def map_of_tiles(
    task: Task, cells: np.ndarray, view: ViewPolicy, model: Size, picture: Size, stride: Any
) -> np.ndarray:
    """A picture's map [h, w, …] from the head's output [n, positions, …] for its tiles, which are
    brought to the model's size one by one as they are put together.
    """
    scores = task.map.kind == "classes"
    make = dense.upsample if scores else getattr(dense, task.map.function)
    maps = (make(tile[None], *model, stride)[0] for tile in cells)
    values = view.undo(maps, picture, scores=scores)
    return _unit(values) if task.map.kind == "vector" else values


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [h, w, C] at length 1, which means of unit vectors do not have; those that cancel
    each other out stay 0.
    """
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 1e-6, length, 1)


def _task_facts(calls: Calls, task: Task) -> Steps[dict[str, Any]]:
    """Classes and unit of a task's answers; requested each time, since a rollout may have changed
    them.

    Raises NotServed if the front door has no such task.
    """
    served = yield from calls.describe(FRONT_DOOR, fresh=True)
    if task.output not in served.outputs:
        raise NotServed(
            f"the server has no {task.name}: its bundle was exported without that head (train one "
            "with python -m distill.evaluate and export again)"
        )
    return ((served.facts("about") or {}).get("tasks") or {}).get(task.name) or {}
