"""What the benchmarks of serving send: a photograph, from so many clients at once."""

import asyncio
import io

import numpy as np
import tritonclient.grpc.aio as grpc
from PIL import Image
from skimage import data

from serve.bundle import Bundle
from serve.load import Outcome, closed_loop


def load(
    address: str,
    model: str,
    outputs: list[str],
    values: np.ndarray,
    concurrency: int,
    seconds: float,
) -> Outcome:
    async def run() -> Outcome:
        async with grpc.InferenceServerClient(address) as client:
            kind = ("encoded", "BYTES") if values.dtype == np.object_ else ("image", "UINT8")
            tensor = grpc.InferInput(kind[0], values.shape, kind[1])
            tensor.set_data_from_numpy(values)
            requested = [grpc.InferRequestedOutput(name) for name in outputs]

            async def ask() -> None:
                await client.infer(model, [tensor], outputs=requested)

            await ask()
            outcome = await closed_loop(ask, concurrency, seconds)
        if outcome.failures:
            raise RuntimeError(f"{model}: {outcome.failures}")
        return outcome

    return asyncio.run(run())


def photograph(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """A photograph as the bundle's view shows it (of tiles, the first), uint8 [1, H, W, 3], and, at
    640x480, as JPEG bytes [1, 1].
    """
    picture, size = Image.fromarray(data.astronaut()).resize((640, 480)), bundle.manifest.resolution
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    pixels = bundle.manifest.policy.every(picture, size.height, size.width)[:1]
    return pixels, np.array([[buffer.getvalue()]], dtype=np.object_)
