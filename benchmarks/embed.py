"""What serve.embed costs over its graph alone. Every figure is a ratio of two
measurements that alternate.

    python benchmarks/embed.py BUNDLE --side 375x500

The bare graph is called on pictures of the model's size that are in memory,
one batch after the other, in the runtime and with the threads that serve.embed
uses. serve.embed reads the same number of JPEG files, decodes, resizes, runs
the graph, and writes a part of Parquet for each 256. Opening the bundle is in
neither. CPU time is that of this process with all its threads: on a busy
machine it says more than the clock.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# not this folder, in which `serve` would be this file
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from skimage import data  # noqa: E402

from contract.command_line import read_size  # noqa: E402
from serve.embed.data import open_data  # noqa: E402
from serve.embed.features import Features, Source, open_features  # noqa: E402
from serve.embed.pipeline import embed  # noqa: E402
from serve.embed.reading import read_row  # noqa: E402
from serve.embed.table import TableManifest, open_table  # noqa: E402
from serve.repository.settings import cores  # noqa: E402

PART_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--outputs", nargs="+", default=["backbone_global"])
    parser.add_argument("--side", default="375x500", metavar="HxW", help="of the JPEGs (375x500)")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="a turn (256)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    source = Source(tuple(args.outputs), bundle=args.bundle, threads=cores())
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder, "photographs")
        _write_photographs(photographs, args.images, read_size(args.side, "--side"))
        features = open_features(source)
        sides = {
            "graph": lambda: _bare(features, args.images),
            "embed": lambda: _embed(features, photographs, Path(folder, "table")),
            "decode": lambda: _decode(features, photographs),
        }
        turns = {name: [] for name in sides}
        for side in sides.values():
            side()  # caches and pools of memory
        for _ in range(args.rounds):
            for name, side in sides.items():
                turns[name].append(_timed(side, args.images))
        features.close()
    _show(features, args, turns)
    if args.output:
        args.output.write_text(json.dumps(turns, indent=1))


def _write_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """JPEG files of scikit-image's photographs."""
    folder.mkdir()
    names = ("astronaut", "chelsea", "coffee", "rocket", "retina")
    photographs = [Image.fromarray(getattr(data, name)()) for name in names]
    for number in range(count):
        picture = photographs[number % len(names)].resize(size[::-1])
        picture.save(folder / f"{number:05d}.jpg", quality=90)


def _bare(features: Features, images: int) -> None:
    pixels = np.random.default_rng(0).integers(
        0, 256, (features.batch, *features.size, 3), dtype=np.uint8
    )
    for start in range(0, images, features.batch):
        features.submit(pixels[: images - start]).result()


def _embed(features: Features, photographs: Path, table: Path) -> None:
    listed = open_data([str(photographs)])
    manifest = TableManifest(
        bundle=features.bundle,
        outputs=features.shapes,
        dtype="float32",
        format="parquet",
        size=features.size,
        view=str(features.view),
        data=listed.digest(),
        rows=len(listed),
        part_rows=PART_ROWS,
    )
    with tempfile.TemporaryDirectory(dir=table.parent) as folder:
        with open_table(Path(folder, "table"), manifest, None) as opened:
            bounds = range(0, len(listed), PART_ROWS)
            parts = ((n, listed.entries(s, s + PART_ROWS)) for n, s in enumerate(bounds))
            for _ in embed(opened, parts, features, cores(), lambda rows, errors: None):
                pass
            if opened.errors():
                sys.exit("error: some photographs could not be read")


def _decode(features: Features, photographs: Path) -> None:
    """Reading, decoding and resizing alone, in as many threads."""
    listed = open_data([str(photographs)])
    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(lambda e: read_row(e, *features.size), listed.entries(0, len(listed))):
            pass


def _timed(side: Callable[[], None], images: int) -> dict[str, float]:
    """Images a second by the clock, and milliseconds of CPU an image."""
    clock, cpu = time.perf_counter(), time.process_time()
    side()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"rate": images / clock, "cpu": 1e3 * cpu / images}


def _show(features: Features, args: argparse.Namespace, turns: dict[str, list[dict]]) -> None:
    height, width = features.size
    print(
        f"\n{args.bundle}, {', '.join(args.outputs)}, {height}x{width}, {features.about}, "
        f"{features.batch} a batch; {args.rounds} turns of {args.images} JPEGs of {args.side}\n"
    )
    print("| | images/s | CPU ms an image |\n|---|---|---|")
    for name, rows in turns.items():
        rate, cpu = (statistics.median(row[key] for row in rows) for key in ("rate", "cpu"))
        print(f"| {name} | {rate:.1f} | {cpu:.1f} |")
    pairs = list(zip(turns["graph"], turns["embed"], strict=True))
    for what, ratios in (
        ("images/s of embed / of the graph", sorted(b["rate"] / a["rate"] for a, b in pairs)),
        ("CPU time of the graph / of embed", sorted(a["cpu"] / b["cpu"] for a, b in pairs)),
    ):
        middle = statistics.median(ratios)
        print(f"{what}: {middle:.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
