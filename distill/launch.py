"""Which of several processes this one is: what torchrun, SLURM or MPI put into the environment.

Without torch, so that a mistake is answered before torch is loaded.
"""

import os
import re
import zlib
from typing import NamedTuple

from contract.errors import UserError


class Launch(NamedTuple):
    """This process among those of the run: its rank, its number on its machine, their number."""

    rank: int
    local_rank: int
    world: int


class _Starter(NamedTuple):
    """The variables of one way to start processes."""

    name: str
    world: str
    rank: str
    local_rank: str
    local_world: str
    job: tuple[str, ...]


_STARTERS = (
    # not SLURM_NTASKS, which a batch script's own, single process has too
    _Starter(
        "srun",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
    _Starter(
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Starter("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ()),
)


def planned_world() -> int:
    """`WORLD_SIZE`, by default 1; raises UserError for one that is not a number above 0."""
    return _number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1


def launched() -> Launch:
    """What the environment says of this process; variables of SLURM and MPI are also set as torch
    knows them.

    Raises UserError, in one line, where a variable is missing or wrong.
    """
    if "WORLD_SIZE" not in os.environ:
        _translate()
    world = planned_world()
    if world == 1:
        return Launch(0, 0, 1)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"WORLD_SIZE = {world}, but {name} is not set: start the processes with torchrun, "
                f"or set {name} as it would (unset WORLD_SIZE to train with this one alone)"
            )
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    _number("MASTER_PORT", 1)
    if rank >= world:
        raise UserError(f"RANK = {rank}, but WORLD_SIZE = {world}: ranks count from 0")
    return Launch(rank, local_rank, world)


def local_world() -> int:
    """Processes of the run on this machine, as far as the environment says; else those that must
    be there for this one to have its local rank.
    """
    if planned_world() == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return _number("LOCAL_WORLD_SIZE", 1)
    return 1 + _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 1


def _number(name: str, least: int) -> int:
    text = os.environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name} = '{text}' in the environment is not a whole number >= {least}")
    return int(text)


def _translate() -> None:
    """Set torch's variables from those of srun or mpirun, if one of them started several
    processes.
    """
    for starter in _STARTERS:
        if starter.world not in os.environ or _number(starter.world, 1) == 1:
            continue
        if not {starter.rank, starter.local_rank} <= os.environ.keys():
            continue
        values = {
            "WORLD_SIZE": os.environ[starter.world],
            "RANK": os.environ[starter.rank],
            "LOCAL_RANK": os.environ[starter.local_rank],
            "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_machine(starter),
            "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_port(starter)),
        }
        # srun has a list of them, 4(x2),3: as many as on the fullest machine
        here = re.findall(r"(?:^|,)([0-9]+)", os.environ.get(starter.local_world, ""))
        if here:
            values.setdefault("LOCAL_WORLD_SIZE", str(max(map(int, here))))
        os.environ |= values
        return


def _first_machine(starter: _Starter) -> str:
    """The machine of rank 0."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "") if starter.name == "srun" else ""
    # node[03-07,12] begins with node03
    if first := re.match(r"([^\[,]+)(?:\[(\d+))?", nodes):
        return first[1] + (first[2] or "")
    if os.environ.get(starter.local_world) == os.environ[starter.world]:
        return "127.0.0.1"
    raise UserError(
        f"{starter.name} started {os.environ[starter.world]} processes, but MASTER_ADDR is not "
        "set: set it to the machine of rank 0, or start with torchrun"
    )


def _port(starter: _Starter) -> int:
    """A port that is the same in all processes of a job and most likely another in other jobs."""
    job = " ".join(os.environ.get(name, "") for name in starter.job)
    return 20000 + zlib.crc32(job.encode()) % 12000
