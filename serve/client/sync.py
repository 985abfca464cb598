"""`FeatureClient`: features of pictures from a running server; `python -m serve.client` is its
command line.

    with FeatureClient("127.0.0.1:8001") as client:
        answer = client.features(["cat.jpg", "dog.jpg"], outputs=["backbone_global", "clip_token"])
        answer["clip_token"]        # float32 [2, d]

`serve.client.aio.AsyncFeatureClient` is the same for asyncio; what both do in between is in
`calls.py`.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serve.client.answers import Answer
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import ClientOptions, RequestOptions
from serve.client.served import FRONT_DOOR, Outputs, Served
from serve.client.steps import Rpc, Sleep, Step, Steps, Together

Result = TypeVar("Result")

DEFAULT_URL = "127.0.0.1:8001"
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # serve.client.retry decides what is sent again: gRPC must neither do so by itself nor wait up
    # to two minutes to reconnect
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

TIME_IS_UP = ("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")
"""Message and status that gRPC gives when a deadline passes."""
LAST_WAIT = 5.0
"""Seconds that `close` waits for requests that were given up."""


class FeatureClient:
    """A connection to a server; threads may share it. Keyword arguments are those of
    serve.client.options.ClientOptions.

    Every method raises a serve.errors.ClientError: BadRequest, NotServed and NotAllowed are the
    caller's mistakes; Unavailable, DeadlineExceeded, ServerFailed and WrongAnswer are not. Nothing
    is connected before the first call.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self.url = url
        self.calls = Calls(ClientOptions(**options))
        tls = self.calls.options.tls
        self.triton = InferenceServerClient(
            url, creds=tls.credentials() if tls else None, channel_args=CHANNEL
        )
        self.threads: ThreadPoolExecutor | None = None
        self.lock = threading.Lock()
        self.left: set[Future[Any]] = set()

    def features(
        self,
        images: Images,
        outputs: Outputs = None,
        options: RequestOptions = RequestOptions(),
        **changes: Any,
    ) -> Answer:
        """Outputs (None: all) for pictures, each an array with a row a picture: tokens [B, d],
        patches [B, h*w, d].

        `images`: paths, bytes of JPEG, PNG or WebP files, PIL pictures, uint8 arrays [H, W, 3] or
        [B, H, W, 3], or a list of any of these. They are decoded here and brought to the model's
        size as the server would, or with `encoded=True` sent as files and decoded there. More than
        the model's batch are split and joined. Fields of `options` may be given as keyword
        arguments: `model`, `encoded`, `partial`, `size`, `timeout`, `request_id`.
        """
        return self.run(self.calls.features(images, outputs, replace(options, **changes)))

    def describe(self, model: str = FRONT_DOOR) -> Served:
        """Inputs, outputs, batch and parameters of a model."""
        return self.run(self.calls.describe(model))

    def run(self, steps: Steps[Result]) -> Result:
        """Carry out a piece of work of serve.client.calls or serve.client.tasks; returns its
        answer.
        """
        try:
            step = next(steps)
            while True:
                try:
                    result = self.carry_out(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value
        finally:
            # what was lent to interrupted work is given back now, not when it is collected
            steps.close()

    def carry_out(self, step: Step) -> Any:
        if isinstance(step, Rpc):
            if step.patience is not None:
                return self.wait_for(step.arguments, step.patience)
            return getattr(self.triton, step.method)(**step.arguments)
        if isinstance(step, Sleep):
            return time.sleep(step.seconds)
        if isinstance(step, Together):
            return self.together(step.parts, step.at_once)
        return step.function()

    def wait_for(self, arguments: dict[str, Any], seconds: float) -> Any:
        """An inference that keeps running when its caller stops waiting."""
        future: Future[Any] = Future()

        def settle(result: Any, error: Exception | None) -> None:
            self.left.discard(future)
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.left.add(future)
        self.triton.async_infer(callback=settle, **arguments)
        try:
            return future.result(seconds)
        except TimeoutError:
            raise InferenceServerException(*TIME_IS_UP) from None

    def together(self, parts: Sequence[Steps[Result]], at_once: bool) -> list[Result]:
        """Answers of several pieces of work, carried out by the client's threads, or each by a
        thread of its own.
        """
        if len(parts) == 1:
            return [self.run(parts[0])]
        if at_once:
            with ThreadPoolExecutor(len(parts)) as threads:
                return list(threads.map(self.run, parts))
        with self.lock:
            self.threads = self.threads or ThreadPoolExecutor(
                self.calls.options.concurrency, "feature-client"
            )
        futures = [self.threads.submit(self.run, part) for part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Wait for requests under way, give back shared memory, close the connection."""
        if self.threads is not None:
            self.threads.shutdown()
        wait(self.left.copy(), LAST_WAIT)  # closing cancels them
        self.run(self.calls.clean(everything=True))
        self.triton.close()

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
