"""This project beside its peers, in turns, in one run:

    python benchmarks/peers.py train
    python benchmarks/peers.py serve BUNDLE
    python benchmarks/peers.py train serve BUNDLE --turns 7 --output peers.json

train  one step with one teacher and the same student: this project's method
       `plain`, a plain timm loop, and lightly-train's distillation
serve  all outputs of a bundle's `fused` graph, one picture a request: the
       embedded tritonserver, LitServe with batching, the graph called in one
       process by OpenVINO and by onnxruntime; and the tritonserver again under
       NVIDIA's perf_analyzer

A peer that is not at hand is installed from the package index into an
environment of its own, of the version below; what is missing or breaks is said
in a line and left out. Prints medians (least, most) over the turns of wall and
CPU time, the latter of all processes of a side, client included.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # in which `serve` would be a benchmark
    sys.path[0] = str(HERE.parent)

PINS = {
    "lightly": ("lightly-train==0.18.0", "timm==1.0.31"),
    "litserve": ("litserve==0.2.19",),
    "perf": ("perf-analyzer==2.60.0",),
}
"""What is installed for each peer."""

Turn = dict[str, float]
"""`wall` and `cpu` seconds of one step, or of one picture."""


class Missing(Exception):
    """Why a peer is left out, in one line."""


# ---- environments ------------------------------------------------------------------------------


def environment(folder: Path, peer: str, on_top: bool = False) -> Path:
    """The Python of a peer's own environment below `folder`, made at the first call; `on_top` of
    this one's packages, which are taken where it has none. Raises Missing.
    """
    place, done = folder / peer, folder / peer / ".installed"
    python = place / "bin" / "python"
    wanted = " ".join(PINS[peer])
    if done.exists() and done.read_text() == wanted:
        return python
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shutil.rmtree(place, ignore_errors=True)
    install = [uv, "pip", "install", "--quiet", "--python", python]
    if uv is None:
        install = [python, "-m", "pip", "install", "--quiet"]
    make = [uv, "venv", "--quiet", "--python", sys.executable, place]
    if uv is None:
        make = [sys.executable, "-m", "venv", place]
    print(f"installing {wanted} into {place}", file=sys.stderr, flush=True)
    for command in (make, [*install, *PINS[peer]]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise Missing(f"{wanted} cannot be installed: {' '.join(lines)[-400:]}")
    if on_top:
        library = next((place / "lib").glob("python*")) / "site-packages"
        (library / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done.write_text(wanted)
    return python


# ---- measuring ---------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU time so far of this process and all below it that still run."""
    times: dict[int, tuple[int, float]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{name}/stat").read_text()
        except OSError:  # it has ended
            continue
        fields = text.rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        times[int(name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK")
    own, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, (parent, _) in times.items() if parent in own} - own
        own, grown = own | more, bool(more)
    return sum(times[pid][1] for pid in own if pid in times)


def take_turns(sides: dict[str, Callable[[], Turn]], turns: int) -> dict[str, list[Turn]]:
    """Turns of every side, one after the other; a side that fails is left out from then on."""
    result: dict[str, list[Turn]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in list(result):
            try:
                result[name].append(sides[name]())
            except Exception as error:  # whatever a peer's code raises
                del result[name]
                say_missing(name, error)
        load = " ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"turn {turn + 1} of {turns}, load average {load}", file=sys.stderr, flush=True)
    return result


def say_missing(name: str, error: Exception) -> None:
    print(f"- {name}: left out, {' '.join(str(error).split())[-400:]}", flush=True)


def table(measured: dict[str, list[Turn]], first: str, unit: str) -> list[dict]:
    """Print the sides as a table, each beside the first; returns its rows."""
    if first not in measured:
        return []
    print(f"\n| {unit} | wall ms | CPU ms | CPU over {first}'s |\n|---|---|---|---|")
    rows = []
    for name, turns in measured.items():
        ratios = [a["cpu"] / b["cpu"] for a, b in zip(turns, measured[first], strict=True)]
        wall, cpu = ([1e3 * turn[key] for turn in turns] for key in ("wall", "cpu"))
        print(f"| {name} | {spread(wall)} | {spread(cpu)} | {spread(ratios)} |", flush=True)
        rows.append({"side": name, "wall_ms": wall, "cpu_ms": cpu, "over_first": ratios})
    return rows


def spread(values: list[float]) -> str:
    """Median (least, most)."""
    median = statistics.median(values)
    digits = 2 if median < 10 else 0
    return f"{median:.{digits}f} ({min(values):.{digits}f}, {max(values):.{digits}f})"


# ---- training ----------------------------------------------------------------------------------


@contextmanager
def stepping(side: str, python: Path, args: argparse.Namespace) -> Iterator[subprocess.Popen]:
    """A process of peer_steps.py."""
    # no messages home, no hub
    quiet = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, HERE / "peer_steps.py", side, "--batch", str(args.batch)]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    # a file: a pipe that nobody reads would stop a talkative peer
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, text=True, env=os.environ | quiet, **pipes)
        process.errors = errors
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def reply(process: subprocess.Popen) -> dict:
    """The next line of JSON; raises Missing where the process has ended."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    process.errors.seek(0)
    raise Missing(f"its process ended: {process.errors.read()[-300:]}")


def next_turn(process: subprocess.Popen) -> Turn:
    process.stdin.write("\n")
    process.stdin.flush()
    return reply(process)


def train(args: argparse.Namespace) -> list[dict]:
    print(f"\n## A training step, batch {args.batch}, {args.threads} thread(s)\n")
    with ExitStack() as stack:
        started: dict[str, subprocess.Popen] = {}
        for side in ("ours", "timm", "lightly"):
            try:
                own = side == "lightly"
                python = environment(args.environments, side) if own else Path(sys.executable)
                started[side] = stack.enter_context(stepping(side, python, args))
            except Missing as error:
                say_missing(side, error)
        sides: dict[str, Callable[[], Turn]] = {}
        for side, process in started.items():
            try:
                about = reply(process)
            except Missing as error:
                say_missing(side, error)
                continue
            packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
            print(f"- {side}: {about['what']}; {packages}", flush=True)
            sides[side] = lambda process=process: next_turn(process)
        return table(take_turns(sides, args.turns), "ours", "a step")


# ---- serving -----------------------------------------------------------------------------------


def answered(ask: Callable[[], float], seconds: float) -> Turn:
    """Seconds of one picture, where `ask` answers pictures for so long and says how many a
    second.
    """
    before = cpu_seconds()
    rate = ask()
    return {"wall": 1 / rate, "cpu": (cpu_seconds() - before) / (rate * seconds)}


def serve(args: argparse.Namespace) -> list[dict]:
    import numpy as np

    from benchmarks.in_process import latencies, open_image_graph
    from benchmarks.serve import load, photograph, served
    from contract.signature import FUSED
    from serve.bundle import read_bundle
    from serve.repository.settings import Settings, choose_runtime, cores

    bundle = read_bundle(args.bundle)
    pixels, _ = photograph(bundle)
    outputs = [tensor.name for tensor in bundle.outputs]
    graph = bundle.path / bundle.graphs[FUSED].file
    runtime, most = choose_runtime("auto", "cpu"), bundle.manifest.max_batch
    settings = Settings(runtime=runtime, instances=cores(), threads=1)
    n, seconds = args.concurrency, args.seconds
    student = bundle.manifest.student.network
    print(f"\n## Serving {student}, {bundle.manifest.precision}, {n} requests at once\n")
    for name in ("nvidia-pytriton", "openvino", "onnxruntime"):
        try:
            print(f"- {name} {version(name)}")
        except ImportError:
            continue
    with ExitStack() as stack:
        address = stack.enter_context(served(args.bundle, settings))
        name = f"Triton, {runtime}"
        sides = {name: lambda: load(address, FUSED, outputs, pixels, n, seconds).rate}
        for choice in ("openvino", "onnxruntime"):
            try:
                call = open_image_graph(graph, choice, cores())
            except Exception as error:  # ImportError among others
                say_missing(f"{choice} in one process", error)
                continue

            def direct(call: Callable = call) -> float:
                times = latencies(call, pixels, seconds)
                return len(times) / sum(times)

            sides[f"{choice} in one process, one at a time"] = direct
        size = sum(4 * int(np.prod(tensor.dims)) for tensor in bundle.outputs)
        try:
            ask = stack.enter_context(litserve(args, settings, most, pixels, size))
            sides[f"LitServe, {runtime}, batches up to {most}"] = ask
        except Exception as error:
            say_missing("LitServe", error)
        timed = {key: lambda ask=ask: answered(ask, seconds) for key, ask in sides.items()}
        rows = table(take_turns(timed, args.turns), name, "a picture")
        try:
            for_perf_analyzer(args, address, outputs)
        except Missing as error:
            say_missing("perf_analyzer", error)
    return rows


@contextmanager
def litserve(
    args: argparse.Namespace, settings, most: int, pixels, size: int
) -> Iterator[Callable[[], float]]:
    """benchmarks/litserve_peer.py on the bundle; yields a function to its pictures a second."""
    from benchmarks.litserve_client import upload

    python = environment(args.environments, "litserve", on_top=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, HERE / "litserve_peer.py", args.bundle, "--port", str(port)]
    command += ["--runtime", settings.runtime, "--workers", str(settings.instances)]
    command += ["--threads", str(settings.threads), "--max-batch", str(most)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        upload(url, pixels, size, process)  # waits for its first answer
        yield lambda: upload(url, pixels, size, process, args.concurrency, args.seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers outlive a SIGTERM
        process.wait()


def for_perf_analyzer(args: argparse.Namespace, address: str, outputs: list[str]) -> None:
    """Print what NVIDIA's load generator measures of the same server. Raises Missing."""
    from contract.signature import FUSED

    tool = shutil.which("perf_analyzer")
    if tool is None:
        tool = environment(args.environments, "perf").parent / "perf_analyzer"
    command = [tool, "-m", FUSED, "-u", address, "-i", "grpc", "--input-data", "zero"]
    command += ["--concurrency-range", str(args.concurrency), "--measurement-interval"]
    command += [str(int(1000 * args.seconds)), "--stability-percentage", "999"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{error} ({platform.libc_ver()[1]} is the C library here)") from error
    found = re.search(r"Throughput: ([0-9.]+) infer/sec", result.stdout)
    if result.returncode or not found:
        raise Missing(f"{tool} failed: {(result.stderr or result.stdout).strip()[-300:]}")
    print(f"- perf_analyzer: {1000 / float(found[1]):.1f} wall ms a picture of the same Triton")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", metavar="train | serve BUNDLE")
    parser.add_argument("--turns", type=int, default=5, help="of every side (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="of a training step (default: 8)")
    parser.add_argument("--steps", type=int, default=1, help="in a turn (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of a training step (default: 1)")
    parser.add_argument("--seconds", type=float, default=3, help="of serving, a turn (default: 3)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vfm-distill-peers",
        metavar="FOLDER",
        help="where peers are installed (default: vfm-distill-peers in the temporary folder)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every turn as JSON")
    args = parser.parse_args()
    parts = list(args.what)
    args.bundle = None
    if "serve" in parts and len(parts) > parts.index("serve") + 1:
        args.bundle = Path(parts.pop(parts.index("serve") + 1))
    if not set(parts) <= {"train", "serve"} or ("serve" in parts and args.bundle is None):
        parser.error(f"give train, serve BUNDLE or both, not {' '.join(args.what)}")
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, ")
    print(f"Python {platform.python_version()}, load average {os.getloadavg()[0]:.1f}")
    result: dict[str, list[dict]] = {}
    for part, run in (("train", train), ("serve", serve)):
        if part not in parts:
            continue
        try:
            result[part] = run(args)
        except Exception as error:  # the other part still has its turn
            say_missing(part, error)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - begun:.0f} s", file=sys.stderr)
