"""Pictures in, the same pictures out, if they are of a size that the graphs answer rightly.

graph_model.py is copied next to this file in a rendered repository.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import Refused, answer_each, wrong_size


class TritonPythonModel:
    """What `ImageGraph` refuses where the python backend runs the graphs, in the same words."""

    def initialize(self, args: dict) -> None:
        """Read the sizes of pictures that are served from config.pbtxt."""
        self.limits = {
            key: int(value["string_value"])
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return answer_each(requests, self.answer)

    def answer(self, request):
        """uint8 [B, H, W, 3] of one request; raises Refused."""
        pictures = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        # Triton passes a batch of 0 on without its axis, and the configuration puts an axis of 1
        # after the batch
        if pictures.ndim != 5 or not len(pictures):
            raise Refused("input 'image' is a batch of 0: give 1 or more")
        pictures = pictures[:, 0]
        if message := wrong_size(pictures.shape, self.limits):
            raise Refused(message)
        tensor = pb_utils.Tensor("image", np.ascontiguousarray(pictures))
        return pb_utils.InferenceResponse([tensor])
