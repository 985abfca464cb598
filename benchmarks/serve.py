"""The cost of serving over calling the same graph in this process. Every figure
is a ratio of two measurements that alternate.

    python benchmarks/serve.py BUNDLE --output docs/results/serving.json
    python benchmarks/serve.py BUNDLE \\
        --settings openvino:2x1 openvino:1x2 onnxruntime:2x1

(a) `fused` through gRPC at concurrency 8 over in-process calls of one batch
(b) the cost of one output compared with all
(c) milliseconds that a request adds
(d) JPEG bytes over pixels
(e) dynamic batching on over off
(f) LitServe
(g) the front of the embedded server
(h) `features` over calls of the same graphs in this process: processor time of
    the server's processes, throughput, and p50 of a request that is alone,
    also over that of calls in this process after a pause of 3 ms, because a
    process that waits for requests finds its caches cold

--encoded measures (d) alone, --front (g), --door (h). --settings only compares
settings; each is RUNTIME:INSTANCESxTHREADS. Clients, server and the in-process
calls share the same cores.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# not this folder, in which `serve` would be this file
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks.in_process import latencies, open_image_graph, open_parts  # noqa: E402
from benchmarks.litserve_client import upload  # noqa: E402
from benchmarks.triton_client import load, photograph  # noqa: E402
from contract.signature import FUSED  # noqa: E402
from serve.bundle import Bundle, read_bundle  # noqa: E402
from serve.repository.build import make_repository  # noqa: E402
from serve.repository.settings import (  # noqa: E402
    MOST_THREADS,
    Settings,
    choose_runtime,
    cores,
    instances_and_threads,
)
from serve.server.activity import cpu_seconds  # noqa: E402
from serve.server.front import FrontOptions  # noqa: E402
from serve.server.front_process import Front  # noqa: E402
from serve.server.process import Options, Server  # noqa: E402
from serve.server.stubs import find_stubs  # noqa: E402
from serve.server.triton import find_tritonserver  # noqa: E402

_PAUSE = 0.003
"""Seconds before a call of (h) that finds its caches cold."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement (default: 4)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="alternations of the two sides of a ratio (default: 3)",
    )
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="R:IxT", help="compare settings and stop"
    )
    parser.add_argument("--encoded", action="store_true", help="measure (d) and stop")
    parser.add_argument("--front", action="store_true", help="measure (g) and stop")
    parser.add_argument("--door", action="store_true", help="measure (h) and stop")
    parser.add_argument("--no-peer", action="store_true", help="leave out LitServe")
    parser.add_argument("--threads", type=int, help="of each instance, and in this process, in (h)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    bundle = read_bundle(args.bundle)
    alone = {"encoded": encoded, "front": front, "door": door}
    chosen = [measure for name, measure in alone.items() if getattr(args, name)]
    if chosen:
        rows = [row for measure in chosen for row in measure(args, bundle)]
    else:
        rows = search(args, bundle) if args.settings else compare(args, bundle)
    print(f"\n{bundle.manifest.student.network}, {bundle.manifest.precision}, {cores()} cores\n")
    print("| what | this | that | ratio | least, most |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['what']} | {row['this']:.4g} | {row['that']:.4g} | {row['ratio']:.2f} | "
            f"{row['span']} |"
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


def row(what: str, this: list[float], that: list[float]) -> dict:
    """A ratio: the median over turns of the two sides' ratios."""
    ratios = sorted(a / b for a, b in zip(this, that, strict=True))
    result = {
        "what": what,
        "this": statistics.median(this),
        "that": statistics.median(that),
        "ratio": statistics.median(ratios),
        "span": f"{ratios[0]:.2f}, {ratios[-1]:.2f}",
    }
    print(f"  {what}: {result['ratio']:.2f} ({result['span']})", file=sys.stderr, flush=True)
    return result


@contextmanager
def served(bundle: Path, settings: Settings) -> Iterator[str]:
    """The embedded server on a bundle; yields its gRPC address."""
    with running(bundle, settings) as server:
        yield server.grpc


@contextmanager
def running(bundle: Path, settings: Settings) -> Iterator[Server]:
    """The embedded server on a bundle."""
    with tempfile.TemporaryDirectory() as folder:
        make_repository(read_bundle(bundle), Path(folder) / "repository", settings)
        options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
        result, message = find_tritonserver(None, Path(folder)), deque(maxlen=30)
        with Server(result, Path(folder) / "repository", options, message.append) as server:
            try:
                yield server
            except RuntimeError:
                print("tritonserver's last lines:", *message, sep="\n", file=sys.stderr)
                raise


def _default_settings(runtime: str = "auto") -> Settings:
    instances, threads = instances_and_threads(None, None, cores())
    runtime = choose_runtime(runtime, "cpu")
    return Settings(
        runtime=runtime, instances=instances, threads=threads, decoders=min(cores(), MOST_THREADS)
    )


def in_process(
    bundle: Bundle, graph: str, runtime: str, pixels: np.ndarray, seconds: float
) -> list[float]:
    return latencies(
        open_image_graph(
            bundle.path / bundle.graphs[graph].file, bundle.manifest.runtime(runtime), cores()
        ),
        pixels,
        seconds,
    )


def search(args: argparse.Namespace, bundle: Bundle) -> list[dict]:
    """Throughput of settings over in-process onnxruntime on all cores, at concurrency 1 and
    --concurrency.
    """
    pixels, _ = photograph(bundle)
    every, rows = [tensor.name for tensor in bundle.outputs], []
    direct = open_image_graph(bundle.path / bundle.graphs[FUSED].file, "onnxruntime", cores())
    for text in args.settings:
        runtime, _, shape = text.partition(":")
        instances, threads = (int(part) for part in shape.split("x"))
        settings = Settings(runtime=runtime, instances=instances, threads=threads)
        with served(args.bundle, settings) as address:
            for model in (FUSED, "features"):
                for concurrency in (1, args.concurrency):
                    pairs = []
                    for _ in range(args.rounds):
                        calls = latencies(direct, pixels, args.seconds)
                        result = load(address, model, every, pixels, concurrency, args.seconds)
                        pairs.append((result.rate, len(calls) / sum(calls)))
                    what = (
                        f"{text}, {model}, {concurrency} at once / in-process onnxruntime "
                        f"1x{cores()}, pictures/s"
                    )
                    rows.append(row(what, *map(list, zip(*pairs, strict=True))))
    return rows


def compare(args: argparse.Namespace, bundle: Bundle) -> list[dict]:
    pixels, jpeg = photograph(bundle)
    every = [tensor.name for tensor in bundle.outputs]
    teacher = next((name for name in every if name.endswith("_token")), every[-1])
    n, seconds, turns, rows = args.concurrency, args.seconds, range(args.rounds), []
    pairs: list[tuple[float, float]]

    def rates(address: str, this: tuple, that: tuple) -> dict:
        one, other = [], []
        for _ in turns:
            one.append(load(address, *this, n, seconds).rate)
            other.append(load(address, *that, n, seconds).rate)
        return {"this": one, "that": other}

    for runtime in dict.fromkeys(("onnxruntime", choose_runtime("auto", "cpu"))):
        settings = _default_settings(runtime)
        with served(args.bundle, settings) as address:
            for batch in (1, min(8, bundle.manifest.max_batch)):
                several = np.repeat(pixels, batch, 0)
                pairs = []
                for _ in turns:
                    calls = in_process(bundle, FUSED, "onnxruntime", several, seconds)
                    result = load(address, FUSED, every, several, n, seconds)
                    pairs.append((batch * result.rate, batch * len(calls) / sum(calls)))
                what = (
                    f"(a) fused in {runtime}, batch {batch}, {n} at once / onnxruntime "
                    "in-process, pictures/s"
                )
                rows.append(row(what, *map(list, zip(*pairs, strict=True))))
            if runtime != _default_settings().runtime:
                continue
            alone = ("features", ["backbone_global"], pixels)
            result = rates(address, ("features", [teacher], pixels), ("features", every, pixels))
            rows.append(row(f"(b) features, {teacher} only / all outputs, requests/s", **result))
            result = rates(address, (FUSED, every, pixels), ("features", every, pixels))
            rows.append(row("(b) fused / features, all outputs, requests/s", **result))
            pairs = []
            for _ in turns:
                calls = in_process(bundle, "backbone", runtime, pixels, seconds)
                one = load(address, *alone, 1, seconds)
                pairs.append((one.percentile(50), 1e3 * statistics.median(calls)))
            what = (
                f"(c) backbone_global, one at a time: p50 ms through gRPC / in-process {runtime} "
                f"1x{cores()}"
            )
            rows.append(row(what, *map(list, zip(*pairs, strict=True))))
            if not args.no_peer:
                rows += peer(args, bundle, address, every, pixels, settings)
    rows.append(batching(args, bundle, every, pixels))
    return rows + encoded(args, bundle) + front(args, bundle) + door(args, bundle)


def encoded(args: argparse.Namespace, bundle: Bundle) -> list[dict]:
    """(d): both through the server, in turns."""
    pixels, jpeg = photograph(bundle)
    every, rows = [tensor.name for tensor in bundle.outputs], []
    with served(args.bundle, _default_settings()) as address:
        for name, outputs in (("backbone_global", ["backbone_global"]), ("all outputs", every)):
            for at_once in (args.concurrency, 1):
                rates = [], []
                for _ in range(args.rounds):
                    for side, given in enumerate(
                        (("features_encoded", outputs, jpeg), ("features", outputs, pixels))
                    ):
                        result = load(address, *given, at_once, args.seconds)
                        rates[side].append(result.rate)
                what = f"(d) JPEG of 640x480 / pixels, {name}, {at_once} at once, requests/s"
                rows.append(row(what, *rates))
    return rows


def front(args: argparse.Namespace, bundle: Bundle) -> list[dict]:
    """(g): the same tritonserver through its front and directly, in turns."""
    pixels, _ = photograph(bundle)
    every, n, rows = [tensor.name for tensor in bundle.outputs], args.concurrency, []
    with served(args.bundle, _default_settings()) as address, front_of(address) as outer:
        for model, outputs in (("features", ["backbone_global"]), (FUSED, every)):
            for at_once in (n, 1):
                rates, medians = ([], []), ([], [])
                for _ in range(args.rounds):
                    for side, url in enumerate((outer, address)):
                        result = load(url, model, outputs, pixels, at_once, args.seconds)
                        rates[side].append(result.rate)
                        medians[side].append(result.percentile(50))
                what = f"(g) {model}, {at_once} at once: through the front / directly"
                rows.append(row(f"{what}, requests/s", *rates))
                rows.append(row(f"{what}, p50 ms", *medians))
    return rows


def door(args: argparse.Namespace, bundle: Bundle) -> list[dict]:
    """(h): in turns; processor time of clients is not the server's, but all share the cores."""
    pixels, _ = photograph(bundle)
    settings = _default_settings().model_copy(update={"encoded": False, "fused": False})
    if args.threads:
        settings = settings.model_copy(update={"threads": args.threads})
    apart = settings.model_copy(update={"parts": "apart"})
    rows, every = [], [tensor.name for tensor in bundle.outputs]
    many, n = min(8, bundle.manifest.max_batch), args.concurrency
    with (
        running(args.bundle, settings) as server,
        running(args.bundle, apart) as ensemble,
        front_of(server.grpc) as outer,
    ):

        def there(outputs: list[str], at_once: int, server: Server, address: str = "") -> tuple:
            """Milliseconds of processor time a picture, pictures/s, p50 in ms."""
            pids = [server.process.pid, *(s.pid for s in find_stubs(server.process.pid))]
            began = cpu_seconds(pids)
            result = load(
                address or server.grpc, "features", outputs, pixels, at_once, args.seconds
            )
            count = len(result.latencies) + 1
            return 1e3 * (cpu_seconds(pids) - began) / count, result.rate, result.percentile(50)

        for name, outputs in (("all outputs", every), ("backbone_global", ["backbone_global"])):
            call = open_parts(bundle, settings.runtime, settings.threads, outputs)
            sides: dict[str, list[tuple]] = {}
            for _ in range(args.rounds):
                turn = {
                    "one": here(call, pixels, args.seconds),
                    "many": here(call, np.repeat(pixels, many, 0), args.seconds),
                    "paused": here(call, pixels, args.seconds, pause=_PAUSE),
                    "loaded": there(outputs, n, server),
                    "ensemble": there(outputs, n, ensemble),
                    "alone": there(outputs, 1, server),
                    "alone_ensemble": there(outputs, 1, ensemble),
                    "fronted": there(outputs, 1, server, outer),
                }
                for side, figures in turn.items():
                    sides.setdefault(side, []).append(figures)
            used, rate, p50 = (
                {side: [turn[place] for turn in turns] for side, turns in sides.items()}
                for place in range(3)
            )
            what = f"(h) {name}, {n} at once"
            for form, side in (("one model", "loaded"), ("ensemble", "ensemble")):
                for base, batch in (("one", 1), ("many", many)):
                    text = f"{what}: CPU ms/picture, in-process calls of {batch} / {form}"
                    rows.append(row(text, used[base], used[side]))
                text = f"{what}: pictures/s, {form} / in-process calls of 1"
                rows.append(row(text, rate[side], rate["one"]))
            for side, how in (
                ("alone", "one model"),
                ("alone_ensemble", "ensemble"),
                ("fronted", "one model through the front"),
            ):
                text = f"(h) {name}, one at a time: p50 ms, {how} / in-process"
                rows.append(row(text, p50[side], p50["one"]))
                rows.append(row(f"{text}, each call after a pause", p50[side], p50["paused"]))
    return rows


def here(
    call: Callable[[np.ndarray], list[np.ndarray]],
    pictures: np.ndarray,
    seconds: float,
    pause: float = 0,
) -> tuple[float, float, float]:
    """The same figures of calls in this process, each after a pause of so many seconds."""
    call(pictures)
    began = time.process_time()
    calls = latencies(call, pictures, seconds, pause)
    used = (time.process_time() - began) / (len(pictures) * (len(calls) + 1))
    return 1e3 * used, len(pictures) * len(calls) / sum(calls), 1e3 * statistics.median(calls)


@contextmanager
def front_of(address: str) -> Iterator[str]:
    """The front of the embedded server before one; yields its own address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        outer = f"127.0.0.1:{free.getsockname()[1]}"
    options = FrontOptions(listen=outer, upstream=address)
    proxy = Front(options, lambda line: print(line, file=sys.stderr))
    proxy.start()
    try:
        yield outer
    finally:
        proxy.stop()


def batching(
    args: argparse.Namespace, bundle: Bundle, every: list[str], pixels: np.ndarray
) -> dict:
    """(e): two servers, one after the other in each turn."""
    one, other = [], []
    for _ in range(args.rounds):
        for result, on in ((one, True), (other, False)):
            with served(
                args.bundle, _default_settings().model_copy(update={"batching": on})
            ) as address:
                result.append(
                    load(address, FUSED, every, pixels, args.concurrency, args.seconds).rate
                )
    return row(
        f"(e) dynamic batching on / off, fused, {args.concurrency} at once, requests/s", one, other
    )


def peer(
    args: argparse.Namespace,
    bundle: Bundle,
    address: str,
    every: list[str],
    pixels: np.ndarray,
    settings: Settings,
) -> list[dict]:
    """(f): the same graph, runtime, workers and threads behind LitServe; the fastest of two batch
    sizes.
    """
    rows = []
    for most in (1, bundle.manifest.max_batch):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            Path(__file__).parent / "litserve_peer.py",
            args.bundle,
            *("--port", str(port), "--runtime", settings.runtime),
            *("--workers", str(settings.instances), "--threads", str(settings.threads)),
            *("--max-batch", str(most)),
        ]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            size = sum(4 * int(np.prod(tensor.dims)) for tensor in bundle.outputs)
            upload(url, pixels, size, process)
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours.append(
                    load(address, FUSED, every, pixels, args.concurrency, args.seconds).rate
                )
                theirs.append(upload(url, pixels, size, process, args.concurrency, args.seconds))
            rows.append(
                row(
                    f"(f) Triton / LitServe (batches up to {most}), fused, {args.concurrency} at "
                    "once",
                    ours,
                    theirs,
                )
            )
        finally:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # its workers outlive a SIGTERM, and take a fifth of a core each
            process.wait()
    return rows


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - begun:.0f} s", file=sys.stderr)
