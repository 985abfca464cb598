"""What folding UMT's interaction for serving saves.

    python -m benchmarks.folding
    python -m benchmarks.folding --students vit_base --modes channel --batch 1

For each student and `umt.cross_space`: the graphs `interaction` and one
teacher's head, M teachers of the student's width and random weights, as they
were trained and as `export.run` folds them (`distill/methods/folding.py`).
GFLOP and CPU seconds are those of one picture: FLOPs counted on the traced
modules, seconds of one thread, medians of calls that take turns.
"""

import argparse
import logging
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from contract.signature import INTERACTION
from distill.features import FeatureDims
from distill.methods import build_method
from distill.methods.deployment import Deployment
from distill.recipe_io import make_recipe
from export.graph import Student, build_parts
from export.modules import Part
from export.runtimes.onnx import OnnxRuntime
from export.to_onnx import export_part

_SIDE = 224
_WIDTHS = {"vit_tiny": 192, "vit_small": 384, "vit_base": 768}
_MODES = ("channel", "grouped", "axial", "token")


class _AsTrained(Deployment):
    """A deployment that is not folded."""

    def folded(self) -> Deployment:
        return self


def main() -> None:
    """Parse the command line and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    students = ("vit_small", "vit_base")
    parser.add_argument("--students", nargs="+", default=students, choices=_WIDTHS)
    parser.add_argument("--modes", nargs="+", default=_MODES, choices=_MODES)
    parser.add_argument("--teachers", type=int, default=3, metavar="M", help="(3)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="pictures (2)")
    runtimes = ("onnxruntime", "torch")
    parser.add_argument("--runtime", default="onnxruntime", choices=runtimes, help="(onnxruntime)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="calls of each (7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    print(
        "| student | cross_space | graph | GFLOP, trained | folded | CPU s, trained | folded "
        "| folded / trained | largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for student in args.students:
        heads = True  # a head does not depend on the mode
        for mode in args.modes:
            for row in measure(student, mode, args, heads):
                print(row, flush=True)
            heads = False


def measure(student: str, mode: str, args: argparse.Namespace, heads: bool) -> list[str]:
    """The rows of a student: its interaction, and one head."""
    parts = {"trained": make(student, mode, args.teachers, False)}
    parts["folded"] = make(student, mode, args.teachers, True)
    graphs = (INTERACTION, *(("head_t0",) if heads else ()))
    with tempfile.TemporaryDirectory() as folder:
        return [_row(student, mode, graph, parts, Path(folder), args) for graph in graphs]


def make(student: str, mode: str, teachers: int, folded: bool) -> dict[str, Part]:
    """The graphs to be of a student, by name."""
    values = {
        "method": "umt",
        # its features' width is all that matters here
        "student": {
            "name": f"{student}_patch16_224",
            "image_size": _SIDE,
            "kwargs": {"depth": 1},
        },
        "teachers": [
            {"name": "vit_tiny_patch16_224", "role": "dino", "alias": f"t{i}", "pretrained": False}
            for i in range(teachers)
        ],
        "umt": {"cross_space": mode},
        "data": {"kind": "packaged-photos"},
        "train": {"steps": 1},
    }
    width = _WIDTHS[student]
    dims = {f"t{i}": FeatureDims(width, width) for i in range(teachers)}
    torch.manual_seed(0)
    method = build_method(make_recipe(values), dims)
    with torch.no_grad():  # zeros would hide what is done with biases
        for parameter in method.interaction.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole = method.deploy()
    if not folded:
        whole = _AsTrained(whole.preprocess, whole.student, whole.coupling, whole.shipped)
    exported = Student(SimpleNamespace(dims=dims), whole, (), whole.student.stride, "0" * 64)
    parts = build_parts(exported, _SIDE, _SIDE)
    return {part.signature.graph: part for part in parts}


def _row(
    student: str,
    mode: str,
    graph: str,
    parts: dict[str, dict[str, Part]],
    folder: Path,
    args: argparse.Namespace,
) -> str:
    calls, flops, answers = {}, {}, {}
    generator = torch.Generator().manual_seed(0)
    signature = parts["trained"][graph].signature
    shapes = [[args.batch, *port.axes[1:]] for port in signature.inputs]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    feeds = {p.name: value.numpy() for p, value in zip(signature.inputs, inputs, strict=True)}
    for kind, made in parts.items():
        part = made[graph]
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            part.module(*inputs)
        flops[kind] = counter.get_total_flops() / args.batch / 1e9
        if args.runtime == "torch":
            calls[kind] = partial(torch.inference_mode()(part.module), *inputs)
            continue
        path = folder / f"{graph}-{kind}.onnx"
        export_part(part, 16, args.batch, path, {})
        calls[kind] = partial(OnnxRuntime({graph: path}, threads=1).run, graph, feeds)
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    for turn in range(args.rounds + 1):  # the first is not counted
        for kind, call in calls.items():
            begun = time.process_time()
            answers[kind] = call()
            taken[kind] += [time.process_time() - begun] if turn else []
    before, after = (statistics.median(taken[kind]) / args.batch for kind in taken)
    ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
    difference = "different outputs"
    if graph == INTERACTION:
        # the trained one goes on: its last block is in the folded one's heads
        difference = f"{_difference(parts, inputs, answers['folded']):.1e}"
    return (
        f"| {student} | {mode} | {graph} | {flops['trained']:.2f} | {flops['folded']:.2f} | "
        f"{before:.3f} | {after:.3f} | {ratio:.2f} | {difference} |"
    )


def _difference(
    parts: dict[str, dict[str, Part]], inputs: list[torch.Tensor], answer: object
) -> float:
    """Largest difference of the folded graph's spaces from those of the trained module's last
    cross-space block, over their largest value.
    """
    trained, seen = parts["trained"][INTERACTION].module, []
    trained.coupling.cross[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.inference_mode():
        trained(*inputs)
    wanted = seen[0].numpy()
    answer = answer[0] if isinstance(answer, list) else answer.numpy()
    return float(np.abs(answer - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    main()
