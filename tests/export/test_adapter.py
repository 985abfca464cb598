"""A KPU student in ONNX: deformable attention as gathers, maps of odd sizes, heads of several
maps, a UPerNet head.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml

from contract.dense import class_map
from contract.signature import further_names
from distill.data.pictures import PackagedPhotos
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.encoder import RunEncoder
from distill.features import FeatureDims
from distill.heads import Head, load_head
from distill.methods import build_method
from distill.recipe_io import make_recipe
from distill.runs import load_run
from distill.upernet import UPerNet
from export.graph import UPERNET, Student, build_parts
from export.parity import reference
from export.run import main as export
from serve.bundle import read_bundle
from tests.conftest import need_tritonserver, run_here
from tests.distill.methods.test_kpu import kpu_recipe
from tests.export.test_maps import run_graph

DIMS = {"clip": FeatureDims(6, 10), "detector": FeatureDims(None, 5, (7, 9))}


def untrained(levels: list[int]) -> Student:
    """One interaction with open gates, a detector whose three maps read `levels`, and a UPerNet
    head.
    """
    values = kpu_recipe(Path("photos"))
    values["student"]["kwargs"] = values["student"]["kwargs"] | {"depth": 1}
    values["kpu"]["adapter"] = values["kpu"]["adapter"] | {"blocks": 1, "extra": 1}
    torch.manual_seed(0)
    method = build_method(make_recipe(values), DIMS, inference=True)
    for interaction in method.student.interactions:
        torch.nn.init.normal_(interaction.injector.gate)
    method.heads["detector"].remember(levels)
    deployment = method.eval().deploy()
    run = SimpleNamespace(dims=DIMS, recipe=None)
    about = {"reads": "backbone", "classes": ["a", "b", "c"]}
    head = Head("segmentation", UPERNET, UPerNet((32,) * 4, 8, 3).eval(), about)
    return Student(run, deployment, (head,), deployment.student.stride, "0" * 64)


def test_further_maps_of_one_stride_have_names_of_their_own():
    assert further_names("a", (8, 16)) == ["a_s8", "a_s16"]
    assert further_names("a", (32, 32)) == ["a_s32", "a_s32_2"]


def test_heads_say_every_map_and_where_it_lies():
    parts = build_parts(untrained([1, 2, 3]), 56, 56)
    ports = {port.name: port.axes for part in parts for port in part.signature.outputs}
    assert ports["detector_patches"] == ("batch", 49, 5)
    assert ports["detector_s16"] == ("batch", 16, 7)
    assert ports["detector_s32"] == ("batch", 4, 9)
    assert ports["clip_patches"] == ("batch", 16, 10) and ports["clip_token"] == ("batch", 6)
    assert ports["backbone_s4"] == ("batch", 196, 32)
    fused = parts[-1].signature
    assert {"detector_s16", "detector_s32", "backbone_s32"} < {p.name for p in fused.outputs}


@pytest.mark.slow
def test_deformable_attention_is_exported_as_gathers_with_parity(tmp_path):
    """On pictures of 42 x 70 pixels: no side of a map is half of another's, and the coarsest of 2 x
    3 positions is smaller than UPerNet's pooling grids.
    """
    student = untrained([1, 3, 3])
    parts = {part.signature.graph: part for part in build_parts(student, 42, 70)}
    image = torch.randint(256, (3, 42, 70, 3), dtype=torch.uint8)
    wanted = reference(student, list(parts.values()), image)
    given = run_graph(parts["backbone"], {"image": image.numpy()}, tmp_path)
    given |= run_graph(parts["head_detector"], given, tmp_path)
    given |= run_graph(parts["segmentation"], given, tmp_path)
    assert {"detector_patches", "detector_s32", "detector_s32_2"} < set(given)
    assert given["segmentation_logits"].shape == (3, 11 * 18, 3)
    for name, value in given.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-4, err_msg=name)
    operators = [node.op_type for node in onnx.load(tmp_path / "backbone.onnx").graph.node]
    # four for each of three levels and two extractors
    assert "GridSample" not in operators and operators.count("GatherElements") == 4 * (3 + 2)


@pytest.fixture(scope="module")
def small_run(expensive, photo_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    recipe = kpu_recipe(photo_folder, train={"steps": 2})
    recipe["student"]["kwargs"] = recipe["student"]["kwargs"] | {"depth": 1}
    recipe["kpu"]["adapter"] = recipe["kpu"]["adapter"] | {"blocks": 1, "extra": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def upernet_run(small_run, scenes, tmp_path_factory) -> Path:
    """`small_run` with a UPerNet head of a few steps; what its training printed is in `log`."""
    run = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("upernet") / "run"))
    quick = ("segmentation.width=16", "dense.size=56", "dense.steps=30", "dense.lr=1e-2")
    words = ("--data", scenes, "--tasks", "segmentation", "--with-teachers", "extract.workers=0")
    done = run_here(run, *words, "segmentation.head=upernet", *quick, command=evaluate)
    assert done.returncode == 0, done.stderr
    (run / "log").write_text(done.stdout)
    return run


def test_a_upernet_head_is_scored_and_teachers_without_maps_are_left_out(upernet_run):
    rows = json.loads((upernet_run / "evaluation" / "evaluation.json").read_text())["rows"]
    assert set(rows) == {"student backbone"}
    result = rows["student backbone"]["segmentation"]
    assert result["details"]["head"] == "upernet" and result["scores"]["pixel_accuracy"] > 0.4
    log = (upernet_run / "log").read_text().splitlines()
    left_out = [line for line in log if line.startswith("left out")]
    assert len(left_out) == 2 and "needs maps of several resolutions" in left_out[0]
    head = load_head(upernet_run / "heads" / "segmentation.safetensors")
    assert head.kind == "upernet-segmentation" and head.about["output"] == "maps"


@pytest.mark.parametrize("features", ["clip", "detector"])
def test_upernet_on_a_head_is_refused_in_a_line(upernet_run, scenes, tmp_path, features):
    words = ("--data", scenes, "--tasks", "segmentation", "--features", features)
    output = ("--output", tmp_path, "segmentation.head=upernet")
    done = run_here(upernet_run, *words, *output, command=evaluate)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"'{features}' does not have" in done.stderr


def test_half_precision_agrees_with_the_student_and_is_served(upernet_run, tmp_path):
    bundle = tmp_path / "bundle"
    words = ("--resolutions", "42x70", "--max-batch", 2, "--precision", "bf16")
    done = run_here(upernet_run, "--output", bundle, *words, command=export)
    assert done.returncode == 0, done.stderr
    read = read_bundle(bundle)
    assert all(row.passed for row in read.manifest.parity)
    names = {tensor.name for tensor in read.outputs}
    assert {"backbone_s4", "backbone_s32", "clip_token", "detector_patches"} < names
    graph = read.manifest.graph("segmentation")
    assert [port.name for port in graph.inputs] == [f"features_s{s}" for s in (4, 8, 16, 32)]
    assert graph.about["stride"] == 4 and graph.about["grid"] == [11, 18]

    need_tritonserver()
    from serve.client import FeatureClient
    from serve.client.tasks.segmentation import segment
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    photos = PackagedPhotos()
    image = np.stack([np.asarray(photos.load(n).convert("RGB").resize((70, 42))) for n in range(2)])
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2)
    head = load_head(upernet_run / "heads" / "segmentation.safetensors").module
    with torch.inference_mode():
        logits = head(RunEncoder(load_run(upernet_run), "backbone").pyramid(pixels))
    wanted = class_map(logits.flatten(2).transpose(1, 2).numpy(), 42, 70, 4)
    assert len(np.unique(wanted)) > 1
    settings = Settings(fused=False, encoded=False, runtime="openvino")
    make_repository(read, tmp_path / "repository", settings)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    triton = find_tritonserver(None, tmp_path)
    with (
        Server(triton, tmp_path / "repository", options, lambda line: None) as server,
        FeatureClient(server.grpc) as client,
    ):
        for side in ("server", "client"):
            result = segment(client, image, side=side)
            assert (result.class_map == wanted).mean() > 0.97
