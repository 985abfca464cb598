"""Load, unload and query models of a running server over HTTP, with the key of its state file.

HTTP stays on this machine where gRPC has TLS (serve/server/process.py), so that a rollout needs no
certificates.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import tritonclient.http as http
from geventhttpclient.response import HTTPParseError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from contract.errors import UserError
from serve.errors import ServerError
from serve.repository.state import read_state
from serve.server.loading import one_line
from serve.server.rest import Refused, Rest

_NO_REASON = "no reason given"
_PATIENCE = 120.0
_PASSING = ("Exceeds maximum queue size", "Stub process")
"""Triton's messages, beside what it answers with status 503, of what says nothing of a model."""


class Busy(ServerError):
    """A model did not answer, and may well do so later: its queue is full, or time ran out."""


def http_client(address: str, seconds: float = _PATIENCE) -> http.InferenceServerClient:
    """A client that waits so long for an answer."""
    return http.InferenceServerClient(address, connection_timeout=10, network_timeout=seconds)


def infer(
    client: http.InferenceServerClient,
    model: str,
    version: int,
    inputs: Mapping[str, np.ndarray],
    outputs: list[str],
) -> dict[str, np.ndarray]:
    """Outputs of a version by name; raises ServerError if it does not answer, Busy among them."""
    tensors = []
    for name, value in inputs.items():
        tensors.append(http.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)))
        tensors[-1].set_data_from_numpy(value)
    try:
        wanted = [http.InferRequestedOutput(name) for name in outputs]
        answer = client.infer(model, tensors, model_version=str(version), outputs=wanted)
    except (InferenceServerException, OSError, HTTPParseError) as error:
        text = str(error)
        # HTTPParseError: the answer was cut off
        passing = not isinstance(error, InferenceServerException) or error.status() == "503"
        kind = Busy if passing or any(words in text for words in _PASSING) else ServerError
        raise kind(f"model '{model}' does not answer: {one_line(text) or _NO_REASON}") from error
    return {name: answer.as_numpy(name) for name in outputs}


class Admin:
    """The server that runs on a repository; raises UserError if none does."""

    def __init__(self, repository: Path) -> None:
        state = read_state(repository)
        if state is None:
            raise UserError(
                f"{repository}: no server runs on it: python -m serve.run BUNDLE --repository "
                f"{repository}"
            )
        self.rest = Rest(state.http, state.admin_key)
        self.client = http_client(state.http)

    def __enter__(self) -> "Admin":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def load(self, model: str) -> None:
        """Load what has changed of a model, next to what serves until it is ready; raises
        ServerError with the reason.
        """
        self._request(model, "load", b"{}")
        broken = [
            entry
            for entry in self.rest.index()
            if entry["name"] == model and entry.get("state") == "UNAVAILABLE"
        ]
        # Triton leaves versions that were dropped in its list, as unloaded
        message = [
            entry.get("reason", "")
            for entry in broken
            if entry.get("reason", "") not in ("", "unloaded")
        ]
        if message:
            raise ServerError(f"model '{model}' does not load: {one_line(message[0])}")

    def unload(self, model: str) -> None:
        """Unload a model; nothing happens if it is not loaded."""
        try:
            self._request(model, "unload", b"{}")
        except ServerError:
            pass  # it was never loaded

    def _request(self, model: str, what: str, body: bytes) -> None:
        """Request that a model is loaded or unloaded."""
        try:
            self.rest.call("POST", f"/v2/repository/models/{model}/{what}", body, timeout=300)
        except Refused as error:
            raise ServerError(
                f"model '{model}' does not {what}: {one_line(str(error)) or _NO_REASON}"
            ) from error
        except OSError as error:
            raise ServerError(
                f"the server at {self.rest.address} does not answer ({error})"
            ) from error
