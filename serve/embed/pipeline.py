"""Pictures are decoded in threads while the graph, or the server, works on those before them; rows
come out in order and are written part by part.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serve.embed.data import Entry
from serve.embed.features import Arrays, Features
from serve.embed.reading import Row, read_row
from serve.embed.table import Part, Table

_AHEAD = 2
"""Batches that are decoded before they are needed."""

Advance = Callable[[int, int], None]
"""Told of so many further rows, and how many of them have an error."""


class _Batch(NamedTuple):
    """Rows of a part on their way: their pictures, then the answer about those that have pixels."""

    part: Part
    reading: Sequence[Future[Row]]


def embed(
    table: Table,
    parts: Iterable[tuple[int, Sequence[Entry]]],
    features: Features,
    decoders: int,
    advance: Advance,
) -> Iterator[int]:
    """Embed parts, given by number with their pictures, and write each; yields the numbers of
    written ones.

    Raises UserError, Failure and ClientError; parts that were yielded stay.
    """
    pool = ThreadPoolExecutor(decoders, "decode")
    try:
        for part, rows, arrays in _answers(_decoded(table, parts, features, pool), features):
            errors = part.add(rows, arrays)
            advance(len(rows), errors)
            if part.complete:
                features.check()
                table.write(part)
                yield part.number
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(
    table: Table,
    parts: Iterable[tuple[int, Sequence[Entry]]],
    features: Features,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Part, list[Row]]]:
    """Batches of rows in order; later ones are being read meanwhile."""
    waiting: deque[_Batch] = deque()
    for number, entries in parts:
        part = Part(table.manifest, number)
        for start in range(0, len(entries), features.batch):
            some = entries[start : start + features.batch]
            reading = [
                pool.submit(read_row, entry, *features.size, features.view) for entry in some
            ]
            waiting.append(_Batch(part, reading))
            if len(waiting) > _AHEAD:
                yield _wait(waiting.popleft())
    while waiting:
        yield _wait(waiting.popleft())


def _wait(batch: _Batch) -> tuple[Part, list[Row]]:
    return batch.part, [future.result() for future in batch.reading]


def _answers(
    batches: Iterable[tuple[Part, list[Row]]], features: Features
) -> Iterator[tuple[Part, list[Row], Arrays]]:
    """Batches with their outputs, in order, as many at a time as the source takes."""
    waiting: deque[tuple[Part, list[Row], Future[Arrays] | None]] = deque()
    try:
        for part, rows in batches:
            pixels = [row.pixels for row in rows if row.pixels is not None]
            answer = features.submit(np.stack(pixels)) if pixels else None
            waiting.append((part, rows, answer))
            if len(waiting) > features.at_once:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())
    finally:
        for *_, answer in waiting:
            if answer is not None:
                answer.cancel()


def _finish(
    part: Part, rows: list[Row], answer: Future[Arrays] | None
) -> tuple[Part, list[Row], Arrays]:
    return part, rows, answer.result() if answer is not None else {}
