"""Labels in, one unit vector each out: every label in every prompt template through CLIP's text
tower.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from clip_text import BadLabel, ClipTokenizer, embed
from graph_call import open_graph
from graph_model import Refused, failed, label_text, refusal, unexpected

_KEPT = 4096
"""Labels whose embeddings are kept: clients send the same few with every picture."""


class TritonPythonModel:
    """Called by clients and by `zero_shot`. clip_text.py and graph_model.py are copied next to this
    file in a repository.
    """

    def initialize(self, args: dict) -> None:
        """Open the graph and the vocabulary if they are those that were exported, and run them
        once.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        about = json.loads((folder / "text_encoder.json").read_text(encoding="utf-8"))
        for name, expected in about["sha256"].items():
            with open(folder / name, "rb") as file:
                result = hashlib.file_digest(file, "sha256").hexdigest()
            if result != expected:
                raise ValueError(
                    f"{name} does not match its sha256: it is not the one that was exported"
                )
        settings = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.max_labels, self.max_bytes = (
            int(settings["max_labels"]),
            int(settings["max_label_bytes"]),
        )
        self.templates = json.loads((folder / "templates.json").read_text(encoding="utf-8"))
        self.tokenizer = ClipTokenizer(about["tokenizer"], (folder / "vocabulary.gz").read_bytes())
        # in onnxruntime whatever the other graphs run in: that is what it was compared with torch
        # in
        self.graph = open_graph(
            folder / "model.onnx", "onnxruntime", int(settings["threads"]), None
        )
        self.known: OrderedDict[str, np.ndarray] = OrderedDict()
        self.look_up(["warm-up"])

    def execute(self, requests: list) -> list:
        """Answer every request; one whose labels are refused leaves the others alone."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """float32 [n, d] of one request's labels, or why there are none."""
        raw = pb_utils.get_input_tensor_by_name(request, "labels").as_numpy().reshape(-1)
        try:
            result = self.look_up(self.read(raw))
        except BadLabel as error:
            return refusal(request, Refused(str(error)))
        except Exception as error:  # whatever the graph failed with, the next request may do better
            return unexpected("the text tower failed", error)
        if not np.isfinite(result).all():
            return failed("the text tower gives NaN or infinity", pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embeddings", result)])

    def read(self, raw: np.ndarray) -> list[str]:
        """Labels as text; raises BadLabel for too many, too long, empty ones, and bytes that are
        not UTF-8.
        """
        if not len(raw):
            raise BadLabel("no labels: give at least one")
        if len(raw) > self.max_labels:
            raise BadLabel(
                f"{len(raw)} labels, at most {self.max_labels} are accepted: split them over "
                "several requests"
            )
        labels = []
        for number, data in enumerate(raw):
            try:
                label = label_text(number, data, self.max_bytes).strip()
            except ValueError as error:
                raise BadLabel(str(error)) from error
            if not label:
                raise BadLabel(f"label {number} is empty")
            labels.append(label)
        return labels

    def look_up(self, labels: list[str]) -> np.ndarray:
        """Embeddings [n, d], those that are not known yet from the graph."""
        new = [label for label in dict.fromkeys(labels) if label not in self.known]
        if new:
            made = embed(
                new, self.templates, self.tokenizer, lambda tokens: self.graph([tokens])[0]
            )
            self.known.update(zip(new, made, strict=True))
        for label in labels:
            self.known.move_to_end(label)
        result = np.stack([self.known[label] for label in labels])
        while len(self.known) > _KEPT:
            self.known.popitem(last=False)
        return result
