"""`python -m serve.bench`: throughput and latency percentiles of a running server, under closed-
and open-loop load.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.tables import print_table
from serve.errors import ServerError

EPILOG = """\
examples:
  python -m serve.bench --concurrency 1 8
  python -m serve.bench --model features --outputs backbone_global cls_token \\
      --concurrency 8 --batch 4
  python -m serve.bench --rate 20 40 80 --seconds 20
  python -m serve.bench --encoded photo.jpg --concurrency 8

--concurrency is a closed loop: each of N clients sends its next request when
the last one is answered, which finds the highest throughput. --rate is an open
loop: R requests a second arrive at random times, whether or not earlier ones
have been answered, and latency counts from when a request was due. --encoded
measures decoding on the server too.

Exit status: 0 success, 1 requests failed, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m serve.bench",
        description="Measure throughput and latency of a running server.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--url",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="gRPC (default: 127.0.0.1:8001)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="(default: features, or features_encoded with --encoded)"
    )
    parser.add_argument(
        "--outputs", nargs="+", metavar="NAME", help="(default: all outputs of the model)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="closed loop (default: 1 8)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        default=[],
        metavar="R",
        help="open loop, requests a second",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="pictures per request (default: 1)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, metavar="S", help="of each measurement (default: 10)"
    )
    parser.add_argument(
        "--encoded", type=Path, metavar="FILE", help="send this JPEG, PNG or WebP file, not pixels"
    )
    parser.add_argument(
        "--json", dest="figures", type=Path, metavar="FILE", help="also write the figures as JSON"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(**vars(args)))


def _run(
    url: str,
    model: str | None,
    outputs: Sequence[str] | None,
    concurrency: Sequence[int],
    rate: Sequence[float],
    batch: int,
    seconds: float,
    encoded: Path | None,
    figures: Path | None,
) -> int:
    for name, values in (("--concurrency", concurrency), ("--batch", [batch])):
        if any(value < 1 for value in values):
            raise UserError(f"{name} {min(values)}: give 1 or more")
    for name, values in (("--rate", rate), ("--seconds", [seconds])):
        if any(value <= 0 for value in values):
            raise UserError(f"{name} {min(values):g}: give more than 0")
    if encoded and not encoded.is_file():
        raise UserError(f"--encoded {encoded}: no such file")
    model = model or ("features_encoded" if encoded else "features")
    if not concurrency and not rate:
        concurrency = (1, 8)
    rows = asyncio.run(_measure(url, model, outputs, concurrency, rate, batch, seconds, encoded))
    show(rows, batch)
    if figures:
        figures.write_text(json.dumps(rows, indent=1))
        print(f"figures   {figures}")
    failed = {reason: count for row in rows for reason, count in row["failures"].items()}
    if failed:
        raise ServerError(
            "requests failed: "
            f"{', '.join(f'{count} x {reason}' for reason, count in failed.items())}"
        )
    return 0


async def _measure(
    url: str,
    model: str,
    outputs: Sequence[str] | None,
    concurrency: Sequence[int],
    rates: Sequence[float],
    batch: int,
    seconds: float,
    encoded: Path | None,
) -> list[dict]:
    """A row for every concurrency and rate, measured one after the other."""
    import tritonclient.grpc.aio as grpc

    from serve.load import closed_loop, open_loop

    outcomes = []
    async with grpc.InferenceServerClient(url) as client:
        ask = await _prepare(client, url, model, outputs, batch, encoded)
        await ask()
        for count in concurrency:
            outcomes.append((f"{count} at once", await closed_loop(ask, count, seconds)))
        for rate in rates:
            outcomes.append((f"{rate:g}/s", await open_loop(ask, rate, seconds)))
    return [
        {"model": model, "load": load, **outcome.row(), "failures": outcome.failures}
        for load, outcome in outcomes
    ]


async def _prepare(client, url: str, model: str, outputs, batch: int, encoded: Path | None):
    """A function that sends one request; raises UserError for a missing server, model or output, or
    too large a batch.
    """
    import numpy as np
    import tritonclient.grpc.aio as grpc
    from tritonclient.utils import InferenceServerException

    try:
        config = (await client.get_model_config(model)).config
    except InferenceServerException as error:
        if "UNAVAILABLE" in str(error.status()):
            raise UserError(
                f"--url {url}: no server answers (start one: python -m serve.run BUNDLE)"
            ) from error
        raise UserError(f"--model {model}: {error.message()}") from error
    known = [port.name for port in config.output]
    missing = [name for name in outputs or () if name not in known]
    if missing:
        raise UserError(f"--outputs {missing[0]}: '{model}' has {', '.join(known)}")
    if batch > max(1, config.max_batch_size):
        raise UserError(f"--batch {batch}: '{model}' takes at most {config.max_batch_size}")
    source = config.input[0]
    if encoded:
        values = np.array([[encoded.read_bytes()]] * batch, dtype=np.object_)
        kind = "BYTES"
    elif source.name == "image":
        if min(source.dims) < 1:
            raise UserError(
                f"--model {model} takes pictures of any size: measure features_encoded (--encoded "
                "FILE)"
            )
        values = np.random.default_rng(0).integers(0, 256, (batch, *source.dims), dtype=np.uint8)
        kind = "UINT8"
    else:
        raise UserError(f"--model {model} reads '{source.name}': choose one that reads pictures")
    tensor = grpc.InferInput(source.name, values.shape, kind)
    tensor.set_data_from_numpy(values)
    requested = [grpc.InferRequestedOutput(name) for name in outputs or known]

    async def ask() -> None:
        await client.infer(model, [tensor], outputs=requested)

    return ask


def show(rows: list[dict], batch: int) -> None:
    heads = ("model", "load", "pictures/s", "p50 ms", "p90 ms", "p99 ms", "answered", "failed")
    table = []
    for row in rows:
        figures = (row["requests_per_second"] * batch, row["p50_ms"], row["p90_ms"], row["p99_ms"])
        cells = (
            row["model"],
            row["load"],
            *(f"{value:.1f}" for value in figures),
            str(row["answered"]),
            str(row["failed"]),
        )
        table.append(cells)
    print_table(heads, table, left=("load",))


if __name__ == "__main__":
    sys.exit(main())
