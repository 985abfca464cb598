"""Where the time of a training step goes, as ratios measured in one run.

    python benchmarks/train_step.py                      ViT-S/16 and ViT-B/16 students, three
    teachers each
    python benchmarks/train_step.py --students vit_small --rounds 3 --batch 4
    python benchmarks/train_step.py --methods sefa unic --students vit_small
    python benchmarks/train_step.py --device cuda --batch 128 --precision bf16

Prints, for each student: the step's time over the sum of its parts timed alone (1.00: nothing is
done twice or waits), peak memory and, on CUDA, MFU against --peak-tflops; for UMT also the share of
the interaction for every `umt.cross_space` and the cost of one more teacher (M = 1..6), for UNIC
the share of losses, standardisation and dropping with four teachers, for SeFA (DINO, two teachers)
that of self-supervision. Weights are random: times do not depend on them. Medians over --rounds, in
which the parts and the whole take turns, so that a machine that slows down slows both.
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
from distill.data.crops import IMAGE, MAIN, view_of
from distill.distributed import Ranks
from distill.features import Features
from distill.methods import build_method
from distill.methods.losses import alignment_losses
from distill.methods.method import Method, Progress
from distill.methods.self_supervised.dino import GLOBAL, LOCAL
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
        index = {MAIN: torch.arange(args.batch)}
        self.batch = Batch(_random_views(self.method, args.batch, device), index, index, [])
        self.progress = Progress(0, 1, 1)
        self.targets = self.look(self.batch)
        self.prepare()

    def prepare(self) -> None:
        """Make the inputs of the parts."""
        self.images = self.method.preprocess(self.batch.views[IMAGE])
        self.features, self.cotangent = self.encode(self.images)

    def encode(self, images: torch.Tensor) -> tuple[Features, Features]:
        """The student's features as leaves, and gradients for them."""
        with torch.no_grad(), self.autocast():
            features = self.method.student(images)
        leaves = features.map(lambda f: f.detach().requires_grad_())
        return leaves, leaves.map(torch.randn_like)

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """What a step consists of, besides the optimizer."""
        return {
            "teachers": self.run_teachers,
            "student": self.run_student,
            "interaction": self.run_interaction,
        }

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
        self.run_network(self.images, self.cotangent)

    def run_network(self, images: torch.Tensor, cotangent: Features) -> None:
        with self.autocast():
            features = self.method.student(images)
        gradients = cotangent.named().values()
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


class _UNICStep(_Step):
    """UNIC's: the student's layers, the ladder, and everything after it."""

    def prepare(self) -> None:
        self.images = self.method.preprocess(self.batch.views[IMAGE])
        self.method.before_step(self.progress)
        with torch.no_grad(), self.autocast():
            layers = self.method._read_layers(self.images)
        self.layers = [
            type(layer)(*(t.detach().requires_grad_() for t in layer)) for layer in layers
        ]
        self.cotangents = [torch.randn_like(t) for layer in self.layers for t in layer]
        with torch.no_grad(), self.autocast():
            self.predictions = {k: head(self.layers) for k, head in self.method.heads.items()}
        self.predictions = {
            k: p._replace(
                token=p.token.detach().requires_grad_(), patches=p.patches.detach().requires_grad_()
            )
            for k, p in self.predictions.items()
        }

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "teachers": self.run_teachers,
            "student": self.run_student,
            "ladder": self.run_ladder,
            "losses": self.run_losses,
        }

    def run_student(self) -> None:
        with self.autocast():
            layers = self.method.student.every_layer(self.images)
        torch.autograd.backward([t for layer in layers for t in layer], self.cotangents)

    def run_ladder(self) -> None:
        with self.autocast():
            outputs = [
                tensor for head in self.method.heads.values() for tensor in head(self.layers)[:2]
            ]
        torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])

    def run_losses(self) -> None:
        """Standardise, compare and drop."""
        with self.autocast():
            loss, _ = self.method.compare(self.predictions, self.targets)
        loss.backward()


class _SeFAStep(_Step):
    """SeFA's with DINO: two crops of 224 px and eight of 96 of each picture."""

    def prepare(self) -> None:
        method = self.method
        method.before_step(self.progress)
        self.images = method.preprocess(self.batch.views[GLOBAL])
        self.local = method.preprocess.normalize(self.batch.views[LOCAL].float() / 255)
        self.features, self.cotangent = self.encode(self.images)
        local, _ = self.encode(self.local)
        self.local_cotangent = torch.randn_like(local.summary)
        self.summaries = torch.cat((self.features.summary, local.summary)).detach().requires_grad_()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "teachers": self.run_teachers,
            "student, 224 px": self.run_student,
            "student, 96 px": self.run_local,
            "momentum": self.run_momentum,
            "heads": self.run_heads,
            "DINO head and loss": self.run_dino,
            "follow": lambda: self.method.after_step(self.progress),
        }

    def run_local(self) -> None:
        with self.autocast():
            summary = self.method.student(self.local).summary
        summary.backward(self.local_cotangent)

    @torch.no_grad()
    def run_momentum(self) -> None:
        ssl = self.method.ssl
        with self.autocast():
            self.followed = ssl.momentum_head(ssl.momentum(self.images).summary).float()

    def run_heads(self) -> None:
        with self.autocast():
            loss, _ = self.method.compare(self.features, self.targets, None)
        loss.backward()

    def run_dino(self) -> None:
        with self.autocast():
            scores = self.method.ssl.head(self.summaries).float()
            loss, _ = self.method.ssl.compare(scores, self.followed)
        loss.backward()


_STEPS = {"umt": _Step, "unic": _UNICStep, "sefa": _SeFAStep}


def _random_views(method: Method, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random bytes in the shapes of the method's views, at 224 px where they say nothing."""
    views = {}
    for view in method.views:
        shapes = view._replace(size=view.size or 224).shapes(batch)
        for name, (shape, kind) in shapes.items():
            views[name] = torch.randint(0, 256, shape, dtype=kind, device=device)
    return views


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
    parts = {"step": step.whole, **step.parts}
    for work in parts.values():
        _seconds(work, args.device)
    taken: dict[str, list[float]] = {name: [] for name in [*parts, "optimizer", "ratio"]}
    for _ in range(args.rounds):
        for name, work in parts.items():
            taken[name].append(_seconds(work, args.device))
        # the parts before it left gradients, which is what the optimizer needs
        taken["optimizer"].append(_seconds(step.optimize, args.device))
        rest = sum(taken[name][-1] for name in (*step.parts, "optimizer"))
        taken["ratio"].append(taken["step"][-1] / rest)
    return {name: statistics.median(values) for name, values in taken.items()}


def _measure(student: str, method: str, args: argparse.Namespace, console: Console) -> dict:
    result: dict = {"student": student, "method": method, "batch": args.batch}
    count = {"umt": 3, "unic": 4, "sefa": 2}[method]
    recipe = _recipe(student, (_TEACHERS[student] * 2)[:count], args, method)
    step = _STEPS[method](recipe, args)
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
    table.add_row("peak memory", f"{result['peak_gb']:.2f} GB")
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
        step = _Step(_recipe(student, _TEACHERS[student], args, cross_space=mode), args)
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
        times = _time_parts(_Step(_recipe(student, repeated, args), args), args)
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
    parser.add_argument("--methods", nargs="+", default=list(_STEPS), choices=list(_STEPS))
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
    results = [
        _measure(student, method, args, console)
        for student in args.students
        for method in args.methods
    ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
