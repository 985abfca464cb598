"""The cost of serve.gateway over serve.client's asyncio client, which it uses
itself. Every figure is a ratio of two measurements that alternate.

    python benchmarks/gateway.py BUNDLE --output docs/results/gateway.json

Both send the same JPEG of 640x640 and ask for backbone_global; the server
decodes. Throughput and p50 at --concurrency and one at a time, and the
processor time of a request: of this process with the client, and of the gateway
with what sends to it. Server, gateway and clients share the same cores.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# not this folder, in which `serve` would be this file
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import orjson  # noqa: E402

from benchmarks.serve import _default_settings, photograph, row, served  # noqa: E402
from serve.bundle import read_bundle  # noqa: E402
from serve.client.aio import AsyncFeatureClient  # noqa: E402
from serve.load import Ask, Outcome, closed_loop  # noqa: E402
from serve.repository.settings import cores  # noqa: E402

OUTPUT = "backbone_global"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement (default: 4)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="alternations of the two sides of a ratio (default: 5)",
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    bundle, rows = read_bundle(args.bundle), []
    jpeg = bytes(photograph(bundle)[1][0, 0])
    with served(args.bundle, _default_settings()) as address, started(address) as (port, process):
        for pictures in (1, min(8, bundle.manifest.max_batch)):
            for at_once in (args.concurrency, 1):
                rows += compare(args, address, port, process, [jpeg] * pictures, at_once)
    print(f"\n{bundle.manifest.student.network}, {bundle.manifest.precision}, {cores()} cores\n")
    print("| what | gateway | client | ratio | least, most |\n|---|---|---|---|---|")
    for each in rows:
        print(
            f"| {each['what']} | {each['this']:.4g} | {each['that']:.4g} | {each['ratio']:.2f} | "
            f"{each['span']} |"
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


@contextmanager
def started(address: str) -> Iterator[tuple[int, int]]:
    """A gateway in front of a server; its port and process id."""
    command = [sys.executable, "-m", "serve.gateway", "--url", address, "--port", "0"]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [*command, "--no-access-log"], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        port = re.search(r":(\d+)/v1$", process.stdout.readline().strip())[1]
        yield int(port), process.pid
    finally:
        process.terminate()
        process.wait(60)


def compare(
    args: argparse.Namespace,
    address: str,
    port: int,
    process: int,
    jpegs: list[bytes],
    at_once: int,
) -> list[dict]:
    """Rows about one kind of request."""
    sides = [
        lambda: through_gateway(port, process, jpegs, at_once, args.seconds),
        lambda: through_client(address, jpegs, at_once, args.seconds),
    ]
    rates, medians, costs = ([], []), ([], []), ([], [])
    for _ in range(args.rounds):
        for side, run in enumerate(sides):
            outcome, cpu = asyncio.run(run())
            if outcome.failures:
                raise RuntimeError(f"requests failed: {outcome.failures}")
            rates[side].append(outcome.rate)
            medians[side].append(outcome.percentile(50))
            costs[side].append(1e3 * cpu / len(outcome.latencies))
    what = f"{len(jpegs)} pictures a request, {at_once} at once"
    return [
        row(f"{what}: requests/s", *rates),
        row(f"{what}: p50 ms", *medians),
        row(f"{what}: CPU ms of a request, without the server's", *costs),
    ]


async def through_client(
    address: str, jpegs: list[bytes], at_once: int, seconds: float
) -> tuple[Outcome, float]:
    """Requests of this process's client, and its processor time in seconds."""
    async with AsyncFeatureClient(address, concurrency=at_once) as client:

        async def ask() -> None:
            await client.features(jpegs, [OUTPUT], encoded=True)

        return await measured(ask, at_once, seconds, lambda: 0.0)


async def through_gateway(
    port: int, process: int, jpegs: list[bytes], at_once: int, seconds: float
) -> tuple[Outcome, float]:
    """Requests over as many kept connections, and the processor time of the gateway and of this
    process, which sends what it has made before and reads the numbers of each answer.
    """
    files = [f"data:image/jpeg;base64,{b64encode(jpeg).decode()}" for jpeg in jpegs]
    body = json.dumps({"model": OUTPUT, "input": files}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(at_once)]

    async def ask() -> None:
        reader, writer = idle.pop()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer)
        data = orjson.loads(await reader.readexactly(int(length[1])))
        assert len(data["data"]) == len(jpegs)
        idle.append((reader, writer))

    result = await measured(ask, at_once, seconds, lambda: used_by(process))
    for _, writer in idle:
        writer.close()
    return result


async def measured(ask: Ask, at_once: int, seconds: float, others) -> tuple[Outcome, float]:
    await asyncio.gather(*(ask() for _ in range(at_once)))
    before = time.process_time() + others()
    outcome = await closed_loop(ask, at_once, seconds)
    return outcome, time.process_time() + others() - before


def used_by(process: int) -> float:
    """Processor seconds that another process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
