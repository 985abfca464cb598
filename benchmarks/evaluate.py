"""What evaluation costs, as ratios measured in one run.

    python benchmarks/evaluate.py                    on a CPU, a few minutes
    python benchmarks/evaluate.py --device cuda --pictures 20000 --batch 256

1. The linear probe's 45 learning rates over one: the whole task (features
   extracted, probe trained, validated) and the training of the classifiers
   alone, over 45 trainings one after the other.
2. k-NN in blocks: peak memory over what was there before, for queries against
   1 281 167 features of width 768 in half precision, and the time the full
   50 000 queries would take.
3. Extraction (decoding, forward pass, hashing, writing) over the bare forward
   pass on pictures already in memory.

Parts that are compared take turns, so a machine that slows down slows both;
medians over --rounds.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contract.views import EVALUATED
from distill.data.pictures import PackagedPhotos
from distill.evaluate.classification import FrozenSplits
from distill.evaluate.config import EvaluationConfig, ExtractConfig, KNNConfig, ProbeConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.encoder import Encoder, parse_model, teacher_encoder
from distill.evaluate.extract import PolicyViews, extract
from distill.evaluate.knn import GIB, knn_votes
from distill.evaluate.linear_probe import evaluate as probe_task
from distill.evaluate.linear_probe import train_sweep

IMAGENET_TRAIN, IMAGENET_VAL, WIDTH = 1_281_167, 50_000, 768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="vit_small_patch16_224",
        help="timm name; random weights (vit_small_patch16_224)",
    )
    parser.add_argument(
        "--pictures", type=int, default=480, help="pictures of the extraction and probe parts (480)"
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a forward pass (32)")
    parser.add_argument("--rounds", type=int, default=2, help="(2)")
    parser.add_argument("--queries", type=int, default=256, help="of the k-NN part (256)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    args = parser.parse_args()
    encoder = teacher_encoder(parse_model(f"{args.model}@random"), name=args.model).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "photos"
        photographs(data, args.pictures)
        extraction(encoder, data, args)
        probe(encoder, data, args)
    neighbours(args)


def photographs(root: Path, count: int) -> None:
    """JPEG crops of real photographs, 500x375 as ImageNet's average, in ten class folders of both
    splits.
    """
    photos, rng = PackagedPhotos(), np.random.default_rng(0)
    for number in range(count):
        photo = photos.load(int(rng.integers(len(photos))))
        side = min(photo.size) * rng.uniform(0.5, 1.0)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        crop = photo.resize(
            (500, 375), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        path = (
            root
            / ("val" if number % 4 == 3 else "train")
            / f"class{number // 4 % 10}"
            / f"{number}.jpg"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=90)


def _timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(works: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each work, taking turns."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(_timed(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def extraction(encoder: Encoder, data: Path, args: argparse.Namespace) -> None:
    """Throughput of `extract` over that of the forward pass alone."""
    views = PolicyViews(open_classes(data, "train"), encoder.image_size, EVALUATED)
    config = ExtractConfig(batch_size=args.batch, workers=2 if args.device == "cpu" else 12)
    batches = torch.stack([views[n] for n in range(len(views))]).to(args.device).split(args.batch)
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")

    def bare() -> None:
        with torch.inference_mode(), precision:
            for images in batches:
                encoder(images)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as cache:
            extract(encoder, views, Path(cache), config)

    result = compare({"bare": bare, "whole": whole}, args.rounds, args.device)
    print(
        f"extraction: {len(views) / result['whole']:.1f} pictures/s, bare forward "
        f"{len(views) / result['bare']:.1f}/s, ratio {result['bare'] / result['whole']:.3f} "
        "(target 0.95)",
        flush=True,
    )


def probe(encoder: Encoder, data: Path, args: argparse.Namespace) -> None:
    """45 rates over one: whole task, and training alone at ImageNet-like and small shapes."""
    train, val = open_classes(data, "train"), open_classes(data, "val")
    config = ExtractConfig(batch_size=args.batch)

    def task(rates: int) -> Callable[[], object]:
        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                views = [
                    PolicyViews(split, encoder.image_size, EVALUATED) for split in (train, val)
                ]
                features = [
                    extract(encoder, v, Path(folder), config).summaries().to(args.device)
                    for v in views
                ]
                labels = [torch.from_numpy(split.labels).to(args.device) for split in (train, val)]
                splits = FrozenSplits(features[0], labels[0], features[1], labels[1], train.classes)
                settings = EvaluationConfig(probe=ProbeConfig(rates=rates))
                probe_task(splits, settings, Path(folder), {})

        return work

    result = compare({"one": task(1), "all": task(45)}, args.rounds, args.device)
    print(
        f"probe, whole task, {len(train)} pictures, 100 epochs: 45 rates over one "
        f"{result['all'] / result['one']:.3f} (target 1.5)",
        flush=True,
    )
    for n, width, classes, epochs in ((2048, 384, 10, 5), (2048, 384, 100, 2)):
        features, labels = (
            torch.randn(n, width, device=args.device),
            torch.randint(classes, (n,), device=args.device),
        )

        def train_all(rates: int, x=features, y=labels, c=classes, e=epochs) -> None:
            train_sweep(x, y, c, ProbeConfig(rates=rates, epochs=e), seed=0)

        works = {
            "one": lambda: train_all(1),
            "all": lambda: train_all(45),
            "in turn": lambda: [train_all(1) for _ in range(45)],
        }
        result = compare(works, args.rounds, args.device)
        over_one, over_turns = result["all"] / result["one"], result["all"] / result["in turn"]
        print(
            f"probe, classifiers alone, {classes} classes of width {width}: 45 at once over one "
            f"{over_one:.1f}, over 45 in turn {over_turns:.2f}",
            flush=True,
        )


def neighbours(args: argparse.Namespace) -> None:
    """Memory and time of k-NN against ImageNet's training set."""
    train = torch.empty(IMAGENET_TRAIN, WIDTH, dtype=torch.float16)
    for part in train.split(65_536):
        part.copy_(torch.randn(len(part), WIDTH))
    labels = torch.randint(1000, (IMAGENET_TRAIN,))
    queries = torch.randn(args.queries, WIDTH, device=args.device)
    config = KNNConfig()
    before = _peak_memory(args.device)
    seconds = _timed(lambda: knn_votes(train, labels, queries, 1000, config), args.device)
    more = (_peak_memory(args.device) - before) / GIB
    minutes = seconds * IMAGENET_VAL / args.queries / 60
    print(
        f"k-NN, {args.queries} queries x {IMAGENET_TRAIN} x {WIDTH}: {seconds:.1f} s, "
        f"{more:.2f} GiB more at the peak (limit {config.block_gib:g}); {IMAGENET_VAL} queries at "
        f"this rate: {minutes:.1f} minutes",
        flush=True,
    )


def _peak_memory(device: str) -> int:
    """Bytes used at most so far, on the device that computes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
