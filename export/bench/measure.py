"""Time the graphs and engines of bundles beside torch, and report it."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from contract.bundle_check import graph_problem
from contract.errors import UserError
from contract.gpu import compute_capabilities
from contract.manifest import Manifest, read_manifest
from contract.signature import BACKBONE, FUSED, INTERACTION, head_graph
from contract.tables import entry
from export.bench.options import BenchOptions
from export.bench.report import draw, show
from export.bench.timing import (
    Feeds,
    TorchStudent,
    cpu_works,
    gpu_runtimes,
    gpu_works,
    time_all,
)
from export.bundle_files import verify_files


def bench(options: BenchOptions) -> list[dict]:
    """Time every graph in every runtime, print a table, write bench.json and bench.png, and return
    the table's rows.

    Raises UserError for bundles that cannot share one table, unknown graphs, and cuda without a
    GPU.
    """
    devices = options.devices or (("cpu", "cuda") if compute_capabilities() else ("cpu",))
    if "cuda" in devices and not compute_capabilities():
        raise UserError(
            "--devices cuda: no CUDA GPU is visible here (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
    manifests = _read_bundles(options.bundles)
    first = manifests[options.bundles[0]]
    graphs = options.graphs or [graph.name for graph in first.graphs if _is_usual(graph.name)]
    for manifest in manifests.values():
        for graph in graphs:
            manifest.graph(graph)
    threads = torch.get_num_threads()  # timing tries others
    try:
        rows = _time_graphs(options, manifests, graphs, devices)
    finally:
        torch.set_num_threads(threads)
    show(rows)
    folder = options.output or options.bundles[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "height": first.resolution.height,
        "width": first.resolution.width,
        "student": first.student.network,
        "rounds": options.rounds,
        "threads": options.threads,
        **_describe_devices(devices),
    }
    (folder / "bench.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    print(f"figures   {folder / 'bench.json'}")
    print(f"picture   {draw(folder / 'bench.png', rows)}")
    return rows


def _read_bundles(bundles: Sequence[Path]) -> dict[Path, Manifest]:
    """Manifests by bundle; raises UserError for bundles that cannot share one table."""
    manifests = {path: read_manifest(path) for path in bundles}
    for path, manifest in manifests.items():  # runtimes open whatever a graph names
        problems = verify_files(path, manifest)
        wrong = [f"{name}: {problems[name]}" for name in manifest.files if problems[name]]
        graphs = {graph.name: graph_problem(path, manifest, graph) for graph in manifest.graphs}
        wrong += [f"{name}: {problem}" for name, problem in graphs.items() if problem]
        if wrong:
            raise UserError(f"{path} is not what its manifest says: {wrong[0]} (export again)")
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
                "export both at one size"
            )
        if manifest.precision in precisions:
            other = precisions[manifest.precision]
            raise UserError(
                f"{path} and {other} are both {manifest.precision}: compare bundles of several "
                "precisions"
            )
        precisions[manifest.precision] = path
    return manifests


def _is_usual(graph: str) -> bool:
    # the task heads are left out: only some students have them
    return graph in (BACKBONE, INTERACTION, FUSED) or graph.startswith(head_graph(""))


def _describe_devices(devices: Sequence[str]) -> dict[str, object]:
    result: dict[str, object] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if "cuda" in devices and torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def _time_graphs(
    options: BenchOptions,
    manifests: dict[Path, Manifest],
    graphs: Sequence[str],
    devices: Sequence[str],
) -> list[dict]:
    """Rows of every graph and batch; prints the settings that were chosen and, once each, what
    cannot run here.
    """
    bundle, first = next(iter(manifests.items()))
    student = None
    if options.run:
        student = TorchStudent(options.run, first, options.compile, options.trust_code)
    feeds = Feeds(bundle, first, graphs)
    rows: list[dict] = []
    reported: set[str] = set()

    def left_out(reasons: Sequence[str]) -> None:
        for reason in reasons:
            if reason not in reported:
                print(entry("left out", reason))
                reported.add(reason)

    for graph in graphs:
        opened = {}
        for path, manifest in manifests.items() if "cuda" in devices else ():
            opened[path], reasons = gpu_runtimes(path, manifest, graph)
            left_out(reasons)
        for batch in options.batches:
            known = feeds.of(batch)
            inputs = {tensor.name: known[tensor.name] for tensor in first.graph(graph).inputs}
            works = []
            for device in devices:
                if student and device == "cuda" and not torch.cuda.is_available():
                    left_out(["torch on cuda: this torch sees no GPU (install torch for CUDA)"])
                elif student:
                    works += student.works(graph, inputs, device, options.threads)
            for path, manifest in manifests.items():
                if "cpu" in devices:
                    works += cpu_works(
                        graph,
                        path / manifest.graph(graph).file,
                        manifest.precision,
                        inputs,
                        options.threads,
                        manifest.runtime("openvino"),
                    )
                result, reasons = gpu_works(opened.get(path, []), graph, manifest.precision, inputs)
                works += result
                left_out(reasons)
            chosen = "; ".join(f"{work.name}: {work.settings}" for work in works if work.settings)
            print(entry("timing", f"{graph}, batch {batch}" + (f": {chosen}" if chosen else "")))
            rows += [
                {"graph": graph, "batch": batch, **row}
                for row in time_all(works, options.rounds, batch)
            ]
    return rows
