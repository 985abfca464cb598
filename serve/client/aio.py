"""`AsyncFeatureClient`: `serve.client.FeatureClient` for asyncio, with the same options, calls and
errors.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serve.client.answers import Answer
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import ClientOptions, RequestOptions
from serve.client.served import FRONT_DOOR, Outputs, Served
from serve.client.steps import Rpc, Sleep, Step, Steps, Together
from serve.client.sync import CHANNEL, DEFAULT_URL, LAST_WAIT, TIME_IS_UP

Result = TypeVar("Result")


class AsyncFeatureClient:
    """A connection to a server, of one event loop. Use with `async with`, or call `close`.

    Tasks of serve.client.tasks take it too: what they return is then awaited.
    """

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        self.url = url
        self.calls = Calls(ClientOptions(**options))
        tls = self.calls.options.tls
        self.credentials = tls.credentials() if tls else None
        self.triton: InferenceServerClient | None = None
        self.places = asyncio.Semaphore(self.calls.options.concurrency)
        self.left: set[asyncio.Task[Any]] = set()

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
            if self.triton is None:  # gRPC's channel belongs to the event loop it is made in
                self.triton = InferenceServerClient(
                    self.url, creds=self.credentials, channel_args=CHANNEL
                )
            call = getattr(self.triton, step.method)(**step.arguments)
            return await (call if step.patience is None else self.wait_for(call, step.patience))
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Together):
            return await self.together(step.parts, step.at_once)
        return await asyncio.to_thread(step.function)

    async def wait_for(self, call: Coroutine[Any, Any, Any], seconds: float) -> Any:
        """An inference that keeps running when its caller stops waiting."""
        task = asyncio.create_task(call)
        self.left.add(task)
        task.add_done_callback(self.forget)
        try:
            return await asyncio.wait_for(asyncio.shield(task), seconds)
        except TimeoutError:
            raise InferenceServerException(*TIME_IS_UP) from None

    def forget(self, task: asyncio.Task[Any]) -> None:
        """Let go of a call that has ended; looking at its exception says that it is known."""
        self.left.discard(task)
        if not task.cancelled():
            task.exception()

    async def together(self, parts: Sequence[Steps[Result]], at_once: bool) -> list[Result]:
        """Answers of several pieces of work, as many at a time as the client allows, or all at
        once.
        """

        async def one(part: Steps[Result]) -> Result:
            async with contextlib.nullcontext() if at_once else self.places:
                return await self.run(part)

        tasks = [asyncio.create_task(one(part)) for part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        if self.left:
            await asyncio.wait(self.left, timeout=LAST_WAIT)  # closing cancels them
        await self.run(self.calls.clean(everything=True))
        if self.triton is not None:
            await self.triton.close()

    async def __aenter__(self) -> "AsyncFeatureClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
