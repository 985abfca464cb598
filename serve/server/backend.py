"""One version of a model as the supervisor watches it: what a canary is made of, and which of its
processes hang.

A hang is seen from two sides, because a model that works on something long gives no answer either.
Requests are on offer: a canary waits in the model's queue. And a process that could take one does
nothing: it uses no processor time, though no other process took its place.
"""

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from serve.server.activity import Activity, cpu_seconds, is_awake, main_thread_ns
from serve.server.rest import Tensor
from serve.server.stubs import Stub

_ANOTHER_SECONDS = 1.0
"""A canary that waits so long while a process is idle is followed by another: a healthy one takes
it.
"""
_HANG_SECONDS = 10.0
"""A process hangs that did nothing for so long while every process was sent a canary."""
_PART_NS = 1_000_000
"""Processor time that shows a part in a window's executions, however much others took: one of them
may have been long. A process that hangs uses a tenth of that in the same time.
"""
_LONG_SECONDS = 300.0
"""No request may take so long, in seconds and in processor time: a model that answers nothing for
so long hangs, whatever it does.
"""
_TURNS = 4
"""Executions for each process, in which one that takes no part is missed: Triton gives them to
processes in turn.
"""
_MISSED_SECONDS, _MISSED_WINDOWS = 3.0, 2
"""A process hangs that was missed so often in a row, over so long a time at least."""

PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde\x00\x00\x00\x0cIDATx\x9c"
    b"c```\x00\x00\x00\x04\x00\x01\xf6\x178U\x00\x00\x00\x00IEND\xaeB`\x82"
)
"""A black pixel as a PNG file: what models that read bytes get; one that wants text may refuse it,
and so is alive.
"""


@dataclass
class Canary:
    """Inferences of zeros sent one after the other, in a thread of their own."""

    sent: float
    done: Future
    answered: int
    """Requests that the model had answered when it was sent."""
    used: float
    """Processor time that the model's processes had used."""


@dataclass
class _Window:
    """A stretch of executions, in which every process should have had its turn."""

    began: float
    executions: int
    used: dict[int, int]
    """Processor time of each process's first thread, in nanoseconds."""


@dataclass
class Backend:
    """State of one version of a model."""

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    output: str
    """Name of the output that canaries ask for; "" for a model that gets none."""
    instances: int
    """Expected stub processes; 0 for backends other than python."""
    calls_others: bool = False
    """Whether its processes wait for other models."""
    answered: int = -1
    """Requests answered at the last look."""
    executions: int = 0
    """Batches run, as Triton counts them."""
    complete: bool = False
    """Whether all stub processes were seen at once since it was loaded."""
    short: int = 0
    """Looks in a row that missed some of them."""
    due: float = 0.0
    canaries: list[Canary] = field(default_factory=list)
    """Those without an answer; at most one for each process."""
    canary_seconds: float = math.inf
    """How long the last inference of zeros took."""
    refused_since: float = math.inf
    """When canaries began to be refused because the queue was full."""
    strikes: int = 0
    """Canaries in a row that failed."""
    replaced: float = -math.inf
    quick: int = 0
    """Deaths in a row that came soon after a replacement."""
    failed: int = 0
    """Attempts in a row to load it again that failed."""
    retry: float = 0.0
    """When the next attempt may be made."""
    reason: str = ""
    hung: set[int] = field(default_factory=set)
    old: set[int] = field(default_factory=set)
    """Stub processes of before the last replacement."""
    activity: dict[int, Activity] = field(default_factory=dict)
    work: Activity = field(default_factory=lambda: Activity(time.monotonic()))
    """Of all its processes."""
    window: _Window | None = None
    turn: float = math.inf
    """Least processor time of an execution seen, in nanoseconds."""
    missed: dict[int, list[float]] = field(default_factory=dict)
    """When windows ended in which a process had no part, by process."""

    def owns(self, stub: Stub) -> bool:
        """Whether a process runs this version, and not from before it was loaded again."""
        return (stub.model, stub.version) == (self.model, self.version) and (
            stub.pid not in self.old
        )

    def count(self) -> int:
        """How many inferences a canary is made of: of several processes each should have its
        turns, if that takes a moment only.
        """
        if self.instances < 2:
            return 1
        most = _TURNS * self.instances
        return most if self.missed else max(1, min(most, int(0.5 / self.canary_seconds)))

    def wants_another(self, pids: Iterable[int], now: float) -> bool:
        """Whether the canaries out wait although a process is idle."""
        return (
            0 < len(self.canaries) < self.instances
            and now - self.canaries[-1].sent > _ANOTHER_SECONDS
            and any(self._idle(pid, now) > _ANOTHER_SECONDS for pid in pids)
        )

    def is_waited_for(self, now: float) -> bool:
        """Whether it may be computing, of a model without processes to look at."""
        return (
            not self.instances
            and bool(self.canaries)
            and now - self.canaries[0].sent < _LONG_SECONDS
        )

    def find_hung(
        self, pids: list[int], now: float, elsewhere: Callable[[], bool]
    ) -> tuple[set[int], str]:
        """Processes of this model (its living ones are `pids`) that hang, and how that shows; none
        and "" otherwise. `elsewhere`: whether other models are at work.
        """
        if not self.canaries and self.refused_since == math.inf:
            self.activity = {}
            return set(), ""
        asked = self.refused_since
        if self.canaries and len(self.canaries) >= max(1, self.instances):
            asked = self.canaries[-1].sent
        idle = {pid: self._idle(pid, now) for pid in pids}
        if now - asked > _HANG_SECONDS:
            hung = {pid for pid, seconds in idle.items() if seconds > _HANG_SECONDS}
            if hung and not (self.calls_others and now - asked < _LONG_SECONDS and elsewhere()):
                return hung, f"no answer and no processor time for {_HANG_SECONDS:.0f} s"
        for canary in self.canaries[:1]:
            used = cpu_seconds(pids) - canary.used
            if (
                now - canary.sent > _LONG_SECONDS
                and canary.answered == self.answered
                # processes that others starve have not had their time
                and (used > _LONG_SECONDS / 2 or not pids or min(idle.values()) > _HANG_SECONDS)
            ):
                return set(pids), f"no answer for {_LONG_SECONDS:.0f} s"
        return set(), ""

    def _idle(self, pid: int, now: float) -> float:
        return self.activity.setdefault(pid, Activity(now)).idle([pid], now)

    def find_missed(
        self, pids: list[int], now: float, elsewhere: Callable[[], bool]
    ) -> tuple[set[int], str]:
        """Processes that have no part in what the others answer, and how that shows; to be called
        when `executions` was read.
        """
        used = {pid: ns for pid in pids if (ns := main_thread_ns(pid)) is not None}
        window = self.window
        if self.instances < 2 or window is None or window.used.keys() != used.keys():
            self.window, self.missed = _Window(now, self.executions, used), {}
            return set(), ""
        count = self.executions - window.executions
        if count < _TURNS * self.instances:
            return set(), ""
        self.window = _Window(now, self.executions, used)
        turns = {pid: ns - window.used[pid] for pid, ns in used.items()}
        self.turn = min(self.turn, sum(turns.values()) / count)
        for pid, turn in turns.items():
            if turn > min(self.turn / 2, _PART_NS) or is_awake(pid):
                self.missed.pop(pid, None)
            else:
                self.missed.setdefault(pid, []).append(now)
        hung = {
            pid
            for pid, times in self.missed.items()
            if len(times) >= _MISSED_WINDOWS and now - times[0] > _MISSED_SECONDS
        }
        if not hung or len(hung) == len(pids) or (self.calls_others and elsewhere()):
            return set(), ""
        return hung, "no part in what the others answer, and no processor time"

    def forget(self) -> None:
        """Begin anew with the processes of a model that was loaded again."""
        self.reason, self.hung, self.canaries, self.refused_since = "", set(), [], math.inf
        self.complete, self.short, self.strikes, self.failed = False, 0, 0, 0
        self.activity, self.window, self.missed = {}, None, {}


def describe(config: dict[str, Any], model: str, version: str) -> Backend:
    """What a model's configuration says of how to watch it. An ensemble has no backend; its steps
    are watched.
    """
    if config.get("platform") == "ensemble":
        return Backend(model, version, (), "", 0)
    warm_up = {
        name: data["dims"]
        for sample in config.get("model_warmup", ())
        for name, data in sample["inputs"].items()
    }
    inputs = []
    required = [port for port in config["input"] if not port.get("optional")]
    for port in required or config["input"][:1]:  # Triton passes on no request without any
        # sizes that vary are those of the warm-up, which the model is known to take
        dims = warm_up.get(port["name"], port["dims"])
        sizes = tuple(max(1, int(size)) for size in dims)
        shape = (1, *sizes) if config.get("max_batch_size", 0) > 0 else sizes
        kind = port["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES")
        inputs.append(Tensor(port["name"], kind, shape, PICTURE))
    stubs = config["backend"] == "python"
    instances = (
        sum(group["count"] * max(1, len(group["gpus"])) for group in config["instance_group"])
        if stubs
        else 0
    )
    return Backend(model, version, tuple(inputs), config["output"][0]["name"], instances)
