"""How a bundle is made, top to bottom: parts, graphs, parity, engines, manifest, and the rename."""

import datetime
import logging
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime
import timm
import torch

from contract.engine_record import EngineOptions
from contract.errors import Failure, UserError
from contract.files import file_sha256
from contract.manifest import (
    MANIFEST,
    CalibrationRecord,
    DetectorRecord,
    Manifest,
    Precision,
    Preprocessing,
    Resolution,
    StudentRecord,
)
from contract.parity_record import ParityRecord
from contract.signature import FUSED
from contract.signing import write_signature
from contract.tables import print_table
from distill.runs import git_commit
from export.compose import write_fused
from export.describe import describe_graph, describe_teacher, licence_of
from export.golden import write_golden
from export.graph import Student, build_parts, open_student
from export.int8 import prepare, quantize_graphs
from export.merge import merge_branches
from export.modules import Part
from export.options import CalibrationMethod, ExportOptions, parse_sizes
from export.output import appearing
from export.parity import check_sizes, engine_sizes, measure
from export.photographs import Chosen, Photos, choose, choose_for_int8, digest
from export.precision import cast_student
from export.runtimes.available import cpu_runtime, runtimes_here
from export.runtimes.base import Exported, Runtime
from export.runtimes.openvino import OpenVINO
from export.tensorrt.engines import build_all
from export.to_onnx import OPSET, export_part

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from export.detector import Detector

log = logging.getLogger(__name__)


def assemble(
    options: ExportOptions,
    engine_options: Sequence[EngineOptions],
    place: Path,
    key: "Ed25519PrivateKey | None" = None,
) -> Manifest:
    """Make the bundle of `options` beside its `place`, sign it if there is a key, and rename it;
    nothing is left of a failed or stopped export.

    Raises UserError for what the user can correct and Failure where graphs disagree with the
    student.
    """
    start = time.perf_counter()
    # the runtime that will check the graphs must be installed: not to be discovered minutes later
    cpu_runtime({}, options.precision)
    student = open_student(options.run, options.checkpoint, options.trust_code, options.view)
    own = student.run.recipe.student.image_size
    sizes = parse_sizes(options.resolutions, student.stride, own)
    if options.detector and len(sizes) > 1:
        raise UserError(
            f"--detector {options.detector}: its graphs take pictures of one size: give one "
            "--resolutions"
        )
    detector = None
    if options.detector:
        from export.detector import open_detector  # with scipy and transformers: a second or more

        detector = open_detector(options.detector, student)
    if options.precision == "int8":
        folder, count = options.calibration_folder, options.calibration_images
        chosen = choose_for_int8(options.images, folder, count, sizes)
    else:
        chosen = choose(options.images, sizes)
    with appearing(options.output, place, options.force) as aside:
        manifest = _fill(options, engine_options, student, detector, sizes, chosen, aside).sealed()
        (aside / MANIFEST).write_bytes(manifest.to_bytes())
        if key:
            write_signature(aside, manifest.to_bytes(), key)
    log.info(
        "bundle    %s, %d graphs, %.1f MB, %.0f s",
        options.output,
        len(manifest.graphs),
        sum((place / name).stat().st_size for name in manifest.files) / 1e6,
        time.perf_counter() - start,
    )
    return manifest


def _fill(
    options: ExportOptions,
    engine_options: Sequence[EngineOptions],
    student: Student,
    detector: "Detector | None",
    sizes: list[tuple[int, int]],
    chosen: Chosen,
    folder: Path,
) -> Manifest:
    """Write every file of the bundle but the manifest, and return that."""
    precision, max_batch = options.precision, options.max_batch
    dynamic, photos = len(sizes) > 1, chosen.compared
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    # parity compares with the student as it was trained, unmerged
    cast = cast_student(merge_branches(student, sizes[0]), precision)
    parts = build_parts(cast, None if dynamic else height, None if dynamic else width)
    recipe = student.run.recipe
    about = {"method": recipe.method, "student": recipe.student.name, "precision": precision}
    paths = {part.signature.graph: folder / f"{part.signature.graph}.onnx" for part in parts}
    labels = [teacher.label for teacher in recipe.teachers]
    about["licences"] = "; ".join(f"{n}: {licence_of(n, student) or 'unknown'}" for n in labels)
    facts = {
        part.signature.graph: about
        | {"graph": part.signature.graph}
        | {k: str(v) for k, v in part.about.items()}
        for part in parts
    }
    opset, own = OPSET[precision], [part for part in parts if part.signature.graph != FUSED]
    for part in own:
        begun, graph = time.perf_counter(), part.signature.graph
        export_part(part, student.stride, max_batch, paths[graph], facts[graph], opset)
        _tell_graph(paths[graph], begun)
    record = (
        _calibrate(options.calibration_method, own, paths, sizes, chosen, student)
        if precision == "int8"
        else None
    )
    begun = time.perf_counter()
    write_fused(parts, paths, facts[FUSED], opset)
    _tell_graph(paths[FUSED], begun)
    checked = check_sizes(student.stride, sizes, dynamic)
    prove = partial(
        _prove, student, parts, photos, precision, max_batch, options.allow_parity_failure
    )
    exported = Exported(precision, graphs=paths, parts=parts)
    faster = OpenVINO.faster(exported)
    parity = prove(runtimes_here(exported), checked, faster)
    served = {row.runtime for row in parity} & {runtime.name for runtime in faster}
    engines = build_all(engine_options, parts, paths, sizes, student.stride, max_batch, folder)
    by_flavour: dict[str, dict[str, Path]] = {}
    for entry in engines:
        by_flavour.setdefault(entry.flavour, {})[entry.graph] = folder / entry.file
    built = runtimes_here(Exported(precision, engines=by_flavour))
    parity += prove(built, engine_sizes(sizes))
    write_golden(folder, student, parts, photos, (height, width), max_batch, precision, parity)
    detection = None
    if detector:
        detection, rows = _add_detector(
            detector, student, parts, photos, sizes[0], options, folder, about
        )
        parity += rows
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
        precision=precision,
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
        view=str(student.view),
        max_batch=max_batch,
        graphs=tuple(describe_graph(part, paths, precision) for part in parts),
        engines=tuple(engines),
        parity=tuple(parity),
        calibration=record,
        detector=detection,
        openvino_precision="bf16" if served else "f32",
        licences=student.run.licences,
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


def _tell_graph(path: Path, begun: float) -> None:
    log.info(
        "graph     %-16s %6.1f MB  %4.1f s",
        path.stem,
        path.stat().st_size / 1e6,
        time.perf_counter() - begun,
    )


def _calibrate(
    method: CalibrationMethod,
    parts: list[Part],
    paths: dict[str, Path],
    sizes: list[tuple[int, int]],
    chosen: Chosen,
    student: Student,
) -> CalibrationRecord:
    """Turn the graphs of `parts` into their int8 form; returns what its ranges are from."""
    images = prepare([photo for _, photo in chosen.calibration], sizes, student.view)
    others = "others" if chosen.held_out else "what may be the same"
    log.info(
        "pictures  calibrated on %d of %s, compared on %d, %s",
        len(images),
        chosen.source,
        len(chosen.compared),
        others,
    )
    quantize_graphs(parts, paths, method, images)
    return CalibrationRecord(
        method=method,
        source=chosen.source,
        pictures=len(images),
        sizes=tuple(sizes[: len(images)]),
        held_out=chosen.held_out,
        sha256=digest(images),
    )


def _prove(
    student: Student,
    parts: list[Part],
    photos: Photos,
    precision: Precision,
    max_batch: int,
    allow_failure: bool,
    runtimes: list[Runtime],
    sizes: list[tuple[int, int]],
    faster: Sequence[Runtime] = (),
) -> list[ParityRecord]:
    """Compare the graphs in every runtime with the student and print the worst of each output.

    A `faster` runtime in which they differ, or that breaks, is left out. Raises Failure where
    they differ in another, unless that is allowed.
    """
    if not runtimes:
        return []
    batches = sorted({1, min(3, max_batch), max_batch})
    compare = partial(
        measure,
        student,
        parts,
        photos=photos,
        batches=batches,
        sizes=sizes,
        precision=precision,
    )
    try:
        rows = compare(runtimes=[*runtimes, *faster])
    except UserError as error:
        if not faster:
            raise
        rows = compare(runtimes=runtimes)  # the complaint may be one of these
        log.info("openvino  computes in float32: in bf16, %s", error)
    for name in [runtime.name for runtime in faster]:
        wrong = [row for row in rows if row.runtime == name and not row.passed]
        if wrong:
            output, problem = wrong[0].output, wrong[0].problem
            log.info("openvino  computes in float32: in bf16 '%s' would have %s", output, problem)
            rows = [row for row in rows if row.runtime != name]
    _judge(rows, precision, allow_failure)
    return rows


def _add_detector(
    detector: "Detector",
    student: Student,
    parts: list[Part],
    photos: Photos,
    size: tuple[int, int],
    options: ExportOptions,
    folder: Path,
    about: dict[str, str],
) -> tuple[DetectorRecord, list[ParityRecord]]:
    """Write the detector's graphs and vocabulary; returns what the manifest says of them, and of
    their agreement with torch.
    """
    from export.detector import describe, make_parts, write_graphs
    from export.detector_parity import compare_detector

    begun = time.perf_counter()
    graphs = make_parts(detector, student, parts, size)
    paths = write_graphs(graphs, student.stride, options.max_batch, folder, about)
    for graph, path in paths.items():
        log.info("graph     %-16s %6.1f MB", graph, path.stat().st_size / 1e6)
    rows = compare_detector(
        detector, student, parts, graphs, paths, photos, size, options.max_batch
    )
    _judge(rows, "fp32", options.allow_parity_failure)
    record = describe(detector, graphs, paths, folder)
    log.info("detector  %s, %.0f s", record.source, time.perf_counter() - begun)
    return record, rows


def _judge(rows: list[ParityRecord], precision: Precision, allow_failure: bool) -> None:
    """Print the worst of each output in each runtime; raises Failure where one is wrong, unless
    that is allowed.
    """
    for runtime in dict.fromkeys(row.runtime for row in rows):
        _print_parity([row for row in rows if row.runtime == runtime], runtime)
    failed = sorted((row for row in rows if not row.passed), key=lambda row: row.cosine)
    if failed and not allow_failure:
        worst = failed[0]
        raise Failure(
            f"graph '{worst.graph}', output '{worst.output}', picture {worst.worst_image}: "
            f"{worst.problem} for {precision}, in {worst.runtime} at batch {worst.batch}, "
            f"{worst.height}x{worst.width} ({len(failed)} of {len(rows)} comparisons); nothing "
            "was written (--allow-parity-failure records it instead)"
        )


def _print_parity(rows: list[ParityRecord], runtime: str) -> None:
    """Print the worst agreement of every output over all batches and sizes."""
    most = max(row.pictures for row in rows)
    title = f"parity with the torch student in {runtime}, {most} pictures"
    heads = ("graph, output", "cosine", "off by", "centred", "position", "far", "1-NN", "")
    table, seen = [], set()
    groups: dict[tuple[str, str], list[ParityRecord]] = {}
    for row in rows:
        groups.setdefault((row.graph, row.output), []).append(row)
    for (graph, output), result in groups.items():
        verdict = "ok" if all(row.passed for row in result) else "FAILED"
        centred, nearest = (
            min((v for row in result if (v := getattr(row, name)) is not None), default=None)
            for name in ("centred", "nearest")
        )
        places = [row for row in result if row.position_error is not None]
        if graph not in seen:  # a line of its own, so that names of outputs fit beside the numbers
            seen.add(graph)
            table.append((graph, *[""] * (len(heads) - 1)))
        cells = (
            f"  {output}",
            f"{min(row.cosine for row in result):.6f}",
            f"{max(row.relative for row in result):.1e}",
            "-" if centred is None else f"{centred:.4f}",
            f"{max(row.position_error for row in places):.1e}" if places else "-",
            f"{max(row.positions_beyond for row in places)}" if places else "-",
            "-" if nearest is None else f"{nearest:.3f}",
            verdict,
        )
        table.append(cells)
    print_table(heads, table, title=title)
