"""One ONNX graph behind Triton's python backend; `serve.repository` copies this file, and
contract/graph_call.py, next to each graph's model.py.

Runs where Triton's native onnxruntime and tensorrt backends are not installed, and gives the choice
of OpenVINO on CPUs. Next to it are `model.onnx` and `model.json`: the graph's inputs and outputs,
its files' sha256, and sizes it takes.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_call import Call, open_graph

LONGEST = 280
"""Characters of an error that a client is sent."""
IDENTITY = "identity"
"""A tensor that models of one bundle pass on: that bundle's number."""
MARK = "refusal_mark"
"""A request's parameter: what its sender wants before the message of a refusal."""
MIXED = "the models are of two bundles"


class GraphModel:
    """Batches requests itself, as the python backend requires: one call of the graph for all
    of them.
    """

    about: dict
    inputs: list[str]

    def initialize(self, args: dict) -> None:
        """Open the graph if it is the one that was exported; an exception here keeps the model from
        being loaded.
        """
        folder = self.read_about(args)
        self.inputs, self.outputs = self.about["inputs"], self.about["outputs"]
        self.call = self.open(folder / "model.onnx")

    def read_about(self, args: dict) -> Path:
        """Read `about` and the settings; returns the version's folder. Raises ValueError for a file
        that is not the one that was exported.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        self.about = json.loads((folder / "model.json").read_text())
        for name, listed in self.about["sha256"].items():
            with open(folder / name, "rb") as file:
                result = hashlib.file_digest(file, "sha256").hexdigest()
            if result != listed:
                raise ValueError(
                    f"{folder / name} does not match its sha256: it is not the graph that was "
                    "exported"
                )
        self.bundle = self.about.get("bundle", "")
        self.settings = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.device = (
            int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        )
        return folder

    def open(self, graph: Path, threads: int | None = None, views: bool = False) -> Call:
        """A graph in the runtime of the settings; see graph_call.py."""
        threads = threads or int(self.settings["threads"])
        options = self.about.get("provider_options")
        # the version's own: a rollout leaves the configuration of most models as it is
        runtime = self.about.get("runtime") or self.settings["runtime"]
        return open_graph(graph, runtime, threads, self.device, views, options)

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused or fails leaves the others of its batch
        alone.
        """
        answers: list = [None] * len(requests)
        taken: dict[tuple, list] = {}
        for number, request in enumerate(requests):
            try:
                feeds = self.read(request)
            except Refused as refused:
                answers[number] = refusal(request, refused)
                continue
            except Exception as error:  # left to Triton, it would fail the others of the batch too
                answers[number] = unexpected("the request cannot be read", error)
                continue
            taken.setdefault(tuple(feed.shape[1:] for feed in feeds), []).append((number, feeds))
        for group in taken.values():
            numbers = [number for number, _ in group]
            for number, answer in zip(
                numbers,
                self.answer([requests[n] for n in numbers], [f for _, f in group], len(taken) == 1),
                strict=True,
            ):
                answers[number] = answer
        return answers

    def read(self, request) -> list[np.ndarray]:
        """The inputs of a request; raises Refused for those that must not reach the graph."""
        tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in self.inputs]
        for name, tensor in zip(self.inputs, tensors, strict=True):
            if tensor is None:  # Triton only counts the inputs of a model that has optional ones
                raise Refused(f"input '{name}' is missing")
        feeds = [tensor.as_numpy() for tensor in tensors]
        refused = _no_batch(self.inputs, feeds, self.about["largest"])
        if not refused:
            # without the axis that the configuration puts after the batch
            feeds = [feed[:, 0] for feed in feeds]
            refused = self.refuse(feeds)
        if refused:
            raise Refused(refused)
        check_bundle(request, self.bundle)
        return feeds

    def refuse(self, feeds: list[np.ndarray]) -> str:
        """Why inputs must not reach the graph, "" if they may: floats that are not finite would
        come out as features.

        More positions than the largest picture has would take memory by their square.
        """
        for name, feed, largest in zip(self.inputs, feeds, self.about["largest"], strict=True):
            if any(
                not 1 <= size <= most for size, most in zip(feed.shape[1:], largest, strict=True)
            ):
                size, most = ("x".join(map(str, shape)) for shape in (feed.shape[1:], largest))
                return (
                    f"input '{name}' is {size} for a picture: it must not be empty, and at most "
                    f"{most} is served"
                )
            if not is_finite(feed):
                return f"input '{name}' holds NaN or infinity: give finite numbers"
        return ""

    def is_whole(self, name: str, value: np.ndarray) -> bool:
        """Whether an output is one that a client may get."""
        return is_finite(value)

    def answer(self, requests: list, feeds: list[list[np.ndarray]], only: bool) -> list:
        """Responses to requests of equal shapes, from one call of the graph; `only`: no other call
        is made before they are sent.
        """
        together = [join(parts) for parts in zip(*feeds, strict=True)]
        try:
            result = self.call(together)
        except Exception as error:
            if len(requests) > 1:  # run one at a time to find the failing one
                return [
                    self.answer([request], [feed], False)[0]
                    for request, feed in zip(requests, feeds, strict=True)
                ]
            return [unexpected("the graph failed", error)]
        answers, start = [], 0
        for request, feed in zip(requests, feeds, strict=True):
            end = start + len(feed[0])
            requested = set(request.requested_output_names())
            rows = {
                name: value[start:end]
                for name, value in zip(self.outputs, result, strict=True)
                if name in requested
            }
            start = end
            broken = [name for name, value in rows.items() if not self.is_whole(name, value)]
            if broken:
                answers.append(not_finite(broken[0]))
                continue
            answers.append(respond(rows, requested, len(feed[0]), self.bundle))
        return answers


class ImageGraph(GraphModel):
    """A graph that reads pictures: sizes it would answer wrongly are refused here."""

    def refuse(self, feeds: list[np.ndarray]) -> str:
        """Sides must be multiples of the stride, within what the bundle was compared for."""
        return wrong_size(feeds[0].shape, self.about)


class PromptGraph(GraphModel):
    """A graph that reads a detector's prompt: masks by which it would compute NaN are refused here,
    which is what zeros are.
    """

    def refuse(self, feeds: list[np.ndarray]) -> str:
        """Every token must see itself, and some must be text."""
        known = dict(zip(self.inputs, feeds, strict=True))
        if not np.diagonal(known["self_mask"], axis1=1, axis2=2).all():
            return "input 'self_mask': every token must see itself"
        if "text_mask" in known and not known["text_mask"].any(1).all():
            return "input 'text_mask': at least one token must be text"
        return super().refuse(feeds)


def _no_batch(
    names: Sequence[str], feeds: Sequence[np.ndarray], dims: Sequence[Sequence[int]]
) -> str:
    """Why inputs [B, 1, *dims] are not taken, "" if they are: Triton passes a batch of 0 on without
    its axis.
    """
    for name, feed, one in zip(names, feeds, dims, strict=True):
        if feed.ndim != len(one) + 2 or not len(feed):
            return f"input '{name}' is a batch of 0: give 1 or more"
    return ""


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several arrays in one, without a copy where there is one array."""
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def check_bundle(request, bundle: str) -> None:
    """Raise Refused for tensors that another bundle's model made: in a repository whose models were
    exchanged one by one, one student's features would reach another's heads.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, IDENTITY)
    if tensor is None:  # a client that asks this model alone
        return
    for number in set(tensor.as_numpy().flat):
        if number != identity_of(bundle):
            raise Refused(
                f"{MIXED}: this one is of {bundle}, and what it reads of "
                f"{number & (2**48 - 1):012x}: render the repository again",
                pb_utils.TritonError.INTERNAL,
            )


def identity_of(bundle: str) -> int:
    """The number of a bundle, whose name is twelve hexadecimal digits."""
    return int(bundle, 16)


def respond(rows: dict[str, np.ndarray], requested: Set[str], count: int, bundle: str):
    """The response with these outputs, and with the bundle's number where a later model of an
    ensemble wants it.
    """
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in rows.items()]
    if IDENTITY in requested:
        numbers = np.full((count, 1), identity_of(bundle), np.int64)
        tensors.append(pb_utils.Tensor(IDENTITY, numbers))
    return pb_utils.InferenceResponse(tensors)


def wrong_size(shape: tuple[int, ...], about: dict) -> str:
    """Why pictures [B, H, W, 3] are not taken, "" if they are; `about` has the stride, the largest
    and smallest sides.
    """
    (height, width), stride = shape[1:3], about["stride"]
    if height < stride or width < stride or height % stride or width % stride:
        return f"input 'image' is {height}x{width}: height and width must be multiples of {stride}"
    if height > about["height"] or width > about["width"]:
        return (
            f"input 'image' is {height}x{width}: at most {about['height']}x{about['width']} is "
            "served"
        )
    if height < about["min_height"] or width < about["min_width"]:
        return (
            f"input 'image' is {height}x{width}: at least "
            f"{about['min_height']}x{about['min_width']} is served"
        )
    return ""


def is_finite(values: np.ndarray) -> bool:
    """Whether an array is free of NaN and infinity; True for integers."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(invalid="ignore", over="ignore"):
        # a sum is NaN or infinite if any summand is, at a fraction of isfinite's cost. That of
        # floats may be so for its size alone; doubles hold any sum of floats, at four times the
        # cost
        return bool(np.isfinite(values.sum()) or np.isfinite(values.sum(dtype=np.float64)))


class Refused(Exception):
    """The request cannot be answered; the message goes to its sender, with Triton's code (the
    sender's mistake unless another is given).
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = pb_utils.TritonError.INVALID_ARG if code is None else code


def answer_each(requests: list, answer) -> list:
    """Responses to requests one by one; one that is refused, or fails, leaves the others alone.

    An exception that left `execute` would fail all of them, with a traceback sent to each client.
    """
    answers = []
    for request in requests:
        try:
            answers.append(answer(request))
        except Refused as refused:
            answers.append(refusal(request, refused))
        except Exception as error:
            answers.append(unexpected("the model failed", error))
    return answers


def failed(message: str, code: int):
    """An error's response; a message that quotes megabytes of a request is cut."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST - 60]} … {message[-56:]}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def refusal(request, refused: Refused):
    """The response to a request that is refused, with the mark that a calling model asked for."""
    mark = ""
    if refused.code == pb_utils.TritonError.INVALID_ARG:
        with contextlib.suppress(Refused):  # a model that calls this one sends text
            mark = parameters_of(request).get(MARK, "")
    return failed(f"{mark}{refused}", refused.code)


def parameters_of(request) -> dict:
    """A request's parameters by name; raises Refused for some that are not UTF-8, which Triton lets
    pass over HTTP.
    """
    try:
        return json.loads(request.parameters() or "{}")
    except ValueError as error:
        raise Refused("the request's parameters are not UTF-8 text") from error


def not_finite(output: str):
    """The response where an output is not one that a client may get."""
    return failed(f"output '{output}' holds NaN or infinity", pb_utils.TritonError.INTERNAL)


def unexpected(what: str, error: Exception):
    """The response for an exception that nobody expected: its text may name paths of the server,
    and is for the log.
    """
    sys.stderr.write(f"{what}: {type(error).__name__}: {first_line(error)}\n")
    sys.stderr.flush()
    return failed(f"{what}: the server's log says why", pb_utils.TritonError.INTERNAL)


def label_text(number: int, data: bytes, most: int) -> str:
    """Label `number` of a request as text; raises ValueError for more than `most` bytes, and for
    bytes that are not UTF-8.
    """
    if len(data) > most:
        raise ValueError(f"label {number} has {len(data)} bytes, at most {most} are accepted")
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"label {number} is not UTF-8 text (byte {error.start})") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
