"""Room for what a running server writes: tensors in shared memory, its state file, temporary files,
the log.
"""

import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from contract.errors import UserError
from serve.repository.contents import read_made_with
from serve.server.loading import CONFIG, read_config
from serve.server.stubs import SHARED_MEMORY

_REGION_BYTES = 2**20
"""What Triton's python backend reserves for each process before the first request."""

_LEAST_SHARED = 4 * 2**20
"""Bytes of shared memory with which a model can be loaded again."""
_LEAST = 2**20
"""Bytes of a disk below which it counts as full."""

_ITEM_SIZES = {"64": 8, "32": 4, "16": 2}

FULL = ("No space left on device", "shared memory pool", "Disk quota exceeded")
"""In a message: it was room that was missing. A model is not broken by that."""


def check_shared_memory(repository: Path) -> None:
    """Raise UserError if shared memory cannot hold the largest request to every model of a
    repository: Triton would call them ready, and refuse many requests for ever.

    Encoded pictures, by far the largest, count for one decoder, and for the process that passes
    them on to it where there is one.
    """
    processes, least, encoded, copies = 0, 0, 0, 1
    for name in read_made_with(repository).models:
        config = read_config(repository / name / CONFIG)
        if config.backend != "python":
            continue
        count = sum(group.count * max(1, len(group.gpus)) for group in config.instance_group)
        processes += count
        least += count * (_REGION_BYTES + _tensor_bytes(config))
        if "max_bytes" in config.parameters:
            limit = int(config.parameters["max_bytes"].string_value)
            encoded = max(encoded, limit * _batch(config))
        elif any(port.name == "encoded" for port in config.input):
            copies = 2
    encoded *= copies
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return  # no such folder: Triton says what it needs
    if free < least + encoded:
        raise UserError(
            f"{SHARED_MEMORY} has {free:,} bytes free, and the {processes} processes of this "
            f"repository need {least + encoded:,}: give a container more (docker run --shm-size "
            f"{math.ceil((least + encoded) / 2**20)}m), or make the repository with smaller "
            "--max-image-bytes, --max-batch, --instances or --decoders"
        )


def _tensor_bytes(config: ModelConfig) -> int:
    """Bytes of the inputs and outputs of the largest request whose sizes the configuration
    gives.
    """
    warm_up = {
        name: data.dims for sample in config.model_warmup for name, data in sample.inputs.items()
    }
    total = 0
    for port in (*config.input, *config.output):
        kind = DataType.Name(port.data_type)
        item = next((size for end, size in _ITEM_SIZES.items() if kind.endswith(end)), 1)
        dims = warm_up.get(port.name, port.dims)
        total += item * math.prod(max(1, size) for size in dims)
    return total * _batch(config)


def _batch(config: ModelConfig) -> int:
    """The largest batch of a model, also of one for which a request is a batch."""
    stated = config.parameters["max_batch"].string_value if "max_batch" in config.parameters else ""
    return max(1, config.max_batch_size, int(stated or 0))


@dataclass
class _Place:
    folder: Path
    what: str
    least: int
    remedy: str
    full: bool = False


class Space:
    """Notices folders without room, and says so once, and again when there is room."""

    def __init__(self, repository: Path, log: Callable[[str], None]) -> None:
        self._log = log
        free_some = "free some space"
        places = [
            _Place(
                SHARED_MEMORY,
                "tensors of requests",
                _LEAST_SHARED,
                "remove what fills it, or give a container more (--shm-size)",
            ),
            _Place(repository, "the repository", _LEAST, free_some),
            _Place(Path(tempfile.gettempdir()), "temporary files", _LEAST, free_some),
        ]
        with suppress(OSError):
            if stat.S_ISREG(os.fstat(1).st_mode):
                log_file = Path(os.readlink("/proc/self/fd/1"))
                places.append(_Place(log_file.parent, "the log", _LEAST, free_some))
        self._places, devices = [], set()
        for place in places:
            with suppress(OSError):
                device = place.folder.stat().st_dev
                if device not in devices:
                    self._places.append(place)
                devices.add(device)

    def look(self) -> bool:
        """Look at all folders; returns whether one of them has room again."""
        came_back = False
        for place in self._places:
            try:
                free = shutil.disk_usage(place.folder).free
            except OSError:
                continue
            if not place.full and free < place.least:
                place.full = True
                self._log(f"supervisor: {_describe(place, free)}: {place.remedy}")
            elif place.full and free >= 2 * place.least:
                place.full, came_back = False, True
                self._log(f"supervisor: {_describe(place, free)} again")
        return came_back

    def explain(self) -> str:
        """Which folders have no room, in words; "" if all have some."""
        return "; ".join(
            _describe(place, shutil.disk_usage(place.folder).free)
            for place in self._places
            if place.full
        )


def _describe(place: _Place, free: int) -> str:
    return f"{place.folder} ({place.what}) has {free:,} bytes free"
