"""`AsyncFeatureClient`: `serve.client.FeatureClient` for asyncio, with the same options, calls and
errors.
"""

import asyncio
import contextlib
import functools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serve.client import connection
from serve.client.answers import Answer
from serve.client.calls import Calls
from serve.client.connection import AFTERWARDS, CHANNEL, TIME_IS_UP, Line, Lines
from serve.client.inputs import Images
from serve.client.options import ClientOptions, RequestOptions, check_url
from serve.client.served import FRONT_DOOR, Outputs, Served
from serve.client.steps import Rpc, Sleep, Step, Steps, Together
from serve.client.sync import DEFAULT_URL, LAST_WAIT, Caller

Result = TypeVar("Result")


@dataclass
class _Loop:
    """What belongs to one event loop: gRPC's channels do, and so do locks and tasks."""

    lines: Lines
    places: asyncio.Semaphore
    left: set[asyncio.Task[Any]] = field(default_factory=set)


class AsyncFeatureClient:
    """A connection to a server for each event loop that uses it. Use with `async with`, or call
    `close`.

    Tasks of serve.client.tasks take it too: what they return is then awaited. Forks are as
    FeatureClient says.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self.url = check_url(url)
        self.calls = Calls(ClientOptions(**options))
        tls = self.calls.options.tls
        self.credentials = tls.credentials() if tls else None
        self.loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = (
            weakref.WeakKeyDictionary()
        )
        # for forked children, where asyncio's half of gRPC is dead
        self.caller = Caller(self.url, self.calls.options)
        self.closed = False
        connection.watch(self)

    def renew(self) -> None:
        """Begin as new, in a forked child; see FeatureClient.renew."""
        self.calls = Calls(self.calls.options)
        for loop in self.loops.values():
            loop.lines.leave_to_parent()
        self.loops = weakref.WeakKeyDictionary()
        self.caller.renew()

    def __reduce__(self) -> tuple:
        """Let a client be sent to another process, which connects by itself."""
        return functools.partial(type(self), self.url, **vars(self.calls.options)), ()

    @property
    def loop(self) -> _Loop:
        """What belongs to the running event loop."""
        running = asyncio.get_running_loop()
        if running not in self.loops:
            lines = Lines(
                lambda: InferenceServerClient(
                    self.url, creds=self.credentials, channel_args=CHANNEL
                )
            )
            self.loops[running] = _Loop(lines, asyncio.Semaphore(self.calls.options.concurrency))
        return self.loops[running]

    async def features(
        self,
        images: Images,
        outputs: Outputs = None,
        options: RequestOptions = RequestOptions(),
        **changes: Any,
    ) -> Answer:
        """Outputs for pictures: see FeatureClient.features."""
        return await self.run(self.calls.features(images, outputs, replace(options, **changes)))

    async def describe(self, model: str = FRONT_DOOR) -> Served:
        """Inputs, outputs, batch and parameters of a model."""
        return await self.run(self.calls.describe(model))

    async def run(self, steps: Steps[Result]) -> Result:
        """Carry out a piece of work of serve.client.calls or serve.client.tasks; returns its
        answer.
        """
        if self.closed:
            raise connection.closed()
        return await self.carry_on(steps)

    async def carry_on(self, steps: Steps[Result]) -> Result:
        """The same while the client is being closed."""
        try:
            step = next(steps)
            while True:
                try:
                    result = await self.carry_out(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as done:
            return done.value
        finally:
            # a cancelled task is thrown out of its step: what was lent to it is given back now
            steps.close()

    async def carry_out(self, step: Step) -> Any:
        if isinstance(step, Rpc):
            if connection.forked():
                return await asyncio.to_thread(self.caller.call, step)
            return await self.call(step)
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Together):
            return await self.together(step.parts, step.at_once)
        return await asyncio.to_thread(step.function)

    async def call(self, step: Rpc) -> Any:
        """The result of a call; raises InferenceServerException, or BadRequest if the client is
        closed.
        """
        connection.gate.used = True  # a forked child must not use asyncio's half of gRPC
        loop = self.loop
        try:
            await _close(loop.lines.spent())
            if step.patience is not None:
                return await self.wait_for(loop, step)
            line = loop.lines.take()
            with loop.lines.watch(line):
                return await getattr(line.triton, step.method)(**step.arguments)
        except Exception as error:
            self.caller.check_open()  # closing fails calls of other tasks in many ways
            raise connection.ours(error) from error

    async def wait_for(self, loop: _Loop, step: Rpc) -> Any:
        """An inference that keeps running when its caller stops waiting."""
        line, began = loop.lines.take(), time.monotonic()

        async def infer() -> Any:
            with loop.lines.watch(line):
                deadline = step.patience + AFTERWARDS
                return await line.triton.infer(**step.arguments, client_timeout=deadline)

        def forget(task: asyncio.Task[Any]) -> None:
            loop.left.discard(task)
            if not task.cancelled():
                task.exception()  # looking at it says that it is known

        task = asyncio.create_task(infer())
        loop.left.add(task)
        task.add_done_callback(forget)
        try:
            return await asyncio.wait_for(asyncio.shield(task), step.patience)
        except TimeoutError:
            late = InferenceServerException(*TIME_IS_UP)
            loop.lines.judge(line, began, late)
            raise late from None

    async def together(self, parts: Sequence[Steps[Result]], at_once: bool) -> list[Result]:
        """Answers of several pieces of work, as many at a time as the client allows, or all at
        once.
        """
        places = self.loop.places

        async def one(part: Steps[Result]) -> Result:
            async with contextlib.nullcontext() if at_once else places:
                return await self.carry_on(part)

        tasks = [asyncio.create_task(one(part)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Wait for requests of this event loop, give back shared memory, close its connection;
        those of other loops end with them. Later calls raise BadRequest; closing again does
        nothing.
        """
        if self.closed:
            return
        self.closed, loop = True, self.loop
        if loop.left:
            await asyncio.wait(loop.left, timeout=LAST_WAIT)  # closing cancels them
        with contextlib.suppress(Exception):  # a server that is gone has forgotten it by itself
            await self.carry_on(self.calls.clean(everything=True))
        self.caller.close()
        await _close(loop.lines.hang_up())

    async def __aenter__(self) -> "AsyncFeatureClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


async def _close(lines: Sequence[Line]) -> None:
    for line in lines:
        with contextlib.suppress(Exception):
            await line.triton.close()
