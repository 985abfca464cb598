"""Engines by the real TensorRT-RTX builder, on a machine without a GPU: what is built, recorded and
refused.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")

from contract.engine_record import EngineOptions, EngineTensor, Profile
from contract.errors import UserError
from contract.gpu import compute_capabilities
from export.tensorrt.bindings import FLAVOURS, load_bindings
from export.tensorrt.build import (
    build_engine,
    inspect_engine,
    read_record,
    record_path,
    verify_engine,
)

without_gpu = pytest.mark.skipif(
    bool(compute_capabilities()), reason="says what happens without a GPU"
)
PROFILE = Profile(shapes={"image": ((1, 32, 32, 3), (2, 64, 48, 3), (4, 128, 128, 3))})
FIXED = Profile(shapes={"image": ((1, 64, 64, 3),) * 3})


def write_graph(
    path: Path, dtype: int = TensorProto.FLOAT, antialias: bool = False, external: bool = False
) -> Path:
    """uint8 images [B, H, W, 3] to a token [B, 8] and patches [B, H/16 * W/16, 8], of dynamic batch
    and size.
    """
    kernel = (
        np.random.default_rng(0)
        .normal(0, 0.1, (8, 3, 16, 16))
        .astype(helper.tensor_dtype_to_np_dtype(dtype))
    )
    weights = [
        numpy_helper.from_array(kernel, "kernel"),
        numpy_helper.from_array(np.array([0, 8, -1]), "rows"),
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["numbers"], to=dtype),
        helper.make_node("Transpose", ["numbers"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["map"], strides=[16, 16]),
        helper.make_node("ReduceMean", ["map", "axes"], ["token"], keepdims=0),
        helper.make_node("Reshape", ["map", "rows"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
    ]
    weights.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    if antialias:
        weights.append(numpy_helper.from_array(np.array([1, 3, 64, 64]), "sizes"))
        resize = ["planes", "", "", "sizes"]
        nodes.insert(
            2,
            helper.make_node("Resize", resize, ["small"], name="shrink", mode="cubic", antialias=1),
        )
        nodes[3].input[0] = "small"
    graph = helper.make_graph(
        nodes,
        "student",
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, ["batch", "height", "width", 3]
            )
        ],
        [
            helper.make_tensor_value_info("token", dtype, ["batch", 8]),
            helper.make_tensor_value_info("patches", dtype, ["batch", "tokens", 8]),
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    location = path.name + ".data"
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=1024)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "student.onnx")


def rtx(*capabilities: str, **options: object) -> EngineOptions:
    return EngineOptions(
        flavour="tensorrt-rtx", compute_capabilities=capabilities or ("8.9",), **options
    )


def refused(graph: Path, *profiles: Profile, options: EngineOptions | None = None) -> str:
    """The one line in which a build is refused; nothing may be left beside the graph."""
    before = sorted(graph.parent.iterdir())
    with pytest.raises(UserError) as caught:
        build_engine(graph, graph.with_suffix(".engine"), profiles, options or rtx())
    assert sorted(graph.parent.iterdir()) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "capabilities", [("8.6",), ("8.9",), ("12.0",), ("8.6", "8.9", "12.0")], ids="+".join
)
def test_engine_is_built_for_each_gpu_and_for_all_at_once(graph, capabilities):
    engine = graph.with_suffix(".engine")
    record = build_engine(graph, engine, [PROFILE], rtx(*capabilities))
    assert engine.stat().st_size > 10_000
    assert record.compute_capabilities == capabilities
    assert verify_engine(engine) == record
    assert sorted(path.name for path in graph.parent.iterdir()) == [
        "student.engine",
        "student.engine.json",
        "student.onnx",
    ]


def test_sidecar_says_what_the_network_is(graph):
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, [FIXED, PROFILE], rtx(workspace_gib=1, optimization_level=2))
    trt = load_bindings("tensorrt-rtx")
    record = read_record(record_path(engine))
    assert record.inputs == (EngineTensor(name="image", dtype="uint8", shape=(-1, -1, -1, 3)),)
    assert record.outputs == (
        EngineTensor(name="token", dtype="float32", shape=(-1, 8)),
        EngineTensor(name="patches", dtype="float32", shape=(-1, -1, 8)),
    )
    assert record.profiles == (FIXED, PROFILE)
    assert {"float32", "uint8"} <= set(record.dtypes) and "float16" not in record.dtypes
    assert (record.flavour, record.tensorrt_version) == ("tensorrt-rtx", trt.__version__)
    assert record.graph_sha256 == {"student.onnx": sha256(graph)}
    assert record.engine_sha256 == sha256(engine)
    assert (record.options.workspace_gib, record.options.optimization_level) == (1, 2)
    assert str(graph.parent) not in record_path(engine).read_text()


def test_two_builds_of_one_size_are_the_same_to_the_byte(graph, tmp_path):
    first, second = tmp_path / "first.engine", tmp_path / "second.engine"
    assert build_engine(graph, first, [FIXED], rtx()) == build_engine(graph, second, [FIXED], rtx())
    assert first.read_bytes() == second.read_bytes()


def test_two_builds_of_dynamic_size_have_the_same_record_but_for_the_hash(graph, tmp_path):
    """TensorRT-RTX 1.7.1 writes some 40 bytes about the symbols of dynamic shapes in varying
    order.
    """
    engines = tmp_path / "first.engine", tmp_path / "second.engine"
    records = [build_engine(graph, engine, [PROFILE], rtx()) for engine in engines]
    first, second = (record.model_dump(exclude={"engine_sha256"}) for record in records)
    assert first == second
    assert len({engine.stat().st_size for engine in engines}) == 1


@pytest.mark.parametrize(
    ("dtype", "name"), [(TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16")]
)
def test_precision_of_the_graph_is_kept_and_recorded(tmp_path, dtype, name):
    graph = write_graph(tmp_path / "half.onnx", dtype)
    record = build_engine(graph, tmp_path / "half.engine", [PROFILE], rtx())
    assert [output.dtype for output in record.outputs] == [name, name]
    assert name in record.dtypes and "float32" not in record.dtypes


def test_weights_outside_the_graph_are_found_and_hashed(tmp_path):
    graph = write_graph(tmp_path / "large.onnx", external=True)
    data = tmp_path / "large.onnx.data"
    record = build_engine(graph, tmp_path / "large.engine", [FIXED], rtx())
    assert record.graph_sha256 == {"large.onnx": sha256(graph), data.name: sha256(data)}
    inline = build_engine(
        write_graph(tmp_path / "inline.onnx"), tmp_path / "inline.engine", [FIXED], rtx()
    )
    assert inline.engine_sha256 == record.engine_sha256
    (tmp_path / "large.engine").unlink()
    data.unlink()
    assert "large.onnx.data" in refused(graph, PROFILE)


def test_a_rebuild_replaces_engine_and_record_and_a_failed_one_leaves_them(graph):
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, [PROFILE], rtx("8.6"))
    record = build_engine(graph, engine, [FIXED], rtx("8.9"))
    assert verify_engine(engine) == record
    refused(graph)
    assert verify_engine(engine) == record


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "no shapes for input 'image'"),
        ({"imag": PROFILE.shapes["image"]}, "did you mean 'image'?"),
        ({"image": ((1, 32, 32, 4),) * 3}, "do not fit input 'image' [-1, -1, -1, 3]"),
        ({"image": ((1, 32, 32),) * 3}, "do not fit input 'image'"),
        ({"image": ((0, 32, 32, 3), (1, 32, 32, 3), (1, 32, 32, 3))}, "1 ≤ min"),
        ({"image": ((4, 32, 32, 3), (2, 32, 32, 3), (1, 32, 32, 3))}, "min ≤ opt ≤ max"),
    ],
    ids=["missing", "unknown", "static dimension", "rank", "empty batch", "min above max"],
)
def test_wrong_profile_is_one_line_and_leaves_no_file(graph, shapes, said):
    message = refused(graph, FIXED, Profile(shapes=shapes))
    assert said in message and "profile 1" in message and str(graph) in message


def test_dynamic_graph_without_any_profile_is_refused(graph):
    assert "an empty list of profiles gives no shapes" in refused(graph)


def test_too_small_a_workspace_is_said_to_be_memory(graph):
    message = refused(graph, PROFILE, options=rtx(workspace_gib=2**-10, optimization_level=0))
    assert "not enough memory" in message and "workspace_gib" in message


def test_operation_the_parser_refuses_is_named_with_its_reason(tmp_path):
    message = refused(write_graph(tmp_path / "resize.onnx", antialias=True), PROFILE)
    assert "node 2 'shrink' (Resize)" in message and "Antialiasing is not supported" in message


def test_an_operation_that_tensorrt_computes_wrongly_is_refused(tmp_path):
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", (1, 2, 4, 4)), ("at", (1, 3, 3, 2)), ("y", (1, 2, 3, 3)))
    ]
    nodes = [helper.make_node("GridSample", ["x", "at"], ["y"], mode="linear")]
    graph = helper.make_graph(nodes, "g", ports[:2], ports[2:])
    path = tmp_path / "sampled.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    assert "computes GridSample wrongly" in refused(path, FIXED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sampled.onnx"]


def test_missing_and_damaged_graphs_are_one_line(graph, tmp_path):
    assert "no such file" in refused(tmp_path / "absent.onnx", PROFILE)
    graph.write_bytes(graph.read_bytes()[:-700])
    assert "damaged" in refused(graph, PROFILE)


def test_folder_that_is_not_there_is_said_before_the_build(graph, tmp_path):
    with pytest.raises(UserError, match="folder that exists"):
        build_engine(graph, tmp_path / "absent" / "student.engine", [PROFILE], rtx())


def test_flipped_byte_in_the_engine_is_found(graph):
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, [PROFILE], rtx())
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(UserError, match="damaged or exchanged"):
        verify_engine(engine)
    with pytest.raises(UserError, match="damaged or exchanged"):
        inspect_engine(engine)


def test_damaged_record_is_one_line(graph):
    engine = graph.with_suffix(".engine")
    build_engine(graph, engine, [PROFILE], rtx())
    path = record_path(engine)
    values = json.loads(path.read_text())
    changed = values | {"options": values["options"] | {"optimization_level": 9}}
    texts = {
        path.read_text()[:-100]: "Expecting property name",
        json.dumps(changed): "optimization_level",
        "{}": "Field required",
    }
    for text, said in texts.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said) as caught:
            read_record(path)
        assert len(str(caught.value).splitlines()) == 1
    path.unlink()
    with pytest.raises(UserError, match="record is missing"):
        verify_engine(engine)


def test_hopper_is_refused_with_the_gpus_that_are_known(graph):
    message = refused(graph, PROFILE, options=rtx("8.9", "9.0"))
    assert "compute capability 9.0" in message and "8.6, 8.9, 12.0" in message
    assert "Hopper needs full TensorRT" in message
    assert "Hopper" not in refused(graph, PROFILE, options=rtx("7.0")).split("(")[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"flavour": "tensorflow"}, "'tensorrt' or 'tensorrt-rtx'"),
        (
            {"compute_capabilities": ("89",)},
            "'89' is not a compute capability (write major.minor, such as 8.9)",
        ),
        ({"compute_capabilities": ("8.9", "8.9")}, "names one twice"),
        (
            {"optimization_level": 6},
            "optimization_level: Input should be less than or equal to 5 (given: 6)",
        ),
        ({"workspace_gib": 0}, "workspace_gib: Input should be greater than 0"),
        ({"workspace": 1}, "workspace: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(values, said):
    with pytest.raises(UserError) as caught:
        EngineOptions(**{"flavour": "tensorrt-rtx"} | values)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_timing_cache_does_nothing_for_rtx_and_the_record_says_so(graph, tmp_path):
    record = build_engine(
        graph, graph.with_suffix(".engine"), [PROFILE], rtx(timing_cache=tmp_path / "timing.cache")
    )
    assert record.options.timing_cache is None and not (tmp_path / "timing.cache").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_build_and_leaves_no_file(graph, number, request):
    """Ctrl-C or SIGTERM arrives while TensorRT calls back; an exception there would end the
    process.
    """
    before = signal.default_int_handler  # a signal that comes too late must not end the tests
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, before)))

    def strike() -> None:
        while signal.getsignal(number) is before:  # until the builder is about to run
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, graph.with_suffix(".engine"), [PROFILE], rtx())
    thread.join()
    assert signal.getsignal(number) is before
    assert [path.name for path in graph.parent.iterdir()] == ["student.onnx"]


@without_gpu
def test_without_a_gpu_the_record_alone_is_inspected_and_that_is_said(graph):
    engine = graph.with_suffix(".engine")
    record = build_engine(graph, engine, [PROFILE], rtx())
    inspection = inspect_engine(engine)
    assert inspection.record == record and not inspection.deserialised
    assert "no GPU here" in inspection.note and "student.engine.json" in inspection.note


@without_gpu
@pytest.mark.parametrize("name", ["strip_weights", "refit", "version_compatible"])
def test_without_a_gpu_what_needs_one_is_refused(graph, name):
    message = refused(graph, PROFILE, options=rtx(**{name: True}))
    assert name in message and "without a GPU" in message


@without_gpu
def test_without_a_gpu_a_compute_capability_must_be_named(graph):
    message = refused(graph, PROFILE, options=EngineOptions(flavour="tensorrt-rtx"))
    assert "no GPU here" in message and "--compute-capability 8.9" in message
    assert compute_capabilities() == ()


@pytest.fixture
def full_tensorrt(tmp_path, monkeypatch):
    """Put a `tensorrt` of the given source first on the path."""

    def install(source: str) -> None:
        (tmp_path / "tensorrt.py").write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    yield install
    sys.modules.pop("tensorrt", None)


@without_gpu
def test_full_tensorrt_missing_broken_or_without_gpu_is_told_apart(full_tensorrt):
    with pytest.raises(
        UserError,
        match="'tensorrt' is not installed .pip install tensorrt, .*nvcr.io/nvidia/tensorrt",
    ):
        load_bindings("tensorrt")
    full_tensorrt("import ctypes\nctypes.CDLL('libnvonnxparser.so.11')")
    with pytest.raises(UserError, match="not its libraries: libnvonnxparser.so.11: cannot open"):
        load_bindings("tensorrt")
    full_tensorrt("__version__ = '11.4.0'")
    with pytest.raises(
        UserError, match="built on the GPU they run on: .*tensorrt-rtx --compute-capability 8.9"
    ):
        load_bindings("tensorrt")


def test_unknown_flavour_is_refused():
    assert FLAVOURS == ("tensorrt", "tensorrt-rtx")
    with pytest.raises(UserError, match="did you mean 'tensorrt-rtx'"):
        load_bindings("tensorrt-rt")
