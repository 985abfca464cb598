"""Which of timm's families work as student, teacher and export: docs/networks.md.

    python -m benchmarks.networks
    python -m benchmarks.networks --limit 45 --budget 480
    python -m benchmarks.networks --families levit hiera
    python -m benchmarks.networks --check levit hiera test_vit

Tries the smallest member of every family with random weights, each in a
process of its own, and every attempt for --limit seconds of CPU time. The page
is written after every family and says what is still to be tried, so that a
stopped run goes on where it was, with the smallest networks; of a page of
other versions of timm or torch nothing is kept. --families tries the given
ones again. --check tries families again and compares them with the page: exit
status 1 where they differ. With --quick exports are left out.

A student takes a step and has to answer to each corner of a picture in that
corner of its map, which tokens in another order do not. An export is compared
with torch in onnxruntime, at two sizes if it varies. Large networks are tried
with two blocks, where they can be built so.
"""

import argparse
import ast
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from torch import nn

from contract.errors import UserError, first_line
from contract.files import write_atomically
from distill.config import StudentConfig, TeacherConfig, TeacherRuntime
from distill.methods.deployment import Deployment
from distill.models.meta import building
from distill.models.preprocess import Preprocess
from distill.models.student import Student, create_timm
from distill.teachers import build_teacher
from export.graph import Student as Exported
from export.graph import build_parts
from export.merge import merge_branches
from export.to_onnx import export_part

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"

_SHORT: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": [1, 1, 1, 1]},
    {"depths": [1, 1, 1]},
    {},
)
"""Arguments that make a network small and leave its layout; the first that it takes is used."""

_SMALL = 8e6
"""Parameters up to which a network is tried as it is."""

_CANDIDATES = 16
"""Members of a family that are built, on the meta device, to find the smallest."""

_HINTS = ("test_", "nano", "atto", "tiny", "_xx", "_m0", "_s0", "_b0", "_t0", "_s", "_n")
"""Parts of the names of small members, the smallest first."""

_LATER = "not tried"
"""Stands in the page for an export that `--quick` left out."""

_HALF = (0.5, 0.5, 0.5)

_EXACT = 1e-3
"""Largest error of a graph, over the length of the output: the parity gate's for fp32."""

_HEADER = """\
# timm's networks

Made by `python -m benchmarks.networks`; do not edit. One member of every family of timm {timm},
random weights, torch {torch}. `yes`, or what the commands answer.

- **student**: takes a training step, and every corner of a picture shows in that corner of its map.
- **teacher**: gives a map and an image-level vector.
- **export**: its ONNX graph agrees with torch in onnxruntime, and can be served.
- **varying sizes**: the same graph takes other sizes that its stride divides, so that several
  `--resolutions` can be exported at once. `not done in N s`: tracing takes more CPU time.

A student's `summary` is its class token, or the mean of its map, as `forward_features` leaves it.
What runs in the classifier alone is no part of a student: where that holds the last norm (BEiT,
EVA, EVA-02, ConvNeXt, ViTs that timm pools by the mean, and all of "norm in the head" in
[Teachers](teachers.md)), summary and patches come without it, also from such weights, though a
teacher of the same file is read with it. Heads learn their own scale from what is there.

A network of one size whose stride does not divide it is listed with the pixels that each position
covers evenly: LeViT's stride is 64, but 4 positions cover 224 pixels.

Arguments in brackets made a large member small enough to be tried. Other members of a family may
differ in their `kwargs`; `python -m distill.run RECIPE --dry-run` answers for any of them before
anything is trained.

| family | member | student | stride | teacher | export | varying sizes |
|---|---|---|---|---|---|---|
"""


def smallest(family: str) -> str:
    """The member with the fewest parameters among those whose names promise few."""
    names = timm.list_models(module=family)

    def rank(name: str) -> tuple[int, str]:
        return next((n for n, hint in enumerate(_HINTS) if hint in name), len(_HINTS)), name

    sizes = {}
    for name in sorted(names, key=rank)[:_CANDIDATES]:
        with building():
            sizes[name] = count(create_timm(name))
    return min(sizes, key=sizes.__getitem__)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def try_family(family: str, limit: float, quick: bool) -> dict[str, Any]:
    """Everything the page says of a family; a reason in place of `yes` where something fails."""
    name = smallest(family)
    with building():
        net = create_timm(name)
    size = net.default_cfg["input_size"][-1]
    result: dict[str, Any] = {"family": family, "member": name}
    kwargs: dict[str, Any] = {}
    for kwargs in _SHORT if count(net) > _SMALL else ({},):
        try:
            with building():
                Student(StudentConfig(name=name, image_size=size, kwargs=kwargs))
            break
        except UserError as error:
            reason = str(error)
    result["kwargs"] = kwargs
    teacher = {"name": name, "role": "classification", "pretrained": False, "kwargs": kwargs}
    result["teacher"] = answer(
        lambda: build_teacher(TeacherConfig(**teacher), TeacherRuntime(precision="fp32"), 0), limit
    ).removeprefix(f"teacher 'classification': '{name}' ")
    torch.manual_seed(0)
    try:
        student = Student(StudentConfig(name=name, image_size=size, kwargs=kwargs))
        if size % student.stride:  # nothing is trained at such a size
            size -= size % student.stride
            student = Student(StudentConfig(name=name, image_size=size, kwargs=kwargs))
    except UserError as error:
        reason = str(error)
        return result | {"student": short(reason, name), "export": "-", "varying": "-"}
    result["stride"] = student.stride
    result["student"] = answer(lambda: train(student, size), limit)
    later = {"export": _LATER, "varying": _LATER}
    return result | (later if quick else export(student, size, limit))


def try_exports(known: dict[str, Any], limit: float) -> dict[str, Any]:
    """A family's results with the exports that `--quick` left out of them."""
    name, kwargs = known["member"], known["kwargs"]
    with building():
        size = create_timm(name).default_cfg["input_size"][-1]
    size -= size % known["stride"]
    torch.manual_seed(0)
    student = Student(StudentConfig(name=name, image_size=size, kwargs=kwargs)).eval()
    return known | export(student, size, limit)


class _Overtime(BaseException):
    """An attempt took too long. Not an Exception: torch.export answers these with another try."""


def answer(attempt: Callable[[], object], limit: float) -> str:
    """`yes`, or why the attempt failed; it has `limit` seconds of CPU time, which other processes
    do not use up.
    """

    def stop(number: int, frame: object) -> None:
        raise _Overtime

    signal.signal(signal.SIGXCPU, stop)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime + limit)
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    try:
        attempt()
    except _Overtime:
        return f"not done in {limit:g} s"
    except Exception as error:  # a page of what fails: whatever it is
        return first_line(error) or type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)
    return "yes"


def short(reason: str, name: str) -> str:
    return reason.removeprefix(f"student '{name}' ")


def train(student: Student, size: int) -> None:
    """One backward pass, and where the map answers; raises ValueError."""
    features = student.train()(torch.randn(2, 3, size, size))
    (features.patches.square().mean() + features.summary.square().mean()).backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ValueError(f"no gradient reaches {name}")
    student.eval()
    rows = features.patches.shape[1]
    if rows < 3:  # corners are neighbours of everything
        return
    with torch.inference_mode():
        picture = torch.randn(1, 3, size, size)
        before = student(picture).patches
        for top, left in ((0, 1), (1, 0)):
            changed, side = picture.clone(), 2 * student.stride
            place = (
                slice(0, side) if top == 0 else slice(size - side, size),
                slice(0, side) if left == 0 else slice(size - side, size),
            )
            changed[:, :, *place] = torch.randn(1, 3, side, side)
            moved = (student(changed).patches - before).norm(dim=-1)[0]
            corners = {
                (y, x): moved[(slice(0, 2), slice(-2, None))[y], (slice(0, 2), slice(-2, None))[x]]
                .mean()
                .item()
                for y in (0, 1)
                for x in (0, 1)
            }
            # attention without a residual connection spreads everything: then no corner stands out
            if max(corners.values()) > 1.5 * corners[top, left]:
                raise ValueError("a corner of the picture shows in another corner of its map")


def export(student: Student, size: int, limit: float) -> dict[str, str]:
    """Whether the backbone's graph agrees with torch, at one size and at two of varying ones."""
    preprocess = Preprocess(size, _HALF, _HALF)
    whole = Exported(
        None, Deployment(preprocess, student, nn.Identity(), {}), (), student.stride, ""
    )
    step = max(student.stride, size // 4 // student.stride * student.stride)
    other = (size - step, size)
    if answer(lambda: outputs(whole, [torch.zeros(1, *other, 3)]), limit) != "yes":
        varying = f"takes {size} px only"
    else:
        varying = answer(lambda: check_export(whole, [(size, size), other], varying=True), limit)
    if varying == "yes":
        return {"export": "yes", "varying": "yes"}
    return {
        "export": answer(lambda: check_export(whole, [(size, size)]), limit),
        "varying": varying,
    }


def outputs(whole: Exported, pictures: list[torch.Tensor]) -> list[np.ndarray]:
    """The student's own patches of uint8 pictures [B, H, W, 3]."""
    with torch.inference_mode():
        normalized = (
            whole.deployment.preprocess.normalize(picture.permute(0, 3, 1, 2) / 255)
            for picture in pictures
        )
        maps = [whole.deployment.student(pixels).patches for pixels in normalized]
    return [map_.flatten(1, 2).numpy() for map_ in maps]


def check_export(whole: Exported, sizes: list[tuple[int, int]], varying: bool = False) -> None:
    """Export the backbone and compare it at `sizes`; raises what torch does, or ValueError."""
    pictures = [torch.randint(256, (2, *size, 3), dtype=torch.uint8) for size in sizes]
    wanted = outputs(whole, pictures)
    merged = merge_branches(whole, sizes[0])
    part = build_parts(merged, *((None, None) if varying else sizes[0]))[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        export_part(part, whole.stride, 2, path, {})
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for picture, right in zip(pictures, wanted, strict=True):
            (got,) = session.run(["backbone_patches"], {"image": picture.numpy()})
            error = np.linalg.norm(got - right) / np.linalg.norm(right)
            if not error <= _EXACT:
                side = "x".join(map(str, picture.shape[1:3]))
                raise ValueError(
                    f"the graph is off by {error:.1e} of the output's length at {side}"
                )


def tried(
    families: list[str],
    limit: float,
    quick: bool = False,
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Results of families, each tried in a process of its own; those that are `known` lack exports
    alone.
    """
    # torch and the exporter's table of operators are loaded once, before processes are forked
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for family in families:
        begun = time.perf_counter()
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(family, limit, quick, known.get(family), sender)
        )
        child.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            child.join()
            reason = f"ended with status {child.exitcode}"
            result = {"family": family, "member": "-", "student": reason}
        child.join()
        print(f"{time.perf_counter() - begun:4.0f} s  {row(result)}", file=sys.stderr, flush=True)
        yield result


def _child(
    family: str, limit: float, quick: bool, known: dict[str, Any] | None, sender: Connection
) -> None:
    sender.send(try_exports(known, limit) if known else try_family(family, limit, quick))


def row(result: dict[str, Any]) -> str:
    """A family's line of the page."""
    given = ", ".join(f"{key}={value}" for key, value in result.get("kwargs", {}).items())
    member = f"`{result['member']}`" + (f" ({given})" if given else "")
    columns = [result["family"], member, result["student"], str(result.get("stride", "-"))]
    columns += [result.get(name, "-") for name in ("teacher", "export", "varying")]
    return "| " + " | ".join(column.replace("|", "/") for column in columns) + " |"


def cells(line: str) -> tuple[str, ...]:
    """What stands between the bars of a line of the page; an empty string first."""
    return tuple(line.split("|"))


def read_page(text: str) -> dict[str, dict[str, Any]]:
    """Results in the lines of a page by family; none of one by other versions."""
    if not text.startswith(_header()):
        return {}
    results = {}
    for line in text.removeprefix(_header()).splitlines():
        family, member, student, stride, teacher, exported, varying = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        name, given = re.fullmatch(r"`?([^`]*)`?(?: \((.*)\))?", member).groups()
        pairs = re.findall(r"(\w+)=(\[.*?\]|[^,]+)", given or "")
        kwargs = {key: ast.literal_eval(value) for key, value in pairs}
        result = {"family": family, "member": name, "kwargs": kwargs, "student": student}
        if stride != "-":
            result["stride"] = int(stride)
        results[family] = result | {"teacher": teacher, "export": exported, "varying": varying}
    return results


def _header() -> str:
    return _HEADER.format(timm=timm.__version__, torch=torch.__version__.split("+")[0])


def write_page(results: Mapping[str, dict[str, Any]]) -> None:
    """Write the page with a line to every family that was tried."""
    lines = [row(results[name]) for name in timm.list_modules() if name in results]
    text = _header() + "\n".join(lines) + "\n"
    write_atomically(PAGE, lambda temporary: temporary.write_text(text))


def smallest_first(families: list[str], known: Mapping[str, dict[str, Any]]) -> list[str]:
    """Families in the order of their members' parameters, those without a member last."""

    def size(family: str) -> float:
        if family not in known:
            return float("inf")
        with building():
            return count(create_timm(known[family]["member"], **known[family]["kwargs"]))

    return sorted(families, key=size)


def main() -> None:
    """Parse the command line; go on with the page, or compare families with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="try these (again)")
    parser.add_argument(
        "--quick", action="store_true", help="leave exports, most of the time, for a later run"
    )
    parser.add_argument("--check", nargs="+", metavar="FAMILY", help="compare these with the page")
    parser.add_argument(
        "--limit", type=float, default=120, metavar="S", help="CPU seconds for an attempt (120)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="S", help="begin no family after S CPU seconds"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    page = PAGE.read_text() if PAGE.exists() else ""
    if args.check:
        # without exports, the page's line up to them
        columns = 6 if args.quick else None
        lines = {cells(line)[:columns] for line in page.splitlines()}
        results = tried(args.check, args.limit, args.quick)
        sys.exit(any([cells(row(result))[:columns] not in lines for result in results]))
    known = read_page(page)
    half = {name: each for name, each in known.items() if each["export"] == _LATER}
    wanted = args.families or [
        *(name for name in timm.list_modules() if name not in known),
        *(() if args.quick else smallest_first(list(half), half)),
    ]
    if args.families:
        half = {}
    for result in tried(wanted, args.limit, args.quick, half):
        known[result["family"]] = result
        write_page(known)
        if args.budget and cpu_seconds() > args.budget:
            break


def cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    main()
