"""`python -m export.bench`: every runtime beside torch on the same photographs, and no speed bought
by wrongness.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from contract.gpu import compute_capabilities
from contract.manifest import MANIFEST, add_files, read_manifest
from export.bench.__main__ import main as bench
from export.bench.timing import Feeds, fastest
from export.runtimes.base import Bound
from export.runtimes.onnx import OnnxRuntime
from tests.conftest import run_here

QUICK = ("--rounds", 2, "--threads", 1, "--devices", "cpu", "--no-compile")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """So that settings and heads are on one line."""
    monkeypatch.setenv("COLUMNS", "300")


def time(*arguments: object) -> subprocess.CompletedProcess:
    """Run the bench in this process, where torch.compile would leave its own signal stacks
    behind.
    """
    return run_here(*arguments, *QUICK, command=bench)


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "bench.json").read_text())["rows"]


def changed(bundle: Path, folder: Path, **changes: object) -> Path:
    """A copy of a bundle whose manifest says something else."""
    copy = Path(shutil.copytree(bundle, folder))
    manifest = read_manifest(copy).model_copy(update=changes).sealed()
    (copy / MANIFEST).write_bytes(manifest.to_bytes())
    return copy


@pytest.fixture(scope="module")
def other(small_bundle, tmp_path_factory) -> Path:
    """A bundle of another student."""
    student = read_manifest(small_bundle).student.model_copy(update={"sha256": "0" * 64})
    return changed(small_bundle, tmp_path_factory.mktemp("other") / "bundle", student=student)


@pytest.mark.slow
def test_every_runtime_is_timed_beside_torch_and_compared_with_it(small_bundle, tmp_path):
    wanted = ("--batches", 1, 6, "--graphs", "backbone", "head_dino", "segmentation", "fused")
    done = time(small_bundle, "--run", small_bundle.parent / "run", *wanted, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert {(row["graph"], row["batch"]) for row in rows} == {
        (graph, batch)
        for graph in ("backbone", "head_dino", "segmentation", "fused")
        for batch in (1, 6)
    }, "batch 6 though the bundle was exported with --max-batch 4"
    assert {row["runtime"] for row in rows} == {
        "torch eager fp32",
        "onnxruntime fp32",
        "openvino fp32",
    }
    for row in rows:
        base = next(
            r
            for r in rows
            if r["runtime"] == "torch eager fp32"
            and all(r[k] == row[k] for k in ("graph", "batch"))
        )
        assert row["speedup"] == pytest.approx(base["p50_ms"] / row["p50_ms"])
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
        assert row["p99_ms"] >= row["p50_ms"]
        assert row["cosine"] > 0.99999 and row["agrees"]
        assert "1 thread" in row["settings"]
    assert "BELOW" not in done.stdout and "least cosine" in done.stdout
    line = next(
        line
        for line in done.stdout.splitlines()
        if line.startswith("timing    head_dino, batch 6: ")
    )
    assert "onnxruntime fp32: optimisation" in line and "openvino fp32: hint" in line
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_backbone_interaction_heads_and_fused_are_timed_unless_others_are_asked_for(
    small_bundle, tmp_path
):
    done = time(small_bundle, "--batches", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert list(dict.fromkeys(row["graph"] for row in rows)) == [
        "backbone",
        "interaction",
        "head_cls",
        "head_mae",
        "head_dino",
        "fused",
    ]
    assert all(row["speedup"] is None and row["cosine"] is None for row in rows), (
        "without --run there is no torch"
    )


def test_rows_that_do_not_say_what_torch_says_are_marked(small_bundle, tmp_path):
    copy = Path(shutil.copytree(small_bundle, tmp_path / "copy"))
    model = onnx.load(copy / "head_mae.onnx")
    weights = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(weights)
    weights.CopyFrom(numpy_helper.from_array(values[::-1].copy(), weights.name))
    onnx.save(model, copy / "head_mae.onnx")
    wanted = ("--batches", 1, "--graphs", "head_mae", "head_cls")
    done = time(copy, *wanted, "--output", tmp_path)
    assert done.returncode == 2 and "head_mae.onnx: does not match its sha256" in done.stderr
    add_files(copy, ["head_mae.onnx"])
    done = time(copy, "--run", small_bundle.parent / "run", *wanted, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = {(row["graph"], row["runtime"]) for row in rows_of(tmp_path) if not row["agrees"]}
    assert wrong == {("head_mae", "onnxruntime fp32"), ("head_mae", "openvino fp32")}
    assert done.stdout.count("BELOW 0.99999: ") == 2


def test_heads_are_fed_what_the_graphs_before_them_say(small_bundle):
    manifest = read_manifest(small_bundle)
    feeds = Feeds(small_bundle, manifest, ["head_cls"])
    assert [record.name for record in feeds.before] == ["backbone", "interaction"]
    known = feeds.of(3)
    assert known["image"].shape == (3, 64, 64, 3) and known["image"].dtype == np.uint8
    backbone = OnnxRuntime({"backbone": small_bundle / "backbone.onnx"})
    names = [tensor.name for tensor in manifest.graph("backbone").outputs]
    wanted = dict(zip(names, backbone.run("backbone", {"image": known["image"]}), strict=True))
    np.testing.assert_allclose(known["features"], wanted["features"], atol=1e-5)
    assert known["spaces"].shape[0] == 3
    assert Feeds(small_bundle, manifest, ["fused"]).before == [], "nothing comes before it"


def test_the_fastest_setting_is_used():
    calls = {"slow": 0, "fast": 0}

    def make(name: str, loops: int):
        def call() -> None:
            calls[name] += 1
            sum(range(loops))

        return lambda: Bound(call, lambda: [np.array([loops])])

    setting, bound = fastest({"slow": make("slow", 1_000_000), "fast": make("fast", 10)})
    assert setting == "fast" and bound.read()[0] == 10
    assert calls["slow"] == calls["fast"] > 1, "each has a call that does not count"


def test_torchs_threads_are_as_before(small_bundle, tmp_path):
    wanted = (
        "--graphs",
        "head_mae",
        "--batches",
        1,
        "--run",
        small_bundle.parent / "run",
        "--output",
        tmp_path,
    )
    before = torch.get_num_threads()
    assert (
        run_here(small_bundle, *wanted, *QUICK, "--threads", before + 1, command=bench).returncode
        == 0
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rounds", "0"), "--rounds 0"),
        (("--batches", "4", "0"), "--batches 0"),
        (("--threads", "0"), "--threads 0"),
        (("--graphs", "nothing"), "has no graph 'nothing'"),
        (("OTHER", "--run", "RUN"), "its student is not the bundle's"),
        (("BUNDLE", "OTHER"), "holds another student"),
        (("BUNDLE", "SAME"), "are both fp32"),
        (("BUNDLE", "LARGER"), "is for 96x64"),
    ],
)
def test_mistakes_are_one_line(small_bundle, other, tmp_path, arguments, words):
    resolution = read_manifest(small_bundle).resolution.model_copy(update={"height": 96})
    stand_ins = {"BUNDLE": small_bundle, "RUN": small_bundle.parent / "run", "OTHER": other}
    if "SAME" in arguments:
        stand_ins["SAME"] = Path(shutil.copytree(small_bundle, tmp_path / "same"))
    if "LARGER" in arguments:
        stand_ins["LARGER"] = changed(
            small_bundle, tmp_path / "larger", resolution=resolution, precision="fp16"
        )
    given = [stand_ins.get(argument, argument) for argument in arguments]
    first = () if arguments[0] in stand_ins else (small_bundle,)
    done = run_here(*first, *given, "--no-compile", "--output", tmp_path / "out", command=bench)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(bool(compute_capabilities()), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_one_line(small_bundle):
    done = run_here(small_bundle, "--devices", "cuda", command=bench)
    assert (
        done.returncode == 2
        and "no CUDA GPU is visible here" in done.stderr
        and done.stderr.count("\n") == 1
    )
