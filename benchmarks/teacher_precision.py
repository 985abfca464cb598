"""How much faster teachers are in bf16 than in float32 on one thread of this CPU.

    python -m benchmarks.teacher_precision
    python -m benchmarks.teacher_precision vit_base_patch16_224 convnext_tiny \\
        --batch 4

Without names the quickstart's three teachers at their own sizes; networks that
are named have random weights. CPU seconds of a batch, medians of calls that
take turns, and of the ratio of each turn its median, least and largest.
"""

import argparse
import statistics
import time

import torch

from distill.config import TeacherConfig, TeacherRuntime
from distill.recipe_io import load_recipe
from distill.teachers import build_teacher


def main() -> None:
    """Parse the command line and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="timm's names")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="pictures (16)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="calls of each (9)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs = [TeacherConfig(name=n, role="dino", pretrained=False) for n in args.networks]
    print("| teacher | px | fp32, CPU s | bf16 | fp32 / bf16 |")
    print("|---|---|---|---|---|")
    for index, config in enumerate(configs or load_recipe("quickstart", []).teachers):
        print(measure(config, index, args.batch, args.rounds), flush=True)


@torch.inference_mode()
def measure(config: TeacherConfig, index: int, batch: int, rounds: int) -> str:
    """A teacher's row."""
    kinds = ("fp32", "bf16")
    teachers = [build_teacher(config, TeacherRuntime(precision=kind), index) for kind in kinds]
    side = teachers[0].image_size
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    taken: list[list[float]] = [[], []]
    for turn in range(rounds + 1):  # the first is not counted
        for teacher, seconds in zip(teachers, taken, strict=True):
            begun = time.process_time()
            teacher(pixels)
            seconds += [time.process_time() - begun] if turn else []
    exact, rounded = (statistics.median(seconds) for seconds in taken)
    ratios = [a / b for a, b in zip(*taken, strict=True)]
    name = config.alias or "random"
    return (
        f"| {name} ({config.name}) | {side} | {exact:.3f} | {rounded:.3f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |"
    )


if __name__ == "__main__":
    main()
