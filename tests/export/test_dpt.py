"""A DPT depth head, which reads four layers of the student, as a graph: the layers, the finer map,
every precision.
"""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from yaml import safe_dump

from contract.dense import depth_map
from contract.manifest import read_manifest
from distill.data.pictures import PackagedPhotos
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.encoder import RunEncoder
from distill.heads import load_head, save_head
from distill.runs import load_run
from export.check import main as check
from export.run import main
from serve.bundle import read_bundle
from tests.conftest import long_case, need_tritonserver, run_here, small_recipe

pytestmark = pytest.mark.slow

ONE_TEACHER = [
    {
        "name": "resnet10t",
        "role": "classification",
        "alias": "cls",
        "pretrained": False,
        "image_size": 64,
    },
]


RTX = importlib.util.find_spec("tensorrt_rtx") is not None
ENGINES = ("--formats", "onnx,tensorrt-rtx", "--compute-capability", "8.9") if RTX else ()
"""Engines are built too where TensorRT-RTX is installed; a GPU is not needed."""


def call(command, *arguments: object) -> subprocess.CompletedProcess:
    """Run a command's main in this process."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = command([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())


def photographs(height: int, width: int) -> np.ndarray:
    """Two photographs, uint8 [2, height, width, 3]."""
    photos = PackagedPhotos()
    return np.stack(
        [np.asarray(photos.load(n).convert("RGB").resize((width, height))) for n in range(2)]
    )


def metres_of(run: Path, image: np.ndarray) -> np.ndarray:
    """What evaluation makes of pictures: metres [B, rows, columns]."""
    encoder, head = (
        RunEncoder(load_run(run), "backbone"),
        load_head(run / "heads" / "depth.safetensors").module,
    )
    with torch.inference_mode():
        return head(encoder.layers(torch.from_numpy(image).permute(0, 3, 1, 2))).numpy()


def run_with_head(folder: Path, photos: Path, scenes: Path, size: int, **student: object) -> Path:
    """A run of plain heads and its DPT head of a few steps, whose answers are then spread over its
    range.

    (A head that says 5 m everywhere would agree with anything.)
    """
    recipe, run = folder / "recipe.yaml", folder / "run"
    student = {"image_size": size, "drop_path": 0.0, **student}
    recipe.write_text(
        safe_dump(
            small_recipe(
                photos, method="plain", teachers=ONE_TEACHER, student=student, train={"steps": 2}
            )
        )
    )
    done = run_here(recipe, "--output", run)
    assert done.returncode == 0, done.stderr
    wanted = (
        "depth.head=dpt",
        "depth.width=16",
        f"dense.size={size}",
        "dense.steps=3",
        "extract.workers=0",
    )
    done = call(
        evaluate, run, "--data", scenes, "--features", "backbone", "--tasks", "depth", *wanted
    )
    assert done.returncode == 0, done.stderr
    head = load_head(run / "heads" / "depth.safetensors")
    low, high = head.module.low, head.module.high
    said = torch.logit(
        (torch.from_numpy(metres_of(run, photographs(size, size))) - low) / (high - low)
    )
    last = head.module.head[-1]
    last.bias.sub_(said.mean()).div_(said.std())
    last.weight.div_(said.std())
    save_head(run / "heads", "depth", head.module, head.about)
    assert metres_of(run, photographs(size, size)).std() > 1
    return run


@pytest.fixture(scope="module")
def vit(photo_folder, scenes, tmp_path_factory) -> Path:
    """A ViT of four blocks: four layers on one grid."""
    kwargs = {"embed_dim": 48, "depth": 4, "num_heads": 2}
    return run_with_head(tmp_path_factory.mktemp("vit"), photo_folder, scenes, 64, kwargs=kwargs)


@pytest.fixture(scope="module")
def cnn(photo_folder, scenes, tmp_path_factory) -> Path:
    """A CNN: four layers, each on its own grid."""
    return run_with_head(
        tmp_path_factory.mktemp("cnn"), photo_folder, scenes, 64, name="resnet10t", kwargs={}
    )


@pytest.fixture(scope="module")
def patch14(photo_folder, scenes, tmp_path_factory) -> Path:
    """A ViT whose patch is no power of two: the map is 3.5 times as fine."""
    kwargs = {"embed_dim": 48, "depth": 4, "num_heads": 2}
    name = "vit_small_patch14_dinov2"
    return run_with_head(
        tmp_path_factory.mktemp("patch14"), photo_folder, scenes, 56, name=name, kwargs=kwargs
    )


def depth_by_graphs(bundle: Path, image: np.ndarray) -> np.ndarray:
    """Metres [B, positions] by the small graphs in turn; `fused` must say the same."""
    found = {
        name: onnxruntime.InferenceSession(str(bundle / f"{name}.onnx"))
        for name in ("backbone", "depth", "fused")
    }
    names = {
        graph: [port.name for port in session.get_outputs()] for graph, session in found.items()
    }
    known = dict(zip(names["backbone"], found["backbone"].run(None, {"image": image}), strict=True))
    (depth,) = found["depth"].run(
        None, {port.name: known[port.name] for port in found["depth"].get_inputs()}
    )
    fused = dict(zip(names["fused"], found["fused"].run(None, {"image": image}), strict=True))
    assert not any(name.startswith("layers") for name in fused), "layers are for graphs only"
    np.testing.assert_allclose(fused["depth"], depth, atol=1e-3)
    return depth


def engines_of(bundle: Path) -> dict[str, dict]:
    """What the manifest says of engines, by graph."""
    return {
        entry["graph"]: entry
        for entry in json.loads((bundle / "manifest.json").read_text())["engines"]
    }


@pytest.mark.parametrize("student", ["vit", long_case("cnn")])
def test_backbone_gives_the_layers_and_the_depth_graph_reads_them_at_any_size(
    student, request, tmp_path
):
    run = request.getfixturevalue(student)
    done = call(
        main,
        run,
        "--output",
        tmp_path / "b",
        "--resolutions",
        64,
        "96x64",
        "--max-batch",
        3,
        *ENGINES,
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "b")
    backbone, depth = manifest.graph("backbone"), manifest.graph("depth")
    layers = [port for port in backbone.outputs if port.name.startswith("layers_")]
    assert [port.name for port in layers[::2]] == [f"layers_{n}" for n in (1, 2, 3, 4)]
    assert depth.inputs == tuple(layers), "the same names, types and axes"
    if student == "vit":
        assert {port.shape for port in layers[::2]} == {("batch", "rows", "columns", 48)}
    else:
        assert [port.shape for port in layers[::2]] == [
            ("batch", "rows_4", "columns_4", 64),
            ("batch", "rows_8", "columns_8", 128),
            ("batch", "rows_16", "columns_16", 256),
            ("batch", "rows", "columns", 512),
        ]
    assert [port.shape for port in layers[1::2]] == [
        ("batch", 1, port.shape[-1]) for port in layers[::2]
    ]
    assert (
        depth.outputs[0].shape == ("batch", "depth_positions")
        and "cell of 4 pixels" in depth.outputs[0].meaning
    )
    assert (depth.about["stride"], depth.about["unit"]) == (
        4,
        "metre",
    ) and "grid" not in depth.about
    shown = {port.name for part in manifest.graphs for port in part.outputs} - {
        port.name for port in layers
    }
    assert {row.output for row in manifest.parity} >= {port.name for port in layers} | {"depth"}
    assert not shown & {port.name for port in depth.inputs}, "no client's output is a step's input"
    assert all(row.passed and row.max_abs < 1e-3 for row in manifest.parity)
    if RTX:
        engine = engines_of(tmp_path / "b")["depth"]
        grid, dim = (4, 48) if student == "vit" else (16, 64)
        smallest, usual, largest = engine["profiles"][0]["shapes"]["layers_1"]
        assert (smallest, usual) == ([1, grid, grid, dim], [3, grid, grid, dim])
        assert largest == [3, grid * 3 // 2, grid, dim]
    # a size that was never compared, with an odd number of rows
    image = photographs(160, 96)
    wanted = metres_of(run, image)
    assert wanted.shape == (2, 40, 24)
    np.testing.assert_allclose(
        depth_by_graphs(tmp_path / "b", image).reshape(wanted.shape), wanted, atol=1e-3
    )


@pytest.fixture(scope="module")
def fixed_bundle(patch14, tmp_path_factory) -> Path:
    """A bundle of one size, with a DPT head on patches of 14 pixels."""
    bundle = tmp_path_factory.mktemp("fixed") / "bundle"
    done = call(main, patch14, "--output", bundle, "--resolutions", "42x70", "--max-batch", 2)
    assert done.returncode == 0, done.stderr
    return bundle


def test_a_fixed_map_says_its_grid_where_it_is_no_multiple_of_the_patches(patch14, fixed_bundle):
    depth = read_manifest(fixed_bundle).graph("depth")
    # 3 x 5 patches, 3.5 cells each, halves up
    assert depth.about["grid"] == [11, 18] and depth.about["stride"] == 4
    assert depth.outputs[0].shape == ("batch", 11 * 18)
    assert [port.shape for port in depth.inputs[:2]] == [("batch", 3, 5, 48), ("batch", 1, 48)]
    image = photographs(42, 70)
    metres = depth_by_graphs(fixed_bundle, image).reshape(2, *depth.about["grid"])
    np.testing.assert_allclose(metres, metres_of(patch14, image), atol=1e-3)


def test_a_server_makes_a_map_of_cells_that_are_finer_than_patches(fixed_bundle, tmp_path):
    need_tritonserver()
    from serve.client import FeatureClient
    from serve.client.tasks.depth import estimate_depth
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    make_repository(
        read_bundle(fixed_bundle), tmp_path / "repository", Settings(fused=False, encoded=False)
    )
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    image = photographs(42, 70)
    with (
        Server(
            find_tritonserver(None, tmp_path), tmp_path / "repository", options, lambda line: None
        ) as server,
        FeatureClient(server.grpc) as client,
    ):
        sides = [estimate_depth(client, image, side=side) for side in ("server", "client")]
    wanted = depth_map(depth_by_graphs(fixed_bundle, image), 42, 70, 4)
    for result in sides:
        depth = np.stack(result.depth)
        assert result.unit == "metre" and depth.shape == (2, 42, 70)
        np.testing.assert_allclose(depth, wanted, atol=1e-3)


@pytest.mark.long
def test_layers_cost_one_pass_and_nothing_without_the_head(cnn, tmp_path):
    bare = Path(shutil.copytree(cnn, tmp_path / "bare"))
    (bare / "heads" / "depth.safetensors").unlink()
    kinds = {}
    for name, run in (("bare", bare), ("with", cnn)):
        sizes = ("--resolutions", 64, "96x64", "--max-batch", 3)
        done = call(main, run, "--output", tmp_path / f"b_{name}", *sizes)
        assert done.returncode == 0, done.stderr
        for path in (tmp_path / f"b_{name}").glob("*.onnx"):
            kinds[name, path.stem] = Counter(node.op_type for node in onnx.load(path).graph.node)
    names = [port.name for port in read_manifest(tmp_path / "b_bare").graph("backbone").outputs]
    assert names == ["backbone_global", "backbone_patches", "features", "features_global"]
    assert kinds["with", "backbone"]["Conv"] == kinds["bare", "backbone"]["Conv"]
    assert (
        kinds["with", "fused"]["Conv"]
        == kinds["bare", "fused"]["Conv"] + kinds["with", "depth"]["Conv"]
    )
    # of a CNN's maps only the coarser of two is resized, where they meet
    assert kinds["with", "depth"]["Resize"] == 3


@pytest.mark.parametrize(
    ("student", "precision"),
    [
        ("patch14", "fp16"),
        long_case("cnn", "bf16"),
        long_case("vit", "int8"),
        long_case("cnn", "int8"),
    ],
)
def test_a_dpt_head_computes_in_the_bundles_precision_at_varying_sizes(
    student, precision, request, tmp_path
):
    """A CNN in bf16 once built no engine: TensorRT wants the axes of its means as constants."""
    run = request.getfixturevalue(student)
    calibration = (
        ("--calibration", request.getfixturevalue("photo_folder")) if precision == "int8" else ()
    )
    sizes = (56, "84x56") if student == "patch14" else (64, "96x64")
    # the random ResNet's own map is 0.987 from int8's on pictures that it was not calibrated on;
    # the depth must pass
    let = ("--allow-parity-failure",) if (student, precision) == ("cnn", "int8") else ()
    done = call(
        main,
        run,
        "--output",
        tmp_path / "b",
        "--precision",
        precision,
        "--max-batch",
        3,
        *calibration,
        *let,
        "--resolutions",
        *sizes,
        *ENGINES,
    )
    assert done.returncode == 0, done.stderr
    model = onnx.load(tmp_path / "b" / "depth.onnx")
    if precision == "int8":
        floats = {
            out
            for node in model.graph.node
            if node.op_type == "DequantizeLinear"
            for out in node.output
        }
        inside = [
            node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in floats
        ]
        assert len(inside) > 16, "the convolutions that are wide enough"
    else:
        types = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
        assert types == {
            {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
        }
    manifest = read_manifest(tmp_path / "b")
    rows = [row for row in manifest.parity if row.output == "depth"]
    assert {row.graph for row in rows} == {"depth", "fused"} and all(row.passed for row in rows)
    if RTX:
        assert set(engines_of(tmp_path / "b")) >= {"backbone", "depth", "fused"}
    assert call(check, tmp_path / "b").returncode == (1 if let else 0), (
        "check says what was let through"
    )
