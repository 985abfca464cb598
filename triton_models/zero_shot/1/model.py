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
from class_scores import ClassVectors, probabilities
from graph_model import failed, first_line, wrong_size

_LATEST = -1
_MARK = "refused: "
"""Prefix of `text_encoder`'s refusals: Triton passes a calling model the message, not the code.
"""
BUSY = ("Exceeds maximum queue size", "Server is stopping", "no available versions", "Stub process")
"""Triton's messages where a retry may help."""


class Refused(Exception):
    """An answer that is an error: its sentence and Triton's code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message, self.code = message, code


class TritonPythonModel:
    """A model that calls others, because what it runs depends on the request. class_scores.py is
    contract/class_scores.py.
    """

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

    async def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return await asyncio.gather(*(self.answer(request) for request in requests))

    async def answer(self, request):
        """probabilities [B, C] and classes [C] of one request, or why there are none."""
        try:
            answers = await self.compare(request)
        except Refused as refused:
            return failed(refused.message, refused.code)
        except (
            Exception
        ) as error:  # left to Triton, it would be a traceback for every client of the batch
            return failed(f"the model failed: {first_line(error)}", pb_utils.TritonError.INTERNAL)
        names = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, answers[name]) for name in answers if name in names]
        )

    async def compare(self, request) -> dict[str, np.ndarray]:
        """Both outputs of one request; raises Refused."""
        image = pb_utils.get_input_tensor_by_name(request, "image")
        labels = pb_utils.get_input_tensor_by_name(request, "labels")
        if image is None:  # Triton itself only counts the inputs of a model that has optional ones
            raise Refused("input 'image' is missing", pb_utils.TritonError.INVALID_ARG)
        requested_labels = None if labels is None else labels.as_numpy().reshape(-1)
        vectors, classes = self.vectors, self.classes
        self.check(image.shape())
        if requested_labels is not None and not self.about["encoder"]:
            vectors, classes = self.choose(requested_labels), requested_labels
        calls = [self.call("features", _LATEST, image, self.about["output"], request)]
        if requested_labels is not None and self.about["encoder"]:
            calls.append(self.call("text_encoder", self.version, labels, "embeddings", request))
        tokens, *embeddings = await asyncio.gather(*calls)
        if embeddings:
            vectors, classes = ClassVectors(embeddings[0], self.about["scale"]), requested_labels
        return {"probabilities": probabilities(tokens, vectors), "classes": classes}

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse pictures [B, H, W, 3] that `features` would refuse, while the error code can still
        be set.
        """
        most = self.about["max_batch"]
        message = wrong_size(shape, self.about)
        if not 1 <= shape[0] <= most:
            message = f"{shape[0]} pictures in a request: 1 to {most} are accepted"
        if message:
            raise Refused(message, pb_utils.TritonError.INVALID_ARG)

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
                "answered for all of them",
                pb_utils.TritonError.INVALID_ARG,
            )
        chosen = {
            name: value[rows]
            for name, value in self.vectors._asdict().items()
            if isinstance(value, np.ndarray)
        }
        return self.vectors._replace(**chosen)

    async def call(self, model: str, version: int, tensor, output: str, request) -> np.ndarray:
        """One output of another model; raises Refused with that model's message and, where it
        shows, its code.

        `features` is called in the version that serves: the vectors of every student are in its
        teacher's space.
        """
        inference = pb_utils.InferenceRequest(
            model_name=model,
            model_version=version,
            inputs=[tensor],
            requested_output_names=[output],
            request_id=request.request_id(),
            parameters={"refusal_mark": _MARK},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = await inference.async_exec()
        except pb_utils.TritonModelException as error:  # refused before the model saw it
            raise refusal(str(error)) from error
        if response.has_error():
            raise refusal(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, output).as_numpy()


def refusal(message: str) -> Refused:
    """The code that belongs to the words of another model."""
    if message.startswith(_MARK):
        return Refused(message.removeprefix(_MARK), pb_utils.TritonError.INVALID_ARG)
    busy = any(words in message for words in BUSY)
    return Refused(
        message, pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INTERNAL
    )
