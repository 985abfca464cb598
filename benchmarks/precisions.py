"""What a precision costs in agreement and gains in OpenVINO, head by head.

    python -m export.run runs/quickstart --output bundles/fp32
    python -m export.run runs/quickstart --output bundles/int8 \\
        --precision int8 --calibration packaged-photos
    python -m benchmarks.precisions bundles/fp32 bundles/int8

For every output of every graph but `fused` and a detector's: the least cosine,
the worst position, and the share of the pictures and their crops that keep
their nearest neighbour (1-NN) and of the five nearest (5-NN), each the worst
of all comparisons with the torch student. For every graph: CPU milliseconds of
a call on one thread as a server opens it (`openvino_precision`), medians of
calls that take turns, and the first bundle's over it. CPU time because other
work on a machine lengthens the wall's.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from contract.graph_call import Call, open_graph
from contract.manifest import GraphRecord, Manifest, read_manifest
from contract.parity_record import ParityRecord
from contract.signature import FUSED, IMAGE
from distill.data.pictures import PackagedPhotos
from export.photographs import shown


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="of one student")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="(15)")
    args = parser.parse_args()
    manifests = {path: read_manifest(path) for path in args.bundles}
    first = next(iter(manifests.values()))
    size = first.resolution
    source = PackagedPhotos()
    view, sides = first.policy, (size.height, size.width)
    pictures = [shown(source.load(n % len(source)), sides, view) for n in range(args.batch)]
    known = {IMAGE: np.stack(pictures)}
    print("| graph | output | precision | cosine | position | 1-NN | 5-NN | CPU ms | speed |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for graph in first.graphs:
        if not all(port.name in known for port in graph.inputs):  # a detector's, which read words
            continue
        feeds = [known[port.name] for port in graph.inputs]
        calls = {path: _open(path, manifest, graph) for path, manifest in manifests.items()}
        taken = _time(calls, feeds, args.rounds)
        answers = dict(
            zip((p.name for p in graph.outputs), calls[args.bundles[0]](feeds), strict=True)
        )
        if graph.name != FUSED:
            known |= answers
        for path, manifest in manifests.items():
            milliseconds, speed = (
                statistics.median(values)
                for values in (
                    taken[path],
                    [a / b for a, b in zip(taken[args.bundles[0]], taken[path], strict=True)],
                )
            )
            for line in _lines(graph, manifest, milliseconds, speed):
                print(line, flush=True)
    print(
        f"\nload average {os.getloadavg()[0]:.1f}, batch {args.batch}, {args.rounds} rounds, ",
        end="",
    )
    print(", ".join(f"{m.precision}: {m.runtime('openvino')}" for m in manifests.values()))


def _open(path: Path, manifest: Manifest, graph: GraphRecord) -> Call:
    file = path / manifest.graph(graph.name).file
    return open_graph(file, manifest.runtime("openvino"), 1, None)


def _time(calls: dict[Path, Call], feeds: list[np.ndarray], rounds: int) -> dict[Path, list[float]]:
    """CPU milliseconds of every call."""
    taken: dict[Path, list[float]] = {path: [] for path in calls}
    for turn in range(rounds + 1):  # the first is not counted
        for path, call in calls.items():
            begun = time.process_time()
            call(feeds)
            if turn:
                taken[path].append(1e3 * (time.process_time() - begun))
    return taken


def _lines(graph: GraphRecord, manifest: Manifest, milliseconds: float, speed: float) -> list[str]:
    """A row for the graph's speed, and one for each output."""
    ends = f"{milliseconds:.1f} | {speed:.2f}"
    result = [f"| {graph.name} | | {manifest.precision} | | | | | {ends} |"]
    for port in graph.outputs if graph.name != FUSED else ():
        rows = [r for r in manifest.parity if (r.graph, r.output) == (graph.name, port.name)]
        cells = (
            f"{min(row.cosine for row in rows):.6f}",
            _worst(rows, lambda row: row.position_error, max, "{:.1e}"),
            _worst(rows, lambda row: row.nearest, min, "{:.3f}"),
            _worst(rows, lambda row: row.ranked, min, "{:.3f}"),
        )
        result.append(f"| | {port.name} | {manifest.precision} | " + " | ".join(cells) + " | | |")
    return result


def _worst(
    rows: list[ParityRecord],
    figure: Callable[[ParityRecord], float | None],
    worst: Callable[[Iterable[float]], float],
    form: str,
) -> str:
    values = [value for row in rows if (value := figure(row)) is not None]
    return form.format(worst(values)) if values else ""


if __name__ == "__main__":
    main()
