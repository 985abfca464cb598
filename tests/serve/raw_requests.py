"""Inference requests as bytes on the wire, so that they can be wrong in ways no client library
would let through.
"""

import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from serve.bundle import Bundle

KINDS = {"uint8": "UINT8", "float32": "FP32", "int32": "INT32"}
TYPES = {"UINT8": np.uint8, "FP32": np.float32, "INT32": np.int32}


@dataclass(frozen=True)
class Raw:
    """An input tensor: what is said of it, and its bytes (None: none are sent)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: bytes | None
    region: str = ""


def array(name: str, values: np.ndarray) -> Raw:
    """An honest tensor."""
    return Raw(name, KINDS[values.dtype.name], values.shape, np.ascontiguousarray(values).tobytes())


def strings(name: str, items: Iterable[bytes], shape: Sequence[int] | None = None) -> Raw:
    """A BYTES tensor, [n, 1] unless told: every element has its length in front."""
    items = list(items)
    data = b"".join(struct.pack("<I", len(item)) + item for item in items)
    return Raw(name, "BYTES", tuple(shape if shape is not None else (len(items), 1)), data)


def request(
    model: str, inputs: Iterable[Raw], outputs: Iterable[str] = (), version: str = ""
) -> ModelInferRequest:
    """The message."""
    message = ModelInferRequest(model_name=model, model_version=version)
    for given in inputs:
        port = message.inputs.add(name=given.name, datatype=given.kind, shape=given.shape)
        if given.region:
            port.parameters["shared_memory_region"].string_param = given.region
            port.parameters["shared_memory_byte_size"].int64_param = 64
        elif given.data is not None:
            message.raw_input_contents.append(given.data)
    for name in outputs:
        message.outputs.add(name=name)
    return message


def arrays(response: ModelInferResponse) -> dict[str, np.ndarray]:
    """Numeric outputs by name."""
    return {
        port.name: np.frombuffer(data, TYPES[port.datatype]).reshape(port.shape)
        for port, data in zip(response.outputs, response.raw_output_contents, strict=True)
        if port.datatype in TYPES
    }


def reference(bundle: Bundle, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor between and after the graphs, as onnxruntime computes it in this process."""
    known = {"image": pixels}
    for graph in bundle.parts:
        session = onnxruntime.InferenceSession(
            bundle.path / graph.file, providers=["CPUExecutionProvider"]
        )
        said = session.run(None, {tensor.name: known[tensor.name] for tensor in graph.inputs})
        known |= dict(zip((tensor.name for tensor in graph.outputs), said, strict=True))
    return known


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Assert that outputs are those expected, up to what batching with others does to floats."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            assert found[name].shape == values.shape
            assert (found[name] == values).mean() > 0.99, (
                name
            )  # the likeliest class of two that are equally likely


# Picture files


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG of rows as they are before compression, with further chunks after its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


# Processes


def memory(pid: int, line: str = "VmRSS") -> int:
    """KiB of a process; "VmHWM" is the most it ever had."""
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1])
    raise AssertionError(f"process {pid} has no {line}")
