"""`python -m export.run`: a run folder becomes a bundle of graphs and engines that provably say
what the student says.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from export.options import PACKAGED
from export.output import check_output

EPILOG = """\
examples:
  python -m export.run runs/quickstart --output bundles/quickstart
  python -m export.run runs/mine --output bundles/mine-fp16 --precision fp16 --max-batch 32
  python -m export.run runs/mine --output bundles/mine-any --resolutions 224 448x336       any multiples of the stride
  python -m export.run runs/mine --output bundles/mine-int8 --precision int8 --calibration /data/photos
  python -m export.run runs/mine --output bundles/mine-rtx --formats onnx,tensorrt-rtx --compute-capability 8.6 8.9

A bundle holds manifest.json (written last: what has one is whole) and, beside it, one ONNX graph for the backbone, the
method's coupling part, every teacher's head and every task head of RUN/heads, and `fused` with all of them. Every output is
compared with the torch student on photographs; the table is printed and kept in the manifest. It has the worst picture's
cosine, length of the difference over the output's (off by), cosine without what all pictures have in common (centred), the
worst position's cosine and the largest difference of a number.
Exit status: 0 done, 2 a mistake in what was asked, 1 outputs that do not agree (or another failure).
"""

FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")
BUILDER = (
    "workspace",
    "optimization_level",
    "timing_cache",
    "version_compatible",
    "strip_weights",
    "refit",
)
"""Options that only TensorRT's builder heeds."""

CALIBRATION = {"calibration": None, "calibration_images": 64, "calibration_method": "percentile"}
"""Options that only int8 heeds, with their defaults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.run",
        description="Export a trained student with its heads to ONNX graphs and TensorRT engines.",
        epilog=EPILOG,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="BUNDLE", help="folder to make"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the bundle that is there, and nothing else"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "bf16", "int8"),
        help="of the network's weights and arithmetic, inputs and outputs staying as they are: "
        "fp16 and bf16 for GPUs, int8 for CPUs and GPUs (needs --calibration) (fp32)",
    )
    parser.add_argument(
        "--formats", default="onnx", metavar="A,B", help=f"of {', '.join(FORMATS)} (onnx)"
    )
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="largest batch (8)")
    parser.add_argument(
        "--resolutions",
        nargs="+",
        metavar="H[xW]",
        help="pixels; several make height and width vary (default: its own)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="photographs to compare on (default: packaged ones)",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="int8: a folder of photographs like those it will see, from which the ranges of its "
        "numbers are measured, or packaged-photos",
    )
    parser.add_argument(
        "--calibration-images", type=int, metavar="N", help="int8: how many of them, at most (64)"
    )
    parser.add_argument(
        "--calibration-method",
        choices=("entropy", "percentile", "minmax"),
        help="int8: how a range is chosen: percentile leaves out rare outliers, entropy keeps the "
        "distribution, minmax keeps everything seen (percentile)",
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="M.N",
        help="tensorrt-rtx: GPUs to build for, e.g. 8.9",
    )
    parser.add_argument(
        "--workspace", type=float, metavar="GIB", help="TensorRT: memory limit while building"
    )
    parser.add_argument(
        "--optimization-level", type=int, metavar="0-5", help="TensorRT: the builder's effort"
    )
    parser.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="TensorRT: kept between builds"
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="TensorRT: engines for later versions too"
    )
    parser.add_argument(
        "--strip-weights",
        action="store_true",
        help="TensorRT: engines without weights, refitted on load",
    )
    parser.add_argument(
        "--refit", action="store_true", help="TensorRT: engines whose weights can be replaced"
    )
    parser.add_argument(
        "--allow-parity-failure",
        action="store_true",
        help="record outputs that do not agree instead of failing",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed command line."""
    formats = list(dict.fromkeys(name.strip() for name in args.formats.split(",")))
    check_options(args, formats)
    read = {"RUN": args.run, "--images": args.images, "--timing-cache": args.timing_cache}
    if args.calibration and args.calibration != PACKAGED:
        read["--calibration"] = Path(args.calibration)
    for option in ("--images", "--calibration"):
        check_folder(option, read.get(option))
    place = check_output(
        args.output, args.force, {name: path for name, path in read.items() if path}
    )

    # Imported here so that --help answers at once: torch and timm take seconds to load.
    from export.assemble import export_bundle
    from export.tensorrt.engines import engine_options

    # What engines need is looked at before the minutes that graphs take.
    engine_options(args, formats)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("timm", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    export_bundle(args, formats, place)
    return 0


def check_options(args: argparse.Namespace, formats: Sequence[str]) -> None:
    """Raise UserError for options that cannot be or would do nothing; then fill in the defaults of
    calibration.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats {name}: known are {', '.join(FORMATS)}")
    if args.max_batch < 1:
        raise UserError(f"--max-batch {args.max_batch}: give 1 or more")
    for name in BUILDER:
        given = getattr(args, name)
        if given is not None and given is not False and formats == ["onnx"]:
            raise UserError(
                f"{spelt(name)} is for TensorRT: add --formats onnx,tensorrt (or tensorrt-rtx), or "
                "leave it out"
            )
    if args.timing_cache and "tensorrt" not in formats:
        raise UserError(
            "--timing-cache is for --formats tensorrt: tensorrt-rtx measures no times, leave it out"
        )
    if args.timing_cache and (args.timing_cache.is_dir() or not args.timing_cache.parent.is_dir()):
        raise UserError(f"--timing-cache {args.timing_cache}: name a file in a folder that exists")
    if args.workspace is not None and not 0 < args.workspace < float("inf"):
        raise UserError(f"--workspace {args.workspace:g}: give more than 0 GiB")
    if args.optimization_level not in (None, *range(6)):
        raise UserError(
            f"--optimization-level {args.optimization_level}: give 0 (builds fast) to 5 (runs fast)"
        )
    if args.compute_capability and "tensorrt-rtx" not in formats:
        raise UserError(
            "--compute-capability is for --formats tensorrt-rtx: add it (full TensorRT builds for "
            "this GPU)"
        )
    for name, default in CALIBRATION.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.precision != "int8":
            raise UserError(
                f"{spelt(name)} is for --precision int8: add it, or leave {spelt(name)} out"
            )
    if args.precision == "int8" and not args.calibration:
        raise UserError(
            "--precision int8 needs pictures to calibrate on: add --calibration DIR (or "
            f"{PACKAGED})"
        )
    if args.calibration_images < 1:
        raise UserError(f"--calibration-images {args.calibration_images}: give 1 or more")


def spelt(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def check_folder(option: str, folder: Path | None) -> None:
    """Raise UserError where pictures are to come from what is no folder."""
    if folder and not folder.is_dir():
        what = (
            "is a file: give the folder it is in"
            if folder.exists()
            else "no such folder (check the path)"
        )
        raise UserError(f"{option} {folder}: {what}")


if __name__ == "__main__":
    sys.exit(main())
