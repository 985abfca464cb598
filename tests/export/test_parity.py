"""Parity finds what is wrong: another scale, another picture, one position, one picture of many, an
overflow in fp16.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from contract.errors import Failure, UserError
from contract.golden import Golden
from contract.golden import compare as compare_golden
from contract.manifest import read_manifest
from contract.parity_record import ParityRecord
from distill.data.pictures import PackagedPhotos
from distill.methods.targets import FeatureNormalizer
from distill.models.preprocess import Preprocess
from distill.models.weights import tensors_sha256
from export.agreement import TOLERANCE, agreement, compare, exact_agreement, judge
from export.golden import let_through, not_exact
from export.graph import build_parts, open_student
from export.options import parse_sizes
from export.parity import check_sizes, measure
from export.photographs import shown
from export.precision import DTYPES, cast_student
from export.run import main
from export.runtimes.onnx import OnnxRuntime
from export.runtimes.openvino import OpenVINO
from tests.conftest import run_here


class Altered(OnnxRuntime):
    """The graphs' own outputs, one of them changed."""

    def __init__(self, files, output="", change=lambda value, image: value) -> None:
        super().__init__(files)
        self.output, self.change, self.image = output, change, None

    def run(self, graph, feeds):
        self.image = feeds.get("image", self.image)
        names = [port.name for port in self.sessions[graph].get_outputs()]
        values = super().run(graph, feeds)
        return [
            self.change(v, self.image) if n == self.output else v
            for n, v in zip(names, values, strict=True)
        ]


@pytest.fixture(scope="module")
def prove(small_bundle):
    """A function that compares the small bundle's graphs, one output changed, with its student;
    returns the rows.
    """
    manifest = read_manifest(small_bundle)
    files = {graph.name: small_bundle / graph.file for graph in manifest.graphs}
    student = open_student(small_bundle.parent / "run", view=manifest.view)
    parts, source = build_parts(student, 64, 64), PackagedPhotos()
    photos = [(source.name(number), source.load(number)) for number in range(7)]

    def prove(
        output="", change=lambda value, image: value, batches=(1, 3), sizes=((64, 64),)
    ) -> list[ParityRecord]:
        return measure(
            student, parts, [Altered(files, output, change)], photos, batches, sizes, "fp32"
        )

    return prove


def failed(rows: list[ParityRecord]) -> set[tuple[str, str]]:
    return {(row.graph, row.output) for row in rows if not row.passed}


def test_every_output_of_every_graph_agrees_on_every_picture(prove, small_bundle):
    rows = prove()
    manifest = read_manifest(small_bundle)
    assert failed(rows) == set()
    assert {(row.graph, row.output) for row in rows} == {
        (g.name, t.name) for g in manifest.graphs for t in g.outputs
    }
    assert {(row.batch, row.pictures) for row in rows} == {(3, 7), (1, 1)}, (
        "all in the largest batch, another for one"
    )
    first = {row.output: row for row in rows if row.batch == 3}
    assert first["spaces"].graph == "interaction" and first["dino_patches"].position_cosine > 0.9999
    assert first["dino_token"].position_cosine is None and first["dino_token"].centred > 0.99
    assert all(row.relative < 1e-4 for row in rows)


def test_an_output_three_times_too_large_fails_though_its_cosine_is_one(prove):
    rows = prove("depth", lambda value, image: 3 * value)
    assert failed(rows) == {("depth", "depth"), ("fused", "depth")}
    row = next(row for row in rows if not row.passed)
    assert (
        row.cosine > 0.99999
        and row.relative == pytest.approx(2, rel=1e-3)
        and "off by 2 of its length" in row.problem
    )


def test_a_fault_between_the_graphs_is_found_where_it_is(prove):
    rows = prove("spaces", lambda value, image: value * np.float32(1.01))
    first = next(row for row in rows if not row.passed)
    assert (first.graph, first.output) == ("interaction", "spaces")


def test_one_wrong_picture_of_many_is_found_and_named(prove, small_bundle):
    last = PackagedPhotos()
    image = shown(last.load(6), (64, 64), read_manifest(small_bundle).policy)

    def change(value: np.ndarray, images: np.ndarray) -> np.ndarray:
        hit = (images == image).all((1, 2, 3)).reshape(-1, *[1] * (value.ndim - 1))
        return np.where(hit, -value, value)

    rows = prove("cls_token", change)
    assert {(row.batch, row.worst_image) for row in rows if not row.passed} == {(3, last.name(6))}


def test_other_batches_are_compared_on_the_pictures_that_come_next(prove):
    rows = [
        row
        for row in prove(batches=(1, 2, 3))
        if row.output == "dino_token" and row.graph == "fused"
    ]
    assert [(row.batch, row.pictures) for row in rows] == [(3, 7), (1, 1), (2, 2)]
    name = PackagedPhotos().name  # nine in batches of three: the first two once more
    assert rows[1].worst_image == name(2) and rows[2].worst_image in (name(3), name(4))


def alike(apart: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [6, 400] that differ between pictures by a part of their length, and the same with
    noise.
    """
    random = np.random.default_rng(0)
    common = random.normal(size=400)
    wanted = common + apart * random.normal(size=(6, 400))
    return wanted, wanted + noise * random.normal(size=(6, 400))


def test_another_pictures_output_fails_where_pictures_tell_more_than_rounding():
    wanted, _ = alike(apart=0.02, noise=0)
    found = agreement(np.roll(wanted, 1, axis=0), wanted, wanted.mean(0))
    assert found.cosine.min() > 0.999 and found.relative.max() < 0.05, "neither sees it"
    assert "without the mean over pictures" in judge(found, "fp16")[1]
    assert (
        "without the mean over pictures"
        in judge(agreement(wanted * 0 + wanted.mean(0), wanted, wanted.mean(0)), "fp16")[1]
    )


def test_a_student_that_has_learnt_little_does_not_fail_for_the_noise_of_its_precision():
    wanted, got = alike(apart=0.01, noise=0.06)
    found = agreement(got, wanted, wanted.mean(0))
    assert found.centred.min() < 0.5, "recorded all the same"
    assert judge(found, "int8")[1] == ""


def test_one_wrong_position_is_recorded():
    wanted = np.random.default_rng(0).normal(size=(2, 500, 8))
    got = wanted.copy()
    got[1, 7] *= -1
    found = agreement(got, wanted, None)
    assert (
        found.cosine.min() > 0.99
        and found.position[0] == pytest.approx(1)
        and found.position[1] == pytest.approx(-1)
    )


def test_figures_by_hand():
    got, wanted = np.array([[3.0, 4], [0, 0], [np.nan, 1]]), np.array([[4.0, 3], [0, 0], [1, 1]])
    cosine, largest = compare(got, wanted)
    np.testing.assert_allclose(cosine, [0.96, 1.0, -1.0])
    assert largest[0] == 1
    found = agreement(got, wanted, np.array([2.0, 1.0]))
    np.testing.assert_allclose(found.relative[:2], [2**0.5 / 5, 0])
    np.testing.assert_allclose(found.centred, [(1 * 2 + 3 * 2) / (10**0.5 * 8**0.5), 1, -1])
    np.testing.assert_allclose(found.deviation[:1], [8**0.5 / 5])
    assert "NaN or infinity" in judge(found, "fp32")[1]


def test_compared_sizes_are_those_asked_and_what_they_could_hide_up_to_the_largest():
    assert check_sizes(16, [(64, 64)], dynamic=False) == [(64, 64)]
    found = check_sizes(16, [(64, 64), (128, 128), (32, 64)], dynamic=True)
    assert found == [(64, 64), (128, 128), (32, 64), (32, 128), (128, 64)]
    found = check_sizes(16, [(64, 64), (96, 64)], dynamic=True)
    assert found == [(64, 64), (96, 64), (80, 64)], (
        "not square, and none that an engine for these sizes refuses"
    )


def test_a_size_given_twice_is_one_size():
    assert parse_sizes(["64", "64x64"], 16, 224) == [(64, 64)]


def test_another_scale_that_is_let_through_is_no_other_direction(prove):
    ((name, bounds),) = let_through(prove("depth", lambda value, image: 3 * value), "fp32").items()
    assert name == "depth" and bounds == (
        pytest.approx(TOLERANCE["fp32"], abs=1e-5),
        pytest.approx(3.0, rel=1e-2),
    )


def test_one_photograph_in_a_batch_tells_nothing_apart(small_bundle):
    files = {graph.name: small_bundle / graph.file for graph in read_manifest(small_bundle).graphs}
    student, photo = open_student(small_bundle.parent / "run"), PackagedPhotos().load(0)
    rows = measure(
        student,
        build_parts(student, 64, 64),
        [OnnxRuntime(files)],
        [("a", photo)],
        [3],
        [(64, 64)],
        "fp32",
    )
    assert all(row.passed and row.centred is None and row.pictures == 1 for row in rows)


def test_a_student_that_says_nan_proves_nothing(small_bundle):
    files = {graph.name: small_bundle / graph.file for graph in read_manifest(small_bundle).graphs}
    student, photo = open_student(small_bundle.parent / "run"), PackagedPhotos().load(0)
    with torch.no_grad():
        next(student.deployment.student.parameters()).fill_(float("nan"))
    with pytest.raises(Failure, match="the student's own .* NaN or infinity"):
        measure(
            student,
            build_parts(student, 64, 64),
            [OnnxRuntime(files)],
            [("a", photo)],
            [1],
            [(64, 64)],
            "fp32",
        )


def test_a_graph_that_cannot_be_opened_is_one_line(small_bundle, tmp_path):
    (tmp_path / "backbone.onnx").write_bytes((small_bundle / "backbone.onnx").read_bytes()[:-1000])
    for runtime in (OnnxRuntime, OpenVINO):
        for name in ("backbone", "missing"):
            with pytest.raises(UserError, match=f"graph '{name}'") as caught:
                runtime({name: tmp_path / f"{name}.onnx"})
            assert "\n" not in str(caught.value)


def test_what_is_let_through_is_known_to_the_golden_set(prove):
    rows = prove(
        "depth",
        lambda value, image: value + np.eye(len(value), value.shape[1], dtype=np.float32) * 9,
    )
    allowed = let_through(rows, "fp32")
    worst = min(row.cosine for row in rows if row.output == "depth")
    far = max(row.relative for row in rows if row.output == "depth")
    assert set(allowed) == {"depth"}
    assert allowed["depth"] == (
        pytest.approx(1 - 1.5 * (1 - worst), abs=1e-6),
        pytest.approx(1.5 * far, rel=1e-2),
    )
    assert let_through(prove(), "fp32") == {} and not_exact(prove(), "fp32") == {}


@pytest.mark.parametrize("far", [0.004, 0.01, 0.02])
def test_what_agrees_in_float64_alone_is_served(prove, far):
    """Graph and student are off by as much, and not in the same direction."""
    random = np.random.default_rng(0)
    exact = random.normal(size=(3, 768))

    def off() -> np.ndarray:
        error = random.normal(size=exact.shape)
        lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in (exact, error)]
        error *= far * lengths[0] / lengths[1]
        return (exact + error).astype(np.float32)

    graph, student = off(), off()
    result = exact_agreement(graph, student, exact, exact.mean(0), "cls_token")
    assert judge(result, "fp32")[1] == ""
    row = next(row for row in prove() if row.output == "cls_token")
    found = {"cosine": float(result.cosine.min()), "relative": float(result.relative.max())}
    rows = [row.model_copy(update=found)]
    assert let_through(rows, "fp32") == {}
    golden = Golden(
        image=np.zeros((3, 8, 8, 3), np.uint8),
        outputs={"cls_token": student},
        bounds=(TOLERANCE["fp32"], 0.01),
        pictures=("a", "b", "c"),
        inexact=not_exact(rows, "fp32"),
    )
    assert compare_golden(golden, {"cls_token": graph}) == []
    (said,) = compare_golden(golden, {"cls_token": -graph})
    assert "not what was recorded" in said and "let it through" not in said


@pytest.mark.slow
def test_an_activation_beyond_the_range_of_fp16_fails_although_onnxruntime_sees_none(
    plain_run, tmp_path
):
    """What onnxruntime's CPU kernels compute in float32 overflows on a GPU: the cast student itself
    is run.
    """
    run = Path(shutil.copytree(plain_run, tmp_path / "run"))
    path, factors = (
        run / "student.safetensors",
        {"fc1.weight": 5e5, "fc1.bias": 5e5, "fc2.weight": 1e-2},
    )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    for name in [name for name in weights if name.startswith("student.") and ".mlp." in name]:
        weights[name] = weights[name] * factors.get(name.split(".mlp.")[1], 1)
    save_file(weights, path, metadata=metadata | {"sha256": tensors_sha256(weights)})
    wanted = (run, "--output", tmp_path / "b", "--precision", "fp16", "--max-batch", 2)
    done = run_here(*wanted, command=main)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.search(r"'backbone.*NaN or infinity.*torch-fp16-cpu", done.stderr)
    assert run_here(*wanted, "--allow-parity-failure", command=main).returncode == 0
    rows = read_manifest(tmp_path / "b").parity
    assert {row.runtime for row in rows} == {"onnxruntime-cpu (fp32 arithmetic)", "torch-fp16-cpu"}
    assert {row.runtime for row in rows if not row.passed} == {"torch-fp16-cpu"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_stays_in_float32_is_not_rounded_on_the_way(small_bundle, precision):
    student = open_student(small_bundle.parent / "run")
    for module in student.deployment.modules():
        if isinstance(module, FeatureNormalizer):
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(1.1, 1.2)
    cast = cast_student(student, precision)
    assert {parameter.dtype for parameter in cast.deployment.student.parameters()} == {
        DTYPES[precision]
    }
    kept = 0
    whole = student.deployment.folded()
    for before, after in zip(whole.modules(), cast.deployment.modules(), strict=True):
        if isinstance(before, Preprocess | FeatureNormalizer):
            for exact, found in zip(before.buffers(), after.buffers(), strict=True):
                assert found.dtype == exact.dtype and torch.equal(found, exact)
                kept += 1
    assert kept > 2
