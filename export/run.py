"""`python -m export.run`: a run folder becomes a bundle of graphs and engines that provably say what the student says."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import UserError, exit_status

EPILOG = """\
examples:
  python -m export.run runs/quickstart --output bundles/quickstart
  python -m export.run runs/mine --output bundles/mine-fp16 --precision fp16 --max-batch 32
  python -m export.run runs/mine --output bundles/mine-any --resolutions 224 448x336       any multiples of the stride
  python -m export.run runs/mine --output bundles/mine-int8 --precision int8 --calibration /data/photos
  python -m export.run runs/mine --output bundles/mine-rtx --formats onnx,tensorrt-rtx --compute-capability 8.6 8.9

A bundle holds manifest.json (written last: what has one is whole) and, beside it, one ONNX graph for the backbone, the
method's coupling part, every teacher's head and every task head of RUN/heads, and `fused` with all of them. Every output is
compared with the torch student on photographs; the table is printed and kept in the manifest.
Exit status: 0 done, 2 a mistake in what was asked, 1 outputs that do not agree (or another failure).
"""

FORMATS = ("onnx", "tensorrt", "tensorrt-rtx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.run",
        description="Export a trained student with its heads to ONNX graphs and TensorRT engines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it is there")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "bf16", "int8"), help="(fp32)")
    parser.add_argument("--formats", default="onnx", metavar="A,B", help=f"of {', '.join(FORMATS)} (onnx)")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="largest batch (8)")
    parser.add_argument(
        "--resolutions",
        nargs="+",
        metavar="H[xW]",
        help="pixels; several make height and width vary (default: its own)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs to compare on (default: packaged ones)")
    parser.add_argument("--calibration", metavar="DIR", help="photographs for int8 ranges, or packaged-photos")
    parser.add_argument("--calibration-images", type=int, default=64, metavar="N", help="how many of them (64)")
    parser.add_argument("--calibration-method", default="percentile", choices=("entropy", "percentile", "minmax"))
    parser.add_argument(
        "--compute-capability", nargs="+", default=[], metavar="M.N", help="tensorrt-rtx: GPUs to build for, e.g. 8.9"
    )
    parser.add_argument("--workspace", type=float, metavar="GIB", help="TensorRT: memory limit while building")
    parser.add_argument("--optimization-level", type=int, metavar="0-5", help="TensorRT: the builder's effort")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT: kept between builds")
    parser.add_argument("--version-compatible", action="store_true", help="TensorRT: engines for later versions too")
    parser.add_argument(
        "--strip-weights", action="store_true", help="TensorRT: engines without weights, refitted on load"
    )
    parser.add_argument("--refit", action="store_true", help="TensorRT: engines whose weights can be replaced")
    parser.add_argument(
        "--allow-parity-failure", action="store_true", help="record outputs that do not agree instead of failing"
    )
    asked = parser.parse_args(arguments)
    return exit_status(lambda: run(asked))


def run(asked: argparse.Namespace) -> int:
    """Carry out a parsed command line."""
    formats = [name.strip() for name in asked.formats.split(",")]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats {name}: known are {', '.join(FORMATS)}")
    if asked.max_batch < 1:
        raise UserError(f"--max-batch {asked.max_batch}: give 1 or more")
    if asked.precision == "int8" and not asked.calibration:
        raise UserError("--precision int8 needs pictures to calibrate on: add --calibration DIR (or packaged-photos)")
    if asked.output.exists() and not asked.output.is_dir():
        raise UserError(f"--output {asked.output} is a file: give a folder")
    if asked.output.exists() and any(asked.output.iterdir()) and not asked.force:
        raise UserError(f"--output {asked.output} already holds files: add --force to replace it, or choose another")

    if asked.compute_capability and "tensorrt-rtx" not in formats:
        raise UserError(
            "--compute-capability is for --formats tensorrt-rtx: add it (full TensorRT builds for this GPU)"
        )

    # Imported here so that --help answers at once: torch and timm take seconds to load.
    from export.assemble import export_bundle
    from export.engines import engine_options

    # What engines need is looked at before the minutes that graphs take.
    engine_options(asked, formats)

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("timm", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    export_bundle(asked, formats)
    return 0


def parse_sizes(texts: Sequence[str] | None, stride: int, own: int) -> list[tuple[int, int]]:
    """(height, width) of every `224` or `448x336`; raises UserError for sides that the stride does not divide."""
    found = []
    for text in texts or [str(own)]:
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"--resolutions {text}: write pixels, 224 or 448x336 (height x width)")
        height, width = int(parts[0]), int(parts[-1])
        for side in (height, width):
            if side % stride:
                below = side // stride * stride
                nearest = f"{below} or {below + stride}" if below else str(stride)
                raise UserError(
                    f"--resolutions {text}: {side} is not a multiple of the student's stride {stride}: use {nearest}"
                )
        found.append((height, width))
    return found


if __name__ == "__main__":
    sys.exit(main())
