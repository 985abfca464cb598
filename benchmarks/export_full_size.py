"""Does export hold at full size? Random students of paper recipes, exported and compared in every
precision.

    python benchmarks/export_full_size.py --output runs/full_size
    python benchmarks/export_full_size.py --recipes umt_vit_base --precisions fp32 --rtx 8.6 8.9
    12.0

For each recipe and precision: seconds and peak memory of `python -m export.run` (a process of its
own), the size of the bundle and the least cosine of its parity table. Weights are random, so int8's
agreement is only indicative.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from contract.manifest import read_manifest
from distill.methods import build_method
from distill.recipe_io import load_recipe
from distill.runs import save_student
from distill.training.checkpoint import claim_folder
from distill.training.plan import meta_teacher

_RECIPES = ("umt_vit_base", "umt_convnext_base_cnn", "umt_resnet50")


def main() -> None:
    """Export every recipe in every precision and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/full_size"),
        metavar="DIR",
        help="(runs/full_size)",
    )
    parser.add_argument("--recipes", nargs="+", default=list(_RECIPES), help="(a ViT and two CNNs)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument(
        "--rtx",
        nargs="+",
        default=[],
        metavar="M.N",
        help="also build TensorRT-RTX engines for these",
    )
    parser.add_argument("--max-batch", type=int, default=3, metavar="N", help="(3)")
    args = parser.parse_args()
    print(
        "| student | precision | seconds | peak memory, GB | bundle, MB | comparisons | least "
        "cosine | passed |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.recipes:
        run = args.output / name
        if not (run / "student.safetensors").exists():
            _make_random(name, run)
        for precision in args.precisions:
            print(_export(args, name, run, precision), flush=True)


def _make_random(name: str, folder: Path) -> None:
    """A run folder of a recipe's student with random weights."""
    recipe = load_recipe(name, ["data.kind=packaged-photos"])
    dims = {t.label: meta_teacher(t, recipe, i).dims for i, t in enumerate(recipe.teachers)}
    torch.manual_seed(0)
    method = build_method(recipe, dims).eval()
    claim_folder(folder, recipe)
    save_student(folder, method.state_dict(), method, recipe, dims, 0)


def _export(args: argparse.Namespace, name: str, run: Path, precision: str) -> str:
    """One row of the table."""
    bundle = args.output / f"{name}-{precision}"
    command = [
        sys.executable,
        "-m",
        "export.run",
        str(run),
        "--output",
        str(bundle),
        "--force",
        "--precision",
        precision,
    ]
    command += ["--max-batch", str(args.max_batch), "--allow-parity-failure"]
    if precision == "int8":
        command += ["--calibration", "packaged-photos"]
    if args.rtx:
        command += ["--formats", "onnx,tensorrt-rtx", "--compute-capability", *args.rtx]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        return f"| {name} | {precision} | {done.stderr.strip().splitlines()[-1]} | | | | | |"
    manifest = read_manifest(bundle)
    size = sum((bundle / file).stat().st_size for file in manifest.files) / 1e6
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # the largest child so far
    least = min(row.cosine for row in manifest.parity)
    passed = f"{sum(row.passed for row in manifest.parity)}/{len(manifest.parity)}"
    row = [
        name,
        precision,
        f"{seconds:.0f}",
        f"≤ {peak:.1f}",
        f"{size:.0f}",
        str(len(manifest.parity)),
        f"{least:.6f}",
        passed,
    ]
    (bundle.parent / f"{bundle.name}.json").write_text(json.dumps({"row": row}))
    return "| " + " | ".join(row) + " |"


if __name__ == "__main__":
    main()
