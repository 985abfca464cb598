"""A model that calls others, because what it runs depends on the request; `serve.repository` copies
this file next to the model.py of each.
"""

import asyncio

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import failed, unexpected, wrong_size

LATEST = -1
_MARK = "refused: "
"""Prefix of another model's refusals: Triton passes a calling model the message, not the code."""
_BUSY = (
    "Exceeds maximum queue size",
    "Server is stopping",
    "no available versions",
    "Stub process",
)
"""Triton's messages where a retry may help."""


class Refused(Exception):
    """An answer that is an error: its sentence and Triton's code, the caller's mistake unless
    another is given.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = pb_utils.TritonError.INVALID_ARG if code is None else code


class CallingModel:
    """Answers requests one by one; a subclass has `about`, what it knows of the bundle, and
    `compute`.
    """

    about: dict

    async def compute(self, request) -> dict[str, np.ndarray]:
        """All outputs of one request; raises Refused."""
        raise NotImplementedError

    async def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request):
        """The outputs that one request wants, or why there are none."""
        try:
            answers = await self.compute(request)
        except Refused as refused:
            return failed(refused.message, refused.code)
        except (
            Exception
        ) as error:  # left to Triton, it would be a traceback for every client of the batch
            return unexpected("the model failed", error)
        names = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, answers[name]) for name in answers if name in names]
        )

    def read_image(self, request):
        """The tensor of the request's pictures [B, H, W, 3]; refuses those that `features` would
        refuse, while the error code can still be set.
        """
        image = pb_utils.get_input_tensor_by_name(request, "image")
        if image is None:  # Triton itself only counts the inputs of a model that has optional ones
            raise Refused("input 'image' is missing")
        shape, most = image.shape(), self.about["max_batch"]
        message = wrong_size(shape, self.about)
        if not 1 <= shape[0] <= most:
            message = f"{shape[0]} pictures in a request: 1 to {most} are accepted"
        if message:
            raise Refused(message)
        return image

    async def call(
        self, model: str, version: int, tensors: list, outputs: list[str], request
    ) -> list[np.ndarray]:
        """Outputs of another model; raises Refused with that model's message and, where it shows,
        its code.

        `features` is called in the version that serves: what every student predicts is in its
        teacher's space.
        """
        inference = pb_utils.InferenceRequest(
            model_name=model,
            model_version=version,
            inputs=tensors,
            requested_output_names=outputs,
            request_id=request.request_id(),
            parameters={"refusal_mark": _MARK},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = await inference.async_exec()
        except pb_utils.TritonModelException as error:  # refused before the model saw it
            raise _refusal(str(error)) from error
        if response.has_error():
            raise _refusal(response.error().message())
        return [
            pb_utils.get_output_tensor_by_name(response, output).as_numpy() for output in outputs
        ]


def _refusal(message: str) -> Refused:
    """The code that belongs to the words of another model."""
    if message.startswith(_MARK):
        return Refused(message.removeprefix(_MARK))
    busy = any(words in message for words in _BUSY)
    return Refused(
        message, pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INTERNAL
    )
