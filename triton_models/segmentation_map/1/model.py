"""A score per patch and class in, the likeliest class of every pixel out."""

from dense import class_map
from map_model import MapModel


class TritonPythonModel(MapModel):
    """The last step of `segmentation`. dense.py is contract/dense.py; it, map_model.py and
    graph_model.py lie beside this file.
    """

    make = staticmethod(class_map)
