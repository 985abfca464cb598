"""The benchmark beside peers: its own parts work, and a peer that is missing or broken is said and
left out.
"""

import argparse
import os
import subprocess
import sys
import time

import pytest

from benchmarks import peers
from benchmarks.peer_steps import timm_loop

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def test_the_plain_loop_trains():
    peer = timm_loop(2, 56, TINY, TINY)
    losses = [float(peer.step()) for _ in range(5)]
    assert losses[-1] < losses[0] and set(peer.versions) == {"torch", "timm"}


def test_its_help_needs_no_peer():
    done = subprocess.run(
        [sys.executable, "benchmarks/peers.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100
    done = subprocess.run(
        [sys.executable, "benchmarks/peers.py", "serve"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "give train, serve BUNDLE or both" in done.stderr


def test_a_side_that_breaks_is_left_out_and_the_others_go_on(capsys):
    turns = iter(({"wall": 0.02, "cpu": 0.01}, {"wall": 0.04, "cpu": 0.03}))

    def broken() -> dict:
        raise RuntimeError("no\nluck")

    measured = peers.take_turns({"ours": lambda: next(turns), "theirs": broken}, 2)
    (row,) = peers.table(measured, "ours", "a step")
    assert row["wall_ms"] == [20, 40] and row["over_first"] == [1, 1]
    shown = capsys.readouterr().out
    assert "- theirs: left out, no luck" in shown and "| ours | 30 (20, 40) | 20 (10, 30)" in shown


def test_a_process_that_ends_is_a_missing_peer(tmp_path):
    args = argparse.Namespace(batch=1, steps=1, threads=1)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no module >&2\n")
    program.chmod(0o755)
    with peers.stepping("lightly", program, args) as process:
        with pytest.raises(peers.Missing, match="its process ended: no module"):
            peers.reply(process)


def test_cpu_time_is_that_of_processes_below_too():
    spin = "import time; e = time.process_time() + 0.5\nwhile time.process_time() < e: pass\n"
    before, own = peers.cpu_seconds(), time.process_time()
    with subprocess.Popen(
        [sys.executable, "-c", spin + "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        child.stdout.readline()
        spent = peers.cpu_seconds() - before - (time.process_time() - own)
        child.communicate(os.linesep.encode())
    assert 0.4 < spent < 2
