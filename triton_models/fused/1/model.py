"""Backbone and every head in one graph, for callers that want all outputs each time."""

from graph_model import ImageGraph


class TritonPythonModel(ImageGraph):
    """See graph_model.py, copied next to this file in a rendered repository."""
