"""Scores at every patch become a map of the picture's size; `serve.repository` copies this file
beside the models that do it.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import Refused, answer_each, is_finite, wrong_size


class MapModel:
    """The last step of a task. `make` is contract/dense.py's: values [B, positions, ...] and a size
    in, [B, H, W] out.
    """

    def initialize(self, args: dict) -> None:
        """Read names and the sizes of pictures that are served from config.pbtxt."""
        config = json.loads(args["model_config"])
        self.scores, self.map = config["input"][0]["name"], config["output"][0]["name"]
        self.about = {
            key: int(value["string_value"]) for key, value in config["parameters"].items()
        }

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return answer_each(requests, self.answer)

    def answer(self, request):
        """The map of one request; the picture is read for its size alone. Raises Refused."""
        image = pb_utils.get_input_tensor_by_name(request, "image").shape()
        values = pb_utils.get_input_tensor_by_name(request, self.scores).as_numpy()
        # Triton passes a batch of 0 on without its axis, if the bytes are those of one picture
        message = (
            wrong_size(image, self.about)
            if len(image) == 4
            else "input 'image' is a batch of 0: give 1 or more"
        )
        if message:
            raise Refused(message)
        if not is_finite(values):
            raise Refused(f"input '{self.scores}' holds NaN or infinity: give finite numbers")
        try:
            result = self.make(values, *image[1:3], self.about["cell"])
        except ValueError as error:  # scores of a picture of another size
            raise Refused(f"input '{self.scores}' does not belong to 'image': {error}") from error
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.map, result)])

    def make(self, values: np.ndarray, height: int, width: int, stride: int) -> np.ndarray:
        """The map."""
        raise NotImplementedError
