"""Students of SeFA and UNIC from training to Triton: a second class token, distillation heads, or
the backbone alone.
"""

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
import yaml

from contract.manifest import read_manifest
from distill.runs import load_run
from export.run import main as export
from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.settings import Settings
from tests.conftest import long_case, need_tritonserver, run_here
from tests.distill.methods.test_sefa import sefa_recipe


@pytest.fixture(scope="module")
def runs(expensive, photo_folder, tmp_path_factory):
    """Two steps each of SeFA with UDI and of UNIC with its ladder."""
    folder = tmp_path_factory.mktemp("runs")
    unic = sefa_recipe(photo_folder) | {"method": "unic"}
    unic["unic"] = {"hidden": 16, "last_hidden": 16}
    del unic["sefa"], unic["ssl"]
    for name, recipe in (("udi", sefa_recipe(photo_folder, "udi")), ("unic", unic)):
        recipe["train"]["steps"] = 2
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        done = run_here(folder / f"{name}.yaml", "--output", folder / name)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def bundles(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name in ("udi", "unic"):
        done = run_here(runs / name, "--output", folder / name, "--max-batch", 4, command=export)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_ladder_ships_the_backbone_alone(bundles):
    graphs = read_manifest(bundles / "unic").graphs
    assert {graph.name for graph in graphs} == {"backbone", "fused"}


def test_a_second_class_token_is_an_output(bundles):
    graphs = {graph.name: graph for graph in read_manifest(bundles / "udi").graphs}
    assert {"backbone", "head_cls", "head_mae", "fused"} == set(graphs)
    outputs = {port.name for port in graphs["fused"].outputs}
    assert {"backbone_global", "backbone_second", "cls_token", "mae_patches"} <= outputs


@pytest.mark.parametrize("precision", ["fp16", long_case("bf16"), "int8"])
def test_every_precision_agrees_with_the_student(runs, photo_folder, tmp_path, precision):
    calibration = ("--calibration", photo_folder) if precision == "int8" else ()
    words = ("--precision", precision, "--images", photo_folder, "--max-batch", 2, *calibration)
    done = run_here(runs / "udi", "--output", tmp_path / "bundle", *words, command=export)
    assert done.returncode == 0, done.stderr


def test_triton_answers_as_the_student_does(runs, bundles, tmp_path):
    need_tritonserver()
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    for name in ("udi", "unic"):
        repository = tmp_path / name
        make_repository(read_bundle(bundles / name), repository, Settings())
        lines: list[str] = []
        with Server(find_tritonserver(None, tmp_path), repository, options, lines.append) as triton:
            client = grpc.InferenceServerClient(triton.grpc)
            given = grpc.InferInput("image", images.shape, "UINT8")
            given.set_data_from_numpy(images)
            answer = client.infer("features", [given])
            deployed = load_run(runs / name).method.deploy()
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            wanted = deployed(pixels)
            expected = {"backbone_global": wanted["backbone"].token}
            if name == "udi":
                expected["backbone_second"] = wanted["backbone"].second
                expected["cls_token"] = wanted["cls"].token
                expected["mae_patches"] = wanted["mae"].patches.flatten(1, 2)
            for output, tensor in expected.items():
                got = answer.as_numpy(output)
                np.testing.assert_allclose(got, tensor.numpy(), atol=2e-3, rtol=2e-3)
