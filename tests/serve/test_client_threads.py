"""What requests and threads share in a client: regions of memory, pictures, what is known of
models, graphs; each as the worst order of events has it.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tritonclient.utils import InferenceServerException

from contract.graph_call import open_graph
from contract.images import Limits
from contract.views import SQUASH
from serve.client.calls import Calls
from serve.client.inputs import list_pictures, to_tensor
from serve.client.options import ClientOptions
from serve.client.served import Port, Served
from serve.client.steps import Rpc, Sleep
from serve.errors import ServerFailed

SERVED = Served(
    "features", 8, {"image": Port("image", "UINT8", (4, 4, 3))}, {"v": Port("v", "FP32", (4,))}, {}
)
LOST = {
    "reset": ("recvmsg:Connection reset by peer", "StatusCode.UNAVAILABLE"),
    "front": ("tritonserver is being started again", "StatusCode.UNAVAILABLE"),
    "stub": ("Stub process 'features' is not healthy", "StatusCode.INTERNAL"),
}


def answer(request_id: str) -> Any:
    output = SimpleNamespace(name="v", datatype="FP32", shape=[1, 4])
    response = SimpleNamespace(id=request_id, outputs=[output])
    return SimpleNamespace(get_response=lambda: response)


class Asked:
    """A request through shared memory, whose calls are answered by hand."""

    def __init__(self, calls: Calls, name: str) -> None:
        image = {"image": np.zeros((1, 4, 4, 3), np.uint8)}
        self.name, lend = name, calls.pool.lend
        calls.pool.lend = lambda places: setattr(self, "region", lend(places)) or self.region
        self.steps = calls.infer(SERVED, image, ["v"], time.monotonic() + 20, 1, name, False)
        step = next(self.steps)
        calls.pool.lend = lend
        if step.method != "infer":  # the region is registered first
            step = self.steps.send(None)
        assert isinstance(step, Rpc) and step.method == "infer"

    def fail(self, message: str, status: str) -> None:
        """End an attempt, and wait for the next."""
        step = self.steps.throw(InferenceServerException(message, status))
        while not (isinstance(step, Rpc) and step.method == "infer"):
            step = self.steps.send(None if isinstance(step, Sleep) else "")

    def write(self, value: float) -> None:
        """What the server does when it has computed this request's output."""
        start, length = self.region.places["v"]
        memory = self.region.handle._mpsm_handle.buf[start : start + length]
        np.ndarray(4, np.float32, memory)[:] = value

    def end(self) -> np.ndarray:
        with pytest.raises(StopIteration) as done:
            self.steps.send(answer(self.name))
        return done.value.value["v"]


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls(ClientOptions(shared_memory="system"))
    calls.cancels = True
    yield calls
    for region in calls.pool.leave(everything=True):
        region.destroy()


@pytest.mark.parametrize("lost", LOST)
def test_a_late_attempt_writes_into_no_other_requests_answer(calls, lost):
    first = Asked(calls, "first")
    first.fail(*LOST[lost])
    first.write(1)
    assert (first.end() == 1).all()
    second = Asked(calls, "second")
    second.write(2)
    first.write(1)  # the attempt whose connection was lost ends only now
    assert (second.end() == 2).all()
    assert calls.pool.free == [second.region] and calls.pool.retired == [first.region]


def test_regions_of_requests_that_never_began_are_lent_again(calls):
    first = Asked(calls, "first")
    first.fail("Exceeds maximum queue size", "StatusCode.UNAVAILABLE")
    first.write(1)
    first.end()
    assert calls.pool.free == [first.region]


def test_a_region_of_a_request_that_failed_is_lent_to_nobody(calls):
    asked = Asked(calls, "one")
    with pytest.raises(ServerFailed):
        asked.steps.throw(InferenceServerException("Received RST_STREAM", "StatusCode.INTERNAL"))
    assert calls.pool.retired == [asked.region]


def test_a_region_that_comes_back_to_a_closed_client_is_gone(calls):
    asked = Asked(calls, "one")
    assert calls.pool.leave(everything=True) == []
    asked.write(3)
    assert (asked.end() == 3).all()
    assert not (Path("/dev/shm") / asked.region.name).exists()


def test_a_model_that_another_thread_forgets_is_described_all_the_same(calls):
    class Forgetful(dict):
        def __contains__(self, name: object) -> bool:
            return self.pop(name, None) is not None

        def get(self, name: object, default: object = None) -> Any:
            return self.pop(name, default)

    calls.known = Forgetful(features=SERVED)
    with pytest.raises(StopIteration) as done:
        next(calls.describe("features"))
    assert done.value.value is SERVED


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_picture_that_is_not_loaded_may_be_in_two_parts(tmp_path, kind):
    path, noise = tmp_path / f"noise.{kind}", np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 255, (500, 600, 3), np.uint8)).save(path)

    def read(picture: Image.Image) -> np.ndarray:
        return to_tensor(list_pictures([picture]), (64, 64), SQUASH, False, Limits())["image"]

    wanted = read(Image.open(path))
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            picture = Image.open(path)
            for found in threads.map(read, [picture] * 2):
                assert np.array_equal(found, wanted)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_threads_may_share_a_graph(tmp_path, runtime):
    pytest.importorskip(runtime)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 64]) for name in "xy"]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.eye(64).flatten())
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "graph", ports[:1], ports[1:], [weights])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "graph.onnx")
    call = open_graph(tmp_path / "graph.onnx", runtime, 1, None)

    def ask(thread: int) -> bool:
        given = [np.full((400, 64), 100 * thread + n, np.float32) for n in range(40)]
        return all(np.array_equal(call([x])[0], x) for x in given)

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(ask, range(3)))
