"""A score per patch and class in, the likeliest class of every pixel out."""

import triton_python_backend_utils as pb_utils
from dense import class_map


class TritonPythonModel:
    """The last step of `segmentation`. dense.py beside this file is serve/dense.py."""

    def execute(self, requests: list) -> list:
        """The picture is read for its size alone."""
        answers = []
        for request in requests:
            values, image = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("segmentation_logits", "image")
            )
            found = class_map(values, *image.shape[1:3])
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("class_map", found)]))
        return answers
