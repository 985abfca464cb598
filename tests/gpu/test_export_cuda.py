"""Exported graphs and engines on a GPU say what the student says; engines of TensorRT-RTX and, if
installed, of TensorRT.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from contract.errors import UserError
from contract.manifest import Manifest, read_manifest
from distill.data.pictures import PackagedPhotos
from export.agreement import TOLERANCE, compare
from export.bench.__main__ import main as bench
from export.check import main as check
from export.graph import build_parts, open_student
from export.parity import run_chain
from export.run import main as export
from export.runtimes.engine import EngineRuntime
from export.runtimes.onnx import CudaRuntime, OnnxRuntime, no_cuda_provider
from export.tensorrt import bindings as gpu
from export.tensorrt.build import inspect_engine
from tests.conftest import run_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, none is visible"
    ),
]
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def need_cuda_provider() -> None:
    """Skip a test where onnxruntime is not the one for GPUs."""
    if reason := no_cuda_provider():
        pytest.skip(reason)


def need_builder(flavour: str) -> None:
    """Skip a test where a TensorRT flavour is not installed or does not know this GPU."""
    trt = pytest.importorskip(MODULES[flavour], reason=f"{flavour} is not installed")
    try:
        gpu.targets(trt, flavour, ())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(small_bundle) -> Path:
    return small_bundle.parent / "run"


@pytest.fixture(scope="module", params=list(MODULES))
def built(request, run, tmp_path_factory) -> tuple[str, Path, Manifest]:
    """A flavour, and a bundle for varying sizes with its engines."""
    need_builder(request.param)
    folder = tmp_path_factory.mktemp("built") / "bundle"
    wanted = ("--formats", f"onnx,{request.param}", "--resolutions", 64, "96x128", "--max-batch", 4)
    done = run_here(run, "--output", folder, *wanted, command=export)
    assert done.returncode == 0, done.stderr
    return request.param, folder, read_manifest(folder)


def engines_of(folder: Path, manifest: Manifest) -> dict[str, Path]:
    return {entry.graph: folder / entry.file for entry in manifest.engines}


def photos(batch: int, height: int, width: int) -> np.ndarray:
    source = PackagedPhotos()
    return np.stack(
        [np.asarray(source.load(number).resize((width, height))) for number in range(batch)]
    )


def test_a_chain_of_graphs_says_the_same_in_the_cuda_provider_as_on_the_cpu(small_bundle, run):
    need_cuda_provider()
    files = {graph.name: small_bundle / graph.file for graph in read_manifest(small_bundle).graphs}
    parts = build_parts(open_student(run), 64, 64)
    for batch in (1, 3):
        here, there = (
            run_chain(kind(files), parts, photos(batch, 64, 64))
            for kind in (OnnxRuntime, CudaRuntime)
        )
        for graph, outputs in here.items():
            for name, value in outputs.items():
                cosine, _ = compare(there[graph][name], value)
                assert cosine.min() >= TOLERANCE["fp32"], (graph, name, batch)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_export_on_a_gpu_checks_the_cuda_provider_too(precision, run, photo_folder, tmp_path):
    need_cuda_provider()
    calibration = ("--calibration", photo_folder) if precision == "int8" else ()
    wanted = ("--precision", precision, "--max-batch", 3, *calibration)
    done = run_here(run, "--output", tmp_path / "b", *wanted, command=export)
    assert done.returncode == 0, done.stderr
    rows = read_manifest(tmp_path / "b").parity
    cpu = (
        {"onnxruntime-cpu (fp32 arithmetic)", "torch-fp16-cpu"}
        if precision == "fp16"
        else {"onnxruntime-cpu"}
    )
    assert {row.runtime for row in rows} == {*cpu, "onnxruntime-cuda"}
    assert {row.batch for row in rows if row.runtime == "onnxruntime-cuda"} == {1, 3}
    assert "parity with the torch student in onnxruntime-cuda" in done.stdout


def test_bf16_is_checked_in_the_cuda_provider_or_left_out_with_a_reason(run, tmp_path):
    need_cuda_provider()
    done = run_here(
        run, "--output", tmp_path / "b", "--precision", "bf16", "--max-batch", 2, command=export
    )
    assert done.returncode == 0, done.stderr
    found = {row.runtime for row in read_manifest(tmp_path / "b").parity}
    left_out = "not checked in onnxruntime-cuda: graph" in done.stdout
    cpu = {"openvino-cpu (fp32 arithmetic)", "torch-bf16-cpu"}
    assert found == (cpu if left_out else {*cpu, "onnxruntime-cuda"})


def test_engines_are_compared_with_the_student_at_several_batches_and_sizes(built):
    flavour, folder, manifest = built
    rows = [row for row in manifest.parity if row.runtime == flavour]
    assert {row.graph for row in rows} == {graph.name for graph in manifest.graphs}
    assert {row.batch for row in rows} == {1, 3, 4}
    assert {(row.height, row.width) for row in rows} == {(64, 64), (96, 128), (64, 128), (96, 64)}
    assert all(row.passed and row.cosine >= TOLERANCE["fp32"] for row in rows)
    assert run_here(folder, command=check).returncode == 0


def test_engines_say_what_the_graphs_say(built, run):
    flavour, folder, manifest = built
    runtime = EngineRuntime(engines_of(folder, manifest))
    assert runtime.name == flavour
    graphs = OnnxRuntime({graph.name: folder / graph.file for graph in manifest.graphs})
    parts = build_parts(open_student(run), None, None)
    for batch in (1, 3):
        for height, width in ((64, 64), (96, 128)):
            image = photos(batch, height, width)
            wanted = run_chain(graphs, parts, image)
            for graph, outputs in run_chain(runtime, parts, image).items():
                for name, value in outputs.items():
                    assert value.shape == wanted[graph][name].shape
                    cosine, _ = compare(value, wanted[graph][name])
                    assert cosine.min() >= TOLERANCE["fp32"], (graph, name, batch, height, width)


def test_engines_open_with_the_inputs_and_outputs_of_their_records(built):
    _, folder, manifest = built
    for engine in engines_of(folder, manifest).values():
        assert inspect_engine(engine).deserialised


def test_bound_inputs_of_several_shapes_may_take_turns_on_one_engine(built):
    _, folder, manifest = built
    runtime = EngineRuntime({"backbone": engines_of(folder, manifest)["backbone"]})
    bound = [
        runtime.bind("backbone", {"image": photos(*shape)})
        for shape in ((4, 64, 64), (1, 64, 64), (2, 96, 128))
    ]
    for place in (0, 1, 2, 0):
        bound[place].call()
    many, one, wide = (each.read()[0] for each in bound)
    assert (len(many), len(one), len(wide)) == (4, 1, 2)
    assert compare(one, many[:1])[0].min() >= TOLERANCE["fp32"]


def test_inputs_beyond_the_profile_are_one_line(built):
    _, folder, manifest = built
    runtime = EngineRuntime({"backbone": engines_of(folder, manifest)["backbone"]})
    for shape in ((5, 64, 64), (1, 32, 64)):
        with pytest.raises(UserError, match="the engine takes 'image' from .* to ") as caught:
            runtime.run("backbone", {"image": photos(*shape)})
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("flavour", list(MODULES))
def test_engines_of_smaller_types_pass_parity(flavour, precision, run, photo_folder, tmp_path):
    need_builder(flavour)
    calibration = ("--calibration", photo_folder) if precision == "int8" else ()
    wanted = (
        "--precision",
        precision,
        "--formats",
        f"onnx,{flavour}",
        "--max-batch",
        3,
        *calibration,
    )
    done = run_here(run, "--output", tmp_path / "b", *wanted, command=export)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_manifest(tmp_path / "b").parity if row.runtime == flavour]
    assert rows and all(row.passed for row in rows)


def test_the_bench_has_rows_of_every_runtime_on_the_gpu(built, run, tmp_path):
    flavour, folder, manifest = built
    wanted = (
        "--run",
        run,
        "--graphs",
        "fused",
        "head_dino",
        "--batches",
        1,
        8,
        "--rounds",
        3,
        "--no-compile",
    )
    done = run_here(folder, *wanted, "--devices", "cuda", "--output", tmp_path, command=bench)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    usual = {"torch eager fp32 cuda", "torch autocast fp16 cuda"}
    usual |= set() if no_cuda_provider() else {"onnxruntime fp32 cuda"}
    for graph in ("fused", "head_dino"):
        names = {
            batch: {r["runtime"] for r in rows if (r["graph"], r["batch"]) == (graph, batch)}
            for batch in (1, 8)
        }
        assert names == {1: usual | {f"{flavour} fp32"}, 8: usual}, "engines take --max-batch 4"
    assert "left out  " in done.stdout and "the engine takes" in done.stdout
    assert all(row["agrees"] for row in rows) and all(row["device"] == "cuda" for row in rows)
