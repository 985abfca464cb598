"""A KPU student in ONNX: deformable attention as gathers, maps of odd sizes, heads of several
maps.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml

from contract.signature import further_names
from distill.features import FeatureDims
from distill.methods import build_method
from distill.recipe_io import make_recipe
from export.graph import Student, build_parts
from export.parity import reference
from export.run import main as export
from serve.bundle import read_bundle
from tests.conftest import run_here
from tests.distill.methods.test_kpu import kpu_recipe
from tests.export.test_maps import run_graph

DIMS = {"clip": FeatureDims(6, 10), "detector": FeatureDims(None, 5, (7, 9))}


def untrained(levels: list[int]) -> Student:
    """One interaction with open gates, and a detector whose three maps read `levels`."""
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
    return Student(run, deployment, (), deployment.student.stride, "0" * 64)


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
    """On pictures of 42 x 70 pixels: no side of a map is half of another's."""
    student = untrained([1, 3, 3])
    parts = {part.signature.graph: part for part in build_parts(student, 42, 70)}
    image = torch.randint(256, (3, 42, 70, 3), dtype=torch.uint8)
    wanted = reference(student, list(parts.values()), image)
    given = run_graph(parts["backbone"], {"image": image.numpy()}, tmp_path)
    given |= run_graph(parts["head_detector"], given, tmp_path)
    assert {"detector_patches", "detector_s32", "detector_s32_2"} < set(given)
    for name, value in given.items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-4, err_msg=name)
    operators = [node.op_type for node in onnx.load(tmp_path / "backbone.onnx").graph.node]
    # four for each of three levels and two extractors
    assert "GridSample" not in operators and operators.count("GatherElements") == 4 * (3 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precisions_agree_with_the_student(photo_folder, tmp_path, precision, small_run):
    words = ("--precision", precision, "--images", photo_folder, "--max-batch", 2)
    done = run_here(small_run, "--output", tmp_path / "bundle", *words, command=export)
    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "bundle")
    assert all(row.passed for row in bundle.manifest.parity)
    names = {tensor.name for tensor in bundle.outputs}
    assert {"backbone_s4", "backbone_s32", "clip_token", "detector_patches"} < names


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
