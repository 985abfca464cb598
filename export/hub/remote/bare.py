"""The parts of a student without an adapter."""

from types import SimpleNamespace

from export.hub.remote.student import Student

PREFIX = "student.net."
"""What the model puts before the names of `model.safetensors`."""


def build_student(config: SimpleNamespace) -> Student:
    """The student of a `config.json`."""
    return Student(config)
