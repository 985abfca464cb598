"""TensorRT engines of every graph of a bundle: how they are built, and which shapes and GPUs they
are for.
"""

import argparse
import logging
import time
from pathlib import Path

from contract.engine_record import EngineOptions, EngineRecord, Profile
from contract.gpu import compute_capabilities
from contract.manifest import BundledEngine
from contract.signature import Port, layer_side
from export.graph import Part
from export.tensorrt.bindings import flags, load_bindings, targets
from export.tensorrt.build import build_engine

log = logging.getLogger(__name__)


def build_all(
    args: argparse.Namespace,
    flavours: list[str],
    parts: list[Part],
    paths: dict[str, Path],
    sizes: list[tuple[int, int]],
    stride: int,
    folder: Path,
) -> list[BundledEngine]:
    """Build `folder/<graph>.<flavour>.engine` for every graph and flavour; returns their
    records.
    """
    records = []
    for flavour, options in engine_options(args, flavours).items():
        for part in parts:
            begun = time.perf_counter()
            graph = part.signature.graph
            path = folder / f"{graph}.{flavour}.engine"
            profile = make_profile(part, args.max_batch, sizes, stride)
            record = build_engine(paths[graph], path, [profile], options)
            records.append(BundledEngine(graph=graph, file=path.name, **dict(record)))
            log.info(
                "engine    %-16s %6.1f MB  %4.1f s  %s %s",
                graph,
                path.stat().st_size / 1e6,
                time.perf_counter() - begun,
                flavour,
                ", ".join(record.compute_capabilities),
            )
    return records


def engine_options(args: argparse.Namespace, formats: list[str]) -> dict[str, EngineOptions]:
    """The builder's options for every TensorRT flavour among `formats`.

    Raises UserError for what cannot be built here: bindings or libraries missing, no GPU, an
    unknown compute capability, engines that only a GPU can build.
    """
    result = {}
    for flavour in (name for name in formats if name != "onnx"):
        trt = load_bindings(flavour)
        options = EngineOptions(
            flavour=flavour,
            compute_capabilities=tuple(args.compute_capability)
            if flavour == "tensorrt-rtx"
            else (),
            workspace_gib=args.workspace,
            optimization_level=args.optimization_level,
            timing_cache=args.timing_cache,
            tf32=args.precision != "fp32",  # a float32 engine says what the float32 student says
            version_compatible=args.version_compatible,
            strip_weights=args.strip_weights,
            refit=args.refit,
        )
        targets(trt, flavour, options.compute_capabilities)
        flags(trt, options)
        result[flavour] = options
    return result


def make_profile(part: Part, max_batch: int, sizes: list[tuple[int, int]], stride: int) -> Profile:
    """Smallest, usual and largest shapes of a graph's inputs: batches 1 to `max_batch`, sides of
    the sizes asked for.

    The usual size is the first one asked for, at the largest batch.
    """
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    grids = {
        "min": (1, min(heights), min(widths)),
        "opt": (max_batch, *sizes[0]),
        "max": (max_batch, max(heights), max(widths)),
    }
    prefix = getattr(part.module, "prefix", 0) or getattr(
        getattr(part.module, "reader", None), "prefix", 0
    )
    return Profile(
        shapes={
            port.name: {
                which: shape_of(port, *grid, stride, prefix) for which, grid in grids.items()
            }
            for port in part.signature.inputs
        }
    )


def shape_of(
    port: Port, batch: int, height: int, width: int, stride: int, prefix: int
) -> tuple[int, ...]:
    """An input's shape for pictures of a size."""
    rows, columns = height // stride, width // stride
    known = {
        "batch": batch,
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
        "tokens": rows * columns + prefix,
    }
    return tuple(
        axis
        if isinstance(axis, int)
        else known[axis]
        if axis in known
        else layer_side(axis, rows, columns, stride)
        for axis in port.axes
    )


def profile_for(record: EngineRecord, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The number of the first optimisation profile that admits inputs of these shapes, None where
    none does.
    """

    def admits(ranges: dict, name: str, declared: tuple[int, ...]) -> bool:
        smallest, _, largest = ranges.get(name, (declared,) * 3)
        shape = shapes[name]
        return len(shape) == len(smallest) and all(
            low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True)
        )

    for number, profile in enumerate(record.profiles):
        if all(admits(profile.shapes, tensor.name, tensor.shape) for tensor in record.inputs):
            return number
    return None


def outside(record: EngineRecord, shapes: dict[str, tuple[int, ...]]) -> str:
    """What an engine takes instead of these inputs, in words."""
    given = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
    taken = "; ".join(
        f"'{name}' from {list(ranges.min)} to {list(ranges.max)}"
        for profile in record.profiles
        for name, ranges in profile.shapes.items()
    )
    return (
        f"the engine takes {taken}, not {given} (export with another --max-batch or --resolutions)"
    )


def not_for_here(record: EngineRecord) -> str:
    """Why an engine cannot run on this machine, "" where it can."""
    here, built = compute_capabilities(), ", ".join(record.compute_capabilities)
    if not here:
        return f"built for GPUs of compute capability {built}, and no GPU is visible here"
    if here[0] not in record.compute_capabilities:
        return (
            f"built for GPUs of compute capability {built}, this one has {here[0]}: export again "
            "for it"
        )
    if record.options.strip_weights:
        return "built without weights: it cannot run until it is refitted"
    return ""
