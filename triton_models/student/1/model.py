"""All graphs of a student in one process: pictures in, whatever outputs a request wants out.

Arrays go from graph to graph as they are. A graph runs once a batch, on the rows of those requests
that need it.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_call import Call
from graph_model import (
    MIXED,
    ImageGraph,
    Refused,
    first_line,
    is_finite,
    join,
    not_finite,
    parameters_of,
    respond,
    unexpected,
)

IMAGE = "image"
METRIC = "student_graph_executions"
COUNT_SECONDS = 0.05
"""The metric is so old at most."""


class Part(NamedTuple):
    """A graph of the student."""

    name: str
    inputs: list[str]
    outputs: list[str]
    facts: str
    """A digest of what a task head's output means."""
    call: Call


class Rows(NamedTuple):
    """A tensor of some requests of a batch, and where whose rows are."""

    values: np.ndarray
    places: dict[int, slice]

    def of(self, numbers: Sequence[int]) -> np.ndarray:
        """The rows of some of the requests, a copy only where they are not all."""
        if list(self.places) == list(numbers):
            return self.values
        return join([self.row(number) for number in numbers])

    def row(self, number: int) -> np.ndarray:
        """What is of one request."""
        return self.values[self.places[number]]


class Counts:
    """Executions of graphs as a metric of Triton's, which the server's metrics port shows."""

    def __init__(self, model: str, version: str) -> None:
        self.labels = {"model": model, "version": version}
        self.waiting: Counter[str] = Counter()
        self.lock, self.some = threading.Lock(), threading.Event()
        try:
            self.family = pb_utils.MetricFamily(
                name=METRIC,
                description="Executions of each graph of a student, of a batch of any size",
                kind=pb_utils.MetricFamily.COUNTER,
            )
        except Exception as error:  # tritonserver --allow-metrics=false
            sys.stderr.write(f"executions of graphs are not counted: {first_line(error)}\n")
            return
        # telling Triton takes some 20 us a graph, which no request waits for
        threading.Thread(target=self._tell, daemon=True).start()

    def add(self, graph: str) -> None:
        """One more execution."""
        with self.lock:
            self.waiting[graph] += 1
        self.some.set()

    def _tell(self) -> None:
        metrics: dict[str, object] = {}
        while self.some.wait():
            time.sleep(COUNT_SECONDS)
            self.some.clear()
            with self.lock:
                waiting, self.waiting = self.waiting, Counter()
            for graph, count in waiting.items():
                if graph not in metrics:
                    metrics[graph] = self.family.Metric(labels=self.labels | {"graph": graph})
                metrics[graph].increment(count)


class TritonPythonModel(ImageGraph):
    """See graph_model.py, copied next to this file in a rendered repository."""

    def initialize(self, args: dict) -> None:
        """Open every graph; an exception here keeps the model from being loaded."""
        folder = self.read_about(args)
        self.inputs = [IMAGE]
        self.counts = Counts(args["model_name"], args["model_version"])
        self.parts: list[Part] = []
        for about in self.about["parts"]:
            self.parts.append(
                Part(
                    about["name"],
                    about["inputs"],
                    about["outputs"],
                    about.get("facts", ""),
                    self.open(folder / about["file"], views=True),
                )
            )
        self.tensors = [IMAGE, *(name for part in self.parts for name in part.outputs)]

    def read(self, request) -> list[np.ndarray]:
        """The picture of a request; raises Refused for sizes that are not served, and for a model
        of another bundle that would misread a task head or has decoded for another view.
        """
        known = parameters_of(request)
        if "task" in known:
            here = {part.name: part.facts for part in self.parts}.get(known["task"])
            if here != known.get("facts"):
                raise Refused(
                    f"{MIXED}: '{known['task']}' is of {known.get('bundle')}, the head that it "
                    f"reads of {self.bundle}: finish the rollout, or render the repository again",
                    pb_utils.TritonError.UNAVAILABLE,
                )
        if known.get("view", self.about["view"]) != self.about["view"]:
            raise Refused(
                f"{MIXED}: pictures were decoded for one of view {known['view']}, and this one's "
                f"is {self.about['view']}: try again once the rollout has ended",
                pb_utils.TritonError.UNAVAILABLE,
            )
        return super().read(request)

    def answer(self, requests: list, feeds: list[list[np.ndarray]], only: bool) -> list:
        """Responses to requests of pictures of one size; `only`: no other call is made before they
        are sent.
        """
        wanted = [set(request.requested_output_names()) for request in requests]
        lengths = [len(image) for (image,) in feeds]
        everyone = range(len(requests))
        known = {IMAGE: Rows(join([image for (image,) in feeds]), _places(everyone, lengths))}
        needed = [self.needed(names) for names in wanted]
        for part in self.parts:
            numbers = [n for n in everyone if not set(part.outputs).isdisjoint(needed[n])]
            if not numbers:
                continue
            try:
                result = part.call([known[name].of(numbers) for name in part.inputs])
            except Exception as error:
                if len(requests) > 1:  # run one at a time to find the failing one
                    return [
                        self.answer([request], [feed], False)[0]
                        for request, feed in zip(requests, feeds, strict=True)
                    ]
                return [unexpected(f"the graph '{part.name}' failed", error)]
            self.counts.add(part.name)
            places = _places(numbers, lengths)
            for name, value in zip(part.outputs, result, strict=True):
                known[name] = Rows(value, places)
        finite = {name for name in set().union(*needed) if is_finite(known[name].values)}
        answers = []
        for number, names in enumerate(wanted):
            rows = {name: known[name].row(number) for name in needed[number]}
            broken = [name for name in rows if name not in finite and not is_finite(rows[name])]
            if broken:
                answers.append(not_finite(broken[0]))
                continue
            # the next call overwrites what the runtime holds
            rows = {n: v if only else v.copy() for n, v in rows.items() if n in names}
            answers.append(respond(rows, names, lengths[number], self.bundle))
        return answers

    def needed(self, names: set[str]) -> list[str]:
        """Tensors that must be computed for some outputs, themselves included, in order."""
        result = set(names)
        for part in reversed(self.parts):
            if not result.isdisjoint(part.outputs):
                result.update(part.inputs)
        return [name for name in self.tensors if name in result]


def _places(numbers: Sequence[int], lengths: Sequence[int]) -> dict[int, slice]:
    """Where the rows of requests are that stand one after the other."""
    result, start = {}, 0
    for number in numbers:
        result[number] = slice(start, start + lengths[number])
        start += lengths[number]
    return result
