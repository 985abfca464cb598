"""A teacher's head: spaces (or features) in, that teacher's token and patches out."""

from graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """See graph_model.py, copied next to this file in a rendered repository."""
