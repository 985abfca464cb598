"""Where the time of a training step goes, as ratios measured in one run.

    python benchmarks/train_step.py                      ViT-S/16 and ViT-B/16 students, three
    teachers each
    python benchmarks/train_step.py --students vit_small --rounds 3 --batch 4
    python benchmarks/train_step.py --device cuda --batch 128 --precision bf16

Prints, for each student: the step's time over the sum of its parts timed alone (1.00: nothing is
done twice or waits), the share of the interaction for every `umt.cross_space`, the cost of one more
teacher (M = 1..6), peak memory and, on CUDA, MFU against --peak-tflops. Weights are random: times
do not depend on them. Medians over --rounds, in which the parts and the whole take turns, so that a
machine that slows down slows both.
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

from distill.config import Recipe
from distill.data.batches import Batch
from distill.data.crops import MAIN
from distill.distributed import Ranks
from distill.methods import build_method
from distill.methods.losses import alignment_losses
from distill.methods.method import Progress
from distill.recipe_io import make_recipe
from distill.teachers import build_teacher
from distill.training.loop import AUTOCAST, build_optimizer, take_step, teacher_features
from distill.training.plan import method_cost, teacher_gflop

_TEACHERS = {
    "vit_small": [
        ("vit_small_patch16_224", "clip"),
        ("vit_small_patch16_224", "mae"),
        ("vit_small_patch16_dinov3", "dino"),
    ],
    "vit_base": [
        ("vit_base_patch16_clip_224.openai", "clip"),
        ("vit_base_patch16_224.mae", "mae"),
        ("vit_base_patch16_dinov3.lvd1689m", "dino"),
    ],
}


def _umt_recipe(
    student: str, teachers: list[tuple[str, str]], args: argparse.Namespace, **umt: object
) -> Recipe:
    listed = [
        {"name": name, "role": role, "alias": f"{role}{i}", "pretrained": False, "image_size": 224}
        for i, (name, role) in enumerate(teachers)
    ]
    return make_recipe(
        {
            "student": {"name": f"{student}_patch16_224"},
            "teachers": listed,
            "umt": umt,
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1, "batch_size": args.batch, "precision": args.precision},
        }
    )


class _Step:
    """One training step as `distill.training.loop` takes it, and its parts alone."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace) -> None:
        self.ranks = Ranks(0, 1, torch.device(args.device))
        device = self.ranks.device
        self.teachers = [
            build_teacher(t, recipe.teacher_runtime, i).to(device)
            for i, t in enumerate(recipe.teachers)
        ]
        self.recipe = recipe
        self.method = (
            build_method(recipe, {t.label: t.dims for t in self.teachers}).to(device).train()
        )
        self.optimizer = build_optimizer(self.method, recipe.train, device)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.look = teacher_features(self.teachers, self.method.teacher_views, device)
        images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
        index = {MAIN: torch.arange(args.batch)}
        (view,) = self.method.views
        self.batch = Batch({view.name: images}, index, index, [])
        self.images, self.progress = images, Progress(0, 1, 1)
        self.targets = self.look(self.batch)
        with torch.no_grad(), self.autocast():
            features = self.method.student(self.method.preprocess(images))
        self.features = features.map(lambda f: f.detach().requires_grad_())
        self.cotangent = self.features.map(torch.randn_like)

    def autocast(self) -> torch.autocast:
        precision = self.recipe.train.precision
        return torch.autocast(
            self.ranks.device.type, AUTOCAST[precision], enabled=precision != "fp32"
        )

    def whole(self) -> None:
        self.method.before_step(self.progress)
        targets = self.look(self.batch)
        with self.autocast():
            losses = self.method(self.batch.views, targets)
        losses["loss"].backward()
        self.optimize()
        self.method.after_step(self.progress)

    def run_teachers(self) -> None:
        self.look(self.batch)

    def run_student(self) -> None:
        with self.autocast():
            features = self.method.student(self.method.preprocess(self.images))
        gradients = self.cotangent.named().values()
        torch.autograd.backward(list(features.named().values()), list(gradients))

    def run_interaction(self) -> None:
        method = self.method
        with self.autocast():
            spaces = method.interaction(self.features)
            grid = tuple(self.features.patches.shape[1:3])
            predictions = {
                label: method.read_out(label, spaces, grid) for label in method.teacher_views
            }
            losses = alignment_losses(predictions, self.targets, method.teachers, method.grid)
        losses["loss"].backward()

    def optimize(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        take_step(self.optimizer, self.scaler, ~torch.isfinite(norm))
        self.optimizer.zero_grad(set_to_none=True)


def _seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of one call, the device idle before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(device: str) -> float:
    """Peak memory in GB: of the device, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _time_parts(step: _Step, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the whole step and of each part, taking turns."""
    parts = {
        "step": step.whole,
        "teachers": step.run_teachers,
        "student": step.run_student,
        "interaction": step.run_interaction,
    }
    for work in parts.values():
        _seconds(work, args.device)
    taken: dict[str, list[float]] = {name: [] for name in [*parts, "optimizer", "ratio"]}
    for _ in range(args.rounds):
        for name, work in parts.items():
            taken[name].append(_seconds(work, args.device))
        # the parts before it left gradients, which is what the optimizer needs
        taken["optimizer"].append(_seconds(step.optimize, args.device))
        rest = sum(taken[name][-1] for name in ("teachers", "student", "interaction", "optimizer"))
        taken["ratio"].append(taken["step"][-1] / rest)
    return {name: statistics.median(values) for name, values in taken.items()}


def _measure(student: str, args: argparse.Namespace, console: Console) -> dict:
    result: dict = {"student": student, "batch": args.batch}
    recipe = _umt_recipe(student, _TEACHERS[student], args)
    step = _Step(recipe, args)
    times = _time_parts(step, args)
    result["seconds"] = times
    result["peak_gb"] = _peak_memory(args.device)
    table = Table(title=f"{student}, 3 teachers, batch {args.batch}: a step {times['step']:.3f} s")
    for column in ("part", "of the step"):
        table.add_column(column)
    for name in ("teachers", "student", "interaction", "optimizer"):
        table.add_row(name, f"{times[name] / times['step']:.2f}")
    table.add_row("step / sum of parts", f"{times['ratio']:.3f}")
    table.add_row("peak memory", f"{result['peak_gb']:.2f} GB")
    cost = method_cost(recipe, step.teachers)
    gflop = 3 * sum(part.gflop for part in cost.parts) + sum(
        teacher_gflop(t) for t in step.teachers
    )
    result["gflop_per_image"] = gflop
    result["tflops"] = gflop * args.batch / times["step"] / 1000
    table.add_row("achieved", f"{result['tflops']:.2f} TFLOP/s")
    if args.device == "cuda":
        table.add_row("MFU", f"{100 * result['tflops'] / args.peak_tflops:.1f} %")
    console.print(table)

    table = Table(title=f"{student}: interaction forward + backward by umt.cross_space")
    for column in ("cross_space", "over student forward + backward", "parameters"):
        table.add_column(column)
    result["cross_space"] = {}
    for mode in ("channel", "token", "axial", "grouped", False):
        step = _Step(_umt_recipe(student, _TEACHERS[student], args, cross_space=mode), args)
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
        times = _time_parts(_Step(_umt_recipe(student, repeated, args), args), args)
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
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-teachers", type=int, default=6)
    parser.add_argument("--precision", default="fp32", choices=list(AUTOCAST))
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="dense peak of the GPU, for MFU (H100: 989)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    console = Console()
    console.print(
        f"torch {torch.__version__} on {args.device}, {torch.get_num_threads()} threads, "
        f"{args.precision}"
    )
    results = [_measure(student, args, console) for student in args.students]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
