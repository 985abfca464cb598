"""KPU's student: a ViT inside an adapter."""

from types import SimpleNamespace

from distill.models.vit_adapter import ViTAdapter
from export.hub.remote.student import Student

PREFIX = "student."
"""What the model puts before the names of `model.safetensors`."""


def build_student(config: SimpleNamespace) -> Student:
    """The student of a `config.json`."""
    config.name = config.architecture
    return ViTAdapter(config, SimpleNamespace(**config.adapter))
