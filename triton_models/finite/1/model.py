"""Outputs of graphs in, the same out if they are finite numbers.

graph_model.py is copied next to this file in a rendered repository.
"""

import triton_python_backend_utils as pb_utils
from graph_model import Refused, answer_each, failed, is_finite


class TritonPythonModel:
    """What `GraphModel` refuses where the python backend runs the graphs, in the same words."""

    def execute(self, requests: list) -> list:
        """Answer every request; one that is refused leaves the others alone."""
        return answer_each(requests, self.answer)

    def answer(self, request):
        """The requested outputs of one request, each from its input raw_<name>; raises Refused."""
        tensors = []
        for name in request.requested_output_names():
            tensor = pb_utils.get_input_tensor_by_name(request, f"raw_{name}")
            if tensor is None:  # a client's mistake: ensembles give it
                raise Refused(f"output '{name}' needs input 'raw_{name}'")
            values = tensor.as_numpy()
            if not is_finite(values):
                message = f"output '{name}' holds NaN or infinity"
                return failed(message, pb_utils.TritonError.INTERNAL)
            tensors.append(pb_utils.Tensor(name, values))
        return pb_utils.InferenceResponse(tensors)
