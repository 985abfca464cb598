"""The table of embeddings: a folder of part files that appear whole, and a manifest that says what
they belong to.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.claim import claimed, is_free
from contract.errors import Failure, UserError, first_line
from contract.files import write_atomically
from contract.untrusted import parse_json, read_file
from contract.views import SQUASH
from serve.embed.reading import Row

MANIFEST = "_manifest.json"
_MOST_BYTES = 2**20
_PART_ROWS, _PART_BYTES = 4096, 2**28
"""Rows of a part where nothing else is requested; fewer where they would have more bytes."""
_FRAGMENTS = "_fragments"
"""Folder of what Lance says of each part that is written and not yet committed."""
_REMEDY = "free some space, then run the same command again: finished parts stay"

Format = Literal["parquet", "lance"]


class TableManifest(BaseModel):
    """What a table is of; a run goes on only with the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    bundle: str
    """The bundle's version."""
    outputs: dict[str, tuple[int, ...]]
    """Shapes of the embeddings of one picture."""
    dtype: Literal["float32", "float16"]
    format: Format
    size: tuple[int, int]
    """Height and width that pictures were brought to."""
    view: str = str(SQUASH)
    """How (contract/views.py)."""
    data: str
    """sha256 of the list of pictures."""
    rows: Annotated[int, Field(ge=1)]
    part_rows: Annotated[int, Field(ge=1)]

    @property
    def parts(self) -> int:
        return math.ceil(self.rows / self.part_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one picture's embeddings."""
        numbers = sum(math.prod(shape) for shape in self.outputs.values())
        return numbers * np.dtype(self.dtype).itemsize


def usual_part_rows(outputs: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Rows of a part, so that dense outputs do not fill the memory."""
    numbers = sum(math.prod(shape) for shape in outputs.values())
    return max(1, min(_PART_ROWS, _PART_BYTES // (numbers * np.dtype(dtype).itemsize)))


@dataclass(frozen=True)
class Table:
    """A table's folder, open for writing."""

    folder: Path
    manifest: TableManifest

    def part_path(self, number: int) -> Path:
        """The file whose being there says that a part is finished."""
        if self.manifest.format == "lance":
            return self.folder / _FRAGMENTS / f"part-{number:05d}.json"
        return self.folder / f"part-{number:05d}.parquet"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not finished."""
        if self.committed:
            return []
        return [n for n in range(self.manifest.parts) if not self.part_path(n).exists()]

    @property
    def committed(self) -> bool:
        # Lance makes the folder first, and may be killed before there is a version in it
        versions = (self.folder / "_versions").glob("[!.]*.manifest")
        return self.manifest.format == "lance" and any(versions)

    def write(self, part: "Part") -> None:
        """Write a part; it is there whole or not at all. Raises UserError for a full disk."""
        table = part.arrow()
        path = self.part_path(part.number)
        if self.manifest.format == "lance":
            text = _write_fragment(table, self.folder)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda temporary: temporary.write_text(text), _REMEDY)
            return
        from pyarrow import parquet

        write_atomically(
            path,
            lambda temporary: parquet.write_table(table, temporary, compression="zstd"),
            _REMEDY,
        )

    def commit(self) -> None:
        """Make a readable table of all parts; of Parquet they are one already. Raises Failure where
        Lance cannot read it, and keeps what it was made of.
        """
        if self.manifest.format == "parquet":
            return
        if not self.committed:
            paths = [self.part_path(number) for number in range(self.manifest.parts)]
            texts = [path.read_text() for path in paths]
            _commit_fragments(self.folder, texts, self.manifest)
        _check_committed(self.folder, self.manifest.rows)
        shutil.rmtree(self.folder / _FRAGMENTS, ignore_errors=True)

    def errors(self) -> int:
        """Rows without embeddings, of all finished parts."""
        if self.manifest.format == "lance":
            return import_lance().dataset(self.folder).count_rows("error IS NOT NULL")
        from pyarrow import parquet

        count = 0
        for number in range(self.manifest.parts):
            about = parquet.read_metadata(self.part_path(number))
            for group in map(about.row_group, range(about.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                error = next(one for one in columns if one.path_in_schema == "error")
                count += error.num_values - error.statistics.null_count
        return count

    def example(self) -> str:
        """Python that reads it."""
        name = next(iter(self.manifest.outputs))
        columns = f"columns=['uri', '{name}']"
        if self.manifest.format == "lance":
            return f"import lance; print(lance.dataset('{self.folder}').to_table({columns}))"
        return f"import pyarrow.parquet as pq; print(pq.read_table('{self.folder}', {columns}))"


@contextmanager
def open_table(folder: Path, manifest: TableManifest, part_rows: int | None) -> Iterator[Table]:
    """A new table, or the one that is there if it is of the same; `part_rows` as requested, None
    for what is there.

    Raises UserError for a folder that holds anything else, belongs to another bundle, other outputs
    or other data, is being written by another process, or cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")
    with claimed(folder, "embedding"):
        _sweep_manifests(folder)
        if is_free(folder):
            data = json.dumps(manifest.model_dump(), indent=1).encode()
            write_atomically(folder / MANIFEST, lambda path: path.write_bytes(data))
        elif not (folder / MANIFEST).exists():
            raise UserError(
                f"--output {folder} holds files but no {MANIFEST}: choose an empty or new folder"
            )
        else:
            kept = _read_manifest(folder)
            if part_rows is None:
                manifest = manifest.model_copy(update={"part_rows": kept.part_rows})
            _check_same(folder, kept, manifest)
        _check_writable(folder)
        _sweep(folder)
        yield Table(folder, manifest)


def _read_manifest(folder: Path) -> TableManifest:
    path = folder / MANIFEST
    try:
        return TableManifest.model_validate(parse_json(read_file(path, _MOST_BYTES)))
    except (ValidationError, ValueError) as error:
        raise UserError(
            f"{path} is not the manifest of a table: choose another --output"
        ) from error


_WORDS = {
    "bundle": "bundle",
    "outputs": "outputs",
    "dtype": "--dtype",
    "format": "--format",
    "size": "size",
    "view": "--view",
    "data": "list of pictures or state of tar shards",
    "rows": "number of pictures",
    "part_rows": "--part-rows",
}


def _check_same(folder: Path, kept: TableManifest, now: TableManifest) -> None:
    """Raise UserError, naming the first difference."""
    for name, word in _WORDS.items():
        before, after = getattr(kept, name), getattr(now, name)
        if before != after:
            if name == "outputs":
                before, after = ", ".join(before), ", ".join(after)
            elif name == "data":
                before, after = before[:12], after[:12]
            elif name == "size":
                before, after = ("x".join(map(str, size)) for size in (before, after))
            raise UserError(
                f"--output {folder} was begun with another {word} ({before}, now {after}): repeat "
                "that command, or choose another --output"
            )


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {folder} cannot be written: check its permissions")


def _sweep_manifests(folder: Path) -> None:
    """Remove halves of manifests: a process killed at its first step leaves nothing else."""
    for path in folder.iterdir():
        if re.fullmatch(rf"\.{re.escape(MANIFEST)}\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove halves of parts that killed processes left."""
    for place in (folder, folder / _FRAGMENTS):
        for path in place.iterdir() if place.is_dir() else ():
            if re.fullmatch(r"\.part-\d+\.(parquet|json)\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


class Part:
    """Rows `start` to before `stop` of a table, filled in order."""

    def __init__(self, manifest: TableManifest, number: int) -> None:
        self.manifest, self.number = manifest, number
        self.start = number * manifest.part_rows
        self.stop = min(self.start + manifest.part_rows, manifest.rows)
        self.rows: list[Row] = []
        count = self.stop - self.start
        self.values = {
            name: np.full((count, *shape), np.nan, manifest.dtype)
            for name, shape in manifest.outputs.items()
        }

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.stop - self.start

    def add(self, rows: Sequence[Row], arrays: dict[str, np.ndarray]) -> int:
        """Append rows; `arrays` are of those that have pixels. Returns how many have an error.

        An output that is not finite, or that the table's type cannot hold, makes its picture an
        error.
        """
        begin = len(self.rows)
        good = [number for number, row in enumerate(rows) if not row.error]
        bad: dict[int, str] = {}
        for name, values in arrays.items():
            flat = values.reshape(len(values), -1)
            with np.errstate(over="ignore"):
                kept = values.astype(self.manifest.dtype, copy=False)
            finite = np.isfinite(flat).all(1)
            fits = np.isfinite(kept.reshape(flat.shape)).all(1)
            for n in np.flatnonzero(finite & ~fits):
                most = f"numbers up to {np.abs(flat[n]).max():.3g}"
                reason = f"output '{name}' has {most}, which do not fit {self.manifest.dtype}"
                bad[good[n]] = reason
            bad |= {good[n]: f"output '{name}' is not finite" for n in np.flatnonzero(~finite)}
            self.values[name][[begin + number for number in good]] = kept
        for number, row in enumerate(rows):
            if number in bad:
                row = row._replace(error=bad[number])
                for values in self.values.values():
                    values[begin + number] = np.nan
            self.rows.append(row._replace(pixels=None))
        return sum(1 for row in self.rows[begin:] if row.error)

    def arrow(self):
        """The part as an Arrow table."""
        import pyarrow as pa

        sizes = [row.size or (None, None) for row in self.rows]
        uris = [_printable_utf8(row.entry.uri) for row in self.rows]
        missing = np.array([bool(row.error) for row in self.rows])
        # pyarrow below 26 cannot read a Parquet file with a null among lists of fixed size
        # (apache/arrow#35692), and 26 does not run under numpy 1: an error's embeddings are NaN
        mask = pa.array(missing) if self.manifest.format == "lance" else None
        columns = [
            pa.array(range(self.start, self.stop), pa.int64()),
            pa.array(uris, pa.string()),
            pa.array([width for width, _ in sizes], pa.int32()),
            pa.array([height for _, height in sizes], pa.int32()),
            *(_fixed_lists(pa, value, mask) for value in self.values.values()),
            pa.array([row.error or None for row in self.rows], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=_schema(self.manifest))


def _schema(manifest: TableManifest):
    """Arrow's schema of a table; its metadata say what it is of."""
    import pyarrow as pa

    fields = {"id": pa.int64(), "uri": pa.string(), "width": pa.int32(), "height": pa.int32()}
    for name, shape in manifest.outputs.items():
        kind = pa.float16() if manifest.dtype == "float16" else pa.float32()
        for size in reversed(shape):
            kind = pa.list_(kind, size)
        fields[name] = kind
    fields["error"] = pa.string()
    about = manifest.model_dump_json(exclude={"part_rows"})
    return pa.schema(fields, {"vfm-distill": about})


def _printable_utf8(name: str) -> str:
    """A path as text; bytes that are not UTF-8 stay visible as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _fixed_lists(pa, values: np.ndarray, mask):
    """An array [rows, …] as a column of (nested) lists of fixed size."""
    result = pa.array(values.reshape(-1))
    for size in reversed(values.shape[2:]):
        result = pa.FixedSizeListArray.from_arrays(result, size)
    return pa.FixedSizeListArray.from_arrays(result, values.shape[1], mask=mask)


# ---- Lance ------------------------------------------------------------------------------------


def import_lance():
    """The library; it would warn at each part that there is no table yet, and of forks."""
    os.environ.setdefault("LANCE_LOG", "error")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)  # nothing forks
        import lance

    return lance


def _write_fragment(table, folder: Path) -> str:
    """Write data files of a Lance table; returns what commits them."""
    import_lance()
    from lance.fragment import write_fragments

    try:
        fragments = write_fragments(table, str(folder), schema=table.schema)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error} ({_REMEDY})") from error
    return json.dumps([fragment.to_json() for fragment in fragments])


def _commit_fragments(folder: Path, texts: Sequence[str], manifest: TableManifest) -> None:
    """One version of all fragments, in order; what killed processes left is not in it."""
    lance = import_lance()
    from lance.fragment import FragmentMetadata

    listed = [record for text in texts for record in json.loads(text)]
    fragments = [FragmentMetadata.from_json(json.dumps(record)) for record in listed]
    used = {file.path for fragment in fragments for file in fragment.files}
    operation = lance.LanceOperation.Overwrite(_schema(manifest), fragments)
    lance.LanceDataset.commit(str(folder), operation)
    _check_committed(folder, manifest.rows)
    for path in (folder / "data").iterdir():
        if path.name not in used:
            path.unlink()


def _check_committed(folder: Path, rows: int) -> None:
    """Raise Failure for a table that cannot be opened or has another number of rows."""
    try:
        count = import_lance().dataset(folder).count_rows()
    except (OSError, ValueError) as error:
        raise Failure(
            f"{folder}: Lance cannot open the table ({first_line(error)}): start a new --output"
        ) from error
    if count != rows:
        raise Failure(f"{folder} has {count:,} rows, not {rows:,}: start a new --output")
