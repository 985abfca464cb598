"""`FeatureClient`: features of pictures from a running server; `python -m serve.client` is its
command line.

    with FeatureClient("127.0.0.1:8001") as client:
        answer = client.features(["cat.jpg", "dog.jpg"], outputs=["backbone_global", "clip_token"])
        answer["clip_token"]        # float32 [2, d]

`serve.client.aio.AsyncFeatureClient` is the same for asyncio; what both do in between is in
`calls.py`.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serve.client import connection
from serve.client.answers import Answer
from serve.client.calls import Calls
from serve.client.connection import AFTERWARDS, CHANNEL, TIME_IS_UP, Line, Lines
from serve.client.inputs import Images
from serve.client.options import ClientOptions, RequestOptions, check_url
from serve.client.served import FRONT_DOOR, Outputs, Served
from serve.client.steps import Rpc, Sleep, Step, Steps, Together

Result = TypeVar("Result")

DEFAULT_URL = "127.0.0.1:8001"

LAST_WAIT = 5.0
"""Seconds that `close` waits for requests that were given up."""


class FeatureClient:
    """A connection to a server; threads may share it. Keyword arguments are those of
    serve.client.options.ClientOptions.

    Every method raises a serve.errors.ClientError: BadRequest, NotServed and NotAllowed are the
    caller's mistakes; Unavailable, DeadlineExceeded, ServerFailed and WrongAnswer are not. Nothing
    is connected before the first call, and a connection that has gone silent is replaced after the
    first or second deadline.

    Forked and spawned processes may use it too: each has a connection of its own. A process forked
    while requests are under way may get DeadlineExceeded for all of its own.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self.url = check_url(url)
        self.calls = Calls(ClientOptions(**options))
        self.caller = Caller(self.url, self.calls.options)
        self.threads: ThreadPoolExecutor | None = None
        self.lock = threading.Lock()
        self.closed = False
        connection.watch(self)

    def renew(self) -> None:
        """Begin as new, in a forked child: locks, threads and shared memory are the parent's."""
        self.calls = Calls(self.calls.options)
        self.threads, self.lock = None, threading.Lock()
        self.caller.renew()

    def __reduce__(self) -> tuple:
        """Let a client be sent to another process, which connects by itself."""
        return functools.partial(type(self), self.url, **vars(self.calls.options)), ()

    def features(
        self,
        images: Images,
        outputs: Outputs = None,
        options: RequestOptions = RequestOptions(),
        **changes: Any,
    ) -> Answer:
        """Outputs (None: all) for pictures, each an array with a row a picture: tokens [B, d],
        patches [B, h*w, d].

        `images`: paths, bytes of JPEG, PNG or WebP files, such files opened in binary mode (read
        from where they stand, and left there), PIL pictures, uint8 arrays [H, W, 3] or
        [B, H, W, 3], or an iterable of any of these. They are decoded here and brought to the
        model's size as the server would, or with `encoded=True` sent as files and decoded there.
        More than the model's batch are split and joined. Fields of `options` may be given as
        keyword arguments: `model`, `encoded`, `partial`, `size`, `timeout`, `request_id`.
        """
        return self.run(self.calls.features(images, outputs, replace(options, **changes)))

    def describe(self, model: str = FRONT_DOOR) -> Served:
        """Inputs, outputs, batch and parameters of a model."""
        return self.run(self.calls.describe(model))

    def run(self, steps: Steps[Result]) -> Result:
        """Carry out a piece of work of serve.client.calls or serve.client.tasks; returns its
        answer.
        """
        if self.closed:
            raise connection.closed()
        return self.carry_on(steps)

    def carry_on(self, steps: Steps[Result]) -> Result:
        """The same while the client is being closed."""
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
            return self.caller.call(step)
        if isinstance(step, Sleep):
            return time.sleep(step.seconds)
        if isinstance(step, Together):
            return self.together(step.parts, step.at_once)
        return step.function()

    def together(self, parts: Sequence[Steps[Result]], at_once: bool) -> list[Result]:
        """Answers of several pieces of work, carried out by the client's threads, or each by a
        thread of its own.
        """
        if len(parts) == 1:
            return [self.carry_on(parts[0])]
        if at_once:
            with ThreadPoolExecutor(len(parts)) as threads:
                return list(threads.map(self.carry_on, parts))
        with self.lock:
            if self.closed:
                raise connection.closed()
            self.threads = self.threads or ThreadPoolExecutor(
                self.calls.options.concurrency, "feature-client"
            )
            futures = [self.threads.submit(self.carry_on, part) for part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Wait for requests under way, give back shared memory, close the connection. Later calls
        raise BadRequest; closing again does nothing.
        """
        with self.lock:
            if self.closed:
                return
            self.closed = True
        if self.threads is not None:
            self.threads.shutdown()
        wait(self.caller.left.copy(), LAST_WAIT)  # closing cancels them
        with contextlib.suppress(Exception):  # a server that is gone has forgotten it by itself
            self.carry_on(self.calls.clean(everything=True))
        self.caller.close()

    def __enter__(self) -> "FeatureClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Caller:
    """Calls of a server's methods that wait for the answer, on a connection that is replaced when
    it has gone silent. Threads may share it.
    """

    def __init__(self, url: str, options: ClientOptions) -> None:
        credentials = options.tls.credentials() if options.tls else None
        self.lines = Lines(
            lambda: InferenceServerClient(url, creds=credentials, channel_args=CHANNEL)
        )
        self.closed = False
        self.left: set[Future[Any]] = set()

    def renew(self) -> None:
        self.left = set()
        self.lines.leave_to_parent()

    def check_open(self) -> None:
        if self.closed:
            raise connection.closed()

    def call(self, step: Rpc) -> Any:
        """The result of a call; raises InferenceServerException, or BadRequest if it is closed."""
        self.check_open()
        if not connection.forked():
            return self._call(step)
        seconds = step.arguments["client_timeout"] if step.patience is None else step.patience
        # a little more, for where gRPC's own deadline works
        return connection.within(lambda: self._call(step), seconds + 0.1)

    def _call(self, step: Rpc) -> Any:
        """Call and wait for as long as the call's deadline or the step's patience says."""
        try:
            connection.close(self.lines.spent())
            gate = connection.gate
            gate.enter()
            try:
                line = self.lines.take()
            except BaseException:
                gate.leave()
                raise
            if step.patience is not None:
                return self._wait_for(line, gate, step.arguments, step.patience)
            try:
                with self.lines.watch(line):
                    return getattr(line.triton, step.method)(**step.arguments)
            finally:
                gate.leave()
        except Exception as error:
            self.check_open()  # closing fails calls of other threads in many ways
            raise connection.ours(error) from error

    def _wait_for(self, line: Line, gate: Any, arguments: dict[str, Any], seconds: float) -> Any:
        """An inference that keeps running when its caller stops waiting."""
        future: Future[Any] = Future()
        began = time.monotonic()

        def settle(result: Any, error: Exception | None) -> None:
            self.left.discard(future)
            self.lines.judge(line, began, error)
            self.lines.give(line)
            gate.leave()
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.left.add(future)
        arguments = arguments | {"client_timeout": seconds + AFTERWARDS}
        try:
            # it keeps the call in an attribute until the callback is added: another thread's answer
            # would come back here
            with line.sending:
                line.triton.async_infer(callback=settle, **arguments)
        except Exception as error:  # nothing was sent
            settle(None, error)
        try:
            return future.result(seconds)
        except TimeoutError:
            late = InferenceServerException(*TIME_IS_UP)
            self.lines.judge(line, began, late)
            raise late from None

    def close(self) -> None:
        self.closed = True
        connection.close(self.lines.hang_up())
