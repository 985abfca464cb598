"""The method's coupling part (UMT's cross- and intra-space modules): features in, spaces out."""

from graph_model import GraphModel


class TritonPythonModel(GraphModel):
    """See graph_model.py, copied next to this file in a rendered repository."""
