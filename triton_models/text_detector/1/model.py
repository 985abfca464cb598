"""A detector's text tower: tokens and their masks in, text features out."""

from graph_model import PromptGraph


class TritonPythonModel(PromptGraph):
    """See graph_model.py, copied next to this file in a rendered repository."""
