"""A head that distil's evaluation trained, one of contract/tasks.py: scores or metres out."""

from graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """See graph_model.py, copied next to this file in a rendered repository."""
