"""Where the time of a training step goes, as ratios measured in one run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --students vit_small --rounds 3 --batch 4
    python benchmarks/train_step.py --methods sefa unic --students vit_small
    python benchmarks/train_step.py --methods kpu --students vit_small \\
        --batch 8 --cpu-time
    python benchmarks/train_step.py --device cuda --batch 128 --precision bf16

Without options ViT-S/16 and ViT-B/16 students, three teachers each.

Prints, for each student: the step's time over the sum of its parts timed alone
(1.00: nothing is done twice or waits), the optimizer's state, peak memory and,
on CUDA, MFU against --peak-tflops; for UMT also the share of the interaction
for every `umt.cross_space` and the cost of one more teacher (M = 1..6), for
UNIC the share of losses, standardisation and dropping with four teachers, for
SeFA (DINO, two teachers) that of self-supervision, for KPU that of each
teacher's stream, and the step over its networks alone: teachers, and the
student's forward and backward passes. Weights are random: times do not depend
on them. Medians over --rounds, in which the parts and the whole take turns, so
that a machine that slows down slows both.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from steps import STEPS, Step

from distill.config import Recipe
from distill.data.crops import view_of
from distill.freed_memory import keep_freed_memory
from distill.recipe_io import make_recipe
from distill.training.loop import AUTOCAST
from distill.training.plan import method_cost, teacher_gflop

_TEACHERS = {
    "vit_small": [
        ("vit_small_patch16_224", "clip"),
        ("vit_small_patch16_224", "mae"),
        ("vit_small_patch16_dinov3", "dino"),
    ],
    "vit_base": [
        ("vit_base_patch16_clip_quickgelu_224.openai", "clip"),
        ("vit_base_patch16_224.mae", "mae"),
        ("vit_base_patch16_dinov3.lvd1689m", "dino"),
    ],
}


_DETECTOR = "swin_tiny_patch4_window7_224"
"""GroundingDINO's backbone, with the last of its maps alone."""


def _kpu_recipe(student: str, args: argparse.Namespace) -> Recipe:
    """Streams of a CLIP and of a detector, the latter with an eighth of the pictures, as in the
    paper.
    """
    clip = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_clip_224"}[student]
    detector = {"image_size": args.detector_size, "summary": False, "alias": "detector"}
    return make_recipe(
        {
            "method": "kpu",
            "student": {"name": f"{student}_patch14_dinov2"},
            "teachers": [
                {"name": clip, "role": "clip", "batch_size": args.batch, "pretrained": False},
                {
                    "name": _DETECTOR,
                    "role": "classification",
                    "batch_size": max(1, args.batch // 8),
                    "pretrained": False,
                    **detector,
                },
            ],
            "kpu": {"adapter": {"heads": 6 if student == "vit_small" else 12}},
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1, "batch_size": args.batch, "precision": args.precision},
        }
    )


def _recipe(
    student: str,
    teachers: list[tuple[str, str]],
    args: argparse.Namespace,
    method: str = "umt",
    **own: object,
) -> Recipe:
    listed = [
        {"name": name, "role": role, "alias": f"{role}{i}", "pretrained": False, "image_size": 224}
        for i, (name, role) in enumerate(teachers)
    ]
    return make_recipe(
        {
            "method": method,
            "student": {"name": f"{student}_patch16_224"},
            "teachers": listed,
            method: own,
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1, "batch_size": args.batch, "precision": args.precision},
        }
    )


def _seconds(work: Callable[[], None], device: str, clock: Callable[[], float]) -> float:
    """Time of one call by `clock`, the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _peak_memory(device: str) -> float:
    """Peak memory in GB: of the device, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _time_parts(step: Step, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the whole step and of each part, taking turns."""
    parts = {"step": step.whole, **step.parts}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for work in parts.values():
        _seconds(work, args.device, clock)
    names = [*parts, "optimizer", "ratio", *(["over networks"] if step.networks else [])]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, work in parts.items():
            taken[name].append(_seconds(work, args.device, clock))
        # the parts before it left gradients, which is what the optimizer needs
        taken["optimizer"].append(_seconds(step.optimize, args.device, clock))
        rest = sum(taken[name][-1] for name in (*step.parts, "optimizer"))
        taken["ratio"].append(taken["step"][-1] / rest)
        if step.networks:
            alone = sum(taken[name][-1] for name in step.networks)
            taken["over networks"].append(taken["step"][-1] / alone)
    return {name: statistics.median(values) for name, values in taken.items()}


def _measure(student: str, method: str, args: argparse.Namespace, console: Console) -> dict:
    result: dict = {"student": student, "method": method, "batch": args.batch}
    count = {"umt": 3, "unic": 4, "sefa": 2, "kpu": 2}[method]
    recipe = (
        _kpu_recipe(student, args)
        if method == "kpu"
        else _recipe(student, (_TEACHERS[student] * 2)[:count], args, method)
    )
    step = STEPS[method](recipe, args)
    times = _time_parts(step, args)
    result["seconds"] = times
    result["peak_gb"] = _peak_memory(args.device)
    table = Table(
        title=f"{student}, {method}, {count} teachers, batch {args.batch}: "
        f"a step {times['step']:.3f} s"
    )
    for column in ("part", "of the step"):
        table.add_column(column)
    for name in (*step.parts, "optimizer"):
        table.add_row(name, f"{times[name] / times['step']:.2f}")
    table.add_row("step / sum of parts", f"{times['ratio']:.3f}")
    if step.networks:
        table.add_row("step / its networks alone", f"{times['over networks']:.3f}")
    result["optimizer_bytes"] = sum(
        tensor.nbytes for state in step.optimizer.state.values() for tensor in state.values()
    )
    trained = sum(p.numel() for p in step.parameters)
    table.add_row(
        "optimizer state",
        f"{result['optimizer_bytes'] / 1e6:.1f} MB of {trained / 1e6:.1f} M trained weights",
    )
    table.add_row("peak memory", f"{result['peak_gb']:.2f} GB")
    if method == "kpu":  # its streams have no common number of pictures
        console.print(table)
        return result
    crops = {view.name: view.crops for view in step.method.views}
    cost = method_cost(recipe, step.teachers)
    gflop = 3 * sum(part.gflop for part in cost.parts) + sum(
        crops[view_of(step.method.teacher_views[t.label])] * teacher_gflop(t) for t in step.teachers
    )
    result["gflop_per_image"] = gflop
    result["tflops"] = gflop * args.batch / times["step"] / 1000
    table.add_row("achieved", f"{result['tflops']:.2f} TFLOP/s")
    if args.device == "cuda":
        table.add_row("MFU", f"{100 * result['tflops'] / args.peak_tflops:.1f} %")
    console.print(table)
    if method != "umt":
        return result

    table = Table(title=f"{student}: interaction forward + backward by umt.cross_space")
    for column in ("cross_space", "over student forward + backward", "parameters"):
        table.add_column(column)
    result["cross_space"] = {}
    for mode in ("channel", "token", "axial", "grouped", False):
        step = Step(_recipe(student, _TEACHERS[student], args, cross_space=mode), args)
        times = _time_parts(step, args)
        share = times["interaction"] / times["student"]
        result["cross_space"][str(mode)] = share
        size = sum(p.numel() for p in step.method.interaction.parameters())
        table.add_row(str(mode), f"{share:.2f}", f"{size:,}")
    console.print(table)

    table = Table(title=f"{student}: cost of one more teacher")
    for column in ("M", "interaction over student (fwd + bwd)", "step over M = 1"):
        table.add_column(column)
    result["teachers"], first = {}, 0.0
    for count in range(1, args.max_teachers + 1):
        repeated = (_TEACHERS[student] * 2)[:count]
        times = _time_parts(Step(_recipe(student, repeated, args), args), args)
        first = times["step"] if count == 1 else first
        shares = times["interaction"] / times["student"], times["step"] / first
        result["teachers"][count] = shares
        table.add_row(str(count), *(f"{share:.2f}" for share in shares))
    console.print(table)
    return result


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--students", nargs="+", default=["vit_small", "vit_base"], choices=list(_TEACHERS)
    )
    parser.add_argument("--methods", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-teachers", type=int, default=6)
    parser.add_argument(
        "--detector-size", type=int, default=448, help="KPU: pixels of the detector's stream (448)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure this process's CPU time: other work on the machine then counts little",
    )
    parser.add_argument("--precision", default="fp32", choices=list(AUTOCAST))
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="dense peak of the GPU, for MFU (H100: 989)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.device == "cpu":  # as training does
        keep_freed_memory()
    console = Console()
    console.print(
        f"torch {torch.__version__} on {args.device}, {torch.get_num_threads()} threads, "
        f"{args.precision}"
    )
    results = [
        _measure(student, method, args, console)
        for student in args.students
        for method in args.methods
    ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
