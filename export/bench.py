"""`python -m export.bench`: what a bundle's graphs cost in every runtime at hand, beside torch, in one run."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distill.errors import UserError, exit_status

EPILOG = """\
examples:
  python -m export.bench bundles/quickstart --run runs/quickstart
  python -m export.bench bundles/mine bundles/mine-int8 --run runs/mine --batches 1 8 32 --rounds 20
  python -m export.bench bundles/mine --batches 8 --graphs fused backbone

Runtimes take turns within a round, so that a machine that slows down slows all of them. torch eager and torch.compile run
the student of --run (the bundle alone has no torch model); ratios are to torch eager, at each graph and batch. Prints a
table and writes BUNDLE/../bench.json and bench.png (or into --output). Threads: all cores for every runtime.
"""

LEVELS = ("basic", "all")
"""onnxruntime's graph optimisation levels that are tried; the faster one is used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.bench",
        description="Time a bundle's graphs in onnxruntime and OpenVINO beside torch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="one or more precisions of one student")
    parser.add_argument("--run", type=Path, metavar="RUN", help="run folder, for torch eager and torch.compile")
    parser.add_argument("--graphs", nargs="+", default=["backbone", "fused"], metavar="NAME", help="(backbone fused)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="(1 8 32)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed calls of each (10)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes to start"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for bench.json and bench.png (default: BUNDLE/..)")
    asked = parser.parse_args(arguments)
    return exit_status(lambda: run(asked))


def run(asked: argparse.Namespace) -> int:
    """Carry out a parsed command line."""
    import numpy as np

    from export.bundle import read_manifest

    for name, values in (("--batches", asked.batches), ("--rounds", [asked.rounds])):
        if min(values) < 1:
            raise UserError(f"{name} {min(values)}: give 1 or more")
    manifests = {path: read_manifest(path) for path in asked.bundles}
    first = next(iter(manifests.values()))
    for path, manifest in manifests.items():
        if manifest.student.sha256 != first.student.sha256:
            raise UserError(f"{path} holds another student than {asked.bundles[0]}: compare bundles of one student")
        for graph in asked.graphs:
            if [t.name for t in manifest.graph(graph).inputs] != ["image"]:
                raise UserError(f"--graphs {graph}: it does not read pictures; choose backbone or fused")
    height, width = first.resolution.height, first.resolution.width
    rng = np.random.default_rng(0)
    rows: list[dict] = []
    for graph in asked.graphs:
        for batch in asked.batches:
            fits = {path: m for path, m in manifests.items() if batch <= m.max_batch}
            image = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
            works = dict(torch_works(asked, graph, image, first)) if asked.run else {}
            for path, manifest in fits.items():
                works |= onnx_works(path / manifest.graph(graph).file, manifest.precision, image)
            rows += [{"graph": graph, "batch": batch, **row} for row in time_all(works, asked.rounds, batch)]
    show(rows)
    folder = asked.output or asked.bundles[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    about = {"height": height, "width": width, "student": first.student.network, "rounds": asked.rounds}
    (folder / "bench.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"figures   {folder / 'bench.json'}")
    print(f"picture   {draw(folder / 'bench.png', rows)}")
    return 0


def torch_works(asked: argparse.Namespace, graph: str, image, manifest):  # noqa: ANN001, ANN201 - a generator
    """torch eager and torch.compile on the same graph's module, as (name, call)."""
    import torch

    from export.graph import build_parts, open_student

    student = open_student(asked.run)
    if student.sha256 != manifest.student.sha256:
        raise UserError(f"--run {asked.run}: its student is not the bundle's")
    height, width = manifest.resolution.height, manifest.resolution.width
    parts = {part.signature.graph: part.module.eval() for part in build_parts(student, height, width)}
    pixels = torch.from_numpy(image)

    def call(module: Callable) -> Callable:
        def work() -> None:
            with torch.inference_mode():
                module(pixels)

        return work

    yield "torch eager fp32", call(parts[graph])
    if not asked.no_compile:
        yield "torch.compile fp32", call(torch.compile(parts[graph]))


def onnx_works(path: Path, precision: str, image) -> dict[str, Callable]:  # noqa: ANN001 - an array
    """A graph in onnxruntime (the faster of two optimisation levels) and in OpenVINO, as calls by name."""
    import onnxruntime

    works: dict[str, Callable] = {}
    if precision != "bf16":  # its CPU provider has no bf16 convolutions
        sessions = {}
        for level in LEVELS:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = {
                "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
                "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
            }[level]
            # idle threads that spin take cores from whatever runs beside
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            sessions[level] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        level = min(sessions, key=lambda name: measured(lambda: sessions[name].run(None, {"image": image}), 2))
        works[f"onnxruntime {precision}"] = lambda: sessions[level].run(None, {"image": image})
    try:
        import openvino
    except ModuleNotFoundError:
        return works
    model = openvino.Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    works[f"openvino {precision}"] = lambda: model({"image": image})
    return works


def measured(work: Callable, times: int) -> float:
    """Least seconds of several calls, after one that does not count."""
    work()
    return min(once(work) for _ in range(times))


def once(work: Callable) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_all(works: dict[str, Callable], rounds: int, batch: int) -> list[dict]:
    """Latencies of all works, taking turns; ratios of medians to torch eager, where that is among them."""
    for work in works.values():
        work()  # compiles, fills caches
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(once(work))
    base = statistics.median(times["torch eager fp32"]) if "torch eager fp32" in times else None
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        ordered = sorted(values)
        rows.append({
            "runtime": name, "p50_ms": 1e3 * middle, "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "images_per_second": batch / middle, "speedup": base / middle if base else None,
        })  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("graph", "batch", "runtime", "p50 ms", "p99 ms", "images/s", "over torch eager"):
        table.add_column(name, justify="left" if name in ("graph", "runtime") else "right")
    for row in rows:
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        table.add_row(row["graph"], str(row["batch"]), row["runtime"], f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}",
                      f"{row['images_per_second']:.1f}", speedup)  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def draw(path: Path, rows: list[dict]) -> Path:
    """Images a second by batch, a panel a graph, a line a runtime."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from distill.plots import save_figure

    graphs = list(dict.fromkeys(row["graph"] for row in rows))
    figure, axes = plt.subplots(1, len(graphs), figsize=(6.5 * len(graphs), 4.2), squeeze=False, layout="constrained")
    for axis, graph in zip(axes[0], graphs, strict=True):
        for runtime in dict.fromkeys(row["runtime"] for row in rows):
            points = [
                (r["batch"], r["images_per_second"]) for r in rows if (r["graph"], r["runtime"]) == (graph, runtime)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=runtime)
        axis.set(title=graph, xlabel="batch", ylabel="images/s", xscale="log")
        axis.set_xticks(sorted({r["batch"] for r in rows}), [str(b) for b in sorted({r["batch"] for r in rows})])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
