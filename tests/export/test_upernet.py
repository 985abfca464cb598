"""A UPerNet head from its training to a server's map, on a KPU student of one teacher."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from contract.dense import class_map
from contract.manifest import GraphRecord
from distill.data.pictures import PackagedPhotos
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.encoder import RunEncoder
from distill.heads import Head, load_head
from distill.runs import load_run
from distill.upernet import UPerNet
from export.describe import describe_graph
from export.graph import UPERNET, Student, build_parts
from export.modules import Part
from export.parity import reference
from export.precision import cast_student
from export.run import main as export
from export.runtimes.openvino import OpenVINO
from export.to_onnx import OPSET, export_part
from serve.bundle import read_bundle
from tests.conftest import long_case, need_tritonserver, run_here
from tests.distill.methods.test_kpu import kpu_recipe
from tests.export.test_maps import toy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(expensive, photo_folder, scenes, tmp_path_factory) -> Path:
    """A run with a UPerNet head of a few steps; what its training printed is in `log`."""
    folder = tmp_path_factory.mktemp("upernet")
    recipe = kpu_recipe(photo_folder, train={"steps": 2})
    recipe["teachers"] = recipe["teachers"][:1]
    recipe["student"]["kwargs"] = recipe["student"]["kwargs"] | {"depth": 1}
    # the graphs of deformable attention, tested elsewhere, take ten times as long to trace
    plain = {"blocks": 1, "extra": 1, "attention": "plain"}
    recipe["kpu"]["adapter"] = recipe["kpu"]["adapter"] | plain
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert made.returncode == 0, made.stderr
    quick = ("segmentation.width=16", "dense.size=56", "dense.steps=30", "dense.lr=1e-2")
    words = ("--data", scenes, "--tasks", "segmentation", "--with-teachers", "extract.workers=0")
    done = run_here(folder / "run", *words, "segmentation.head=upernet", *quick, command=evaluate)
    assert done.returncode == 0, done.stderr
    (folder / "run" / "log").write_text(done.stdout)
    return folder / "run"


def test_a_head_is_scored_and_a_teacher_without_maps_is_left_out(run):
    rows = json.loads((run / "evaluation" / "evaluation.json").read_text())["rows"]
    assert set(rows) == {"student backbone"}
    result = rows["student backbone"]["segmentation"]
    assert result["details"]["head"] == "upernet" and result["scores"]["pixel_accuracy"] > 0.4
    log = (run / "log").read_text().splitlines()
    (left_out,) = [line for line in log if line.startswith("left out")]
    assert "needs maps of several resolutions" in left_out
    head = load_head(run / "heads" / "segmentation.safetensors")
    assert head.kind == UPERNET and head.about["output"] == "maps"


def test_upernet_on_a_teachers_head_is_refused_in_a_line(run, scenes, tmp_path):
    words = ("--data", scenes, "--tasks", "segmentation", "--features", "clip")
    output = ("--output", tmp_path, "segmentation.head=upernet")
    done = run_here(run, *words, *output, command=evaluate)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'clip' does not have" in done.stderr


def test_a_head_is_exported_with_parity_and_served(run, tmp_path):
    """At 42 x 70 pixels: no map is half of another, and the coarsest of 2 x 3 positions is smaller
    than the pooling's grids.
    """
    bundle = tmp_path / "bundle"
    words = ("--resolutions", "42x70", "--max-batch", 2)
    done = run_here(run, "--output", bundle, *words, command=export)
    assert done.returncode == 0, done.stderr
    read = read_bundle(bundle)
    graph = read.manifest.graph("segmentation")
    assert [port.name for port in graph.inputs] == [f"features_s{s}" for s in (4, 8, 16, 32)]
    assert graph.about["stride"] == 4 and graph.about["grid"] == [11, 18]
    rows = [row for row in read.manifest.parity if row.output == "segmentation_logits"]
    assert {row.graph for row in rows} == {"segmentation", "fused"}
    assert all(row.passed for row in rows)

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
    head = load_head(run / "heads" / "segmentation.safetensors").module
    with torch.inference_mode():
        logits = head(RunEncoder(load_run(run), "backbone").pyramid(pixels))
    wanted = class_map(logits.flatten(2).transpose(1, 2).numpy(), 42, 70, 4)
    assert len(np.unique(wanted)) > 1
    make_repository(read, tmp_path / "repository", Settings(fused=False, encoded=False))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    triton = find_tritonserver(None, tmp_path)
    with (
        Server(triton, tmp_path / "repository", options, lambda line: None) as server,
        FeatureClient(server.grpc) as client,
    ):
        for side in ("server", "client"):
            result = segment(client, image, side=side)
            assert (result.class_map == wanted).mean() > 0.999


def test_a_head_computes_in_the_bundles_precision(tmp_path):
    exact = toy_with_upernet()
    cast = cast_student(exact, "bf16")
    assert next(cast.heads[0].module.parameters()).dtype == torch.bfloat16
    (part,) = (p for p in build_parts(cast, 64, 96) if p.signature.graph == "segmentation")
    path = tmp_path / "segmentation.onnx"
    export_part(part, exact.stride, 2, path, {}, OPSET["bf16"])
    image = torch.randint(256, (2, 64, 96, 3), dtype=torch.uint8)
    wanted = reference(exact, [], image)
    feeds = {port.name: wanted[port.name] for port in part.signature.inputs}
    (logits,) = OpenVINO({"segmentation": path}).run("segmentation", feeds)
    off = np.linalg.norm(logits - wanted["segmentation_logits"])
    assert 0 < off / np.linalg.norm(wanted["segmentation_logits"]) < 0.05


def toy_with_upernet() -> Student:
    """A student of four convolutions, and an untrained head on their maps."""
    student = toy(with_head=False)
    about = {"reads": "backbone", "classes": ["a", "b", "c"]}
    head = Head("segmentation", UPERNET, UPerNet((8,) * 4, 16, 3).eval(), about)
    run = SimpleNamespace(dims={})
    return Student(run, student.deployment, (head,), student.stride, student.sha256)


@pytest.mark.parametrize("graph", ["segmentation", long_case("fused")])
def test_one_graph_answers_at_every_size(tmp_path, graph):
    student = toy_with_upernet()
    (part,) = (p for p in build_parts(student, None, None) if p.signature.graph == graph)
    port = part.signature.outputs[-1]
    assert port.axes == ("batch", "positions_4", 3) and "4 pixels" in port.meaning
    record = export_and_describe(part, student.stride, tmp_path)
    assert "grid" not in record.about and (graph == "fused" or record.about["stride"] == 4)
    runtime = OpenVINO({graph: tmp_path / record.file})
    for count, height, width in ((3, 64, 96), (1, 32, 32), (2, 160, 48)):
        image = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
        wanted = reference(student, [], image) | {"image": image.numpy()}
        logits = runtime.run(graph, {p.name: wanted[p.name] for p in part.signature.inputs})[-1]
        np.testing.assert_allclose(logits, wanted["segmentation_logits"], atol=1e-5)
        assert class_map(logits, height, width, 4).shape == (count, height, width)


def export_and_describe(part: Part, stride: int, folder: Path) -> GraphRecord:
    """A part's graph in a folder, and what a manifest says of it."""
    paths = {part.signature.graph: folder / f"{part.signature.graph}.onnx"}
    export_part(part, stride, 4, paths[part.signature.graph], {}, OPSET["fp32"])
    return describe_graph(part, paths, "fp32")
