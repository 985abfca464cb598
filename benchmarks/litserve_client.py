"""Load for the LitServe peer of benchmarks/serve.py."""

import asyncio
import subprocess

import aiohttp
import numpy as np

from serve.load import closed_loop


def upload(
    url: str,
    pixels: np.ndarray,
    size: int,
    process: subprocess.Popen,
    concurrency: int = 0,
    seconds: float = 0,
) -> float:
    """Requests a second that the peer answers correctly; without `seconds`, wait for its first
    answer.
    """

    async def run() -> float:
        async with aiohttp.ClientSession() as session:

            async def ask() -> None:
                form = aiohttp.FormData()
                form.add_field(
                    "image",
                    pixels.tobytes(),
                    filename="image",
                    content_type="application/octet-stream",
                )
                async with session.post(f"{url}/predict", data=form) as answer:
                    content = await answer.read()
                    if answer.status != 200 or len(content) != size:
                        raise RuntimeError(f"LitServe answers {answer.status}: {content[:200]!r}")

            if not seconds:
                for _ in range(300):
                    try:
                        await ask()
                    except aiohttp.ClientError:
                        if process.poll() is not None:
                            raise RuntimeError(
                                f"LitServe ended: {process.stderr.read()[-500:]}"
                            ) from None
                        await asyncio.sleep(0.2)
                    else:
                        return 0.0
                raise RuntimeError("LitServe does not answer")
            outcome = await closed_loop(ask, concurrency, seconds)
        if outcome.failures:
            raise RuntimeError(f"LitServe: {outcome.failures}")
        return outcome.rate

    return asyncio.run(run())
