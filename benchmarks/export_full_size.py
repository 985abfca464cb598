"""Does export hold at full size? Random students of paper recipes, exported and
compared in every precision.

    python benchmarks/export_full_size.py --output runs/full_size
    python benchmarks/export_full_size.py --recipes umt_vit_base \\
        --precisions fp32 --rtx 8.6 8.9 12.0
    python benchmarks/export_full_size.py --batches 1 4 \\
        --adapter vit_small_patch14_dinov2

For each recipe and precision: seconds and peak memory of `python -m
export.run` (a process of its own), the size of the bundle and the least cosine
of its parity table. Weights are random, so int8's agreement is only
indicative.

--adapter instead times KPU's student of a ViT, the sentinel inside its
adapter, over the bare ViT: both as graphs at 224 px, and in torch, on one
thread, in turns in one process, by the process's CPU time, so that other work
on the machine counts little.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnx
import torch

from contract.manifest import read_manifest
from contract.signature import IMAGE
from distill.config import StudentConfig
from distill.methods import build_method
from distill.methods.deployment import Deployment
from distill.models import student as models
from distill.models.preprocess import Preprocess
from distill.models.vit_adapter import AdapterConfig, ViTAdapter
from distill.recipe_io import load_recipe
from distill.runs import save_student
from distill.training.checkpoint import write_recipe
from distill.training.plan import meta_teacher
from export.agreement import compare
from export.graph import Student, build_parts
from export.modules import Part
from export.runtimes.onnx import OnnxRuntime
from export.runtimes.openvino import OpenVINO
from export.to_onnx import export_part

_SIDE = 224
"""Pixels of the pictures that adapters are timed on."""

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
    parser.add_argument("--adapter", nargs="+", metavar="VIT", help="time KPU's student over these")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="N", help="(1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(5)")
    args = parser.parse_args()
    if args.adapter:
        _compare_adapters(args)
        return
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
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, recipe)
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


def _compare_adapters(args: argparse.Namespace) -> None:
    """A row for each ViT, batch and runtime."""
    print("| sentinel | batch | runtime | bare, CPU s | with adapter | ratio | least cosine |")
    print("|---|---|---|---|---|---|---|", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.adapter:
        parts = {kind: _backbone(name, kind == "adapter") for kind in ("bare", "adapter")}
        files = {kind: args.output / f"{name}-{kind}.onnx" for kind in parts}
        for kind, (part, stride) in parts.items():
            start = time.process_time()
            export_part(part, stride, max(args.batches), files[kind], {})
            nodes = len(onnx.load(files[kind], load_external_data=False).graph.node)
            seconds = time.process_time() - start
            print(f"{files[kind].name}: {nodes} nodes, {seconds:.0f} CPU s", file=sys.stderr)
        for batch in args.batches:
            image = torch.randint(256, (batch, _SIDE, _SIDE, 3), dtype=torch.uint8)
            for row in _time_graphs(parts, files, image, args.rounds):
                print(f"| {name} | {batch} | " + " | ".join(row) + " |", flush=True)


def _backbone(name: str, adapter: bool) -> tuple[Part, int]:
    """The graph to be of a random ViT, alone or inside KPU's adapter, and its stride."""
    config = StudentConfig(name=name, image_size=_SIDE, pretrained=False)
    torch.manual_seed(0)
    student = models.Student(config)
    if adapter:
        # the public adapters have 6 heads around a ViT-S, 12 around a ViT-B
        heads = student.width // 64
        torch.manual_seed(0)
        student = ViTAdapter(config, AdapterConfig(heads=heads))
        for interaction in student.interactions:
            torch.nn.init.normal_(interaction.injector.gate)  # shut, they would hide mistakes
    preprocess = Preprocess(_SIDE, (0.5,) * 3, (0.25,) * 3)
    deployment = Deployment(preprocess, student, torch.nn.Identity(), {})
    whole = Student(SimpleNamespace(dims={}), deployment, (), student.stride, "0" * 64)
    return build_parts(whole, _SIDE, _SIDE)[0], student.stride


def _time_graphs(
    parts: dict[str, tuple[Part, int]], files: dict[str, Path], image: torch.Tensor, rounds: int
) -> Iterator[list[str]]:
    """What is said of each runtime: medians of `rounds` calls, the ratio's within each round."""
    feeds, wanted, calls = {IMAGE: image.numpy()}, {}, {}
    for kind, (part, _) in parts.items():
        with torch.inference_mode():
            wanted[kind] = [tensor.numpy() for tensor in part.module.eval()(image)]
        bound = {
            "torch": partial(torch.inference_mode()(part.module), image),
            "onnxruntime": OnnxRuntime({kind: files[kind]}, threads=1).bind(kind, feeds),
            "OpenVINO": OpenVINO(
                {kind: files[kind]},
                {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
            ).bind(kind, feeds),
        }
        for runtime, work in bound.items():
            calls[runtime, kind] = work
    for runtime in ("torch", "onnxruntime", "OpenVINO"):
        taken: dict[str, list[float]] = {kind: [] for kind in parts}
        least = 1.0
        for turn in range(rounds + 1):  # the first is not counted
            for kind, seconds in taken.items():
                work = calls[runtime, kind]
                start = time.process_time()
                work() if runtime == "torch" else work.call()
                seconds += [time.process_time() - start] if turn else []
                if not turn and runtime != "torch":
                    pairs = zip(work.read(), wanted[kind], strict=True)
                    least = min(least, *(float(compare(a, b)[0].min()) for a, b in pairs))
        bare, whole = (statistics.median(taken[kind]) for kind in ("bare", "adapter"))
        ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
        cosine = "" if runtime == "torch" else f"{least:.6f}"
        yield [runtime, f"{bare:.3f}", f"{whole:.3f}", f"{ratio:.2f}", cosine]


if __name__ == "__main__":
    main()
