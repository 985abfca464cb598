"""Triton's HTTP endpoints, as much of them as watching a server takes: health, models, statistics,
metrics, one inference.

Standard library only, and a connection a call: it is used from threads, at a few calls a second,
beside the server. https://github.com/kserve/open-inference-protocol says what they are, and
Triton's docs/protocol what is added.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

ADMIN_HEADER = "admin-key"
"""The header that opens restricted endpoints; over gRPC its name is
`triton-grpc-protocol-admin-key`.
"""

_ITEM_SIZES = {
    "BOOL": 1,
    "UINT8": 1,
    "INT8": 1,
    "UINT16": 2,
    "INT16": 2,
    "FP16": 2,
    "BF16": 2,
    "UINT32": 4,
    "INT32": 4,
    "FP32": 4,
    "UINT64": 8,
    "INT64": 8,
    "FP64": 8,
}
"""Bytes of an element, by the protocol's names of types; BYTES has none."""


class Refused(RuntimeError):
    """The server answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Tensor:
    """An input of an inference: zeros, or `text` in every element of a BYTES tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    text: bytes = b""

    def encode(self) -> bytes:
        """The tensor's bytes on the wire: BYTES elements have their length in front."""
        count = math.prod(self.shape)
        if self.datatype == "BYTES":
            return (len(self.text).to_bytes(4, "little") + self.text) * count
        return bytes(_ITEM_SIZES[self.datatype] * count)


@dataclass(frozen=True)
class Rest:
    """A server's HTTP address ("127.0.0.1:8000") and, for restricted endpoints, its key.

    Methods raise Refused for an error that the server answers with, OSError (TimeoutError among
    them) if it does not.
    """

    address: str
    key: str = field(default="", repr=False)
    timeout: float = 10.0

    def ready(self) -> bool:
        try:
            self.call("GET", "/v2/health/ready")
        except (OSError, Refused):
            return False
        return True

    def version(self) -> str:
        """Triton's own."""
        return str(self.json("GET", "/v2").get("version", ""))

    def model_ready(self, model: str, version: str) -> bool:
        """Whether Triton calls this version ready; a version whose process was killed goes on being
        called so.
        """
        try:
            self.call("GET", f"/v2/models/{model}/versions/{version}/ready")
        except Refused:
            return False
        return True

    def index(self) -> list[dict[str, Any]]:
        """Name, version, state and reason of every requested version; restricted."""
        return self.json("POST", "/v2/repository/index", b"{}")

    def load(self, model: str, config: str = "", timeout: float = 120.0) -> None:
        """Load a model whose files have changed, next to the old one until it is ready; restricted.

        `config`: a configuration as JSON, in place of the model's file.
        """
        body = json.dumps({"parameters": {"config": config}} if config else {}).encode()
        self.call("POST", f"/v2/repository/models/{model}/load", body, timeout=timeout)

    def config(self, model: str, version: str) -> dict[str, Any]:
        """A model's configuration, in the JSON form of its protobuf message."""
        return self.json("GET", f"/v2/models/{model}/versions/{version}/config")

    def statistics(self) -> list[dict[str, Any]]:
        """Counts and durations of every loaded version since it was loaded."""
        return self.json("GET", "/v2/models/stats")["model_stats"]

    def infer(
        self, model: str, version: str, inputs: Sequence[Tensor], output: str, timeout: float
    ) -> None:
        """Run one inference of one output and throw the answer away."""
        parts = [tensor.encode() for tensor in inputs]
        ports = [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": {"binary_data_size": len(part)},
            }
            for tensor, part in zip(inputs, parts, strict=True)
        ]
        outputs = [{"name": output, "parameters": {"binary_data": True}}]
        head = json.dumps({"id": "canary", "inputs": ports, "outputs": outputs}).encode()
        headers = {
            "Inference-Header-Content-Length": str(len(head)),
            "Content-Type": "application/octet-stream",
        }
        path = f"/v2/models/{model}/versions/{version}/infer"
        self.call("POST", path, b"".join([head, *parts]), headers, timeout)

    def json(self, method: str, path: str, body: bytes | None = None) -> Any:
        return json.loads(self.call(method, path, body))

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        host, _, port = self.address.rpartition(":")
        connection = HTTPConnection(host.strip("[]"), int(port), timeout=timeout or self.timeout)
        key = {ADMIN_HEADER: self.key} if self.key else {}
        try:
            connection.request(method, path, body, {**(headers or {}), **key})
            answer = connection.getresponse()
            content = answer.read()
        except HTTPException as error:  # cut off in the middle
            raise ConnectionError(
                f"{self.address} answered no HTTP: {type(error).__name__}"
            ) from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise Refused(answer.status, _error_text(content))
        return content


def _error_text(content: bytes) -> str:
    """The sentence in the body of an error."""
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace").strip()
