"""`python -m export.bench`: time a bundle's graphs in every runtime available, beside torch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from contract.command_line import CommandLine
from contract.errors import exit_status
from export.bench.options import BenchOptions, Device

EPILOG = """\
examples:
  python -m export.bench bundles/quickstart --run runs/quickstart
  python -m export.bench bundles/mine bundles/mine-int8 --run runs/mine \\
      --graphs backbone fused --rounds 20
  python -m export.bench bundles/mine --run runs/mine --devices cuda \\
      --batches 1 8 32 128
  python -m export.bench bundles/mine --batches 8 --threads 4 \\
      --graphs head_dino depth

CPU rows: torch eager and torch.compile (with --run), onnxruntime, OpenVINO.
GPU rows: torch eager, torch.compile, torch autocast fp16, onnxruntime's CUDA
provider and the bundle's TensorRT engines. Inputs and outputs stay on the GPU
and TF32 is off.

Ratios are to torch eager on the same device, for each graph and batch. The
least cosine compares every output of every photograph with torch eager, so no
row is fast by being wrong. Heads read what the graphs before them compute from
the photographs. Runtimes take turns within a round, so that a machine that
slows down slows all of them.

Graphs take any batch, whatever --max-batch they were exported with. Engines
take no more than that; larger batches have no engine rows. On a CPU each
runtime uses the fastest of a few settings, tried first and printed: threads
(all cores or half of them, or --threads), onnxruntime's optimization level,
OpenVINO's hint.

Prints a table and writes bench.json and bench.png to --output.
Exit status: 0 success, 1 failure, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.bench",
        description="Time a bundle's graphs and engines in onnxruntime, OpenVINO and TensorRT,\n"
        "beside torch.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,  # defaults are those of BenchOptions
    )
    parser.add_argument(
        "bundles",
        type=Path,
        nargs="+",
        metavar="BUNDLE",
        help="one or more precisions of one student",
    )
    parser.add_argument(
        "--run", type=Path, metavar="RUN", help="run folder, for torch and the cosines to it"
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and call the python: code of a decoder in RUN/heads",
    )
    parser.add_argument(
        "--graphs",
        nargs="+",
        metavar="NAME",
        help="graphs of the bundle (default: backbone, interaction, every teacher's head, fused)",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="timed calls of each graph and runtime (default: 10)",
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        choices=get_args(Device),
        help="(default: cpu and, where there is a GPU, cuda)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of every runtime (default: the fastest of a few)",
    )
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="leave out torch.compile, which takes minutes to start",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for bench.json and bench.png (default: BUNDLE/..)",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(**vars(args)))


def _run(**options: object) -> None:
    chosen = BenchOptions(**options)
    # torch takes seconds to load: mistakes in the options are reported before
    from export.bench.measure import bench

    bench(chosen)


if __name__ == "__main__":
    sys.exit(main())
