"""Where an export's time goes, and what it takes in two checkouts.

    python -m benchmarks.export_time runs/quickstart
    python -m benchmarks.export_time runs/quickstart --checkouts ../before . \\
        --rounds 3

Without `--checkouts`: CPU seconds of each stage of one `export.run` in this
process, on one thread. With them: `python -m export.run` of each checkout, as
a process of its own, in turns, on one thread; medians of its CPU seconds, and
of the ratio to the first's within each round. CPU seconds because other work
on a machine lengthens the wall's.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument("--checkouts", type=Path, nargs="+", metavar="DIR", help="compare these")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--precision", default="fp32", help="(fp32)")
    args = parser.parse_args()
    options = ["--precision", args.precision]
    options += ["--calibration", "packaged-photos"] if args.precision == "int8" else []
    with tempfile.TemporaryDirectory() as folder:
        command = [str(args.run.resolve()), "--output", f"{folder}/bundle", "--force", *options]
        if args.checkouts:
            _compare(args.checkouts, command, args.rounds)
        else:
            _stages(command)


def _compare(checkouts: list[Path], command: list[str], rounds: int) -> None:
    """A row for each checkout."""
    taken: dict[Path, list[float]] = {place: [] for place in checkouts}
    for _ in range(rounds):
        for place, seconds in taken.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            variables = os.environ | {"PYTHONPATH": str(place.resolve()), "OMP_NUM_THREADS": "1"}
            subprocess.run(
                [sys.executable, "-m", "export.run", *command],
                cwd=place,
                env=variables,
                check=True,
                capture_output=True,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            seconds.append(used)
            print(f"{place}: {used:.1f} CPU s", file=sys.stderr, flush=True)
    print("| checkout | CPU s, median | min-max | over the first |\n|---|---|---|---|")
    first = taken[checkouts[0]]
    for place, seconds in taken.items():
        ratio = statistics.median(mine / his for mine, his in zip(seconds, first, strict=True))
        print(
            f"| {place} | {statistics.median(seconds):.1f} | {min(seconds):.1f}-{max(seconds):.1f} "
            f"| {ratio:.2f} |"
        )
    print(f"\nload average {os.getloadavg()[0]:.1f}, {rounds} rounds")


def _stages(command: list[str]) -> None:
    """A row for each stage."""
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.process_time()
    from torch.onnx._internal.exporter import _capture_strategies, _core, _onnx_program

    import export.assemble as assembling
    from export import trace_once
    from export.run import main as export

    seconds = {"imports": time.process_time() - start}

    def timed(place: Any, name: str, stage: str) -> None:
        function: Callable = getattr(place, name)

        @wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **options)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - begun

        setattr(place, name, counted)

    timed(assembling, "open_student", "reading the run")
    timed(assembling, "export_part", "graphs, all")
    timed(trace_once, "registry", "of these: table of operators")
    timed(trace_once, "decompositions", "of these: table of decompositions")
    timed(_capture_strategies.TorchExportNonStrictStrategy, "__call__", "of these: torch.export")
    timed(_core, "_prepare_exported_program_for_export", "of these: decomposition")
    timed(_core, "_exported_program_to_onnx_program", "of these: translation")
    timed(_onnx_program.ONNXProgram, "optimize", "of these: onnxscript's rewriting")
    timed(assembling, "write_fused", "fused")
    timed(assembling, "_prove", "comparison")
    if status := export(command):
        sys.exit(status)
    seconds["all"] = time.process_time()
    print("| stage | CPU s | share |\n|---|---|---|")
    for stage, used in seconds.items():
        print(f"| {stage} | {used:.1f} | {used / seconds['all']:.2f} |")


if __name__ == "__main__":
    main()
