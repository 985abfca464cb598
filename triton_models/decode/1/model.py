"""JPEG, PNG or WebP bytes in, RGB pictures of the model's size out; limits keep decompression bombs
away.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from graph_model import Refused, answer_each
from images import Limits, UnreadableImage, read_views
from views import ViewPolicy


class TritonPythonModel:
    """The first step of `features_encoded`. images.py and views.py are those of contract/; they and
    graph_model.py are copied next to this file.
    """

    def initialize(self, args: dict) -> None:
        texts = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        # the version's own, which a rollout may change; the configuration stays as it is, and in
        # older repositories has one too
        folder = Path(args["model_repository"]) / args["model_version"]
        self.view = ViewPolicy.parse(json.loads((folder / "model.json").read_text())["view"])
        texts = {key: text for key, text in texts.items() if key not in ("unbatched", "view")}
        settings = {key: int(text) for key, text in texts.items()}
        self.max_batch = settings["max_batch"]
        self.height, self.width = settings["height"], settings["width"]
        self.limits = Limits(settings["max_bytes"], settings["max_pixels"])

    def execute(self, requests: list) -> list:
        """Answer every request; a picture that cannot be decoded fails its own request only."""
        return answer_each(requests, self.answer)

    def answer(self, request):
        """uint8 [B, height, width, 3] of one request; raises Refused, naming which of several
        pictures it is.
        """
        encoded = pb_utils.get_input_tensor_by_name(request, "encoded").as_numpy()
        # Triton passes a batch of 0 on without its axis, if there is one string
        if encoded.ndim != 2 or not len(encoded):
            raise Refused("input 'encoded' is a batch of 0: give 1 or more")
        if len(encoded) > self.max_batch:
            raise Refused(f"input 'encoded' has {len(encoded)} pictures: at most {self.max_batch}")
        pictures = np.empty((len(encoded), self.height, self.width, 3), np.uint8)
        for number, data in enumerate(encoded[:, 0]):
            try:
                (pictures[number],) = read_views(
                    bytes(data), self.view, self.height, self.width, self.limits
                )
            except UnreadableImage as error:
                raise Refused(
                    f"picture {number}: {error}" if len(encoded) > 1 else str(error)
                ) from error
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", pictures)])
