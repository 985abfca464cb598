"""Runtimes of graphs and engines: the same outputs in the same order, and one line for what cannot
run here.
"""

import ctypes
import itertools
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from contract.engine_record import EngineOptions, EngineRecord, EngineTensor, Profile
from contract.errors import UserError
from contract.gpu import compute_capabilities
from contract.graph_call import inference_precision, open_graph
from contract.manifest import read_manifest
from distill.data.pictures import PackagedPhotos
from export import assemble
from export.graph import build_parts, open_student
from export.parity import engine_sizes, run_chain
from export.runtimes import onnx as runtimes
from export.runtimes.available import runtimes_here
from export.runtimes.base import Exported
from export.runtimes.engine import EngineRuntime
from export.runtimes.onnx import CUDA, CudaRuntime, OnnxRuntime
from export.runtimes.openvino import OpenVINO, SignalStack
from export.tensorrt import bindings as gpu
from export.tensorrt import engines
from export.tensorrt.build import build_engine, read_record, record_path
from export.tensorrt.engines import make_profile, not_for_here, outside, profile_for

without_gpu = pytest.mark.skipif(
    bool(compute_capabilities()), reason="says what happens without a GPU"
)
PROFILE = Profile(shapes={"image": ((1, 64, 64, 3), (2, 64, 64, 3), (4, 96, 64, 3))})


@pytest.fixture(scope="module")
def graphs(small_bundle) -> dict[str, Path]:
    """Every graph's file by name."""
    return {graph.name: small_bundle / graph.file for graph in read_manifest(small_bundle).graphs}


@pytest.fixture(scope="module")
def student(small_bundle):
    return open_student(small_bundle.parent / "run")


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Three photographs [3, 64, 64, 3]."""
    source = PackagedPhotos()
    return np.stack([np.asarray(source.load(number).resize((64, 64))) for number in range(3)])


@pytest.fixture(scope="module")
def engine(graphs, tmp_path_factory) -> Path:
    """An engine of the backbone for compute capability 8.6."""
    pytest.importorskip("tensorrt_rtx", reason="the optional extra [tensorrt-rtx] is not installed")
    path = tmp_path_factory.mktemp("engine") / "backbone.engine"
    options = EngineOptions(flavour="tensorrt-rtx", compute_capabilities=("8.6",))
    build_engine(
        graphs["backbone"],
        path,
        [Profile(shapes={"image": ((1, 64, 64, 3), (2, 64, 64, 3), (4, 64, 64, 3))})],
        options,
    )
    return path


def refused(call, *arguments: object) -> str:
    """The one line in which something is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
def test_outputs_come_in_the_order_of_the_graph(kind, graphs, photos):
    runtime = kind(graphs)
    session = onnxruntime.InferenceSession(str(graphs["fused"]))
    wanted = session.run(
        [output.name for output in onnx.load(graphs["fused"]).graph.output], {"image": photos}
    )
    for got, value in zip(runtime.run("fused", {"image": photos}), wanted, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, value, atol=1e-3, rtol=1e-3)


def test_a_chain_of_graphs_says_the_same_in_onnxruntime_and_openvino(graphs, student, photos):
    parts = build_parts(student, 64, 64)
    first, second = (run_chain(kind(graphs), parts, photos) for kind in (OnnxRuntime, OpenVINO))
    assert list(first) == [part.signature.graph for part in parts] and "interaction" in first
    for graph, outputs in first.items():
        for name, value in outputs.items():
            np.testing.assert_allclose(
                second[graph][name], value, atol=1e-3, rtol=1e-3, err_msg=f"{graph} {name}"
            )


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
def test_bound_graphs_keep_their_own_inputs_and_may_outgrow_the_largest_batch_of_the_export(
    kind, graphs, photos
):
    runtime = kind(graphs)
    many = np.concatenate([photos, photos])  # exported with --max-batch 4
    bound = [runtime.bind("backbone", {"image": images}) for images in (photos[:1], many)]
    for place in (0, 1, 0):
        bound[place].call()
    (alone, *_), (together, *_) = (each.read() for each in bound)
    assert len(alone) == 1 and len(together) == 6
    np.testing.assert_allclose(together[[0, 3]], alone[[0, 0]], atol=1e-5)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
@pytest.mark.parametrize(
    "inputs", [{"image": np.zeros((64, 64, 3), np.uint8)}, {"picture": np.zeros(3)}], ids=list
)
def test_inputs_a_graph_does_not_take_are_one_line(kind, inputs, graphs):
    runtime = kind({"backbone": graphs["backbone"]})
    message = refused(runtime.run, "backbone", inputs)
    assert message.startswith(f"{runtime.name}: graph 'backbone': ")


@without_gpu
def test_cuda_without_a_gpu_is_refused_and_says_where_to_look(graphs):
    message = refused(CudaRuntime, graphs)
    assert "no CUDA GPU is visible here" in message and "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(),
    reason="says what an onnxruntime without CUDA says",
)
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_onnxruntime_that_would_run_on_the_cpu_instead_is_refused_with_the_remedy(
    graphs, monkeypatch
):
    monkeypatch.setattr(runtimes, "compute_capabilities", lambda: ("8.9",))
    message = refused(CudaRuntime, graphs)
    assert "built without CUDA" in message and "pip install 'onnxruntime-gpu" in message
    monkeypatch.setattr(
        runtimes, "no_cuda_provider", lambda: ""
    )  # as if it were built with CUDA that does not load
    assert "would run on the CPU: install the CUDA and cuDNN" in refused(CudaRuntime, graphs)


@without_gpu
def test_an_engine_without_a_gpu_is_refused(engine):
    assert "built for GPUs of compute capability 8.6, and no GPU is visible here" in refused(
        EngineRuntime, {"backbone": engine}
    )


def test_an_engine_for_another_gpu_is_refused_before_it_is_opened(engine, monkeypatch):
    monkeypatch.setattr(engines, "compute_capabilities", lambda: ("9.0",))
    monkeypatch.setattr(gpu, "load_engine", lambda *_: pytest.fail("it was opened"))
    message = refused(EngineRuntime, {"backbone": engine})
    assert (
        message.startswith(f"{engine}: ")
        and "compute capability 8.6, this one has 9.0: export again" in message
    )


def test_engines_without_weights_do_not_run_anywhere(engine, monkeypatch):
    monkeypatch.setattr(engines, "compute_capabilities", lambda: ("8.6",))
    record = read_record(record_path(engine))
    assert not_for_here(record) == ""
    stripped = record.model_copy(
        update={"options": record.options.model_copy(update={"strip_weights": True})}
    )
    assert "without weights" in not_for_here(stripped)


def test_a_damaged_engine_is_refused(engine, tmp_path):
    copy = tmp_path / engine.name
    copy.write_bytes(engine.read_bytes()[:-1])
    record_path(copy).write_bytes(record_path(engine).read_bytes())
    assert "damaged or exchanged" in refused(EngineRuntime, {"backbone": copy})


@pytest.mark.parametrize(
    ("shape", "number"),
    [
        ((1, 64, 64, 3), 0),
        ((4, 96, 64, 3), 0),
        ((3, 80, 64, 3), 0),
        ((5, 64, 64, 3), 1),
        ((9, 64, 64, 3), None),
        ((1, 96, 96, 3), None),
        ((64, 64, 3), None),
    ],
)
def test_the_profile_is_the_first_that_admits_the_inputs(shape, number):
    wide = Profile(shapes={"image": ((1, 64, 64, 3), (8, 64, 64, 3), (8, 64, 64, 3))})
    record = EngineRecord.model_construct(
        inputs=(EngineTensor(name="image", dtype="uint8", shape=(-1, -1, -1, 3)),),
        profiles=(PROFILE, wide),
    )
    assert profile_for(record, {"image": shape}) == number
    assert f"not 'image' {list(shape)}" in outside(record, {"image": shape})
    assert "'image' from [1, 64, 64, 3] to [4, 96, 64, 3]" in outside(record, {"image": shape})


@pytest.mark.parametrize(
    "sizes", [[(64, 64)], [(64, 64), (96, 64)], [(96, 128), (64, 160), (128, 64)]], ids=str
)
def test_profiles_admit_every_size_that_engines_are_compared_at(sizes, student):
    found = engine_sizes(sizes)
    assert found[: len(sizes)] == sizes and len(found) == len(set(found))
    for part in build_parts(student, None, None):
        profile = make_profile(part, 8, sizes, student.stride)
        record = EngineRecord.model_construct(
            inputs=tuple(
                EngineTensor(name=p.name, dtype=p.dtype, shape=()) for p in part.signature.inputs
            ),
            profiles=(profile,),
        )
        for batch, size in itertools.product((1, 3, 8), found):
            inside = make_profile(part, batch, [size], student.stride)
            shapes = {name: ranges.max for name, ranges in inside.shapes.items()}
            assert profile_for(record, shapes) == 0, (part.signature.graph, batch, size)


@without_gpu
def test_without_a_gpu_a_cpu_runtime_checks_graphs_and_engines_are_left_with_a_reason(
    graphs, engine, caplog
):
    with caplog.at_level(logging.INFO):
        found = runtimes_here(
            Exported("fp32", graphs, engines={"tensorrt-rtx": {"backbone": engine}})
        )
    assert [runtime.name for runtime in found] == ["onnxruntime-cpu"]
    assert (
        "tensorrt-rtx engines were not run: built for GPUs of compute capability 8.6, and no GPU"
        in caplog.text
    )
    assert [runtime.name for runtime in runtimes_here(Exported("bf16", graphs))] == [
        "openvino-cpu (fp32 arithmetic)"
    ]
    assert [runtime.name for runtime in runtimes_here(Exported("fp16", graphs))] == [
        "onnxruntime-cpu (fp32 arithmetic)"
    ]
    assert runtimes_here(Exported("fp32")) == []


@pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(),
    reason="says what an onnxruntime without CUDA says",
)
def test_a_gpu_that_onnxruntime_cannot_use_is_said_and_the_export_goes_on(
    graphs, monkeypatch, caplog
):
    monkeypatch.setattr(runtimes, "compute_capabilities", lambda: ("8.9",))
    assert [runtime.name for runtime in runtimes_here(Exported("fp32", graphs))] == [
        "onnxruntime-cpu"
    ]
    assert (
        "not checked in onnxruntime-cuda" in caplog.text
        and "pip install 'onnxruntime-gpu" in caplog.text
    )


def test_where_openvino_does_not_take_them_in_bf16_graphs_stay_in_float32(graphs, tmp_path, caplog):
    pytest.importorskip("openvino", reason="needs pip install openvino")
    caplog.set_level("INFO")
    broken = tmp_path / "head_cls.onnx"
    broken.write_bytes(b"no graph")
    assert OpenVINO.faster(Exported("bf16", {"head_cls": broken})) == []
    assert caplog.text.count("computes in float32: in bf16, openvino-cpu: graph 'head_cls'") == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_a_faster_runtime_that_breaks_while_it_is_compared_is_left_out(monkeypatch, caplog, wrong):
    caplog.set_level("INFO")

    checking, faster = SimpleNamespace(name="checking"), SimpleNamespace(name="faster")

    def measure(*given, runtimes, **rest):
        if faster in runtimes or wrong:
            raise UserError(f"{runtimes[-1].name}: graph 'fused': no such kernel")
        return []

    monkeypatch.setattr(assemble, "measure", measure)
    given = (None, [], [], "int8", 4, False)
    if wrong:
        with pytest.raises(UserError, match="checking: graph 'fused'"):
            assemble._prove(*given, [checking], [], [faster])
        return
    assert assemble._prove(*given, [checking], [], [faster]) == []
    assert "in bf16, faster: graph 'fused': no such kernel" in caplog.text


def test_bf16_arithmetic_is_for_graphs_that_say_so_on_processors_that_have_it(graphs):
    """And what it is asked for is what OpenVINO then does."""
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    head = {"head_cls": graphs["head_cls"]}
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert OpenVINO.faster(Exported("fp32", head)) == OpenVINO.faster(Exported("bf16")) == []
    assert OpenVINO.faster(Exported("int8", head)) == []
    names = [runtime.name for runtime in OpenVINO.faster(Exported("bf16", head))]
    assert names == (["openvino-cpu (bf16 arithmetic)"] if has else [])
    for runtime, kind in (("openvino", "f32"), ("openvino-bf16", "bf16" if has else "f32")):
        made = OpenVINO(head, runtime=runtime)
        used = made.models["head_cls"].get_property("INFERENCE_PRECISION_HINT").to_string()
        assert made.precision == kind and used == kind

    class Older:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    assert inference_precision(Older(), "openvino-bf16") == "f32"


def test_a_processor_without_bf16_answers_as_in_float32(graphs, monkeypatch):
    openvino = pytest.importorskip("openvino", reason="needs pip install openvino")
    path = graphs["head_cls"]
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    sizes = [2, *(dim.dim_value or 17 for dim in shape[1:])]
    feeds = [np.random.default_rng(0).normal(size=sizes).astype(np.float32)]
    exact = open_graph(path, "openvino", 1, None)(feeds)
    monkeypatch.setattr(openvino.Core, "get_property", lambda self, device, name: ["FP32", "INT8"])
    for got, wanted in zip(open_graph(path, "openvino-bf16", 1, None)(feeds), exact, strict=True):
        np.testing.assert_array_equal(got, wanted)


def signal_stack() -> tuple[int | None, int]:
    """Where this thread's signal stack is, and its size."""
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.place, found.size


def test_signals_find_their_stack_after_openvino(graphs):
    """Made and dropped in one order, its runtimes leave one that is no longer there: Ctrl-C would
    crash.
    """
    pytest.importorskip("openvino", reason="needs pip install openvino")
    before, head = signal_stack(), {"head_cls": graphs["head_cls"]}
    kept = [OpenVINO(head), OpenVINO(head)]
    assert signal_stack() == before
    while kept:
        kept.pop(0)
        assert signal_stack() == before
