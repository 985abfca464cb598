"""int8: what it is calibrated on, ranges, `fused` made of the other graphs; and weights outside the
file, in all precisions.
"""

import itertools
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector
from PIL import Image

from contract.errors import Failure
from contract.manifest import read_manifest
from export import to_onnx
from export.check import main as check
from export.graph import build_parts, open_student
from export.int8 import (
    METHODS,
    SMALLEST,
    Ranges,
    activations,
    insert,
    left_alone,
    prepare,
    smallest_side,
)
from export.options import PACKAGED
from export.parity import run_chain
from export.photographs import choose, choose_for_int8, digest
from export.run import main
from export.runtimes.onnx import OnnxRuntime
from tests.conftest import run_here

SIZES = [(64, 64)]


@pytest.fixture(scope="module")
def run(small_bundle) -> Path:
    return small_bundle.parent / "run"


@pytest.fixture(scope="module")
def bundle(expensive, run, photo_folder, tmp_path_factory) -> Path:
    """An int8 bundle of varying sizes, calibrated and compared on one folder."""
    folder = tmp_path_factory.mktemp("int8") / "b"
    pictures = ("--calibration", photo_folder, "--images", photo_folder, "--calibration-images", 4)
    done = run_here(
        run,
        "--output",
        folder,
        "--precision",
        "int8",
        "--resolutions",
        64,
        "96x64",
        "--max-batch",
        4,
        *pictures,
        command=main,
    )
    assert done.returncode == 0, done.stderr
    assert "calibrated on 4 of photos" in done.stdout and "compared on 6, others" in done.stdout
    return folder


def test_one_folder_for_both_is_shared_out_and_taken_from_evenly(photo_folder):
    found = choose_for_int8(photo_folder, photo_folder, 4, SIZES)
    names = [name for name, _ in found.calibration]
    assert names == ["even/00.jpg", "even/04.jpg", "odd/01.jpg", "odd/05.jpg"], (
        "not the first class alone"
    )
    assert found.held_out and not set(names) & {name for name, _ in found.compared}
    assert len(found.compared) == 6 and found.source == photo_folder.name


def test_packaged_photographs_are_shared_out_too_and_another_folder_is_not(photo_folder):
    both = choose_for_int8(None, None, 64, SIZES)
    assert len(both.calibration) == 10 and len(both.compared) == 9 and both.source == PACKAGED
    apart = choose_for_int8(None, photo_folder, 64, SIZES)
    assert apart.held_out and len(apart.calibration) == 12 and len(apart.compared) == 19
    inside = choose_for_int8(photo_folder, photo_folder / "odd", 64, SIZES)
    assert not inside.held_out
    assert choose(None, SIZES).calibration == []


def test_the_same_pictures_under_other_names_are_not_held_out(photo_folder, tmp_path):
    for number, path in enumerate(sorted(photo_folder.rglob("*.jpg"))[:3]):
        (tmp_path / f"{number}.jpg").symlink_to(path)
    assert not choose_for_int8(photo_folder, tmp_path, 64, SIZES).held_out


def test_large_photographs_are_not_kept_whole(tmp_path):
    Image.effect_noise((4000, 3000), 50).convert("RGB").save(tmp_path / "large.jpg")
    ((_, picture),) = choose(tmp_path, [(64, 64), (96, 64)]).compared
    assert picture.size == (1334, 1000), "two megapixels, or twice what is asked for"


def test_the_manifest_says_what_it_was_calibrated_on(bundle, photo_folder):
    record = read_manifest(bundle).calibration
    assert (record.method, record.source, record.pictures, record.held_out) == (
        "percentile",
        photo_folder.name,
        4,
        True,
    )
    assert record.sizes == ((64, 64), (96, 64))
    chosen = choose_for_int8(photo_folder, photo_folder, 4, record.sizes)
    assert record.sha256 == digest(
        prepare(
            [photo for _, photo in chosen.calibration], record.sizes, read_manifest(bundle).policy
        )
    )
    assert all(row.pictures <= 6 for row in read_manifest(bundle).parity)


def test_all_sizes_asked_for_take_turns(photo_folder):
    photos = [photo for _, photo in choose(None, SIZES).compared[:3]]
    assert [image.shape for image in prepare(photos, [(64, 64), (96, 32)])] == [
        (1, 64, 64, 3),
        (1, 96, 32, 3),
        (1, 64, 64, 3),
    ]


def test_fused_says_what_the_other_graphs_say(bundle, run):
    parts = build_parts(open_student(run), None, None)
    runtime = OnnxRuntime(
        {part.signature.graph: bundle / f"{part.signature.graph}.onnx" for part in parts}, "basic"
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), dtype=np.uint8)
    found = run_chain(runtime, parts, images)
    alone = {name: value for graph in list(found)[:-1] for name, value in found[graph].items()}
    for name, value in found["fused"].items():
        np.testing.assert_allclose(value, alone[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_only_what_matrices_read_is_quantised_and_every_weight_is_kept_once(bundle):
    model = onnx.load(bundle / "fused.onnx")
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    said = [
        readers[node.output[0]] for node in model.graph.node if node.op_type == "DequantizeLinear"
    ]
    assert said and all(kinds <= {"MatMul", "Gemm", "Conv"} for kinds in said)
    large = [
        (t.data_type, tuple(t.dims), t.raw_data)
        for t in model.graph.initializer
        if len(t.raw_data) > 1000
    ]
    assert len(large) == len(set(large)), (
        "segmentation repeats dino's head: its weights must not lie there twice"
    )
    assert {p.key: p.value for p in model.metadata_props}["graph"] == "fused"
    assert model.doc_string == "" and not any(node.doc_string for node in model.graph.node)


def test_what_two_graphs_compute_is_computed_once(bundle):
    """Segmentation reads dino's output and holds dino's head."""
    kinds = ("MatMul", "Gemm", "Conv")
    graphs = {path.stem: onnx.load(path).graph for path in bundle.glob("*.onnx")}
    count = {name: sum(n.op_type in kinds for n in graph.node) for name, graph in graphs.items()}
    own = sum(value for name, value in count.items() if name not in ("fused", "segmentation"))
    # that of its space: four linear maps and two products of attention, and the read-out
    assert count["head_dino"] == 6 + 2 and count["segmentation"] == count["head_dino"], count
    assert count["fused"] == own + 1, "its classifier alone is new"
    read = {name for node in graphs["fused"].node for name in node.input}
    made = {name for node in graphs["fused"].node for name in node.output}
    assert made <= read | {value.name for value in graphs["fused"].output}


def test_what_is_the_same_for_every_picture_stays_in_float(bundle):
    """A ViT's position embedding is resampled by matrix products, from the picture's size alone."""
    model = onnx.load(bundle / "backbone.onnx")
    products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    alone = [
        name
        for name in left_alone(model)
        if name in products and smallest_side(products[name], {}) > SMALLEST
    ]
    assert len(alone) == 2
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert not any(rounded.intersection(products[name].input) for name in alone)


def test_shortcuts_are_not_rounded():
    """x -> Conv -> + x, as in a CNN's blocks: onnxruntime hands the rounded x to the sum, too."""
    weights = np.random.default_rng(0).normal(size=(16, 16, 1, 1)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Relu", ["image"], ["x"], "relu"),
        onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv"),
        onnx.helper.make_node("Add", ["x", "y"], ["z"], "add"),
    ]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [1, 16, 4, 4]) for name in ("image", "z")]
    graph = onnx.helper.make_graph(
        nodes, "g", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weights, "w")]
    )
    ranges = Ranges("minmax")
    ranges.collect({"x": np.ones((1, 16, 4, 4), np.float32)})
    found = insert(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)]),
        ranges.compute(),
    )
    by_kind = {node.op_type: node for node in found.graph.node if node.op_type in ("Add", "Conv")}
    assert by_kind["Add"].input[0] == "x" and by_kind["Conv"].input[0] != "x"


def test_percentiles_are_onnxruntimes_without_its_sorting():
    random = np.random.default_rng(0)
    pictures = [
        (scale * random.normal(size=(1, 50, 40 + n))).astype(np.float32)
        for n, scale in enumerate((1, 3, 0.5, 2))
    ]
    mine, theirs = (
        Ranges("percentile"),
        HistogramCollector("percentile", True, 2048, 128, 99.999, "same"),
    )
    for picture in pictures:
        mine.collect({"x": picture})
        theirs.collect({"x": picture})
    low, high = mine.compute()["x"].range_value
    wanted = theirs.compute_percentile()["x"]
    width = np.abs(pictures[0]).max() / 2048
    assert low == pytest.approx(wanted[0], abs=2 * width) and high == pytest.approx(
        wanted[1], abs=2 * width
    )
    assert mine.histogram_dict["x"][0].sum() == sum(picture.size for picture in pictures)


@pytest.mark.parametrize("method", list(METHODS))
def test_ranges_hold_what_is_seen_but_for_rare_outliers(method):
    ranges, random = Ranges(method), np.random.default_rng(0)
    for scale in (1e-6, 0.5, 1):  # a nearly empty first picture must not make millions of bins
        ranges.collect({"x": (scale * random.uniform(-1, 2, 200_000)).astype(np.float32)})
    low, high = ranges.compute()["x"].range_value
    assert -1.01 <= low <= -0.3 and 0.9 <= high <= 2.01
    if method != "entropy":
        assert high > 1.99 and low < -0.99
    assert len(ranges.histogram_dict.get("x", [[]])[0]) < 40_000


def test_numbers_that_are_not_finite_are_no_range():
    with pytest.raises(Failure, match="'x' is not finite"):
        Ranges("percentile").collect({"x": np.array([1, np.nan], np.float32)})


def test_kernels_before_a_norm_over_a_picture_stay_in_float():
    """As GroupNorm is exported, and as BatchNorm is, which has become part of the kernel."""
    kernels = [
        onnx.numpy_helper.from_array(np.zeros((32, 32, 1, 1), np.float32), name) for name in "kl"
    ]
    norm = [onnx.numpy_helper.from_array(np.ones(32, np.float32), name) for name in "sb"]
    shape = onnx.numpy_helper.from_array(np.array([0, 32, -1]), "shape")
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "k"], ["a"], "normed"),
        make("Reshape", ["a", "shape"], ["groups"]),
        make("InstanceNormalization", ["groups", "s", "b"], ["n"]),
        make("Conv", ["x", "l"], ["c"], "alone"),
        make("Relu", ["c"], ["y"]),
    ]
    ports = [onnx.ValueInfoProto(name=name) for name in "xny"]
    graph = onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], [*kernels, *norm, shape])
    assert left_alone(onnx.helper.make_model(graph)) == ["normed"]


def test_weights_are_no_activations(small_bundle):
    model = onnx.load(small_bundle / "backbone.onnx")
    found = activations(model)
    assert found and not set(found) & {tensor.name for tensor in model.graph.initializer}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_past_the_limit_lie_beside_the_graph_and_nothing_else_does(
    precision, run, tmp_path, monkeypatch
):
    """2 GB, in truth: what protobuf can hold."""
    monkeypatch.setattr(to_onnx, "INLINE_LIMIT", 20_000)
    calibration = (
        ("--calibration", PACKAGED, "--calibration-images", 8) if precision == "int8" else ()
    )
    done = run_here(
        run,
        "--output",
        tmp_path / "b",
        "--precision",
        precision,
        "--max-batch",
        4,
        *calibration,
        command=main,
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "b")
    used = {"golden.safetensors"}
    for graph in manifest.graphs:
        model = onnx.load(tmp_path / "b" / graph.file, load_external_data=False)
        outside = [
            entry.value
            for t in model.graph.initializer
            for entry in t.external_data
            if entry.key == "location"
        ]
        assert set(outside) <= {f"{graph.file}.data"}
        used |= {graph.file, *outside}
        if outside:
            bound = sum(
                len(t.raw_data) for t in onnx.load(tmp_path / "b" / graph.file).graph.initializer
            )
            assert (
                tmp_path / "b" / f"{graph.file}.data"
            ).stat().st_size <= bound * 1.1 + 4096 * len(outside)
    assert {"backbone.onnx.data", "fused.onnx.data"} <= used
    assert (
        set(manifest.files)
        == used
        == {p.name for p in (tmp_path / "b").iterdir()} - {"manifest.json"}
    )
    assert {stat.S_IMODE((tmp_path / "b" / name).stat().st_mode) for name in used} == {0o644}
    assert run_here(tmp_path / "b", command=check).returncode == 0
    OnnxRuntime({graph.name: tmp_path / "b" / graph.file for graph in manifest.graphs})


def test_sizes_and_batches_agree(bundle):
    rows = read_manifest(bundle).parity
    pairs = set(itertools.product({(64, 64), (96, 64), (80, 64)}, {1, 4})) | {((64, 64), 3)}
    assert {((row.height, row.width), row.batch) for row in rows} == pairs and all(
        row.passed for row in rows
    )
