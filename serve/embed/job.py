"""One call of `python -m serve.embed`: opens data, source and table, and embeds what is missing."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.errors import Failure
from serve.embed.data import Data, open_data
from serve.embed.features import Features, Source, open_features
from serve.embed.pipeline import embed
from serve.embed.progress import Count, duration, open_progress
from serve.embed.table import (
    Format,
    Table,
    TableManifest,
    import_lance,
    open_table,
    usual_part_rows,
)
from serve.errors import ClientError


@dataclass(frozen=True)
class Job:
    """What is embedded, by what, into what."""

    data: tuple[str, ...]
    source: Source
    output: Path
    column: str | None = None
    root: str | None = None
    dtype: str = "float32"
    format: Format = "parquet"
    part_rows: int | None = None
    decoders: int = 1
    """Threads that read and decode."""


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs a job."""

    address: str | None
    """None: a new Ray on this machine, or the one that RAY_ADDRESS names."""
    workers: int | None
    """None: as many as the cluster has room for."""


def run(job: Job, cluster: Cluster | None = None) -> int:
    """Embed what is missing of a job's table; prints what it does. Raises UserError, Failure."""
    if job.format == "lance":
        import_lance()
    data = open_data(job.data, job.column, job.root)
    print(f"data      {len(data):,} pictures of {data.kind}", flush=True)
    features = open_features(job.source)
    try:
        outputs = features.shapes
        manifest = TableManifest(
            bundle=features.bundle,
            outputs=outputs,
            dtype=job.dtype,
            format=job.format,
            size=features.size,
            view=str(features.view),
            data=data.digest(),
            rows=len(data),
            part_rows=job.part_rows or usual_part_rows(outputs, job.dtype),
        )
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in outputs.items())
        print(f"features  {shown} of bundle {features.bundle}")
        height, width = features.size
        print(f"          {features.about}, pictures of {height}x{width}, {features.batch} a batch")
        print(f"view      {features.view}")
        with open_table(job.output, manifest, job.part_rows) as table:
            return _fill(job, data, features, table, cluster)
    finally:
        features.close()


def _fill(job: Job, data: Data, features: Features, table: Table, cluster: Cluster | None) -> int:
    missing, manifest = table.missing(), table.manifest
    _tell_size(table, missing)
    rows = [_bounds(manifest, number) for number in missing]
    count = Count(manifest.rows, manifest.rows - sum(stop - start for start, stop in rows))
    if missing:
        listed = (
            (number, data.entries(*bounds)) for number, bounds in zip(missing, rows, strict=True)
        )
        with open_progress(count) as progress:
            if cluster is None:
                numbers = embed(table, listed, features, job.decoders, progress.advance)
            else:
                from serve.embed.on_ray import embed_on_ray

                numbers = embed_on_ray(job, table, listed, cluster, progress.advance)
            _follow(numbers, manifest.parts - len(missing), manifest.parts)
    table.commit()
    return _finish(table, count, bool(missing))


def _follow(numbers: Iterator[int], done: int, parts: int) -> None:
    """Wait for the numbers of written parts; what ends the work says how much is there."""
    try:
        for _ in numbers:
            done += 1
    except ClientError as error:
        error.message = f"{error.message} ({_how_far(done, parts)})"
        raise
    except Failure as error:
        raise Failure(f"{error} ({_how_far(done, parts)})") from error


def _how_far(done: int, parts: int) -> str:
    return f"{done} of {_parts(parts)} are finished; the same command goes on from there"


def _parts(count: int) -> str:
    return f"{count:,} part{'s' * (count != 1)}"


def _bounds(manifest: TableManifest, number: int) -> tuple[int, int]:
    start = number * manifest.part_rows
    return start, min(start + manifest.part_rows, manifest.rows)


def _tell_size(table: Table, missing: Sequence[int]) -> None:
    """Print how large the table will be, what is there of it, and whether there is room."""
    manifest = table.manifest
    most = min(manifest.part_rows, manifest.rows)
    print(
        f"table     {table.folder}: {_bytes(manifest.rows * manifest.row_bytes)} of embeddings "
        f"({_bytes(manifest.row_bytes)} a picture), {_parts(manifest.parts)} of {most:,} rows",
        flush=True,
    )
    if missing and len(missing) < manifest.parts:
        there = manifest.parts - len(missing)
        print(f"resume    {there:,} of {_parts(manifest.parts)} are there", flush=True)
    needed = sum(stop - start for start, stop in (_bounds(manifest, n) for n in missing))
    free = shutil.disk_usage(table.folder).free
    if needed * manifest.row_bytes > free:
        print(f"warning   only {_bytes(free)} are free there", flush=True)


def _bytes(count: int) -> str:
    """A number of bytes with its unit."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return (
        f"{size:.0f} {units[0]}" if size >= 100 or units[0] == "bytes" else f"{size:.1f} {units[0]}"
    )


def _finish(table: Table, count: Count, worked: bool) -> int:
    """Print what is there and how to read it; raises Failure where no picture could be embedded."""
    rows, errors = table.manifest.rows, table.errors()
    speed = f"; {count.rate:.1f} images/s, {duration(count.seconds)}" if worked else ""
    already = "" if worked else " (it was finished before)"
    print(
        f"done      {table.folder}: {rows:,} rows in {_parts(table.manifest.parts)}, {errors:,} "
        f"with an error{speed}{already}"
    )
    if errors == rows:
        raise Failure(
            f"none of the {rows:,} pictures could be embedded: the column 'error' of "
            f"{table.folder} says why"
        )
    print(f'next      read it:\n  python -c "{table.example()}"')
    return 0
