"""A bundle's golden photographs: the student's own answers are kept, and a server that says
something else is found out.
"""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
from pydantic_core import to_json
from safetensors import safe_open
from safetensors.numpy import save_file

from contract.errors import UserError
from contract.golden import GOLDEN, compare, read_golden
from contract.manifest import add_files, read_manifest
from distill.runs import load_run
from export import to_onnx
from export.agreement import POSITIONS
from export.golden import TF32
from export.run import main as export
from serve.bundle import read_bundle
from serve.client import FeatureClient
from serve.errors import ServerError
from serve.repository.build import make_repository
from serve.repository.golden import golden_of
from serve.repository.settings import Settings
from serve.server.process import Options, Server
from serve.server.triton import find_tritonserver
from tests.conftest import need_tritonserver, run_here


@pytest.fixture(scope="module")
def golden(small_bundle):
    return read_golden(small_bundle / GOLDEN)


@pytest.fixture
def copy(small_bundle, tmp_path):
    """A bundle that a test may break."""
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def test_the_outputs_are_those_of_the_torch_student(golden, small_bundle):
    deployment = load_run(small_bundle.parent / "run").method.deploy()
    with torch.inference_mode():
        said = deployment(torch.from_numpy(golden.image).permute(0, 3, 1, 2).float() / 255)
    np.testing.assert_array_equal(golden.outputs["dino_token"], said["dino"].token.numpy())
    np.testing.assert_array_equal(
        golden.outputs["backbone_patches"], said["backbone"].patches.flatten(1, 2).numpy()
    )


def test_it_holds_every_output_a_client_may_ask_for(golden, small_bundle):
    bundle = read_bundle(small_bundle)
    size = bundle.manifest.resolution
    assert set(golden.outputs) == {tensor.name for tensor in bundle.outputs}
    assert golden.image.dtype == np.uint8 and golden.image.shape == (3, size.height, size.width, 3)
    assert all(value.dtype == np.float32 and len(value) == 3 for value in golden.outputs.values())
    assert golden.bounds == (1 - TF32**2 / 2, TF32) and golden.pictures[0] == "astronaut.png"
    assert golden.positions == POSITIONS["fp16"], "TF32 has the mantissa of fp16"
    assert not np.array_equal(golden.image[0], golden.image[1])


def test_a_running_server_passes(golden, server):
    with grpc.InferenceServerClient(server.grpc) as client:
        image = grpc.InferInput("image", golden.image.shape, "UINT8")
        image.set_data_from_numpy(golden.image)
        for model in ("features", "fused"):
            answer = client.infer(model, [image])
            assert compare(golden, {name: answer.as_numpy(name) for name in golden.outputs}) == []


def test_each_kind_of_wrong_answer_is_said(golden):
    answers = {name: value.copy() for name, value in golden.outputs.items()}
    assert compare(golden, answers) == []
    answers["cls_token"] = None
    answers["mae_token"] = answers["mae_token"][:2]
    answers["dino_token"][1, 0] = np.nan
    answers["depth"][2] = answers["depth"][2][::-1]
    del answers["mae_patches"]
    said = {sentence.split("'")[1]: sentence for sentence in compare(golden, answers)}
    assert set(said) == {"cls_token", "mae_token", "dino_token", "depth", "mae_patches"}
    assert "missing" in said["cls_token"] and "missing" in said["mae_patches"]
    assert "recorded [3, " in said["mae_token"] and "NaN" in said["dino_token"]
    assert golden.pictures[2] in said["depth"] and "cosine" in said["depth"]


def test_only_the_bounds_decide(golden):
    answers = dict(golden.outputs)
    answers["cls_token"] = answers["cls_token"] + 0.02 * np.abs(
        answers["cls_token"]
    ).max() * np.sign(
        np.random.default_rng(0).standard_normal(answers["cls_token"].shape).astype(np.float32)
    )
    assert len(compare(golden, answers)) == 1
    assert compare(dataclasses.replace(golden, bounds=(0.9, 0.5)), answers) == []


def test_an_output_of_another_scale_is_found_though_its_cosine_is_one(golden):
    (said,) = compare(golden, golden.outputs | {"depth": 3 * golden.outputs["depth"]})
    assert "'depth'" in said and "off by 2 of its length" in said


def test_one_position_that_is_wrong_is_found_unless_the_set_is_older(golden):
    patches = golden.outputs["dino_patches"].copy()
    bounds = POSITIONS["fp16"]
    wide = dataclasses.replace(golden, bounds=(-1.0, 9.0), positions=bounds)
    patches[1, 3] = 0
    (said,) = compare(wide, golden.outputs | {"dino_patches": patches})
    assert "'dino_patches'" in said and "at position 3 of 16" in said and golden.pictures[1] in said
    assert compare(wide, golden.outputs) == []
    older = dataclasses.replace(wide, positions=None)
    assert compare(older, golden.outputs | {"dino_patches": patches}) == []


def test_products_in_tf32_are_within_the_bounds_of_fp32(golden):
    """Off by at most a hundredth of the length, in any direction."""
    token = golden.outputs["cls_token"]
    error = np.random.default_rng(0).standard_normal(token.shape)
    error /= np.linalg.norm(error, axis=1, keepdims=True)
    error *= 0.009 * np.linalg.norm(token, axis=1, keepdims=True)
    token = (token + error).astype(np.float32)
    assert compare(golden, golden.outputs | {"cls_token": token}) == []


def test_a_set_without_outputs_is_none(golden, small_bundle, tmp_path):
    (tmp_path / GOLDEN).write_bytes(dataclasses.replace(golden, outputs={}).to_bytes())
    with pytest.raises(UserError, match="it has no outputs"):
        read_golden(tmp_path / GOLDEN)
    folder = shutil.copytree(small_bundle, tmp_path / "bundle")
    outputs = {"depth": golden.outputs["depth"]}
    (folder / GOLDEN).write_bytes(dataclasses.replace(golden, outputs=outputs).to_bytes())
    add_files(folder, [GOLDEN])
    with pytest.raises(UserError, match="has no output '.*', which the bundle has"):
        golden_of(read_bundle(folder))


def test_an_output_of_zeros_must_be_zeros_again(golden):
    zeros = dataclasses.replace(golden, outputs={"depth": np.zeros((3, 4), np.float32)})
    assert compare(zeros, {"depth": np.zeros((3, 4), np.float32)}) == []
    assert len(compare(zeros, {"depth": np.ones((3, 4), np.float32)})) == 1


def test_an_output_that_the_export_let_through_is_held_to_what_it_said_then(golden):
    depth = golden.outputs["depth"]
    answers = golden.outputs | {
        "depth": depth + 0.2 * np.linalg.norm(depth, axis=1).max() * np.eye(3, depth.shape[1])
    }
    (said,) = compare(golden, answers)
    assert "'depth'" in said and "let it through" not in said
    allowed = dataclasses.replace(golden, allowed={"depth": (0.9, 3.0)})
    assert compare(allowed, answers) == []
    (said,) = compare(allowed, answers | {"depth": -depth})
    assert "at least 0.9 is wanted (the export let it through: --allow-parity-failure)" in said


def test_the_file_is_the_same_to_the_byte_whenever_it_is_written(small_bundle):
    with safe_open(small_bundle / GOLDEN, framework="np") as file:
        assert list(file.metadata()) == ["golden"], (
            "safetensors writes several keys in random order"
        )


def test_a_bundle_from_before_golden_sets_is_told_to_be_exported_again(copy):
    (copy / GOLDEN).unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][GOLDEN]
    manifest["seal"] = hashlib.sha256(to_json(manifest | {"seal": ""})).hexdigest()
    (copy / "manifest.json").write_bytes(to_json(manifest, indent=1))
    with pytest.raises(UserError, match=f"does not list {GOLDEN}.*export again"):
        read_golden(read_bundle(copy).file(GOLDEN))


def test_a_changed_file_is_refused(copy):
    data = bytearray((copy / GOLDEN).read_bytes())
    data[-1] ^= 1
    (copy / GOLDEN).write_bytes(data)
    with pytest.raises(UserError, match="sha256"):
        read_golden(read_bundle(copy).file(GOLDEN))


def test_a_file_of_something_else_is_refused(copy):
    with safe_open(copy / GOLDEN, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for metadata in (
        {},
        {"format": "1", "cosine": "1", "pictures": ""},
        {"golden": "[]"},
        {"golden": '{"format": 3}'},
    ):
        save_file(tensors, copy / GOLDEN, metadata)
        add_files(copy, [GOLDEN])
        with pytest.raises(UserError, match="export again"):
            read_golden(read_bundle(copy).file(GOLDEN))
    assert GOLDEN in read_manifest(copy).files


@pytest.mark.slow
def test_weights_that_lie_beside_their_graphs_are_served(small_bundle, tmp_path, monkeypatch):
    """As those past 2 GB do: the golden set, asked of a real server."""
    need_tritonserver()
    monkeypatch.setattr(to_onnx, "INLINE_LIMIT", 20_000)
    done = run_here(
        small_bundle.parent / "run", "--output", tmp_path / "b", "--max-batch", 4, command=export
    )
    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "b")
    make_repository(read_bundle(tmp_path / "b"), tmp_path / "repository", Settings(encoded=False))
    version = tmp_path / "repository" / "features" / "1"
    listed = json.loads((version / "model.json").read_text())["sha256"]
    for name in ("backbone.onnx", "backbone.onnx.data"):
        assert listed[name] == bundle.manifest.files[name]
    found, lines = find_tritonserver(None, tmp_path), []
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    with (
        Server(found, tmp_path / "repository", options, lines.append) as server,
        FeatureClient(server.grpc) as client,
    ):
        golden = read_golden(bundle.file(GOLDEN))
        for model in ("features", "fused"):
            assert compare(golden, client.features(golden.image, model=model)) == []
    with open(version / "backbone.onnx.data", "r+b") as file:
        file.write(b"\x01\x02")
    with pytest.raises(ServerError, match="backbone.*does not match its sha256"):
        Server(found, tmp_path / "repository", options, lines.append).start()
