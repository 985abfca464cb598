"""A task head's output in, a map of the picture's size out, made by a function of dense.py.

dense.py is contract/dense.py; it and graph_model.py are copied next to this file in a rendered
repository.
"""

import json
from pathlib import Path

import dense
import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import Refused, answer_each, check_bundle, is_finite, wrong_size


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        """Read names, the function and the sizes of pictures that are served from config.pbtxt."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.bundle = json.loads((folder / "model.json").read_text())["bundle"]
        self.values, self.map = config["input"][0]["name"], config["output"][0]["name"]
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        settings.pop("unbatched")
        self.max_batch = int(settings.pop("max_batch"))
        self.make = getattr(dense, settings.pop("function"))
        # of DPT heads a fraction: 14 / 4 pixels
        self.cell = float(settings.pop("cell"))
        self.limits = {key: int(value) for key, value in settings.items()}

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return answer_each(requests, self.answer)

    def answer(self, request):
        """The map of one request; the picture is read for its size alone. Raises Refused."""
        image = pb_utils.get_input_tensor_by_name(request, "image").shape()
        values = pb_utils.get_input_tensor_by_name(request, self.values).as_numpy()
        # Triton passes a batch of 0 on without its axis, if the bytes are those of one picture
        message = (
            wrong_size(image, self.limits)
            if len(image) == 4 and image[0]
            else "input 'image' is a batch of 0: give 1 or more"
        )
        if message:
            raise Refused(message)
        if image[0] > self.max_batch or image[0] != len(values):
            raise Refused(
                f"'image' has {image[0]} pictures and '{self.values}' {len(values)} rows: give as "
                f"many of each, at most {self.max_batch}"
            )
        check_bundle(request, self.bundle)
        if not is_finite(values):
            raise Refused(f"input '{self.values}' holds NaN or infinity: give finite numbers")
        try:
            result = self.make(values, *image[1:3], self.cell)
        except ValueError as error:  # values of a picture of another size
            raise Refused(f"input '{self.values}' does not belong to 'image': {error}") from error
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.map, np.ascontiguousarray(result))])
