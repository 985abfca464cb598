"""Disks and shared memory that are full, or too small from the start: real ones, mounted for one
serve.run alone.
"""

import io
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from PIL import Image

from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.settings import Settings
from serve.repository.state import read_state
from serve.server.stubs import find_stubs
from tests.conftest import need_tritonserver
from tests.serve.running import Run, small_repository, until

MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def mounting(expensive) -> None:
    need_tritonserver()
    try:
        done = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if done.returncode:
        pytest.skip("this user may not mount file systems")


def mounted(sizes: dict[Path, int], then: str = "") -> tuple[str, ...]:
    """A command that runs another where folders are file systems of so many bytes of their own;
    `then` is run by a shell before it.
    """
    lines = [f"mount -t tmpfs -o size={size} tmpfs {folder}" for folder, size in sizes.items()]
    script = " && ".join([*lines, *([then] if then else []), 'exec "$@"'])
    return ("unshare", "--mount", "/bin/sh", "-c", script, "mounted")


def seen_by(run: Run, path: Path) -> Path:
    """A path as the process of a run sees it."""
    return Path(f"/proc/{run.process.pid}/root{path}")


def fill(folder: Path) -> Path:
    """Take all room of a file system, in a file of its own."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    return path


def decode(address: str, side: int, count: int, requests: int) -> list[str]:
    """Errors of requests to the decoder, each of so many pictures that do not compress."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    pictures = np.full((count, 1), file.getvalue(), object)
    tensor = grpc.InferInput("encoded", pictures.shape, "BYTES")
    tensor.set_data_from_numpy(pictures)
    errors = []
    with grpc.InferenceServerClient(address) as client:
        for _ in range(requests):
            try:
                client.infer("decode", [tensor], client_timeout=30)
            except grpc.InferenceServerException as error:
                errors.append(str(error))
    return errors


class TestSmallSharedMemory:
    def test_a_start_that_would_fail_half_of_all_requests_is_refused(self, small_bundle, tmp_path):
        within = mounted({Path("/dev/shm"): 48 * MIB})
        with Run(small_bundle, "--repository", tmp_path / "repository", within=within) as run:
            assert run.process.wait(90) == 2
        run.reader.join(10)
        assert re.fullmatch(
            r"error: /dev/shm has [\d,]+ bytes free, and the \d+ processes of this repository need "
            r"[\d,]+: give a container more \(docker run --shm-size \d+m\), .*--max-image-bytes.*",
            run.lines[-1],
        )

    def test_where_the_sizes_fit_every_request_is_answered(self, small_bundle, tmp_path):
        repository = tmp_path / "repository"
        sizes = {"max_image_bytes": 2_000_000, "decoders": 1}
        make_repository(
            read_bundle(small_bundle), repository, Settings(fused=False, **sizes), durable=False
        )
        within = mounted({Path("/dev/shm"): 48 * MIB})
        with Run("--repository", repository, within=within) as run:
            run.ready()
            assert not decode(run.grpc, 800, 4, 10)  # of 1.9 MB each
            assert not decode(run.grpc, 64, 1, 10)


class TestFullAtRunTime:
    def test_it_is_named_and_waited_for(self, small_bundle, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        made = small_repository(small_bundle, tmp_path / "made")
        repository = disk / "repository"
        within = mounted(
            {Path("/dev/shm"): 200 * MIB, disk: 64 * MIB}, f"cp -r {made} {repository}"
        )
        with Run("--repository", repository, within=within) as run:
            run.ready()
            fillers = [fill(seen_by(run, folder)) for folder in (Path("/dev/shm"), disk)]
            run.wait_for(r"^supervisor: /dev/shm \(tensors of requests\) has \d+ bytes free: r")
            run.wait_for(rf"^supervisor: {repository} \(the repository\) has \d+ bytes free: free")
            stubs = find_stubs(read_state(seen_by(run, repository)).server_pid)
            killed = next(stub for stub in stubs if stub.model == "backbone")
            os.kill(killed.pid, signal.SIGKILL)
            run.wait_for(r"^supervisor: backbone did not recover: /dev/shm \(tensors", 60)
            time.sleep(10)
            assert 1 < run.text.count("loading it again") < 6
            for filler in fillers:
                filler.unlink()
            emptied = time.monotonic()
            run.wait_for(r"^supervisor: backbone is back", 60)
            assert time.monotonic() - emptied < 30
            assert until(
                lambda: read_state(seen_by(run, repository)).restarts == {"backbone": 1}, 20
            )
            assert not decode(run.grpc, 800, 4, 4)
            assert run.end(signal.SIGTERM) == 0

    def test_a_log_that_cannot_be_written_stops_nothing(self, small_bundle, tmp_path):
        disk, repository = tmp_path / "disk", tmp_path / "repository"
        disk.mkdir()
        small_repository(small_bundle, repository, instances=1)
        within = (
            *mounted({disk: 8 * MIB})[:-2],
            f"{mounted({disk: 8 * MIB})[-2]} >{disk}/log",
            "mounted",
        )
        with Run("--repository", repository, "--", "--log-verbose=1", within=within) as run:
            assert until(lambda: read_state(repository) is not None, 60)
            filler = fill(seen_by(run, disk))
            address = read_state(repository).grpc
            until_noticed = time.monotonic() + 5
            while time.monotonic() < until_noticed:  # each logs many lines
                assert not decode(address, 64, 1, 20)
            filler.unlink()
            text = seen_by(run, disk / "log").read_text
            assert until(lambda: "(the log) has" in text() and "free again" in text(), 20)
            assert run.end(signal.SIGTERM) == 0
