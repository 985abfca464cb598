"""Pictures (and labels) in, a probability for each class out: calls `features` and `text_encoder`,
compares their vectors.
"""

import asyncio
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from calling_model import LATEST, CallingModel, Refused
from class_scores import ClassVectors, probabilities


class TritonPythonModel(CallingModel):
    """See calling_model.py; class_scores.py is contract/class_scores.py."""

    def initialize(self, args: dict) -> None:
        """Read the bundle's class embeddings if they are those that were exported."""
        folder, self.version = (
            Path(args["model_repository"]) / args["model_version"],
            int(args["model_version"]),
        )
        self.about = json.loads((folder / "zero_shot.json").read_text(encoding="utf-8"))
        data = (folder / "classes.npz").read_bytes()
        if hashlib.sha256(data).hexdigest() != self.about["sha256"]:
            raise ValueError(
                "classes.npz does not match its sha256: it is not the one that was exported"
            )
        with np.load(io.BytesIO(data)) as arrays:
            self.vectors = ClassVectors(
                scale=self.about["scale"], **{name: arrays[name] for name in arrays.files}
            )
        self.classes = np.array([name.encode() for name in self.about["classes"]], dtype=np.object_)
        self.numbers = {name: number for number, name in enumerate(self.classes)}

    async def compute(self, request) -> dict[str, np.ndarray]:
        """probabilities [B, C] and classes [C] of one request; raises Refused."""
        image = self.read_image(request)
        labels = pb_utils.get_input_tensor_by_name(request, "labels")
        requested_labels = None if labels is None else labels.as_numpy().reshape(-1)
        vectors, classes = self.vectors, self.classes
        if requested_labels is not None and not self.about["encoder"]:
            vectors, classes = self.choose(requested_labels), requested_labels
        calls = [self.call("features", LATEST, [image], [self.about["output"]], request)]
        if requested_labels is not None and self.about["encoder"]:
            calls.append(self.call("text_encoder", self.version, [labels], ["embeddings"], request))
        (tokens,), *others = await asyncio.gather(*calls)
        if others:
            vectors, classes = ClassVectors(others[0][0], self.about["scale"]), requested_labels
        return {"probabilities": probabilities(tokens, vectors), "classes": classes}

    def choose(self, labels: np.ndarray) -> ClassVectors:
        """The vectors of some of the bundle's classes, where there is no text encoder for
        others.
        """
        rows = [self.numbers.get(bytes(label)) for label in labels]
        if None in rows or not rows:
            unknown = bytes(labels[rows.index(None)]).decode(errors="replace") if rows else ""
            what = f"label '{unknown[:80]}'" if rows else "an empty list of labels"
            known = ", ".join(self.about["classes"][:20]) + (
                ", …" if len(self.classes) > 20 else ""
            )
            raise Refused(
                f"{what} is not among the bundle's {len(self.classes)} classes ({known}), and "
                f"{self.about['encoder_missing']}: give some of these, or leave labels out to be "
                "answered for all of them"
            )
        chosen = {
            name: value[rows]
            for name, value in self.vectors._asdict().items()
            if isinstance(value, np.ndarray)
        }
        return self.vectors._replace(**chosen)
