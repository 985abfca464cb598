"""What features are for: segmentation, metric depth and zero-shot classification, by a head in the
server or one here.

Every task is a function of a client and pictures. Given an AsyncFeatureClient it returns something
to await.
"""

from typing import Any, Literal

from serve.client.calls import Calls
from serve.client.served import FRONT_DOOR
from serve.client.steps import Steps
from serve.errors import BadRequest, NotServed

Side = Literal["server", "client"]
"""Where a task's last step runs: in the server's own model for it, or here, from features."""


def check_side(side: str) -> None:
    """Raise BadRequest for a side there is not."""
    if side not in ("server", "client"):
        raise BadRequest(f"side='{side}': choose 'server' or 'client'")


def task_facts(calls: Calls, task: str) -> Steps[dict[str, Any]]:
    """What the server says of a task's answers (classes, unit); asked anew each time: a version may
    have replaced another.

    Raises NotServed if the front door has no such task.
    """
    served = yield from calls.describe(FRONT_DOOR, calls.options.timeout, fresh=True)
    output = {"segmentation": "segmentation_logits"}.get(task, task)
    if output not in served.outputs:
        raise NotServed(
            f"the server has no {task}: its bundle was exported without that head (train one with "
            "python -m distill.evaluate and export again)"
        )
    return ((served.facts("about") or {}).get("tasks") or {}).get(task) or {}
