"""serve.run, its tritonserver, a backend process or a rollout killed at any moment: the next
serve.run with the same arguments serves.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from export.run import main as export
from serve.repository.state import read_state
from serve.server.stubs import command_line, find_stubs
from tests.conftest import long_case, need_tritonserver, run_here
from tests.serve.running import Load, Run, ask, lasting_port, processes

SIZE = 64
ROUNDS = 2
"""Of three kills, for each of five seeds: thirty, twelve of them in the usual run."""
WITHIN = 30.0
"""Seconds in which the next start must serve."""


@pytest.fixture(scope="module")
def tiny_bundle(expensive, plain_run, made_once) -> Path:
    """The bundle with the fewest graphs."""

    def make(folder: Path) -> None:
        words = ("--output", folder / "bundle", "--max-batch", 2)
        done = run_here(plain_run, *words, command=export)
        assert done.returncode == 0, done.stderr

    return made_once("tiny", make) / "bundle"


class Killer:
    """Starts serve.run with the same arguments each time, and kills at moments that a seed
    chooses.
    """

    def __init__(self, bundle: Path, folder: Path, seed: int) -> None:
        self.bundle, self.repository, self.folder = bundle, folder / "repository", folder
        self.rng = random.Random(seed)
        names = ("grpc", "http", "metrics")
        self.ports = tuple(
            word for name in names for word in (f"--{name}-port", str(lasting_port()))
        )
        self.seconds: list[float] = []
        """How long each start took that was not killed."""
        self.kills: list[str] = []
        self.run: Run | None = None

    def start(self) -> Run:
        words = ("--repository", self.repository, "--instances", 1, "--threads", 1, "--no-fused")
        temporary = self.folder / "temporary"
        self.run = Run(self.bundle, *words, ports=self.ports, temporary=temporary)
        return self.run

    def __enter__(self) -> "Killer":
        return self

    def __exit__(self, *error: object) -> None:
        if self.run:  # nothing is left of a test that failed
            self.run.process.kill()
            self.run.process.wait()

    def serve(self) -> Run:
        """Start and ask once; fails if that takes too long."""
        began, run = time.monotonic(), self.start()
        run.ready()
        with grpc.InferenceServerClient(run.grpc) as client:
            assert ask(client, SIZE) == "", self.kills[-1]
        self.seconds.append(time.monotonic() - began)
        assert self.seconds[-1] < WITHIN, f"after {self.kills[-1:]}: {run.text[-3000:]}"
        mine = read_state(self.repository).server_pid
        strays = set(processes(self.repository)) - {mine, *(s.pid for s in find_stubs(mine))}
        assert not strays, self.kills[-1]
        return run

    def kill(self, victim: str, during: str, run: Run, rollout: subprocess.Popen | None) -> None:
        """Kill one of them now; then the supervisor, while it may be mending that."""
        self.kills.append(f"{victim} during {during}")
        names = {
            pid: Path((command_line(pid) or [""])[0]).name for pid in processes(self.repository)
        }
        pids = {
            "server": [pid for pid, name in names.items() if name == "tritonserver"],
            "stub": [pid for pid, name in names.items() if name == "triton_python_backend_stub"],
            "rollout": [rollout.pid] if rollout else [],
        }
        if victim != "supervisor" and pids[victim]:
            os.kill(self.rng.choice(pids[victim]), signal.SIGKILL)
            time.sleep(self.rng.uniform(0, 1))
        run.process.kill()
        run.process.wait()
        run.reader.join(10)
        if rollout:
            rollout.kill()
            rollout.wait()

    def rollout(self) -> subprocess.Popen:
        """A rollout to a second version, or one that drops the first."""
        two = len([path for path in (self.repository / "features").iterdir() if path.is_dir()]) > 1
        words = (self.repository, "--finish") if two else (self.repository, "--bundle", self.bundle)
        return subprocess.Popen(
            [sys.executable, "-m", "serve.rollout", *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *map(long_case, (1, 2, 3, 4))])
def test_the_next_start_serves_whatever_was_killed_and_when(seed, tiny_bundle, tmp_path, capsys):
    need_tritonserver()
    (tmp_path / "temporary").mkdir()
    with Killer(tiny_bundle, tmp_path, seed) as killer:
        usual = 5.0
        for _ in range(ROUNDS):
            run = killer.start()
            time.sleep(killer.rng.uniform(0, usual))
            killer.kill(killer.rng.choice(("supervisor", "server", "stub")), "start", run, None)
            run = killer.serve()
            with Load(run.grpc, SIZE, 2):
                time.sleep(killer.rng.uniform(0, 1))
                killer.kill(killer.rng.choice(("supervisor", "server", "stub")), "load", run, None)
            run = killer.serve()
            usual = killer.seconds[-1]
            rollout = killer.rollout()
            time.sleep(killer.rng.uniform(0, 4))
            victim = killer.rng.choice(("supervisor", "server", "stub", "rollout", "rollout"))
            killer.kill(victim, "rollout", run, rollout)
        run = killer.serve()
        assert run.end(signal.SIGTERM) == 0
        assert not processes(killer.repository)
        assert not list((tmp_path / "temporary").iterdir())
        with capsys.disabled():
            print(f"\n  {len(killer.kills)} kills, starts took at most {max(killer.seconds):.1f} s")
