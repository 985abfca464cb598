"""One ONNX graph behind Triton's python backend; `serve.repository` copies this file next to each
graph's model.py.

Runs where Triton's native onnxruntime and tensorrt backends are not installed, and gives the choice
of OpenVINO on CPUs. Next to it are `model.onnx` and `model.json`: the graph's inputs and outputs,
its files' sha256, and sizes it takes.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

LONGEST = 280
"""Characters of an error that a client is sent."""


class GraphModel:
    """Batches requests itself, as the python backend requires: one call of the graph for all
    of them.
    """

    def initialize(self, args: dict) -> None:
        """Open the graph if it is the one that was exported; an exception here keeps the model from
        being loaded.
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
        settings = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        device = (
            int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        )
        self.inputs, self.outputs = self.about["inputs"], self.about["outputs"]
        self.call = open_graph(
            folder / "model.onnx", settings["runtime"], int(settings["threads"]), device
        )

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused or fails leaves the others of its batch
        alone.
        """
        answers: list = [None] * len(requests)
        taken: dict[tuple, list] = {}
        for number, request in enumerate(requests):
            feeds = [
                pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs
            ]
            refused = _no_batch(self.inputs, feeds, self.about["largest"])
            if not refused:
                feeds = [
                    feed[:, 0] for feed in feeds
                ]  # the axis that the configuration puts after the batch
                refused = self.refuse(feeds)
            if refused:
                answers[number] = failed(refused, pb_utils.TritonError.INVALID_ARG)
            else:
                taken.setdefault(tuple(feed.shape[1:] for feed in feeds), []).append(
                    (number, feeds)
                )
        for group in taken.values():
            numbers = [number for number, _ in group]
            for number, answer in zip(
                numbers,
                self.answer([requests[n] for n in numbers], [f for _, f in group]),
                strict=True,
            ):
                answers[number] = answer
        return answers

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

    def answer(self, requests: list, feeds: list[list[np.ndarray]]) -> list:
        """Responses to requests of equal shapes, from one call of the graph."""
        together = [
            np.concatenate(parts) if len(parts) > 1 else parts[0]
            for parts in zip(*feeds, strict=True)
        ]
        try:
            result = self.call(together)
        except Exception as error:
            if len(requests) > 1:  # run one at a time to find the failing one
                return [
                    self.answer([request], [feed])[0]
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
                answers.append(
                    failed(
                        f"output '{broken[0]}' holds NaN or infinity", pb_utils.TritonError.INTERNAL
                    )
                )
                continue
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in rows.items()
            ]
            answers.append(pb_utils.InferenceResponse(tensors))
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
    with np.errstate(invalid="ignore"):
        # a sum is NaN or infinite if any summand is, at a fraction of isfinite's cost; doubles hold
        # any sum of floats
        return bool(np.isfinite(values.sum(dtype=np.float64)))


class Refused(Exception):
    """The request cannot be answered; the message goes to its sender."""


def answer_each(requests: list, answer) -> list:
    """Responses to requests one by one; one that is refused, or fails, leaves the others alone.

    An exception that left `execute` would fail all of them, with a traceback sent to each client.
    """
    answers = []
    for request in requests:
        try:
            answers.append(answer(request))
        except Refused as refused:
            answers.append(failed(str(refused), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            answers.append(unexpected("the model failed", error))
    return answers


def failed(message: str, code: int):
    """An error's response; a message that quotes megabytes of a request is cut."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST - 60]} … {message[-56:]}"
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


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


def open_graph(graph: Path, runtime: str, threads: int, device: int | None):
    """The graph as a function from its inputs to its outputs, both lists of arrays in order."""
    if runtime == "openvino":
        import openvino

        settings = {
            # what the graph says, not what the plugin thinks is near enough: that is what parity
            # was measured with
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        model = openvino.Core().compile_model(str(graph), "CPU", settings)
        names, outputs = [port.any_name for port in model.inputs], model.outputs

        def run(feeds: list[np.ndarray]) -> list[np.ndarray]:
            result = model(dict(zip(names, feeds, strict=True)))
            return [result[port] for port in outputs]

        return run
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # threads that spin while idle take the cores from other models
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list = ["CPUExecutionProvider"]
    if device is not None:
        providers = [("CUDAExecutionProvider", {"device_id": device}), *providers]
        if runtime == "tensorrt":
            providers.insert(
                0,
                (
                    "TensorrtExecutionProvider",
                    {
                        "device_id": device,
                        "trt_engine_cache_enable": True,
                        "trt_engine_cache_path": str(graph.parent),
                    },
                ),
            )
    session = onnxruntime.InferenceSession(str(graph), options, providers=providers)
    requested = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != requested:  # it falls back to the CPU silently
        raise RuntimeError(
            f"onnxruntime has no working {requested} here: install onnxruntime-gpu and CUDA's "
            "libraries"
        )
    names = [port.name for port in session.get_inputs()]
    return lambda feeds: session.run(None, dict(zip(names, feeds, strict=True)))
