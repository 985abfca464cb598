"""Load for a server and its results: a fixed number of requests at once (closed loop), or a rate
per second (open loop).
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

Ask = Callable[[], Awaitable[None]]
"""One request; raises if it is not answered."""


@dataclass
class Outcome:
    """Latencies in seconds of the answered requests, in order of their answers, and how many
    failed, by reason.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Latency in milliseconds that so many per cent of the answers do not exceed; NaN without
        answers.
        """
        return (
            1e3 * float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")
        )

    def row(self) -> dict[str, float]:
        return {
            "requests_per_second": self.rate,
            "p50_ms": self.percentile(50),
            "p90_ms": self.percentile(90),
            "p99_ms": self.percentile(99),
            "answered": len(self.latencies),
            "failed": sum(self.failures.values()),
        }

    def failed(self, error: Exception) -> None:
        status = getattr(error, "status", None)
        reason = str(status() if callable(status) else "") or type(error).__name__
        self.failures[reason] = self.failures.get(reason, 0) + 1


async def closed_loop(ask: Ask, concurrency: int, seconds: float) -> Outcome:
    """`concurrency` clients, each of which sends its next request once answered."""
    outcome = Outcome(seconds)
    start = time.perf_counter()
    end = start + seconds

    async def client() -> None:
        while (begun := time.perf_counter()) < end:
            try:
                await ask()
            except (
                Exception
            ) as error:  # whatever a server or client raises is a request not answered
                outcome.failed(error)
                await asyncio.sleep(0.01)  # do not spin on a server that rejects at once
            else:
                outcome.latencies.append(time.perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def open_loop(ask: Ask, rate: float, seconds: float, seed: int = 0) -> Outcome:
    """Requests that arrive at random (Poisson), `rate` a second, whether or not earlier ones have
    been answered.

    A latency counts from the moment the request was due, so that a server that falls behind cannot
    hide it.
    """
    outcome, draw = Outcome(seconds), random.Random(seed)
    start, due, requested = time.perf_counter(), 0.0, []

    async def client(begun: float) -> None:
        try:
            await ask()
        except Exception as error:  # as above
            outcome.failed(error)
        else:
            outcome.latencies.append(time.perf_counter() - begun)

    while (due := due + draw.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        requested.append(asyncio.create_task(client(start + due)))
    await asyncio.gather(*requested)
    outcome.seconds = time.perf_counter() - start
    return outcome
