"""Metres at every patch in, metres at every pixel out."""

from dense import depth_map
from map_model import MapModel


class TritonPythonModel(MapModel):
    """The last step of `depth`. dense.py is contract/dense.py; it, map_model.py and graph_model.py
    lie beside this file.
    """

    make = staticmethod(depth_map)
