"""The same on a cluster: Ray Data gives the missing parts to processes, each of which has opened
the source once and writes its parts itself.
"""

import logging
import os
import pickle
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.data

from contract.errors import Failure, UserError, first_line
from serve.embed.data import Entry
from serve.embed.features import open_features
from serve.embed.job import Cluster, Job
from serve.embed.pipeline import Advance, embed
from serve.embed.table import Table
from serve.errors import ClientError

_CONNECT_SECONDS = 5.0


class _Worker:
    """A process of Ray Data's; called with one part at a time."""

    def __init__(self, job: Job, table: Table) -> None:
        self._job, self._table = job, table
        self._features = open_features(job.source)
        if self._features.bundle != table.manifest.bundle:
            raise Failure(
                f"a worker reads bundle {self._features.bundle}, not {table.manifest.bundle}"
            )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        (number,), (pickled,) = batch["part"], batch["entries"]
        entries, errors = pickle.loads(pickled), []

        def count(rows: int, some: int) -> None:
            errors.append(some)

        parts, decoders = [(int(number), entries)], self._job.decoders
        for _ in embed(self._table, parts, self._features, decoders, count):
            pass
        return {"part": [number], "rows": [len(entries)], "errors": [sum(errors)]}


def embed_on_ray(
    job: Job,
    table: Table,
    parts: Iterable[tuple[int, Sequence[Entry]]],
    cluster: Cluster,
    advance: Advance,
) -> Iterator[int]:
    """Embed parts on a cluster; yields the numbers of written ones as they come.

    Raises UserError where no cluster can be reached, and what a worker raises.
    """
    _connect(cluster)
    source = job.source  # workers have a current folder of their own
    if source.bundle:
        keys = tuple(path.absolute() for path in source.trust)
        source = replace(source, bundle=source.bundle.absolute(), trust=keys)
    job, table = replace(job, source=source), replace(table, folder=table.folder.absolute())
    try:
        rows = [{"part": n, "entries": pickle.dumps(list(some))} for n, some in parts]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(job, table),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=_workers(job, cluster, len(rows))),
            **_resources(job),
        )
        for row in made.iter_rows():
            advance(int(row["rows"]), int(row["errors"]))
            yield int(row["part"])
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        ray.shutdown()


def _connect(cluster: Cluster) -> None:
    where = cluster.address or os.environ.get("RAY_ADDRESS") or "this machine"
    remedy = "start one with `ray start --head`, or give --ray alone for one on this machine"
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if port.isdecimal():  # Ray itself tries for minutes
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(f"--ray {where}: no Ray there ({error.strerror}): {remedy}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"--ray {where}: no Ray there ({reason}): {remedy}") from error


def _resources(job: Job) -> dict[str, float]:
    """What each worker takes: the graphs' CPUs, or a GPU."""
    if job.source.url:
        return {"num_cpus": 1}
    if job.source.device != "cpu" and ray.cluster_resources().get("GPU"):
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": job.source.threads}


def _workers(job: Job, cluster: Cluster, parts: int) -> int:
    """As requested, else as many as there is room for, and no more than there are parts."""
    if cluster.workers:
        return min(cluster.workers, parts)
    free, wanted = ray.cluster_resources(), _resources(job)
    room = [free.get("CPU", 0) / wanted["num_cpus"]]
    if "num_gpus" in wanted:
        room.append(free["GPU"])
    return max(1, min(int(min(room)), parts))


def _cause(error: BaseException) -> Exception:
    """What a worker raised, out of Ray's wrappings."""
    cause: BaseException | None = error
    while cause is not None:
        ours = isinstance(cause, (UserError, Failure, ClientError))
        if ours and not isinstance(cause, ray.exceptions.RayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return Failure(f"Ray: {first_line(error)}")
