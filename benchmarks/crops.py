"""What the data stage spends on a picture: decoding, cropping, photometric
augmentation.

    python benchmarks/crops.py --data /data/imagenet/train
    python benchmarks/crops.py         on the packaged photographs

Times the views of a recipe (default: two global and eight local crops, as in
DINO) in one process on one thread, pictures one after another; prints
milliseconds a picture of each stage, the share of each, and how many pictures
a second one worker makes.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from distill.config import DataConfig
from distill.data.crops import random_crop, resize_crop, to_tensor
from distill.data.photometric import photometric
from distill.data.pictures import open_pictures

_CROPS = [
    (224, (0.4, 1.0), "dino_global_1"),
    (224, (0.4, 1.0), "dino_global_2"),
    *[(96, (0.05, 0.4), "dino_local")] * 8,
]


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="pictures (packaged photographs)")
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="pictures timed (60)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = {"path": str(args.data)} if args.data else {"kind": "packaged-photos"}
    pictures = open_pictures(DataConfig(**source))
    stages: dict[str, list[float]] = {"decode": [], "crop": [], "photometric": []}
    for number in range(args.pictures):
        rng = np.random.Generator(np.random.Philox(number))
        times = [time.perf_counter()]
        image = pictures.load(number % len(pictures)).convert("RGB")
        times.append(time.perf_counter())
        crops = []
        for size, scale, name in _CROPS:
            box = random_crop(image.size, rng, scale, (3 / 4, 4 / 3))
            crops.append((resize_crop(image, box, size, flip=False), name))
        times.append(time.perf_counter())
        for crop, name in crops:
            to_tensor(photometric(crop, name, rng))
        times.append(time.perf_counter())
        for stage, begin, end in zip(stages, times, times[1:], strict=False):
            stages[stage].append(end - begin)
    medians = {stage: statistics.median(values) for stage, values in stages.items()}
    total = sum(medians.values())
    table = Table(title=f"{len(_CROPS)} crops of a picture, one thread: {1 / total:.1f} pictures/s")
    for column in ("stage", "ms a picture", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, seconds in medians.items():
        table.add_row(stage, f"{1000 * seconds:.1f}", f"{seconds / total:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
