"""Load, unload and query models of a running server over HTTP, with the key of its state file.

HTTP stays on this machine where gRPC has TLS (serve/server/process.py), so that a rollout needs no
certificates.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from contract.errors import UserError
from contract.golden import Golden, compare
from contract.signature import IMAGE
from serve.errors import ServerError
from serve.server.loading import one_line
from serve.server.rest import Refused, Rest
from serve.server.state import read_state

_NO_REASON = "no reason given"


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
        self.client = http.InferenceServerClient(
            state.http, connection_timeout=10, network_timeout=120
        )

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

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: list[str]
    ) -> dict[str, np.ndarray]:
        """Outputs of a model by name; raises ServerError if it does not answer."""
        tensors = []
        for name, value in inputs.items():
            tensors.append(http.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)))
            tensors[-1].set_data_from_numpy(value)
        try:
            answer = self.client.infer(
                model, tensors, outputs=[http.InferRequestedOutput(name) for name in outputs]
            )
        except (InferenceServerException, OSError) as error:
            raise ServerError(
                f"model '{model}' does not answer: {one_line(str(error)) or _NO_REASON}"
            ) from error
        return {name: answer.as_numpy(name) for name in outputs}

    def compare(self, model: str, golden: Golden) -> list[str]:
        """Differences between a model's answers and those the bundle recorded for its photographs,
        one picture per request.
        """
        names = list(golden.outputs)
        answers = [
            self.infer(model, {IMAGE: golden.image[n : n + 1]}, names)
            for n in range(len(golden.image))
        ]
        return compare(
            golden, {name: np.concatenate([answer[name] for answer in answers]) for name in names}
        )
