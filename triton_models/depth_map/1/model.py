"""Metres at every patch in, metres at every pixel out."""

import triton_python_backend_utils as pb_utils
from dense import depth_map


class TritonPythonModel:
    """The last step of `depth`. dense.py beside this file is serve/dense.py."""

    def execute(self, requests: list) -> list:
        """The picture is read for its size alone."""
        answers = []
        for request in requests:
            values, image = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("depth", "image"))
            found = depth_map(values, *image.shape[1:3])
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("depth_map", found)]))
        return answers
