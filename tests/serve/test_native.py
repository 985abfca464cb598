"""Repositories for Triton's own backends, onnxruntime and tensorrt, which are not in the wheel's
tritonserver: what is rendered, what is refused, and the guard around the graphs, asked in a real
server in which a few lines of python run the graphs as unsuspectingly as those backends do.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelStatisticsRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from contract.dense import depth_map
from contract.images import read_views
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.native import NATIVE
from serve.repository.settings import Settings
from serve.server.backend import describe
from serve.server.process import Options, Server
from serve.server.triton import find_tritonserver
from tests.conftest import need_tritonserver
from tests.serve.raw_requests import array, arrays, encode, reference, request, same, strings
from tests.serve.running import until

PHOTO = PackagedPhotos().load(0).convert("RGB").resize((160, 120))
INVALID, INTERNAL = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
BLACK, DARK = np.zeros((1, 64, 96, 3), np.uint8), np.ones((1, 64, 96, 3), np.uint8)

# As Triton's onnxruntime backend: batches of one shape, no questions asked
UNGUARDED = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.reads = [port.name for port in self.session.get_inputs()]
        self.gives = [port.name for port in self.session.get_outputs()]

    def execute(self, requests):
        answers = []
        for request in requests:
            feeds = {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in self.reads
            }
            values = dict(zip(self.gives, self.session.run(None, feeds)))
            wanted = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, values[name]) for name in wanted]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
"""


def break_for_dark_pictures(path: Path) -> None:
    """Have the backbone give NaN as `backbone_global` for a black picture, and as `features` for
    one without a value above 1; any other picture is answered as before.
    """
    model = onnx.load(path)
    graph, nodes = model.graph, []

    def add(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    for name, values, kind in (
        ("axes", [1, 2, 3], TensorProto.INT64),
        ("last", [2, 3], TensorProto.INT64),
        ("one", [1.0], TensorProto.FLOAT),
        ("zero", [0.0], TensorProto.FLOAT),
    ):
        graph.initializer.append(helper.make_tensor(f"dark_{name}", kind, [len(values)], values))
    pixels = add("Cast", ["image"], "dark_pixels", to=TensorProto.FLOAT)
    most = add("ReduceMax", [pixels, "dark_axes"], "dark_most", keepdims=1)
    black = add("Mul", [add("Log", [most], "dark_log"), "dark_zero"], "dark_nan")
    above = add("Sub", [most, "dark_one"], "dark_above")
    dark = add("Mul", [add("Log", [above], "dark_log_above"), "dark_zero"], "dark_nan_above")
    black = add("Squeeze", [black, "dark_last"], "dark_row")
    for output, extra in (("backbone_global", black), ("features", dark)):
        for node in graph.node:
            node.output[:] = [f"{name}_whole" if name == output else name for name in node.output]
            node.input[:] = [f"{name}_whole" if name == output else name for name in node.input]
        add("Add", [f"{output}_whole", extra], output)
    graph.node.extend(nodes)
    onnx.save(model, path)


def without_native_backends(repository: Path) -> None:
    """Have `UNGUARDED` run the graphs of a repository that was rendered for onnxruntime."""
    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        if config.backend not in NATIVE:
            continue
        config.backend = "python"
        config.ClearField("default_model_filename")
        config.ClearField("parameters")
        path.write_text(text_format.MessageToString(config))
        (path.parent / "1" / "model.py").write_text(UNGUARDED)


@pytest.fixture(scope="module")
def bundle(varying_bundle):
    return read_bundle(varying_bundle)


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    need_tritonserver()
    folder = tmp_path_factory.mktemp("native")
    repository = folder / "repository"
    make_repository(bundle, repository, Settings(backend="onnxruntime"))
    without_native_backends(repository)
    break_for_dark_pictures(repository / "backbone" / "1" / "model.onnx")
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    server = Server(find_tritonserver(None, folder), repository, options, lambda line: None)
    with server:
        yield server


@pytest.fixture(scope="module")
def triton(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


def picture(height, width):
    return SQUASH.pixels(PHOTO, height, width)[None]


def refusal(triton, model, pixels, outputs=(), code=INVALID):
    """The words of a refusal; a right request beside it is answered rightly."""
    fair = triton.ModelInfer.future(request(model, [array("image", picture(64, 96))], outputs))
    with pytest.raises(grpc.RpcError) as raised:
        triton.ModelInfer(request(model, [pixels], outputs), timeout=30)
    assert all(np.isfinite(values).all() for values in arrays(fair.result(30)).values())
    assert raised.value.code() == code, raised.value
    return raised.value.details()


def ran(triton, before=None):
    """How often each model answered, since `before`."""
    stats = triton.ModelStatistics(ModelStatisticsRequest()).model_stats
    counts = {model.name: model.inference_stats.success.count for model in stats}
    return {name: count - before[name] for name, count in counts.items()} if before else counts


def test_every_set_of_outputs_is_answered_and_only_its_graphs_run(triton, bundle):
    names = [tensor.name for tensor in bundle.outputs]
    pixels = picture(64, 96)
    expected = reference(bundle, pixels)
    for wanted in itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(1, len(names) + 1)
    ):
        before = ran(triton)
        found = arrays(triton.ModelInfer(request("features", [array("image", pixels)], wanted)))
        same(found, {name: expected[name] for name in wanted})
        # an execution is counted a moment after its answer is sent
        assert until(lambda: ran(triton, before)["finite"] == len(wanted), 10), wanted  # noqa: B023
        heads = {"head_mae": {"mae_token", "mae_patches"}, "depth_head": {"depth"}}
        needed = {name: int(bool(outputs & set(wanted))) for name, outputs in heads.items()}
        needed |= {"backbone": 1, "guard": 1}
        assert {name: ran(triton, before)[name] for name in needed} == needed


def test_every_door_answers_as_without_the_guard(triton, bundle):
    pixels = picture(48, 80)
    expected = reference(bundle, pixels)
    given = [array("image", pixels)]
    names = [tensor.name for tensor in bundle.outputs]
    same(arrays(triton.ModelInfer(request("fused", given))), {n: expected[n] for n in names})
    found = arrays(triton.ModelInfer(request("depth", given)))
    same(found, {"depth_map": depth_map(expected["depth"], 48, 80)})
    file = encode(PHOTO, "JPEG", quality=90)
    encoded = request("features_encoded", [strings("encoded", [file] * 2)], ["mae_token"])
    decoded = np.repeat(read_views(file, SQUASH, 64, 96), 2, axis=0)
    same(arrays(triton.ModelInfer(encoded)), {"mae_token": reference(bundle, decoded)["mae_token"]})


@pytest.mark.parametrize("model", ["features", "fused", "depth"])
def test_sizes_are_refused_in_the_python_backends_words(triton, model):
    for height, width, words in (
        (70, 64, "height and width must be multiples of 16"),
        (64, 8, "height and width must be multiples of 16"),
        (80, 64, "at most 64x96 is served"),
        (1600, 1600, "at most 64x96 is served"),
        (16, 64, "at least 32x32 is served"),
    ):
        pixels = np.zeros((1, height, width, 3), np.uint8)
        words = f"input 'image' is {height}x{width}: {words}"
        assert refusal(triton, model, array("image", pixels)) == _from(model, words)
    many = array("image", np.zeros((5, 64, 64, 3), np.uint8))
    assert "batch-size must be <= 4" in refusal(triton, model, many)


def _from(model, words):
    """What a client hears of a step's refusal."""
    return f"in ensemble '{model}', {words}"


def test_a_batch_of_nothing_with_the_bytes_of_one_is_refused(triton):
    # by the guard itself: an ensemble makes a batch of one of it
    empty = replace(array("image", picture(64, 96)), shape=(0, 64, 96, 3))
    assert refusal(triton, "guard", empty) == "input 'image' is a batch of 0: give 1 or more"


@pytest.mark.parametrize(
    ("model", "pixels", "outputs", "broken"),
    [
        ("features", BLACK, ["backbone_global"], "backbone_global"),
        ("features", DARK, ["mae_patches"], "mae_patches"),
        ("features", DARK, ["depth"], "depth"),
        ("depth", DARK, [], "depth"),
    ],
)
def test_an_answer_that_is_not_finite_is_refused(triton, model, pixels, outputs, broken):
    words = _from(model, f"output '{broken}' holds NaN or infinity")
    assert refusal(triton, model, array("image", pixels), outputs, INTERNAL) == words


def test_what_was_not_asked_for_may_be_anything(triton):
    found = arrays(
        triton.ModelInfer(request("features", [array("image", DARK)], ["backbone_global"]))
    )
    assert np.isfinite(found["backbone_global"]).all()


def test_a_broken_picture_fails_its_own_request_alone(triton, bundle):
    expected = reference(bundle, picture(64, 96))["mae_patches"]
    pending = []
    for turn in range(30):
        pixels = DARK if turn % 3 == 1 else picture(64, 96)
        ask = request("features", [array("image", pixels)], ["mae_patches"])
        pending.append((turn % 3 == 1, triton.ModelInfer.future(ask, timeout=30)))
    for broken, future in pending:
        if broken:
            assert future.exception().code() == INTERNAL
        else:
            same(arrays(future.result()), {"mae_patches": expected})


@pytest.mark.parametrize(("model", "instances"), [("guard", 1), ("finite", 2)])
def test_the_supervisors_canaries_reach_the_models_around_the_graphs(server, model, instances):
    backend = describe(server.rest.config(model, "1"), model, "1")
    assert backend.instances == instances and len(backend.inputs) == 1
    server.rest.infer(model, "1", backend.inputs, backend.output, 10)
