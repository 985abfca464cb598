"""A bounded number of open files: thousands of shards exhaust what a process may have open."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Opened = TypeVar("_Opened")

_MOST = 48
"""Files that one pool keeps open: several pools and libraries' own files fit into the 256 that a
process may have on some systems."""


class Pool(Generic[_Opened]):
    """What was opened for the keys used last, at most `most` at a time.

    File descriptors (int) are closed as they leave, anything else is forgotten. A pool that is sent
    to another process arrives empty; a forked one may go on using what its parent has opened.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, _Opened] = OrderedDict()

    def get(self, key: Hashable, open_one: Callable[[], _Opened]) -> _Opened:
        """What is open for `key`, else what `open_one()` returns."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while len(self._kept) >= self._most:
            self._drop()
        self._kept[key] = open_one()
        return self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict:
        return {"_most": self._most, "_kept": OrderedDict()}

    def __del__(self) -> None:
        while self._kept:
            self._drop()

    def _drop(self) -> None:
        _, oldest = self._kept.popitem(last=False)
        if isinstance(oldest, int):
            os.close(oldest)
