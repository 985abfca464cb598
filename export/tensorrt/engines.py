"""TensorRT engines of a bundle's graphs: how they are built, and which shapes and GPUs they
accept.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from contract.engine_record import EngineOptions, EngineRecord, Profile
from contract.gpu import compute_capabilities
from contract.manifest import BundledEngine
from contract.signature import Port, layer_side
from export.modules import Part
from export.tensorrt.bindings import flags, load_bindings, targets
from export.tensorrt.build import build_engine

log = logging.getLogger(__name__)


def check_buildable(options: EngineOptions) -> None:
    """Raise UserError for engines that cannot be built here: bindings or libraries missing, no GPU,
    an unknown compute capability, engines that only a GPU can build.
    """
    trt = load_bindings(options.flavour)
    targets(trt, options.flavour, options.compute_capabilities)
    flags(trt, options)


def build_all(
    engines: Sequence[EngineOptions],
    parts: Sequence[Part],
    paths: dict[str, Path],
    sizes: Sequence[tuple[int, int]],
    stride: int,
    max_batch: int,
    folder: Path,
) -> list[BundledEngine]:
    """Build `folder/<graph>.<flavour>.engine` from every graph, with each of the builder's options;
    returns the engines' records.
    """
    records = []
    for options in engines:
        for part in parts:
            begun = time.perf_counter()
            graph = part.signature.graph
            path = folder / f"{graph}.{options.flavour}.engine"
            profile = make_profile(part, max_batch, sizes, stride)
            record = build_engine(paths[graph], path, [profile], options)
            records.append(BundledEngine(graph=graph, file=path.name, **dict(record)))
            log.info(
                "engine    %-16s %6.1f MB  %4.1f s  %s %s",
                graph,
                path.stat().st_size / 1e6,
                time.perf_counter() - begun,
                options.flavour,
                ", ".join(record.compute_capabilities),
            )
    return records


def make_profile(
    part: Part, max_batch: int, sizes: Sequence[tuple[int, int]], stride: int
) -> Profile:
    """Smallest, favoured and largest shapes of a graph's inputs: batches 1 to `max_batch`, sides of
    `sizes` (height, width).

    The favoured shape is the first size at the largest batch.
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
                which: _shape_of(port, *grid, stride, prefix) for which, grid in grids.items()
            }
            for port in part.signature.inputs
        }
    )


def _shape_of(
    port: Port, batch: int, height: int, width: int, stride: int, prefix: int
) -> tuple[int, ...]:
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
    """Number of the first optimization profile that admits inputs of these shapes, or None."""

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
    """A message: which inputs an engine takes instead of these."""
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
    """Why an engine cannot run on this machine, "" if it can."""
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
