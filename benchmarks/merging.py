"""What merging the parallel branches of reparameterisable students saves on a
CPU.

    python -m benchmarks.merging
    python -m benchmarks.merging mobileone_s1 --size 192

Exports the backbone of each network with random weights twice, as it was
trained and merged as `export.run` does, and times both in onnxruntime on one
thread, in turns; the fastest of the runs counts. The prediction comes before:
every leaf module costs its multiply-adds at {gflops} GFLOP/s and what it reads
and writes at {gbytes} GB/s, batch normalisations aside, which onnxruntime
folds.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from distill.config import StudentConfig
from distill.methods.deployment import Deployment
from distill.models.preprocess import Preprocess
from distill.models.student import Student
from export.graph import Student as Exported
from export.graph import build_parts
from export.merge import merge_branches
from export.to_onnx import export_part

_NETWORKS = ("mobileone_s0", "repvgg_a0", "repvit_m0_9", "fastvit_t8")

_GFLOPS, _GBYTES = 40.0, 10.0
"""One core with AVX2, from its clock; memory shared by two."""

_HALF = (0.5, 0.5, 0.5)


def main() -> None:
    """Parse the command line and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__.format(gflops=_GFLOPS, gbytes=_GBYTES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("networks", nargs="*", default=_NETWORKS, metavar="NETWORK")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side, pixels (224)")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="runs of each (30)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    print("| network | layers merged | predicted | before, ms | after, ms | measured |")
    print("|---|---|---|---|---|---|")
    for name in args.networks:
        print(measure(name, args.size, args.runs), flush=True)


def measure(name: str, size: int, runs: int) -> str:
    """A network's row."""
    torch.manual_seed(0)
    student = Student(StudentConfig(name=name, image_size=size)).eval()
    deployment = Deployment(Preprocess(size, _HALF, _HALF), student, nn.Identity(), {})
    whole = Exported(None, deployment, (), student.stride, "")
    merged = merge_branches(whole, (size, size))
    before, after = (predict(part.deployment.student.net, size) for part in (whole, merged))
    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            session(part, size, Path(folder) / f"{n}.onnx")
            for n, part in enumerate((whole, merged))
        ]
        image = torch.randint(256, (1, size, size, 3), dtype=torch.uint8).numpy()
        best = [float("inf")] * 2
        for _ in range(runs):
            for number, one in enumerate(sessions):
                begun = time.perf_counter()
                one.run(["backbone_global"], {"image": image})
                best[number] = min(best[number], 1000 * (time.perf_counter() - begun))
    return (
        f"| `{name}` | {merged.merged} | {before / after:.2f} x | {best[0]:.1f} | {best[1]:.1f} | "
        f"{best[0] / best[1]:.2f} x |"
    )


def session(whole: Exported, size: int, path: Path) -> onnxruntime.InferenceSession:
    """The backbone's graph for one size, ready on one thread."""
    export_part(build_parts(whole, size, size)[0], whole.stride, 2, path, {})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def predict(net: nn.Module, size: int) -> float:
    """Seconds of a picture, from operations and bytes."""
    moved = 0

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (sum(value.numel() for value in inputs) + output.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in net.modules()
        if not list(module.children()) and not isinstance(module, _BatchNorm | nn.Identity)
    ]
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        net.forward_features(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return flops.get_total_flops() / (_GFLOPS * 1e9) + moved / (_GBYTES * 1e9)


if __name__ == "__main__":
    main()
