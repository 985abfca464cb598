"""Names that a bundle states: types that refuse whatever could lead out of a folder or replace
code.

A bundle may come from anybody, and its names become files, folders, models and tensors. They are
checked by the schema that reads them, so that no reader can forget it.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter

from contract.views import ViewPolicy

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name) or name in (MANIFEST, SIGNATURE):
        raise ValueError(f"'{name[:200]}' is not the name of a file in a bundle")
    return name


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)]
"""Of a graph, tensor, teacher or axis that varies."""


def _view(text: str) -> str:
    return str(ViewPolicy.parse(text))


ViewText = Annotated[str, AfterValidator(_view)]
"""A view policy as contract/views.py writes it."""

FileName = Annotated[str, AfterValidator(_plain)]
"""Of a file directly in a bundle."""

GraphFile = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*\.onnx$", max_length=200)]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

MOST_TEMPLATES = 1000
"""Of class embeddings."""
_MOST_TEXT = 2000
_TEXT = r"^[^\x00-\x1f\x7f-\x9f]*$"

Text = Annotated[str, StringConstraints(pattern=_TEXT, max_length=_MOST_TEXT)]
"""What people read, of a class say: clients print it, so it must not steer their terminals."""


def is_text(value: str) -> bool:
    """Whether a bundle may state this text, as `Text` does."""
    return len(value) <= _MOST_TEXT and re.search(_TEXT, value) is not None


def _readable(about: dict[str, Any]) -> dict[str, Any]:
    for value in about.values():
        texts = value if isinstance(value, list | tuple) else [value]
        _TEXTS.validate_python([text for text in texts if isinstance(text, str)])
    return about


_TEXTS = TypeAdapter(list[Text])
About = Annotated[dict[str, Any], AfterValidator(_readable)]
"""Facts of a graph, whose texts people read."""

Axis = Annotated[int, Field(ge=1, le=2**24)] | Name
"""A tensor's size along an axis, or the name of a size that varies."""

Side = Annotated[int, Field(ge=1, le=2**15)]
"""Of a picture, in pixels."""
