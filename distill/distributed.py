"""One process or many: what torchrun's environment says, and how a method is wrapped for it."""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from contract.errors import Failure, UserError, first_line, out_of_memory
from distill.config import TrainConfig
from distill.freed_memory import keep_freed_memory
from distill.launch import launched

_Item = TypeVar("_Item")
_NOTHING = object()

_LOST = (
    *("connection closed", "connection reset", "connection refused", "broken pipe"),
    *("timed out", "timeout", "socket"),
)
"""Words of gloo's errors, which are plain RuntimeErrors, where another process has ended."""

_PATIENCE = timedelta(days=7)
"""How long a barrier waits; a process that died is torchrun's to notice."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the run, and its device."""

    rank: int
    world: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """Group to wait in; None: the default one, whose collectives fail after minutes."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def draws(self) -> bool:
        """Whether this process draws progress bars: the first one, on a terminal."""
        return self.first and sys.stdout.isatty()

    def barrier(self) -> None:
        """Wait for the other processes, however long one of them fills a cache, reads a list of
        files or writes a checkpoint.
        """
        if self.world > 1:
            with _others():
                dist.barrier(group=self.patient)

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over processes; in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process raises the flag."""
        if self.world == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def gather(self, value: object) -> list:
        """Collect a picklable value of every process on every process, in rank order, however late
        one of them comes.
        """
        if self.world == 1:
            return [value]
        values: list[object] = [None] * self.world
        with _others():
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def add(self, values: Tensor) -> Tensor:
        """Add a tensor up over processes, however late one of them comes; in place."""
        if self.world > 1:
            self.barrier()
            with _others():
                dist.all_reduce(values)
        return values

    def deal(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This process's part of a list: every `world`-th, from its rank on."""
        return items[self.rank :: self.world]

    def gather_rows(self, rows: Tensor, count: int) -> Tensor | None:
        """In the first process the rows [count, ...] of all processes, in the order in which they
        were dealt out; None in others. Every process has at least one.
        """
        most = -(-count // self.world)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world)] if self.first else None
        with _others():
            dist.gather(padded, parts)
        return torch.stack(parts, 1).flatten(0, 1)[:count] if parts else None

    def hand_out(self, module: nn.Module) -> None:
        """Give every process the first one's weights of a module, however late that comes."""
        self.barrier()
        with _others():
            for tensor in module.state_dict().values() if self.world > 1 else ():
                dist.broadcast(tensor, 0)

    def collect(self, results: Sequence[_Item]) -> list[_Item]:
        """What all processes made of the items that they were dealt, in the items' order."""
        rows = zip_longest(*self.gather(list(results)), fillvalue=_NOTHING)
        return [result for row in rows for result in row if result is not _NOTHING]


ALONE = Ranks(0, 1, torch.device("cpu"))
"""The only process."""


@contextmanager
def _others() -> Iterator[None]:
    """Where this process waits for others; raises Failure if one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise Failure(
            f"another process of the run has ended ({first_line(error)}): see its message"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective is a connection's, and not this process's own."""
    if out_of_memory(error):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _LOST)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over the processes of a run, without gradient; itself where there is one."""
    values = values.detach()
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over the processes of a run, without gradient."""
    return sum_over_ranks(values) / world_size()


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_share(values: Tensor) -> Tensor:
    """This rank's images of `values` [..., images of all ranks], in the order in which batches are
    dealt out.
    """
    if world_size() == 1:
        return values
    return values[..., dist.get_rank() :: dist.get_world_size()]


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun, srun or mpirun started (or be alone), and leave them at the
    end.

    Raises UserError for a device that is not there and for processes that cannot meet.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device = cuda: no CUDA device is visible (set train.device=cpu, or check the "
            "driver)"
        )
    if device == "cpu":
        keep_freed_memory()
    launch = launched()
    if launch.world == 1:
        yield Ranks(0, 1, torch.device(device))
        return
    place = torch.device(device)
    if device == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {launch.local_rank}, but {torch.cuda.device_count()} GPUs are "
                "visible here: start as many processes a machine as it has GPUs"
            )
        place = torch.device(device, launch.local_rank)
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (dist.DistError, ValueError, RuntimeError) as error:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {launch.world} processes cannot meet at {meeting} ({first_line(error)}): check "
            "MASTER_ADDR and MASTER_PORT, and that all of them were started"
        ) from error
    # of sockets, also beside NCCL, which gives up after ten minutes and spins a GPU until then
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), place, patient)
    try:
        yield ranks
        # a rank that left earlier would tear down threads they still share
        ranks.barrier()
    finally:
        # wrapped models hold the group in reference cycles, and it must not outlive its destruction
        gc.collect()
        dist.destroy_process_group()


def wrap(method: nn.Module, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Wrap a method for `ranks`: DDP, or FSDP2 sharding every transformer block / stage and the
    rest.
    """
    if ranks.world == 1:
        return method
    if config.parallel == "fsdp":
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.precision]
        # Batch normalisation has float32 statistics and does not take weights of another type;
        # autocast leaves both as they are.
        if any(isinstance(module, _BatchNorm) for module in method.modules()):
            mixed = None
        # Autocast picks each operation's type; casting the inputs too would round the teachers'
        # targets.
        policy = MixedPrecisionPolicy(
            mixed, reduce_dtype=torch.float32 if mixed else None, cast_forward_inputs=False
        )
        mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
        for block in shardable_blocks(method):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(method, mesh=mesh, mp_policy=policy)
    return data_parallel(method, ranks)


def data_parallel(module: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose gradients are averaged over `ranks`; itself for one process."""
    if ranks.world == 1:
        return module
    # Every parameter takes part in every step (Student freezes what it never uses), so nothing
    # needs finding.
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def shardable_blocks(method: nn.Module) -> list[nn.Module]:
    """The student's repeated parts: a ViT's `blocks`, a CNN's `stages` or `layer1..4`.

    Of these only what is called as a whole: FSDP2 gathers the weights of a module as it is called,
    and some networks pass over a list, or over a stage, to what is inside.
    """
    net = method.student.net
    name = next((name for name in ("blocks", "stages") if hasattr(net, name)), None)
    parts = dict(getattr(net, name).named_children()) if name else {}
    blocks = {f"{name}.{key}": part for key, part in parts.items()}
    if not name:
        layers = (f"layer{i}" for i in range(1, 5))
        blocks = {layer: getattr(net, layer) for layer in layers if hasattr(net, layer)}
    layout = getattr(method.student, "layout", None)  # of a timm network alone
    called = layout.called if layout else blocks.keys()
    return [block for name, block in blocks.items() if name in called]


def without_sync(wrapped: nn.Module, last: bool):
    """Context in which gradients of all but the last micro-batch stay on this rank."""
    if last or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_state(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Complete (unsharded, unwrapped, on the CPU) model and optimizer state; a collective call
    under FSDP.
    """
    return get_model_state_dict(wrapped, options=FULL), get_optimizer_state_dict(
        wrapped, optimizer, options=FULL
    )


def full_weights(wrapped: nn.Module) -> dict:
    """The model's part of `full_state`; a collective call under FSDP."""
    return get_model_state_dict(wrapped, options=FULL)


def load_full_state(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, model: dict, optim: dict
) -> None:
    """Inverse of `full_state`: every rank passes the complete state and takes its share."""
    set_model_state_dict(wrapped, model, options=StateDictOptions(full_state_dict=True))
    # A parameter that has not stepped yet (frozen in the first epochs) has no moments in the file.
    # torch gives it some before it loads the others, from which it would count its first steps.
    lenient = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(wrapped, optimizer, optim, options=lenient)
    stepped = {name for name, moments in optim["state"].items() if moments}
    names = {id(p): name for name, p in _unwrapped(wrapped).named_parameters()}
    for parameter in list(optimizer.state):
        if names[id(parameter)] not in stepped:
            del optimizer.state[parameter]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
