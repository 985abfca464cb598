"""Regions of memory that client and server both see, so that pixels and features need not travel
through gRPC.

The server must run on the same machine; from release 26.04 it wants `--allow-client-shm=true`.
Registering a region is an administrator's endpoint: a server that restricts those wants its key.
"""

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import triton_to_np_dtype

from contract.errors import first_line
from serve.client.served import Port
from serve.client.steps import Rpc
from serve.errors import BadRequest

Kind = Literal["system", "cuda"]
SMALLEST, ALIGNED = 1 << 20, 64
COOLING = 60.0
"""Seconds after which a request that was given up has surely ended on the server too, if that was
told.
"""


class Region:
    """A block of shared memory under a name of its own: a request's inputs first, then room for its
    outputs.
    """

    def __init__(self, kind: Kind, size: int, device: int) -> None:
        self.kind, self.size, self.device = kind, size, device
        self.name = f"vfm-{uuid.uuid4().hex[:16]}"
        self.registered = False
        self.doubtful = False
        """Whether the server may still be at a request that was answered at a later attempt."""
        self.retired = 0.0
        self.places: dict[str, tuple[int, int]] = {}
        if kind == "system":
            from tritonclient.utils import shared_memory as module

            try:
                self.handle = module.create_shared_memory_region(
                    self.name, f"/{self.name}", size, create_only=True
                )
            except module.SharedMemoryException as error:
                raise BadRequest(
                    f"shared_memory='system': no {size:,} bytes of it here ({error.__cause__})"
                ) from error
        else:
            module = _cuda_module()
            try:
                self.handle = module.create_shared_memory_region(self.name, size, device)
            except (
                Exception
            ) as error:  # the bindings raise types of their own, and plain ones without a driver
                raise BadRequest(
                    f"shared_memory='cuda': no {size:,} bytes on GPU {device} ({error})"
                ) from error
        self.module = module

    def fill(
        self, tensors: Mapping[str, np.ndarray], places: Mapping[str, tuple[int, int]]
    ) -> tuple[list[InferInput], list[InferRequestedOutput]]:
        """Copy inputs in; returns tritonclient's inputs and outputs that point here. `places`: name
        -> (start, bytes).
        """
        self.places = {name: place for name, place in places.items() if name not in tensors}
        whole = np.zeros(
            max((places[name][0] + places[name][1] for name in tensors), default=0), np.uint8
        )
        inputs, outputs = [], []
        for name, tensor in tensors.items():
            start, length = places[name]
            whole[start : start + length] = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
            inputs.append(InferInput(name, list(tensor.shape), "UINT8"))
            inputs[-1].set_shared_memory(self.name, length, start)
        self.module.set_shared_memory_region(self.handle, [whole])
        for name, (start, length) in self.places.items():
            outputs.append(InferRequestedOutput(name))
            outputs[-1].set_shared_memory(self.name, length, start)
        return inputs, outputs

    def doubt(self) -> None:
        """An attempt has failed that the server may still be at."""
        self.doubtful = True

    def read(self, name: str, kind: str, shape: Sequence[int]) -> np.ndarray:
        """Copy an output of Triton's type `kind` out."""
        start, _ = self.places[name]
        kind_here = np.dtype(triton_to_np_dtype(kind))
        length = int(np.prod(shape)) * kind_here.itemsize
        contents = self.module.get_contents_as_numpy(self.handle, np.uint8, [start + length])
        return contents[start:].copy().view(kind_here).reshape(shape)

    def registration(self) -> Rpc:
        """The call that makes it known to the server."""
        if self.kind == "system":
            arguments: dict[str, Any] = {
                "name": self.name,
                "key": f"/{self.name}",
                "byte_size": self.size,
            }
            return Rpc("register_system_shared_memory", arguments)
        raw = self.module.get_raw_handle(self.handle)
        arguments = {
            "name": self.name,
            "raw_handle": raw,
            "device_id": self.device,
            "byte_size": self.size,
        }
        return Rpc("register_cuda_shared_memory", arguments)

    def removal(self) -> Rpc:
        """The call that makes the server forget it."""
        return Rpc(f"unregister_{self.kind}_shared_memory", {"name": self.name})

    def destroy(self) -> None:
        self.module.destroy_shared_memory_region(self.handle)


def _cuda_module():
    """tritonclient's CUDA shared memory; raises BadRequest where it cannot work, saying what is
    missing.
    """
    try:
        from tritonclient.utils import cuda_shared_memory
    except (
        Exception
    ) as error:  # RuntimeError without cuda-python, ImportError or OSError without a driver
        raise BadRequest(
            f"shared_memory='cuda' needs an NVIDIA GPU and cuda-python: {first_line(error)} (pip "
            "install 'tritonclient[cuda]', or choose 'system')"
        ) from error
    return cuda_shared_memory


def lay_out(
    tensors: Mapping[str, np.ndarray], outputs: Sequence[Port], rows: int
) -> dict[str, tuple[int, int]]:
    """(start, bytes) of every input, then of every output; empty if one of them has no size known
    beforehand.
    """
    if any(tensor.dtype != np.uint8 for tensor in tensors.values()):
        return {}
    if any(port.kind == "BYTES" or min(port.dims, default=1) < 0 for port in outputs):
        return {}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for port in outputs:
        sizes[port.name] = (
            rows * int(np.prod(port.dims)) * np.dtype(triton_to_np_dtype(port.kind)).itemsize
        )
    places, start = {}, 0
    for name, size in sizes.items():
        places[name] = (start, size)
        start += -(-size // ALIGNED) * ALIGNED
    return places


class Pool:
    """Regions of a client. One is lent to a request at a time, and comes back only when the server
    has let go of it.
    """

    def __init__(self, kind: Kind, device: int = 0) -> None:
        if kind not in ("system", "cuda"):
            raise BadRequest(f"shared_memory='{kind}': choose 'system', 'cuda' or None")
        if kind == "cuda":
            _cuda_module()
        self.kind, self.device = kind, device
        self.free: list[Region] = []
        self.retired: list[Region] = []
        self.lock = threading.Lock()
        self.closed = False

    def lend(self, places: Mapping[str, tuple[int, int]]) -> Region:
        """A free region that holds places, made if there is none; raises BadRequest."""
        size = max(start + length for start, length in places.values())
        with self.lock:
            for number, region in enumerate(self.free):
                if region.size >= size:
                    return self.free.pop(number)
        # sizes are rounded up so that the last, smaller part of a batch finds one
        return Region(self.kind, max(SMALLEST, 1 << (size - 1).bit_length()), self.device)

    def back(self, region: Region) -> None:
        """Take back a region that the server has let go of."""
        self._take(region, self.free)

    def retire(self, region: Region) -> None:
        """Take back a region whose request was given up: the server may still read and write it, so
        nobody else may.
        """
        region.retired = time.monotonic()
        self._take(region, self.retired)

    def _take(self, region: Region, where: list[Region]) -> None:
        with self.lock:
            if not self.closed:
                where.append(region)
                return
        region.destroy()  # of a request that its client was closed under

    def leave(self, everything: bool, cooling: float = COOLING) -> list[Region]:
        """Regions to unregister and destroy now: those retired so many seconds ago, or all, of a
        client that is closed.
        """
        with self.lock:
            if everything:
                self.closed = True
                gone = self.retired + self.free
                self.retired.clear()
                self.free.clear()
            else:
                old = time.monotonic() - cooling
                gone = [region for region in self.retired if region.retired < old]
                self.retired[:] = [region for region in self.retired if region.retired >= old]
        return gone
