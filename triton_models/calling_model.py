"""A model that calls others, because what it runs depends on the request; `serve.repository` copies
this file next to the model.py of each.
"""

import asyncio
import json
import threading
from collections.abc import Mapping

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import MARK, MIXED, Refused, failed, unexpected, wrong_size

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
            return failed(str(refused), refused.code)
        except (
            Exception
        ) as error:  # left to Triton, it would be a traceback for every client of the batch
            return unexpected("the model failed", error)
        names = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [
                value if isinstance(value, pb_utils.Tensor) else pb_utils.Tensor(name, value)
                for name, value in answers.items()
                if name in names
            ]
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

    async def call(self, *arguments, **options) -> list[np.ndarray]:
        """`call_tensors` as arrays."""
        answers = await self.call_tensors(*arguments, **options)
        return [tensor.as_numpy() for tensor in answers]

    async def call_tensors(
        self,
        model: str,
        version: int,
        tensors: list,
        outputs: list[str],
        request,
        parameters: Mapping[str, str] = {},
    ) -> list:
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
            parameters={MARK: _MARK, **parameters},
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        try:
            response = await inference.async_exec()
        except pb_utils.TritonModelException as error:  # refused before the model saw it
            raise _refusal(str(error)) from error
        if response.has_error():
            raise _refusal(response.error().message())
        return [pb_utils.get_output_tensor_by_name(response, output) for output in outputs]


class ConcurrentModel(CallingModel):
    """One that takes every request at once and sends each answer when it is there, because it
    computes little itself; needs Triton 24.07 or newer. It refuses those beyond the parameter
    `max_queue`: what it has taken no longer waits in Triton's bounded queues.
    """

    def initialize(self, args: dict) -> None:
        """Start the thread that waits for other models."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.most, self.in_hand = int(parameters["max_queue"]["string_value"]), 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def execute(self, requests: list) -> None:
        """Begin to answer every request."""
        for request in requests:
            asyncio.run_coroutine_threadsafe(self._send(request), self.loop)

    async def _send(self, request) -> None:
        sender = request.get_response_sender()
        if self.in_hand >= self.most:  # all of this runs in one thread
            message = f"Exceeds maximum queue size: {self.most} requests are in hand"
            response = failed(message, pb_utils.TritonError.UNAVAILABLE)
        else:
            self.in_hand += 1
            try:
                response = await self._answer(request)
            finally:
                self.in_hand -= 1
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """End the thread; Triton calls this when every request has its answer."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


def _refusal(message: str) -> Refused:
    """The code that belongs to the words of another model."""
    if message.startswith(_MARK):
        return Refused(message.removeprefix(_MARK))
    if message.startswith(MIXED):
        return Refused(message, pb_utils.TritonError.UNAVAILABLE)
    busy = any(words in message for words in _BUSY)
    return Refused(
        message, pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INTERNAL
    )
