"""4,000 requests that are wrong in random ways, and right ones among them: a seeded fuzz of the
real server.

Every right request is answered rightly, every wrong one with a typed error in a sentence (or, where
chance made a request that can be answered, with numbers of the right shape), no process dies and
memory stays flat.
"""

import asyncio
import gzip
import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from contract.class_scores import ClassVectors, probabilities
from contract.dense import class_map, depth_map
from contract.images import read_views
from contract.manifest import add_files
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.bundle import read_bundle
from serve.repository.state import read_state
from serve.server.stubs import find_stubs
from tests.conftest import need_tritonserver
from tests.serve.raw_requests import (
    array,
    arrays,
    encode,
    memory,
    reference,
    request,
    same,
    strings,
)

SEED = 20261121
WRONG, OVER_HTTP, RIGHT, WARM_UP = 4000, 500, 450, 300
CONCURRENCY = 8
SIZE = 64
PHOTOS = [PackagedPhotos().load(number).convert("RGB").resize((200, 150)) for number in range(3)]
FILES = [
    encode(PHOTOS[0], "JPEG"),
    encode(PHOTOS[1], "PNG"),
    encode(PHOTOS[2], "WEBP"),
    encode(PHOTOS[0], "JPEG", progressive=True),
    encode(PHOTOS[1].quantize(), "PNG", transparency=3),
]

TYPED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL}
LEAKS = ("Traceback", "\nAt:\n", "not healthy")
"""What a client must not be told: Python's errors, and that of a process that died."""
WORDS = "abcdefghijklmnopqrstuvwxyz_-./ \0\n%é猫😀"


@dataclass
class Serving:
    """A server's addresses, its process, its log, and every tensor of each photograph, by name."""

    grpc: str
    http: str
    pid: int
    log: list[str]
    known: list[dict[str, np.ndarray]]

    def memory(self) -> int:
        """KiB of the server and its stubs."""
        return sum(memory(pid) for pid in (self.pid, *self.stubs()))

    def stubs(self) -> list[int]:
        return sorted(stub.pid for stub in find_stubs(self.pid))


@pytest.fixture(scope="module")
def serving(expensive, small_bundle, tmp_path_factory):
    """The small bundle with vectors of three classes beside it, served."""
    need_tritonserver()
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder, log = tmp_path_factory.mktemp("fuzz"), []
    path = shutil.copytree(small_bundle, folder / "bundle")
    vectors = np.eye(3, 32, dtype=np.float32)
    about = {
        "format": "1",
        "classes": json.dumps(["cat", "cup", "moon"]),
        "teacher": "mae",
        "logit_scale": "5",
    }
    save_file({"embeddings": vectors}, path / "class_embeddings.safetensors", about)
    add_files(path, ["class_embeddings.safetensors"])
    known = []
    for file in FILES[:3]:
        tensors = reference(read_bundle(path), read_views(file, SQUASH, SIZE, SIZE))
        tensors["class_map"] = class_map(tensors["segmentation_logits"], SIZE, SIZE)
        tensors["depth_map"] = depth_map(tensors["depth"], SIZE, SIZE)
        tensors["probabilities"] = probabilities(tensors["mae_token"], ClassVectors(vectors, 5.0))
        known.append(tensors)
    make_repository(read_bundle(path), folder / "repository", Settings())
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, log.append
    ) as server:
        pid = read_state(folder / "repository").server_pid
        yield Serving(server.grpc, server.http, pid, log, known)


FRONT = [
    "backbone_global",
    "backbone_patches",
    "cls_token",
    "mae_patches",
    "dino_token",
    "segmentation_logits",
    "depth",
]
MODELS = {  # inputs, outputs
    "features": (["image"], FRONT),
    "features_encoded": (["encoded"], FRONT),
    "fused": (["image"], FRONT),
    "decode": (["encoded"], ["image"]),
    "segmentation": (["image"], ["class_map"]),
    "depth": (["image"], ["depth_map"]),
    "zero_shot": (["image", "labels"], ["probabilities"]),
}
OFTEN = ["features", "features_encoded", "features_encoded", "fused", "zero_shot"]


def right(
    rng: random.Random, known: list[dict], model: str
) -> tuple[ModelInferRequest, dict[str, np.ndarray]]:
    """A request that can be answered, and its answer."""
    number = rng.randrange(len(known))
    inputs, outputs = MODELS[model]
    outputs = rng.sample(outputs, rng.randint(1, len(outputs)))
    tensors = []
    for name in inputs:
        if name == "encoded":
            tensors.append(strings(name, [FILES[number]]))
        elif name == "labels":
            tensors.append(strings(name, [b"cat", b"cup", b"moon"], [3]))
        else:
            tensors.append(array(name, known[number][name]))
    return request(model, tensors, outputs), {name: known[number][name] for name in outputs}


# What goes wrong


def some(rng: random.Random, count: int) -> bytes:
    return rng.randbytes(rng.randint(0, count))


def word(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 300])))


def pick(rng: random.Random, message: ModelInferRequest):
    """One of the inputs, with its number; an empty one if there is none left."""
    if not message.inputs:
        message.inputs.add()
    number = rng.randrange(len(message.inputs))
    return number, message.inputs[number]


def wrong_type(rng, message):
    kinds = [
        "BOOL",
        "UINT8",
        "INT8",
        "UINT16",
        "FP16",
        "BF16",
        "INT32",
        "INT64",
        "UINT64",
        "FP32",
        "FP64",
        "BYTES",
    ]
    pick(rng, message)[1].datatype = rng.choice([*kinds, word(rng)])


def wrong_shape(rng, message):
    shape = pick(rng, message)[1].shape
    sizes = [0, 1, 2, 3, 5, 48, 70, 96, 1000, -1]
    if message.model_name != "zero_shot":
        # Where the model leaves an axis open, the embedded Triton (2.51) multiplies without looking
        # for an overflow, and 2**62 x 64 x 64 x 3 pictures in 0 bytes end the stub process: mended
        # in 2025 (triton-inference-server/server#8182)
        sizes += [-(2**31), 2**31, 2**32, 2**32 + 1, 2**40, 2**62, 2**63 - 1]
    what = rng.randrange(6)
    if what < 3 and shape:
        shape[rng.choice([0, rng.randrange(len(shape))])] = rng.choice(sizes)
    elif what == 3 and shape:
        del shape[rng.randrange(len(shape))]
    elif what == 4:
        shape.insert(rng.randint(0, len(shape)), rng.choice(sizes))
    else:
        sizes = rng.choices(sizes, k=rng.choice([0, 1, 4, 40]))
        del shape[:]
        shape.extend(sizes)


def wrong_bytes(rng, message):
    contents = message.raw_input_contents
    if not contents:
        return
    number = rng.randrange(len(contents))
    data, what = contents[number], rng.randrange(5)
    if what == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif what == 1:
        data += some(rng, 1000)
    elif what == 2:
        data = rng.choice([b"", some(rng, 64), bytes(rng.randrange(2_000_000))])
    elif what == 3:
        del contents[number]
        return
    else:
        data = flipped(rng, data)
    contents[number] = data


def wrong_floats(rng, message):
    for number, port in enumerate(message.inputs):
        if port.datatype == "FP32" and number < len(message.raw_input_contents):
            data = message.raw_input_contents[number]
            values = np.frombuffer(data[: len(data) // 4 * 4], np.float32).copy()
            for _ in range(rng.choice([1, 1, 50])):
                if len(values):
                    values[rng.randrange(len(values))] = rng.choice(
                        [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45]
                    )
            message.raw_input_contents[number] = values.tobytes()


def wrong_names(rng, message):
    number, port = pick(rng, message)
    what = rng.randrange(6)
    if what == 0:
        port.name = word(rng)
    elif what == 1:
        del message.inputs[number]
    elif what == 2:
        message.inputs.add().CopyFrom(port)
    elif what == 3:
        message.inputs.add(name=word(rng), datatype="FP32", shape=[1, 2])
        message.raw_input_contents.append(bytes(8))
    elif what == 4:
        message.model_name = rng.choice(
            [word(rng), "features/1", "../features", "backbone_0", "nobody"]
        )
    else:
        message.model_version = rng.choice(
            ["0", "-1", "2", "999999999999999999999", "one", word(rng)]
        )


def wrong_outputs(rng, message):
    what = rng.randrange(5)
    if what == 0:
        message.outputs.add(name=rng.choice([word(rng), "spaces", "image", "nobody_token"]))
    elif what == 1:
        for _ in range(rng.choice([1, 200])):
            message.outputs.add(name=message.outputs[0].name if message.outputs else "")
    elif what == 2:
        del message.outputs[:]
    else:
        for port in message.outputs:
            key, value = rng.choice(
                [("classification", -1), ("classification", 10**6), ("shared_memory_byte_size", 9)]
            )
            port.parameters[key].int64_param = value


def wrong_parameters(rng, message):
    what = rng.randrange(4)
    if what == 0:
        port = pick(rng, message)[1]
        port.parameters["shared_memory_region"].string_param = word(rng)
        port.parameters["shared_memory_byte_size"].int64_param = rng.choice([0, 64, -1, 2**62])
    elif what == 1:
        for port in message.outputs:
            port.parameters["shared_memory_region"].string_param = word(rng)
    elif what == 2:
        key = rng.choice(
            ["sequence_start", "binary_data_output", "priority", "timeout", "headers", word(rng)]
        )
        parameter = message.parameters[key]
        kind = rng.choice(["bool_param", "int64_param", "string_param"])
        value = {
            "bool_param": True,
            "int64_param": rng.choice([0, -1, 2**63 - 1]),
            "string_param": word(rng),
        }[kind]
        setattr(parameter, kind, value)
    else:
        message.id = word(rng)


def wrong_contents(rng, message):
    """Values in the message's typed fields, instead of or beside bytes."""
    number, port = pick(rng, message)
    field = rng.choice(
        ["uint_contents", "int_contents", "fp32_contents", "bytes_contents", "bool_contents"]
    )
    value = {
        "bytes_contents": some(rng, 50),
        "fp32_contents": float("nan"),
        "bool_contents": True,
    }.get(field, 7)
    getattr(port.contents, field).extend([value] * rng.choice([0, 1, 100, 12288]))
    if rng.random() < 0.6:
        del message.raw_input_contents[:]


def flipped(rng: random.Random, data: bytes) -> bytes:
    """With some bits turned over."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 3, 30, 300])):
        if found:
            found[rng.choice([rng.randrange(len(found)), rng.randrange(min(len(found), 64))])] ^= (
                1 << rng.randrange(8)
            )
    return bytes(found)


def wrong_file(rng: random.Random) -> bytes:
    """A picture file that is probably damaged."""
    data, other = rng.choice(FILES), rng.choice(FILES)
    what = rng.randrange(7)
    if what == 0:
        return data[: rng.randrange(len(data))]
    if what == 1:
        return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    if what == 2:
        start = rng.randrange(len(data))
        return data[:start] + some(rng, 200) + data[start + rng.randrange(200) :]
    if what == 3:
        return rng.choice([b"", some(rng, 3000), bytes(100), data[:20] + some(rng, 500)])
    if what == 4:
        return encode(
            PHOTOS[0].resize((rng.randint(1, 40), rng.randint(1, 40))),
            rng.choice(["GIF", "BMP", "TIFF", "PPM"]),
        )
    if what == 5:  # other sizes in the header
        at = {b"\x89P": 16, b"RI": 26}.get(data[:2], data.find(b"\xff\xc0") + 5)
        return (
            data[:at] + struct.pack(">HH", *rng.choices([0, 1, 300, 65535], k=2)) + data[at + 4 :]
        )
    return flipped(rng, data)


def wrong_strings(rng, message):
    for number, port in enumerate(message.inputs):
        if port.datatype != "BYTES" or number >= len(message.raw_input_contents):
            continue
        if port.name == "labels":
            labels = rng.choice(
                [[], [b""], [b"dog"], [b"cat", some(rng, 20)], [b"cat"] * 300, [b"x" * 5000]]
            )
            packed = strings("labels", labels, [len(labels)])
        else:
            files = [
                wrong_file(rng) if rng.random() < 0.7 else rng.choice(FILES)
                for _ in range(rng.choice([1, 1, 1, 2, 4]))
            ]
            packed = strings("encoded", files)
        data = bytearray(packed.data)
        if data and rng.random() < 0.2:  # a length that is not true
            data[: 4 if rng.random() < 0.5 else 1] = rng.choice(
                [b"\xff" * 4, bytes(4), struct.pack("<I", len(data)), b"\1"]
            )
        message.raw_input_contents[number] = bytes(data)
        del port.shape[:]
        port.shape.extend(packed.shape)


WRONGS: list[Callable] = [
    wrong_type,
    wrong_shape,
    wrong_shape,
    wrong_bytes,
    wrong_floats,
    wrong_names,
    wrong_outputs,
    wrong_parameters,
    wrong_contents,
    wrong_strings,
    wrong_strings,
]


def wrong(rng: random.Random, known: list[dict]) -> tuple[ModelInferRequest, str]:
    """A request after some accidents, and what they were."""
    message, _ = right(rng, known, rng.choice([*MODELS, *OFTEN]))
    before, done = message.SerializeToString(), []
    while message.SerializeToString() == before or rng.random() < 0.35:
        done.append(rng.choice(WRONGS))
        done[-1](rng, message)
    return message, f"{message.model_name[:20]!r}: {', '.join(step.__name__ for step in done)}"


def wrong_http(rng: random.Random, known: list[dict]) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body of a request that is probably wrong."""
    model = rng.choice(
        [
            "features",
            "features_encoded",
            "fused",
            "depth",
            "zero_shot",
            word(rng).split(" ")[0],
        ]
    )
    path = "".join(c for c in f"/v2/models/{model}/infer" if c.isascii() and c.isprintable())
    tensor = {
        "name": rng.choice(["image", "encoded", "spaces", ""]),
        "shape": rng.choice([[1, 64, 64, 3], [1, 1], [], [-1], "x"]),
        "datatype": rng.choice(["UINT8", "BYTES", "FP32", "", 7]),
        "data": rng.choice([[], [0] * 12288, ["a"], [None], [1e999], {}, 5]),
    }
    body = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": rng.choice(["backbone_global", "x"])}]}
    ).encode()
    headers: dict[str, str] = {}
    what = rng.randrange(6)
    if what == 0:
        body = flipped(rng, body)
    elif what == 1:
        body = some(rng, 500)
    elif what == 2:
        body = body[: rng.randrange(len(body))]
    elif what == 3:
        headers["Inference-Header-Content-Length"] = rng.choice(
            ["0", "-1", "5", str(len(body)), "1" * 30, "x"]
        )
        body += some(rng, 100)
    elif what == 4:
        headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br"])
        body = rng.choice([body, gzip.compress(body), gzip.compress(body)[:-9], some(rng, 99)])
    return path, headers, body


# The run


async def ask(stub: GRPCInferenceServiceStub, message: ModelInferRequest):
    """The answer, or the error."""
    try:
        return await stub.ModelInfer(message, timeout=60)
    except grpc.RpcError as error:
        return error


async def post(address: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    """Status and body of a request over HTTP, on a connection of its own."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with closing(writer):
        lines = {"Host": address, "Connection": "close", "Content-Length": str(len(body))} | headers
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        answer = await asyncio.wait_for(reader.read(), 60)
    head, _, said = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), said


def check_wrong(answer, known: dict[str, np.ndarray]) -> str:
    """What is amiss with the answer to a wrong request, "" if nothing is."""
    if isinstance(answer, grpc.RpcError):
        said = answer.details()
        if answer.code() not in TYPED or not said or any(word in said for word in LEAKS):
            return f"{answer.code()}: {said}"
        return ""
    for port, data in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if port.datatype == "BYTES":  # classes
            continue
        one = known[port.name].shape[1:]
        values = arrays_of(port, data)
        # Triton takes a batch of 0 with the bytes of one picture for a picture without a batch
        shaped = tuple(port.shape) == one or (
            tuple(port.shape[1:]) == one and 1 <= port.shape[0] <= 4
        )
        if port.name == "probabilities":
            shaped = len(port.shape) == 2
        if not shaped or not np.isfinite(values).all():
            return f"{port.name} {list(port.shape)}, finite: {np.isfinite(values).all()}"
    return ""


def arrays_of(port, data: bytes) -> np.ndarray:
    return np.frombuffer(
        data, {"FP32": np.float32, "INT32": np.int32, "UINT8": np.uint8}[port.datatype]
    )


async def run(serving: Serving, jobs: list[Callable]) -> int:
    """Do the jobs, so many at a time; returns the memory after the first of them."""
    left, warm = iter(enumerate(jobs)), 0

    async def work() -> None:
        nonlocal warm
        for number, job in left:
            if number == WARM_UP:
                warm = serving.memory()
            await job()

    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return warm


def test_wrong_requests_harm_nobody(serving):
    rng = random.Random(SEED)
    faults: list[str] = []
    count: Counter = Counter()
    stubs = serving.stubs()

    async def fuzz() -> int:
        async with grpc.aio.insecure_channel(serving.grpc) as channel:
            stub = GRPCInferenceServiceStub(channel)

            async def send_right(model: str, message: ModelInferRequest, expected: dict) -> None:
                answer = await ask(stub, message)
                try:
                    same(arrays(answer), expected)
                    count["right"] += 1
                except (AssertionError, AttributeError):
                    faults.append(f"a right request to {model}: {answer}"[:600])

            async def send_wrong(message: ModelInferRequest, what: str) -> None:
                answer = await ask(stub, message)
                said = check_wrong(answer, serving.known[0])
                count[answer.code().name if isinstance(answer, grpc.RpcError) else "answered"] += 1
                if said:
                    faults.append(f"{what}: {said}"[:600])

            async def send_http(path: str, headers: dict[str, str], body: bytes) -> None:
                status, said = await post(serving.http, path, headers, body)
                count[f"http {status}"] += 1
                if any(word in said.decode(errors="replace") for word in LEAKS):
                    faults.append(f"http {path} {headers} {body[:200]!r}: {status} {said[:300]!r}")

            def job(send: Callable, *arguments) -> Callable:
                return lambda: send(*arguments)

            jobs = [job(send_wrong, *wrong(rng, serving.known)) for _ in range(WRONG)]
            jobs += [job(send_http, *wrong_http(rng, serving.known)) for _ in range(OVER_HTTP)]
            for number in range(RIGHT):
                model = list(MODELS)[number % len(MODELS)]
                jobs.append(job(send_right, model, *right(rng, serving.known, model)))
            rng.shuffle(jobs)
            warm = await run(serving, jobs)
            after = serving.memory()
            for model in MODELS:
                await send_right(model, *right(rng, serving.known, model))
            assert after < 1.1 * warm + 30_000, f"memory grew from {warm:,} to {after:,} KiB"
            return after

    asyncio.run(fuzz())
    print(dict(count))
    assert not faults, f"{len(faults)} faults, the first:\n" + "\n".join(faults[:5])
    assert count["right"] == RIGHT + len(MODELS)
    assert count["INVALID_ARGUMENT"] > WRONG / 2, "the requests were hardly wrong"
    assert serving.stubs() == stubs, "a stub process died"
    assert not any("not healthy" in line for line in serving.log)
