"""`python -m export.run`: export a run folder to a bundle of ONNX graphs and TensorRT engines."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from contract.command_line import CommandLine
from contract.errors import exit_status
from contract.manifest import MANIFEST, Precision
from export.bundle import export_bundle
from export.options import CalibrationMethod, ExportOptions, Format

EPILOG = """\
examples:
  python -m export.run runs/quickstart --output bundles/quickstart
  python -m export.run runs/mine --output bundles/mine-fp16 \\
      --precision fp16 --max-batch 32
  python -m export.run runs/mine --output bundles/mine-any \\
      --resolutions 224 448x336
  python -m export.run runs/mine --output bundles/mine-int8 \\
      --precision int8 --calibration /data/photos
  python -m export.run runs/mine --output bundles/mine-rtx \\
      --formats onnx,tensorrt-rtx --compute-capability 8.6 8.9
  python -m export.run runs/kpu --output bundles/kpu --resolutions 798 \\
      --detector IDEA-Research/grounding-dino-tiny
  python -m export.run runs/mine --output bundles/mine --sign key.pem

A bundle holds manifest.json, written last, so a folder with a manifest is
complete. Beside it lies one ONNX graph each for the backbone, the method's
coupling module, every teacher's head and every task head in RUN/heads, and
`fused`, which is all of them in one graph.

Every output is compared with the torch student on photographs. The table is
printed and stored in the manifest; of each output it shows, for the worst
picture,
  cosine    similarity with the student's output
  off by    length of the difference over the length of the output
  centred   cosine without what all pictures have in common
  position  the same as "off by", of the worst position of a map
  far       positions of one picture that are off by more than is usual
and, of what stands for a whole picture,
  1-NN      share of the pictures, and of crops of them, that keep their
            nearest neighbour

Exit status: 0 success, 1 outputs disagree or another failure, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.run",
        description="Export a trained student with its heads to ONNX graphs and TensorRT engines.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,  # defaults are those of ExportOptions
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of distill.run")
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|STEP",
        help="which of the run's weights: latest (newest checkpoint), a step, or best (by its "
        "monitor), with the heads that distill.evaluate --checkpoint trained; default: those of "
        "the finished run",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="BUNDLE", help="folder to create"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the bundle at --output, and only a bundle"
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import and call the python: code of a decoder in RUN/heads (distill.attach)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="of weights and arithmetic (inputs and outputs keep their types): fp16 and bf16 for "
        f"GPUs, int8 for CPUs and GPUs, with --calibration {_default('precision')}",
    )
    parser.add_argument(
        "--formats",
        metavar="A,B",
        help=f"comma-separated list of {', '.join(get_args(Format))} (default: onnx)",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help=f"largest batch {_default('max_batch')}"
    )
    parser.add_argument(
        "--resolutions",
        nargs="+",
        metavar="H[xW]",
        help="sizes in pixels, multiples of the stride; with several, height and width are dynamic "
        "(default: the student's own size)",
    )
    parser.add_argument(
        "--view",
        metavar="POLICY",
        help="how pictures are brought to the student's size: squash, centre-crop:SHARE, letterbox "
        "or tiles:OVERLAP, then ,bilinear or ,no-antialias (default: that of the run's recipe, "
        "which its scores are taken with)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="photographs to compare on (default: packaged ones)",
    )
    parser.add_argument(
        "--detector",
        metavar="CHECKPOINT",
        help="add zero-shot detection: GroundingDINO, a folder or a name on the Hugging Face hub, "
        "of the run's teacher of role detector",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="int8: folder of photographs like those in production, from which the ranges of "
        "activations are measured, or packaged-photos",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help=f"int8: use at most N of them {_default('calibration_images')}",
    )
    parser.add_argument(
        "--calibration-method",
        choices=get_args(CalibrationMethod),
        help="int8: how ranges are chosen: percentile drops rare outliers, entropy preserves the "
        f"distribution, minmax keeps every value {_default('calibration_method')}",
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="M.N",
        help="tensorrt-rtx: GPUs to build for, such as 8.9",
    )
    parser.add_argument(
        "--workspace",
        type=float,
        metavar="GIB",
        help="TensorRT: the builder's memory in GiB (default: its own limit)",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        metavar="0-5",
        help="TensorRT: 0 builds fast, 5 runs fast (default: TensorRT's)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="TensorRT: kernel times, kept between builds",
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="TensorRT: engines that later versions load too",
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
        "--sign",
        type=Path,
        metavar="KEY",
        help="sign the bundle with this ed25519 private key (PEM), for servers with --trust",
    )
    parser.add_argument(
        "--allow-parity-failure",
        action="store_true",
        help="record outputs that disagree instead of failing",
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(**vars(args)))


def _default(field: str) -> str:
    return f"(default: {ExportOptions.model_fields[field].default})"


def _run(**options: object) -> None:
    """Export with the options of the command line, and print what to do next."""
    chosen = ExportOptions(**options)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("timm", "onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    manifest = export_bundle(chosen)
    print(f"view      {manifest.view}")
    print(f"manifest  {chosen.output / MANIFEST}")
    print("next      verify it, or measure its speed:")
    print(f"  python -m export.check {chosen.output}")
    # a checkpoint's student is not the one that the run ships
    beside = f" --run {chosen.run}" if chosen.checkpoint is None else ""
    print(f"  python -m export.bench {chosen.output}{beside}")


if __name__ == "__main__":
    sys.exit(main())
