"""JPEG, PNG or WebP bytes in, RGB pictures of the model's size out; limits keep decompression bombs away."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from images import BadImage, Limits, decode, fit


class TritonPythonModel:
    """The first step of `features_encoded`. images.py beside this file is serve/images.py."""

    def initialize(self, args: dict) -> None:
        """Read sizes and limits from config.pbtxt."""
        settings = {
            key: int(value["string_value"]) for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.height, self.width = settings["height"], settings["width"]
        self.limits = Limits(settings["max_bytes"], settings["max_pixels"])

    def execute(self, requests: list) -> list:
        """Answer every request; a picture that cannot be decoded fails its own request only."""
        return [self.answer(request) for request in requests]

    def answer(self, request):  # noqa: ANN001, ANN201 - Triton's own types
        """uint8 [B, height, width, 3] of one request, or why there is none."""
        encoded = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy().reshape(-1)
        pictures = []
        for number, data in enumerate(encoded):
            try:
                pictures.append(fit(decode(bytes(data), self.limits), self.height, self.width))
            except BadImage as error:
                where = f"picture {number}: " if len(encoded) > 1 else ""
                code = pb_utils.TritonError.INVALID_ARG
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{where}{error}", code))
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", np.stack(pictures))])
