"""Processes that read what others have written, and what one says when another has ended."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from contract.errors import Failure, UserError
from distill.distributed import ALONE, Ranks
from distill.evaluate import extract, shared_files
from distill.evaluate.shared_files import first_sees


class Second(Ranks):
    """The second of two processes; the first one's values are `said`."""

    said = None

    def gather(self, value):
        return [self.said, value]


def second() -> Second:
    return Second(1, 2, torch.device("cpu"))


def test_the_second_process_waits_for_what_the_first_sees(tmp_path, monkeypatch):
    path, ranks = tmp_path / "head", second()
    assert not first_sees(path, ranks), "no wait for what the first one has not"
    (tmp_path / "new").write_bytes(b"weights")
    ranks.__class__.said = shared_files.size_and_time(str(tmp_path / "new"))
    path.write_bytes(b"old")
    late = threading.Timer(0.3, (tmp_path / "new").rename, [path])
    late.start()
    assert first_sees(path, ranks) and path.read_bytes() == b"weights"
    late.join()
    path.unlink()
    monkeypatch.setattr(shared_files, "_PATIENCE", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="does not have head, which another process wrote"):
        first_sees(path, ranks)
    assert not first_sees(path, ALONE)


def test_parts_that_never_come_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_files, "_PATIENCE", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    segments = [extract._Segment(0, 0, [[0, 1]], "1a"), extract._Segment(1, 0, [[2, 3]], "1a")]
    extract._keep_pieces(tmp_path, segments[0], {"summary": np.zeros((2, 4))})
    with pytest.raises(UserError, match="shard_000000.from_2.1a.summary.npy, which another"):
        extract._join_pieces(tmp_path, segments, ["summary"])


@pytest.mark.parametrize(
    "error,kind",
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [::1]:4"), Failure),
        (RuntimeError("Timed out waiting 1800000ms for recv operation"), Failure),
        (dist.DistBackendError("NCCL error: remote process exited"), Failure),
        (RuntimeError("Tensors must be contiguous"), RuntimeError),
    ],
)
def test_only_a_lost_connection_is_another_process_that_ended(monkeypatch, error, kind):
    def fail(**kwargs):
        raise error

    monkeypatch.setattr(dist, "barrier", fail)
    with pytest.raises(kind) as caught:
        second().barrier()
    assert ("another process of the run has ended" in str(caught.value)) == (kind is Failure)


def test_the_first_process_alone_draws_progress_bars(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert ALONE.draws and not second().draws
