"""A KPU student in ONNX: deformable attention as gathers, maps of odd sizes, heads of several
maps.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

from contract.engine_record import EngineOptions
from contract.manifest import ParityRecord
from contract.signature import further_names
from distill.data.pictures import PackagedPhotos
from distill.features import FeatureDims
from distill.methods import build_method
from distill.recipe_io import make_recipe
from export.agreement import RELATIVE
from export.graph import Student, build_parts
from export.options import PACKAGED
from export.parity import measure, reference
from export.run import main as export
from export.runtimes.onnx import OnnxRuntime
from export.to_onnx import export_part
from serve.bundle import read_bundle
from tests.conftest import long_case, run_here
from tests.distill.methods.test_kpu import kpu_recipe

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
    for name, parameter in method.student.named_parameters():
        if not name.startswith("net."):  # as after training: none is 0 or 1, nor equals another
            parameter.data += 0.1 * torch.randn_like(parameter)
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
def test_one_graph_of_gathers_agrees_at_every_multiple_of_the_patch(tmp_path):
    """Also where maps have one row, and where no side of a map is half of another's."""
    student, given = untrained([1, 3, 3]), {}
    parts = {part.signature.graph: part for part in build_parts(student, None, None)}
    for name in ("backbone", "head_detector"):
        export_part(parts[name], student.stride, 4, tmp_path / f"{name}.onnx", {}, 20)
    runtimes = [onnxruntime.InferenceSession(path) for path in sorted(tmp_path.glob("*.onnx"))]
    for count, height, width in ((3, 42, 70), (1, 28, 126), (2, 140, 42)):
        image = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
        wanted = reference(student, [parts["backbone"], parts["head_detector"]], image)
        given = {"image": image.numpy()}
        for runtime in runtimes:
            feeds = {port.name: given[port.name] for port in runtime.get_inputs()}
            names = [port.name for port in runtime.get_outputs()]
            given |= zip(names, runtime.run(names, feeds), strict=True)
        assert given["features_s32"].shape[1:3] == (-(-height // 32), -(-width // 32))
        assert {"detector_patches", "detector_s32", "detector_s32_2"} < set(given)
        for name in set(given) - {"image"}:
            value, expected = given[name], wanted[name]
            np.testing.assert_allclose(value, expected, atol=2e-4, err_msg=f"{name} {height}")
    operators = [node.op_type for node in onnx.load(tmp_path / "backbone.onnx").graph.node]
    # one for each of three levels and two extractors, and others
    assert "GridSample" not in operators and operators.count("Gather") >= 3 + 2


@pytest.mark.slow
def test_where_torch_itself_is_inexact_graphs_are_compared_with_float64(tmp_path):
    """Points far away but for what cancels out, and what they read counts for more than all else:
    of the graph above, with other weights."""
    student = untrained([1, 3, 3])
    part, path = build_parts(student, None, None)[0], tmp_path / "backbone.onnx"
    export_part(part, student.stride, 4, path, {}, 20)
    extractor = student.deployment.student.interactions[0].extractor
    attention = extractor.attention
    far = attention.offsets.weight * 12_000
    wild = {
        extractor.norm.weight: torch.full_like(extractor.norm.weight, 1 / 3000),
        extractor.norm.bias: torch.ones_like(extractor.norm.bias),
        attention.offsets.weight: far,
        attention.offsets.bias: attention.offsets.bias - far.double().sum(1).float(),
        attention.out.weight: attention.out.weight * 1000,
    }
    model = onnx.load(path)
    for parameter, values in wild.items():
        (place,) = (t for t in model.graph.initializer if holds(t, parameter))
        values = values.T if list(place.dims) != list(values.shape) else values
        numbers = values.contiguous().numpy()
        if parameter is attention.offsets.bias:
            # as another order of sums does, which not every processor has here
            numbers = numbers + np.spacing(np.abs(numbers))
        place.raw_data = numbers.tobytes()
        parameter.data = wild[parameter]
    onnx.save(model, path)

    def compared() -> list[ParityRecord]:
        runtime, photos = OnnxRuntime({"backbone": path}), PackagedPhotos()
        chosen = [(photos.name(n), photos.load(n)) for n in range(2)]
        return measure(student, [part], [runtime], chosen, [2], [(42, 70)], "fp32")

    rows = compared()
    assert all(row.passed for row in rows), [row.problem for row in rows if not row.passed]
    assert any(row.relative > RELATIVE["fp32"] for row in rows)
    student.deployment.student.norms[0].bias += 0.5
    assert {"backbone_s4", "features_s4"} == {row.output for row in compared() if not row.passed}


@pytest.mark.long
def test_an_engine_is_built_of_the_graph(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")
    from export.tensorrt.engines import build_all

    student = untrained([1, 3, 3])
    part, path = build_parts(student, 42, 70)[0], tmp_path / "backbone.onnx"
    export_part(part, student.stride, 4, path, {}, 20)
    options = EngineOptions(flavour="tensorrt-rtx", compute_capabilities=("8.9",))
    given = ([options], [part], {"backbone": path}, [(42, 70)], student.stride, 4, tmp_path)
    (engine,) = build_all(*given)
    assert {"backbone_s4", "backbone_s32"} < {tensor.name for tensor in engine.outputs}


def holds(tensor: onnx.TensorProto, parameter: torch.Tensor) -> bool:
    """Whether a graph's tensor is a parameter, perhaps transposed."""
    values = onnx.numpy_helper.to_array(tensor)
    own = parameter.detach().numpy()
    return any(np.array_equal(values, form) for form in ((own, own.T) if own.ndim == 2 else (own,)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [long_case("fp16"), long_case("bf16"), long_case("int8")])
def test_lower_precisions_agree_with_the_student(photo_folder, tmp_path, precision, small_run):
    words = ("--precision", precision, "--images", photo_folder, "--max-batch", 2)
    # at the student's own 56 px the coarsest map is normed over four numbers a group
    words += ("--resolutions", 112)
    if precision == "int8":
        words += ("--calibration", PACKAGED)
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
