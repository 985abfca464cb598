"""The student's backbone: pictures in, features for clients and for the other graphs out."""

from graph_model import ImageGraph


class TritonPythonModel(ImageGraph):
    """See graph_model.py, copied next to this file in a rendered repository."""
