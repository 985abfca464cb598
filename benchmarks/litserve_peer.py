"""A bundle's `fused` graph behind LitServe, as a peer to compare with: `python
benchmarks/litserve_peer.py BUNDLE --port N`.

LitServe is not a dependency: pip install litserve. Pictures come as the bytes of an upload, outputs
go back as raw float32.
"""

import argparse
import sys
from pathlib import Path

# not this folder, in which `serve` would be a benchmark
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import litserve  # noqa: E402
import numpy as np  # noqa: E402
from fastapi import Request, Response  # noqa: E402

from contract.signature import FUSED  # noqa: E402
from serve.bundle import read_bundle  # noqa: E402


class _Fused(litserve.LitAPI):
    """One graph; LitServe batches requests and calls predict with a list of them."""

    def __init__(
        self, graph: Path, size: tuple[int, ...], runtime: str, threads: int, **options: object
    ) -> None:
        super().__init__(**options)
        self.graph, self.size, self.runtime, self.threads = graph, size, runtime, threads

    def setup(self, device: str) -> None:
        from benchmarks.in_process import open_image_graph

        self.call = open_image_graph(self.graph, self.runtime, self.threads)

    def decode_request(self, request: Request) -> np.ndarray:
        """The upload's bytes as a picture."""
        return np.frombuffer(request["image"].file.read(), np.uint8).reshape(self.size)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, image: np.ndarray) -> list[np.ndarray]:
        """All outputs; a single picture comes without a batch."""
        return self.call(image if image.ndim == 4 else image[None])

    def unbatch(self, output: list[np.ndarray]) -> list[list[np.ndarray]]:
        return [list(row) for row in zip(*output, strict=True)]

    def encode_response(self, output: list[np.ndarray]) -> Response:
        """Raw float32 of every output, one after the other."""
        return Response(b"".join(np.ascontiguousarray(value).tobytes() for value in output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=1)
    args = parser.parse_args()
    graph = read_bundle(args.bundle).graphs[FUSED]
    api = _Fused(
        args.bundle / graph.file,
        graph.inputs[0].dims,
        args.runtime,
        args.threads,
        max_batch_size=args.max_batch,
        batch_timeout=0.0005,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=args.workers, timeout=60)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False, log_level="error")


if __name__ == "__main__":
    main()
