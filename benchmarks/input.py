"""How many crops a second one core makes of JPEG files, and what a list of files costs a worker:
`python benchmarks/input.py`.

Pictures are the packaged photographs at two sizes. Rows: this pipeline, the same with every picture
decoded whole by Pillow, and torchvision by its two ways (Pillow, and its own decoder with uint8
tensors). Times are CPU seconds of one thread. Rows take turns, as other processes slow all of them
down: a cell is the median, and the median of how many times as many the first row makes.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from contract.images import to_rgb
from contract.picture_files import Names
from distill.config import DataConfig
from distill.data.crops import IMAGE, MAIN, CropDataset, View
from distill.data.pictures import FolderPictures, PackagedPhotos
from distill.data.pixels import Decoded

SIDE = 224
SIZES = ((1500, 1000), (500, 375))


def write_jpegs(folder: Path, size: tuple[int, int]) -> None:
    """The photographs as JPEGs of quality 90, cut to the shape of `size` = (width, height)."""
    photos = PackagedPhotos()
    for number in range(len(photos)):
        image = photos.load(number)
        scale = min(image.width / size[0], image.height / size[1])
        width, height = size[0] * scale, size[1] * scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        box = (left, top, left + width, top + height)
        sized = image.resize(size, Image.Resampling.LANCZOS, box=box)
        sized.save(folder / f"{number:02d}.jpg", quality=90)


def ways(folder: Path) -> dict[str, Callable[[int], torch.Tensor]]:
    """Functions from a number to a crop, uint8 [3, SIDE, SIDE], by what to call them."""
    pictures = FolderPictures(folder)
    view = View(IMAGE, SIDE, scale=(0.08, 1.0))
    dataset = CropDataset(pictures, DataConfig(path=str(folder)), [view], seed=0)
    count = len(pictures)
    crop = v2.RandomResizedCrop(SIDE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def pillow(number: int) -> torch.Tensor:
        image = Image.open(pictures.name(number % count)).convert("RGB")
        return v2.functional.pil_to_tensor(transform(image))

    def tensors(number: int) -> torch.Tensor:
        data = read_file(pictures.name(number % count))
        return transform(decode_image(data, ImageReadMode.RGB))

    class Whole(FolderPictures):
        def open(self, number: int) -> Decoded:
            with Image.open(self.name(number)) as image:
                return Decoded(to_rgb(image))

    whole = CropDataset(Whole(folder), dataset.config, [view], seed=0)
    return {
        "distill": lambda number: dataset[MAIN, number % count, number // count].views[IMAGE],
        "distill, decoded whole by Pillow": lambda n: whole[MAIN, n % count, n // count].views[
            IMAGE
        ],
        "torchvision, Pillow": pillow,
        "torchvision, tensors": tensors,
    }


def rates(
    made: dict[str, Callable[[int], torch.Tensor]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Calls per CPU second of each, in rounds."""
    result: dict[str, list[float]] = {name: [] for name in made}
    for make in made.values():
        make(0)
    for _ in range(rounds):
        for name, make in made.items():
            start = time.process_time()
            for number in range(count):
                make(number)
            result[name].append(count / (time.process_time() - start))
    return result


def private_bytes(use: Callable[[], object]) -> int:
    """Memory that a forked process has for itself after `use`."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before = _private()
        use()
        os.write(write, str(_private() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        os.close(write)
        return int(pipe.read())


def _private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=76, metavar="N", help="crops a round")
    parser.add_argument("--rounds", type=int, default=6, metavar="N")
    parser.add_argument("--files", type=int, default=1_281_167, metavar="N", help="in the list")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    table = Table(title=f"crops of {SIDE} px a second, one core")
    table.add_column("pipeline")
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        for width, height in SIZES:
            folder = Path(place, f"{width}")
            folder.mkdir()
            write_jpegs(folder, (width, height))
            table.add_column(f"{width} x {height}", justify="right")
            made = rates(ways(folder), args.count, args.rounds)
            first = next(iter(made.values()))
            for name, values in made.items():
                over = statistics.median(a / b for a, b in zip(first, values, strict=True))
                cell = f"{statistics.median(values):.0f}  {over:.2f}"
                rows.setdefault(name, []).append(cell)
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)

    plain = [f"/data/imagenet/train/n{n // 1300:08d}/n_{n}.JPEG" for n in range(args.files)]
    names = Names(plain)
    order = np.random.default_rng(0).permutation(args.files)
    gc.collect()
    gc.freeze()
    console.print(
        f"a list of {args.files:,} files, read once by a forked worker, takes of its own:"
    )
    for kind, files in (("list of str", plain), ("Names", names)):
        used = private_bytes(lambda files=files: sum(len(files[int(n)]) for n in order))
        size = names.nbytes if files is names else sum(len(name) + 57 for name in plain)
        console.print(f"  {kind:12} {used / 1e6:7.1f} MB (the list itself {size / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()
