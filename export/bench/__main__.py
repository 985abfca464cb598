"""`python -m export.bench`: what a bundle's graphs cost in every runtime at hand, beside torch, in
one run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status

EPILOG = """\
examples:
  python -m export.bench bundles/quickstart --run runs/quickstart
  python -m export.bench bundles/mine bundles/mine-int8 --run runs/mine --graphs backbone fused --rounds 20
  python -m export.bench bundles/mine --run runs/mine --devices cuda --batches 1 8 32 128
  python -m export.bench bundles/mine --batches 8 --graphs head_dino depth --threads 4

On a CPU: torch eager and torch.compile, onnxruntime, OpenVINO. Where there is a GPU also torch there (fp16 autocast too),
onnxruntime's CUDA provider and the bundle's TensorRT engines, inputs and outputs staying on the GPU and TF32 off.
torch runs the student of --run; ratios are to torch eager on the same device, at each graph and batch, and the least cosine
is that of any output of any photograph to torch eager's, so that no row is fast by being wrong. Heads are fed what the
graphs before them say of the photographs. Runtimes take turns within a round, so that a machine that slows down slows all.

Graphs take any batch, whatever --max-batch they were exported with; engines take no more than that and have no rows beyond.
On a CPU each uses the fastest of a few settings, tried first and printed: threads (all cores or half of them, unless
--threads says how many), onnxruntime's optimisation level, OpenVINO's hint. Prints a table and writes BUNDLE/../bench.json
and bench.png (or into --output).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.bench",
        description="Time a bundle's graphs and engines in onnxruntime, OpenVINO and TensorRT "
        "beside torch.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "bundles",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="one or more precisions of one student",
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="run folder, for torch and the cosines to it"
    )
    parser.add_argument(
        "--graphs",
        nargs="+",
        metavar="NAME",
        help="any of the bundle (backbone, interaction, every head, fused)",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="(1 8 32)"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="timed calls of each (10)"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=("cpu", "cuda"),
        help="(cpu and, where there is a GPU, cuda)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of every runtime (default: by measurement)",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, which takes minutes to start",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for bench.json and bench.png (default: BUNDLE/..)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed command line."""
    import torch

    from contract.gpu import compute_capabilities

    for name, values in (
        ("--batches", args.batches),
        ("--rounds", [args.rounds]),
        ("--threads", [args.threads]),
    ):
        if values != [None] and min(values) < 1:
            raise UserError(f"{name} {min(values)}: give 1 or more")
    devices = args.devices or (["cpu", "cuda"] if compute_capabilities() else ["cpu"])
    if "cuda" in devices and not compute_capabilities():
        raise UserError(
            "--devices cuda: no CUDA GPU is visible here (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
    manifests = read_bundles(args.bundles)
    first = manifests[args.bundles[0]]
    graphs = args.graphs or [graph.name for graph in first.graphs if is_usual(graph.name)]
    for manifest in manifests.values():
        for graph in graphs:
            manifest.graph(graph)
    threads = torch.get_num_threads()  # timing tries others
    try:
        rows = time_graphs(args, manifests, graphs, devices)
    finally:
        torch.set_num_threads(threads)
    show(rows)
    folder = args.output or args.bundles[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "height": first.resolution.height,
        "width": first.resolution.width,
        "student": first.student.network,
        "rounds": args.rounds,
        "threads": args.threads,
        **describe_devices(devices),
    }
    (folder / "bench.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"figures   {folder / 'bench.json'}")
    print(f"picture   {draw(folder / 'bench.png', rows)}")
    return 0


def read_bundles(bundles: Sequence[Path]) -> dict:
    """Manifests by bundle; raises UserError for bundles that cannot stand in one table."""
    from contract.manifest import read_manifest

    manifests = {path: read_manifest(path) for path in bundles}
    first = manifests[bundles[0]]
    precisions: dict[str, Path] = {}
    for path, manifest in manifests.items():
        if manifest.student.sha256 != first.student.sha256:
            raise UserError(
                f"{path} holds another student than {bundles[0]}: compare bundles of one student"
            )
        size, wanted = ((m.resolution.height, m.resolution.width) for m in (manifest, first))
        if size != wanted:
            raise UserError(
                f"{path} is for {size[0]}x{size[1]}, {bundles[0]} for {wanted[0]}x{wanted[1]}: "
                "export alike"
            )
        if manifest.precision in precisions:
            other = precisions[manifest.precision]
            raise UserError(
                f"{path} and {other} are both {manifest.precision}: compare bundles of several "
                "precisions"
            )
        precisions[manifest.precision] = path
    return manifests


def is_usual(graph: str) -> bool:
    """Whether a graph is timed unless others are asked for: all but the tasks, which only some
    students have.
    """
    from contract.signature import BACKBONE, FUSED, INTERACTION, head_graph

    return graph in (BACKBONE, INTERACTION, FUSED) or graph.startswith(head_graph(""))


def describe_devices(devices: Sequence[str]) -> dict[str, object]:
    """What the figures were taken on."""
    import os
    import platform

    import torch

    result: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if "cuda" in devices and torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def time_graphs(
    args: argparse.Namespace, manifests: dict, graphs: list[str], devices: Sequence[str]
) -> list[dict]:
    """Rows of every graph and batch; says in a line what was chosen, and once each what cannot run
    here.
    """
    import torch

    from export.bench.timing import (
        Feeds,
        TorchStudent,
        cpu_works,
        gpu_runtimes,
        gpu_works,
        time_all,
    )

    bundle, first = next(iter(manifests.items()))
    student = TorchStudent(args.run, first, not args.no_compile) if args.run else None
    feeds = Feeds(bundle, first, graphs)
    rows: list[dict] = []
    answer: set[str] = set()

    def tell(reasons: Sequence[str]) -> None:
        for reason in reasons:
            if reason not in answer:
                print(f"left out  {reason}")
                answer.add(reason)

    for graph in graphs:
        opened = {}
        for path, manifest in manifests.items() if "cuda" in devices else ():
            opened[path], reasons = gpu_runtimes(path, manifest, graph)
            tell(reasons)
        for batch in args.batches:
            known = feeds.of(batch)
            inputs = {tensor.name: known[tensor.name] for tensor in first.graph(graph).inputs}
            works = []
            for device in devices:
                if student and device == "cuda" and not torch.cuda.is_available():
                    tell(["torch on cuda: this torch sees no GPU (install torch for CUDA)"])
                elif student:
                    works += student.works(graph, inputs, device, args.threads)
            for path, manifest in manifests.items():
                if "cpu" in devices:
                    works += cpu_works(
                        graph,
                        path / manifest.graph(graph).file,
                        manifest.precision,
                        inputs,
                        args.threads,
                    )
                result, reasons = gpu_works(opened.get(path, []), graph, manifest.precision, inputs)
                works += result
                tell(reasons)
            chosen = "; ".join(f"{work.name}: {work.settings}" for work in works if work.settings)
            print(f"timing    {graph}, batch {batch}" + (f": {chosen}" if chosen else ""))
            rows += [
                {"graph": graph, "batch": batch, **row}
                for row in time_all(works, args.rounds, batch)
            ]
    return rows


def show(rows: list[dict]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    from export.parity import TOLERANCE

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "graph",
        "batch",
        "runtime",
        "p50 ms",
        "p99 ms",
        "images/s",
        "over torch eager",
        "least cosine",
    ):
        table.add_column(name, justify="left" if name in ("graph", "runtime") else "right")
    for row in rows:
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        cosine = "" if row["cosine"] is None else f"{row['cosine']:.6f}"
        if row["agrees"] is False:
            cosine = f"[red]BELOW {TOLERANCE[row['precision']]}: {cosine}[/red]"
        table.add_row(
            row["graph"],
            str(row["batch"]),
            row["runtime"],
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['images_per_second']:.1f}",
            speedup,
            cosine,
        )
    Console(width=None if sys.stdout.isatty() else 130, highlight=False).print(table)


def draw(path: Path, rows: list[dict]) -> Path:
    """Images a second by batch, a panel a graph, a line a runtime."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from distill.figures import save_figure

    graphs = list(dict.fromkeys(row["graph"] for row in rows))
    columns = min(3, len(graphs))
    lines = -(-len(graphs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.5 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(graphs) :]:
        axis.set_axis_off()
    for axis, graph in zip(axes.flat, graphs, strict=False):
        for runtime in dict.fromkeys(row["runtime"] for row in rows):
            points = [
                (r["batch"], r["images_per_second"])
                for r in rows
                if (r["graph"], r["runtime"]) == (graph, runtime)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=runtime)
        axis.set(title=graph, xlabel="batch", ylabel="images/s", xscale="log")
        axis.set_xticks(
            sorted({r["batch"] for r in rows}), [str(b) for b in sorted({r["batch"] for r in rows})]
        )
        axis.minorticks_off()  # of a logarithmic axis they have labels too
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
