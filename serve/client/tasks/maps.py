"""Tasks whose answer is a map of the picture's size, whichever contract/tasks.py has."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from contract import dense
from contract.tasks import TASKS, Task, map_tasks
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import RequestOptions
from serve.client.served import FRONT_DOOR
from serve.client.steps import Steps, Work
from serve.client.tasks import Side, check_side
from serve.errors import BadRequest, NotServed, WrongAnswer


class TaskMap(NamedTuple):
    """`values`: [B, H, W] or, of a vector map, [B, H, W, C], of the size the model saw. Those of a
    class map index `classes`; `unit` is a scalar map's. What a map does not have is empty.
    """

    task: Task
    values: np.ndarray
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
    `encoded` goes with side="client". Raises a ClientError, NotServed where the bundle has no such
    head.
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
    if side == "server":
        options = replace(options, model=task.name)
        answer = yield from calls.features(images, [task.map.name], options)
        values = answer[task.map.name]
    else:
        answer = yield from calls.features(images, [task.output], options)
        cells, make = answer[task.output], getattr(dense, task.map.function)
        values = yield Work(lambda: make(cells, *answer.size, facts.get("stride")))
    whole = values.shape[1:] == (*answer.size, *task.map.axes)
    if not whole or (task.map.kind == "classes" and values.min() < 0):
        raise WrongAnswer(
            f"{task.map.name} is {list(values.shape)} for pictures of {answer.size}",
            answer.request_id,
        )
    classes: tuple[str, ...] = ()
    if task.map.kind == "classes":
        # another make of server may not list its classes
        numbered = (f"class {number}" for number in range(values.max() + 1))
        classes = tuple(facts.get("classes") or numbered)
        if values.max() >= len(classes):
            raise WrongAnswer(
                f"class {values.max()} of {len(classes)} that the server names: send the request "
                "again",
                answer.request_id,
            )
    return TaskMap(task, values, classes, facts.get("unit") or task.map.unit)


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
