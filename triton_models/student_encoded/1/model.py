"""Bytes of pictures in, any outputs of `features` out: calls `decode`, then `features`."""

import json
from pathlib import Path

import triton_python_backend_utils as pb_utils
from calling_model import LATEST, ConcurrentModel, Refused


class TritonPythonModel(ConcurrentModel):
    """See calling_model.py, copied next to this file in a rendered repository."""

    def initialize(self, args: dict) -> None:
        """Read how `decode` of this version sees pictures."""
        super().initialize(args)
        self.version = int(args["model_version"])
        folder = Path(args["model_repository"]) / args["model_version"]
        # `features` answers in the version that serves: while a rollout switches it refuses
        # pictures of another view than its bundle's
        self.parameters = {"view": json.loads((folder / "model.json").read_text())["view"]}

    async def compute(self, request) -> dict:
        """The outputs that a request wants, by name; raises Refused."""
        encoded = pb_utils.get_input_tensor_by_name(request, "encoded")
        # Triton passes a batch of 0 on without its axis, if there is one string
        if len(encoded.shape()) != 2 or not encoded.shape()[0]:
            raise Refused("input 'encoded' is a batch of 0: give 1 or more")
        names = list(request.requested_output_names())
        (image,) = await self.call_tensors("decode", self.version, [encoded], ["image"], request)
        answers = await self.call_tensors(
            "features", LATEST, [image], names, request, self.parameters
        )
        return dict(zip(names, answers, strict=True))
