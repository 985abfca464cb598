"""Pictures and labels in, boxes out: calls `features` for the maps of a detector's backbone,
`text_detector` for what the labels mean, and `detector` for boxes.
"""

import asyncio
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from calling_model import LATEST, CallingModel, Refused
from detection import TextInputs, detections, read_tokenizer, text_inputs
from graph_model import label_text

_TOP = 300
"""Pairs of a box and a label that are answered, at most."""
_THRESHOLD = 0.25
"""Of a request that has none."""


class TritonPythonModel(CallingModel):
    """See calling_model.py; detection.py is contract/detection.py."""

    def initialize(self, args: dict) -> None:
        """Read the vocabulary if it is the one that was exported."""
        folder, self.version = (
            Path(args["model_repository"]) / args["model_version"],
            int(args["model_version"]),
        )
        self.about = json.loads((folder / "detection.json").read_text(encoding="utf-8"))
        vocabulary = folder / "vocab.txt"
        if hashlib.sha256(vocabulary.read_bytes()).hexdigest() != self.about["sha256"]:
            raise ValueError(
                f"{vocabulary.name} does not match its sha256: it is not the one that was exported"
            )
        self.tokenizer = read_tokenizer(vocabulary)
        parameters = json.loads(args["model_config"])["parameters"]
        self.max_bytes, self.kept = (
            int(parameters[name]["string_value"]) for name in ("max_label_bytes", "kept_prompts")
        )
        self.known: OrderedDict[tuple[str, ...], tuple[TextInputs, np.ndarray]] = OrderedDict()

    async def compute(self, request) -> dict[str, np.ndarray]:
        """boxes [B, N, 4], scores and classes [B, N] and counts [B] of one request; raises
        Refused.
        """
        image, threshold = self.read_image(request), _read_threshold(request)
        labels = self.read_labels(request)
        maps = self.about["maps"]
        values, (prompt, text) = await asyncio.gather(
            self.call("features", LATEST, [image], maps, request), self.look_up(labels, request)
        )
        batch = len(values[0])
        feeds = dict(zip(maps, values, strict=True)) | {
            name: np.repeat(value, batch, axis=0)
            for name, value in (
                ("text", text),
                ("text_mask", np.ones(prompt.ids.shape, bool)),
                ("self_mask", prompt.self_mask),
                ("position_ids", prompt.position_ids),
            )
        }
        tensors = [pb_utils.Tensor(name, np.ascontiguousarray(v)) for name, v in feeds.items()]
        answer = await self.call("detector", self.version, tensors, ["logits", "boxes"], request)
        return _pad(*answer, prompt.label_map, threshold)

    def read_labels(self, request) -> tuple[str, ...]:
        """Labels as text; raises Refused for too long ones and bytes that are not UTF-8."""
        tensor = pb_utils.get_input_tensor_by_name(request, "labels")
        if tensor is None:
            raise Refused("input 'labels' is missing")
        data = tensor.as_numpy().reshape(-1)
        try:
            return tuple(label_text(n, each, self.max_bytes) for n, each in enumerate(data))
        except ValueError as error:
            raise Refused(str(error)) from error

    async def look_up(self, labels: tuple[str, ...], request) -> tuple[TextInputs, np.ndarray]:
        """A prompt and its text features [1, T, d], from `text_detector` if they are not known;
        raises Refused.
        """
        if labels not in self.known:
            try:
                prompt = text_inputs(labels, self.tokenizer)
            except ValueError as error:
                raise Refused(str(error)) from error
            tensors = [pb_utils.Tensor(name, value) for name, value in _tokens(prompt).items()]
            (text,) = await self.call("text_detector", self.version, tensors, ["text"], request)
            # a copy: the other model's memory is lent
            self.known[labels] = prompt, text.copy()
        self.known.move_to_end(labels)
        result = self.known[labels]
        while len(self.known) > self.kept:
            self.known.popitem(last=False)
        return result


def _tokens(prompt: TextInputs) -> dict[str, np.ndarray]:
    """What `text_detector` reads."""
    return {name: getattr(prompt, name) for name in ("ids", "self_mask", "position_ids")}


def _read_threshold(request) -> float:
    tensor = pb_utils.get_input_tensor_by_name(request, "threshold")
    if tensor is None:
        return _THRESHOLD
    value = float(tensor.as_numpy().reshape(-1)[0])
    if not 0 <= value <= 1:
        raise Refused(f"threshold {value:g}: give a number from 0 to 1")
    return value


def _pad(
    logits: np.ndarray, boxes: np.ndarray, label_map: np.ndarray, threshold: float
) -> dict[str, np.ndarray]:
    """All outputs, of one length whatever was found: answers for parts of a batch can be joined."""
    batch, most = len(logits), min(_TOP, logits.shape[1] * len(label_map))
    result = {
        "boxes": np.zeros((batch, most, 4), np.float32),
        "scores": np.zeros((batch, most), np.float32),
        "classes": np.full((batch, most), -1, np.int32),
        "counts": np.zeros(batch, np.int32),
    }
    for row in range(batch):
        found = detections(logits[row], boxes[row], label_map, _TOP, threshold)
        count = result["counts"][row] = len(found.scores)
        result["boxes"][row, :count] = found.boxes
        result["scores"][row, :count] = found.scores
        result["classes"][row, :count] = found.labels
    return result
