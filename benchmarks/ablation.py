"""Does UMT help? Table 3's ablation, and plain heads, at a scale two CPU cores
finish in half an hour.

    python benchmarks/ablation.py --output runs/ablation
    python benchmarks/ablation.py --output runs/modes --modes

Five ways to learn from the quickstart's three real teachers, over several
seeds: plain heads per teacher, UMT, and UMT without its model token,
cross-space or intra-space module; compared with the untrained student (a
floor) and the teachers (a ceiling). The student is a small CNN (ResNet-10-T at
64 px, stride 16), the pictures drawn scenes (distill.scenes), of which no
label is used in distilling. Reported: losses on pictures held out, and k-NN,
linear probe and linear segmentation of the backbone and of two teachers'
heads, mean and standard deviation over seeds.

With `--modes` instead UMT's cross-space modes, and plain heads, for a small
ViT (64 px, 8 x 8 positions); read from the backbone alone, without the
teachers.

Writes ablation.json, ablation.md and ablation.png. Existing results are not
computed again.
"""

import argparse
import datetime
import json
import logging
import sys
import time
from pathlib import Path
from typing import get_args

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from harness import SCORES, cell, is_done, made_with, parser, run_all, scores_of, spread

from distill.data.crops import centre_crop
from distill.distributed import join_ranks
from distill.evaluate.cast import Row, open_rows
from distill.evaluate.datasets import open_classes
from distill.evaluate.encoder import teacher_encoder
from distill.evaluate.reading import read_picture
from distill.features import Features
from distill.methods.umt import CrossMode
from distill.recipe_io import load_recipe
from distill.runs import git_commit, load_run
from distill.scenes import write
from distill.teachers import build_teacher
from distill.training.loop import train
from distill.training.stop import StopSignal

_VARIANTS = {
    "untrained": ["train.steps=1", "train.lr=1e-12", "train.min_lr=0", "train.warmup_steps=0"],
    "plain heads": ["method=plain"],
    "UMT": [],
    "UMT w/o model token": ["umt.model_token=false"],
    "UMT w/o cross-space": ["umt.cross_space=false"],
    "UMT w/o intra-space": ["umt.intra_space=false"],
}
_MODES = {
    "untrained": _VARIANTS["untrained"],
    "plain heads": ["method=plain"],
    **{f"UMT {mode}": [f"umt.cross_space={mode}"] for mode in get_args(CrossMode)},
    "UMT w/o cross-space": ["umt.cross_space=false"],
}
_STUDENT = ["student.name=resnet10t", "student.image_size=64", "student.kwargs={output_stride: 16}"]
_VIT = [
    "student.name=vit_tiny_patch16_224",
    "student.image_size=64",
    "student.kwargs={patch_size: 8, embed_dim: 128, depth: 4, num_heads: 2}",
]
_INTERACTION = ["umt.space_dim=128", "umt.token_dim=128", "umt.groups=64"]


def main() -> None:
    """Prepare data and teachers' features, run every variant and seed, `--jobs` at a time, and sum
    up.
    """
    options = parser(__doc__, "runs/ablation", steps=240)
    options.add_argument("--modes", action="store_true", help="cross-space modes of a ViT student")
    args = options.parse_args()
    if args.one:
        _run_one(args, args.one[0], int(args.one[1]))
        return
    start = time.perf_counter()
    scenes = args.output / "scenes"
    if not (scenes / "scenes.json").exists():  # written last
        write(scenes, args.train, args.val, 128, seed=0)
    # each seed's first run fills that seed's cache of the teachers' features (crops differ by
    # seed); its others read it
    seeds = range(args.seeds)
    first = [("untrained", seed) for seed in seeds]
    run_all(args.jobs, first if args.modes else [*first, ("teachers", 0)])
    rest = [variant for variant in _variants(args) if variant != "untrained"]
    run_all(args.jobs, [(variant, seed) for seed in seeds for variant in rest])
    _sum_up(args, (time.perf_counter() - start) / 60)


def _variants(args: argparse.Namespace) -> dict[str, list[str]]:
    return _MODES if args.modes else _VARIANTS


def _read_outs(args: argparse.Namespace) -> list[str]:
    return ["backbone"] if args.modes else ["backbone", "cls", "focus"]


def _run_one(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Train, measure and write result.json, unless it exists."""
    folder = args.output / f"{variant.replace(' ', '-').replace('/', '')}-{seed}"
    if is_done(folder, args):
        return
    start = time.perf_counter()
    torch.manual_seed(seed)
    logging.getLogger().setLevel(logging.WARNING)
    scenes = args.output / "scenes"
    recipe = load_recipe("quickstart", _overrides(args, _variants(args).get(variant, []), seed))
    result: dict = {
        "variant": variant,
        "seed": seed,
        "made_with": made_with(args),
        "commit": git_commit(),
    }
    result |= {"losses": {}, "scores": {}}
    if variant == "teachers":
        rows = []
        for index, config in enumerate(recipe.teachers):
            encoder = teacher_encoder(
                config, config.image_size, index, f"teacher-{config.label}"
            ).to(args.device)
            rows.append(Row(config.label, encoder, folder / config.label))
    else:
        with join_ranks(args.device) as ranks, StopSignal() as stop:
            train(recipe, folder, ranks, False, stop)
        result["losses"] = _held_out_losses(recipe, folder, scenes, args.device)
        rows = open_rows(
            str(folder), _read_outs(args), False, None, args.device, folder / "evaluation"
        )
    trained = time.perf_counter()
    for row in rows:
        label = row.encoder.read_out if variant != "teachers" else row.name
        result["scores"][label] = scores_of(row, scenes, folder / "cache")
    result["seconds"] = {"train": trained - start, "evaluate": time.perf_counter() - trained}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    total = sum(result["losses"].get(part, 0) for part in ("token", "patches"))
    print(f"{variant}, seed {seed}: held-out loss {total:.3f}, {result['seconds']}", flush=True)


def _overrides(args: argparse.Namespace, variant: list[str], seed: int) -> list[str]:
    """The recipe's changes; the runs of a seed share crops and the cache of the teachers'
    features.
    """
    return [
        "data.kind=folder",
        f"data.path={args.output / 'scenes' / 'dense' / 'train' / 'images'}",
        "data.workers=0",
        "data.repeats=4",
        "teacher_cache.views=4",
        f"teacher_cache.path={args.output / f'teacher_cache-{seed}'}",
        f"train.steps={args.steps}",
        "train.log_every=20",
        "checkpoint.every_steps=100000",
        *(_VIT if args.modes else _STUDENT),
        *([] if "method=plain" in variant else _INTERACTION),
        f"train.device={args.device}",
        f"train.seed={seed}",
        *variant,
    ]


@torch.no_grad()
def _held_out_losses(recipe, folder: Path, scenes: Path, device: str) -> dict[str, float]:
    """Losses of the trained method on the centre crops of the scenes held out: sums over teachers,
    and each.
    """
    method = load_run(folder).method.to(device)
    teachers = [
        build_teacher(t, recipe.teacher_runtime, i).to(device)
        for i, t in enumerate(recipe.teachers)
    ]
    files = open_classes(scenes, "val").files
    sums: dict[str, float] = {}
    for chosen in (files[i : i + 50] for i in range(0, len(files), 50)):
        images = torch.stack([centre_crop(read_picture(path), 112) for path in chosen]).to(device)
        targets = {t.label: Features(*t(images)) for t in teachers}
        for name, value in method({"image": images}, targets).items():
            sums[name] = sums.get(name, 0) + value.item() * len(chosen) / len(files)
    return {name.removeprefix("loss."): value for name, value in sums.items()}


def _sum_up(args: argparse.Namespace, minutes: float) -> None:
    """Collect every result and write JSON, a Markdown table and a picture."""
    results = [json.loads(path.read_text()) for path in sorted(args.output.glob("*/result.json"))]
    about = {
        "command": " ".join(["python", "benchmarks/ablation.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "minutes": round(minutes, 1),
        "train_scenes": args.train,
        "val_scenes": args.val,
        "device": args.device,
    }
    (args.output / "ablation.json").write_text(
        json.dumps({"about": about, "results": results}, indent=1)
    )
    by_variant = {
        v: [r for r in results if r["variant"] == v and r["seed"] < args.seeds]
        for v in _variants(args)
    }
    teachers = next((r["scores"] for r in results if r["variant"] == "teachers"), {})
    text = _markdown(by_variant, teachers, _read_outs(args))
    (args.output / "ablation.md").write_text(text)
    _draw(args.output / "ablation.png", by_variant, teachers, _read_outs(args))
    print(text)
    commits = {r["commit"] for r in results}
    if commits != {about["commit"]}:
        print(f"note: results are of commits {', '.join(sorted(c[:8] for c in commits))}")
    print(
        f"{about['command']}: {minutes:.1f} minutes, commit {about['commit'][:8]}, {about['date']}"
    )
    print(f"wrote {args.output}/ablation.json, ablation.md, ablation.png")


def _collect(results: list[dict], read_out: str, task: str) -> list[float]:
    return [r["scores"][read_out][task] for r in results]


def _markdown(by_variant: dict[str, list[dict]], teachers: dict, read_outs: list[str]) -> str:
    """Two tables: losses, and scores by what is read."""

    lines = ["| variant | seeds | Σ token loss L^m | Σ feature loss L^f |", "|---|---|---|---|"]
    for variant, results in by_variant.items():
        token = [r["losses"]["token"] for r in results if "token" in r["losses"]]
        lines.append(
            f"| {variant} | {len(results)} | {cell(token)} | "
            f"{cell([r['losses']['patches'] for r in results])} |"
        )
    for read_out in read_outs:
        lines += [
            "",
            f"Features read: **{read_out}**",
            "",
            "| variant | k-NN top-1 | linear top-1 | linear mIoU |",
        ]
        lines.append("|---|---|---|---|")
        for variant, results in by_variant.items():
            lines.append(
                f"| {variant} | "
                + " | ".join(cell(_collect(results, read_out, t)) for t in SCORES)
                + " |"
            )
        if read_out in teachers:
            result = teachers[read_out]
            lines.append(
                f"| *teacher {read_out}* | " + " | ".join(f"{result[t]:.3f}" for t in SCORES) + " |"
            )
    return "\n".join(lines) + "\n"


def _draw(
    path: Path, by_variant: dict[str, list[dict]], teachers: dict, read_outs: list[str]
) -> None:
    """Losses and scores as points with their spread, a line per variant, every seed a small dot."""
    panels = [
        ("held-out L^m", lambda r: r["losses"].get("token")),
        ("held-out L^f", lambda r: r["losses"]["patches"]),
    ]
    panels += [
        (f"{task} {name}: {read}", lambda r, t=task, o=read: r["scores"][o][t])
        for read in read_outs
        for task, name in SCORES.items()
    ]
    rows = 1 + len(read_outs)
    size = (13, 2.5 * rows)
    figure, axes = plt.subplots(rows, 3, figsize=size, layout="constrained", sharey=True)
    axes[0, 2].set_axis_off()
    places = [axes[0, 0], axes[0, 1], *axes[1:].flat]
    names = list(by_variant)
    for axis, (title, value) in zip(places, panels, strict=True):
        for line, name in enumerate(names):
            values = [v for v in map(value, by_variant[name]) if v is not None]
            if values:
                mean, deviation = spread(values)
                axis.errorbar(mean, line, xerr=deviation, fmt="o", capsize=3, color="#1f77b4")
                axis.plot(values, [line + 0.2] * len(values), ".", color="#999999", markersize=4)
        read, task = title.split(": ")[-1], title.split()[0]
        if read in teachers:
            axis.axvline(teachers[read][task], color="#d62728", linewidth=1, label="teacher")
            axis.legend(frameon=False, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
