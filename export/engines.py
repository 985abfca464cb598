"""TensorRT engines of every graph of a bundle, each with a sidecar that can be read without a GPU."""

import argparse
import logging
import time
from pathlib import Path

from export.graph import Part
from export.signature import Port
from export.to_tensorrt import EngineOptions, Profile, build_engine, load_bindings

log = logging.getLogger(__name__)


def build_all(
    asked: argparse.Namespace, flavours: list[str], parts: list[Part], paths: dict[str, Path],
    sizes: list[tuple[int, int]], stride: int, folder: Path,
) -> list[dict]:  # fmt: skip
    """Build `folder/<graph>.<flavour>.engine` for every graph and flavour; returns the sidecars' contents."""
    records = []
    for flavour, options in engine_options(asked, flavours).items():
        for part in parts:
            begun = time.perf_counter()
            graph = part.signature.graph
            path = folder / f"{graph}.{flavour}.engine"
            profile = make_profile(part, asked.max_batch, sizes, stride)
            record = build_engine(paths[graph], path, [profile], options)
            records.append({"graph": graph, "file": path.name, **record.model_dump(mode="json")})
            log.info(
                "engine    %-16s %6.1f MB  %4.1f s  %s %s", graph, path.stat().st_size / 1e6,
                time.perf_counter() - begun, flavour, ", ".join(record.compute_capabilities),
            )  # fmt: skip
    return records


def engine_options(asked: argparse.Namespace, formats: list[str]) -> dict[str, EngineOptions]:
    """The builder's options for every TensorRT flavour among `formats`.

    Raises UserError for what cannot be built here: bindings or libraries missing, no GPU, an unknown compute capability.
    """
    found = {}
    for flavour in (name for name in formats if name != "onnx"):
        load_bindings(flavour)
        found[flavour] = EngineOptions(
            flavour=flavour,
            compute_capabilities=tuple(asked.compute_capability) if flavour == "tensorrt-rtx" else (),
            workspace_gib=asked.workspace, optimization_level=asked.optimization_level, timing_cache=asked.timing_cache,
            version_compatible=asked.version_compatible, strip_weights=asked.strip_weights, refit=asked.refit,
        )  # fmt: skip
    return found


def make_profile(part: Part, max_batch: int, sizes: list[tuple[int, int]], stride: int) -> Profile:
    """Smallest, usual and largest shapes of a graph's inputs: batches 1 to `max_batch`, sides of the sizes asked for.

    The usual size is the first one asked for, at the largest batch.
    """
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    grids = {
        "min": (1, min(heights), min(widths)),
        "opt": (max_batch, *sizes[0]),
        "max": (max_batch, max(heights), max(widths)),
    }
    prefix = getattr(part.module, "prefix", 0) or getattr(getattr(part.module, "reader", None), "prefix", 0)
    return Profile(
        shapes={
            port.name: {which: shape_of(port, *grid, stride, prefix) for which, grid in grids.items()}
            for port in part.signature.inputs
        }
    )


def shape_of(port: Port, batch: int, height: int, width: int, stride: int, prefix: int) -> tuple[int, ...]:
    """An input's shape for pictures of a size."""
    rows, columns = height // stride, width // stride
    known = {
        "batch": batch, "height": height, "width": width, "rows": rows, "columns": columns,
        "tokens": rows * columns + prefix,
    }  # fmt: skip
    return tuple(axis if isinstance(axis, int) else known[axis] for axis in port.axes)
