"""A detector without its backbones: maps and text features in, boxes and scores out."""

import numpy as np
from graph_model import PromptGraph, is_finite


class TritonPythonModel(PromptGraph):
    """See graph_model.py, copied next to this file in a rendered repository."""

    def is_whole(self, name: str, value: np.ndarray) -> bool:
        """Logits of tokens beyond the text are -inf."""
        if name != "logits":
            return is_finite(value)
        return bool((value < np.inf).all())  # NaN is not less either
