"""The models of zero-shot classification: what a bundle's class embeddings are compared with, and
its text encoder.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.class_scores import ClassVectors
from contract.engine_record import first_problem
from contract.errors import UserError, first_line
from contract.names import MOST_TEMPLATES, Name, Sha256, Text
from contract.signature import BACKBONE
from contract.text_encoder import TEXT_ENCODER, TextEncoder, read_text_encoder
from contract.untrusted import parse_json, read_tensors
from serve.bundle import Bundle
from serve.repository.model_config import (
    CALLING_CODE,
    CONTRACT,
    GRAPH_CODE,
    TEMPLATES,
    add_port,
    add_tensor,
    bound_queue,
    place_on_cpu,
    read_template,
)
from serve.repository.settings import Settings

EMBEDDINGS = "class_embeddings.safetensors"
"""What `export.text` writes into a bundle, and perhaps TEXT_ENCODER."""

_GRAPH, _VOCABULARY = "model.onnx", "vocabulary.gz"
"""In the repository."""

_FORMAT = "1"
_SCALE = 100.0
"""CLIP's own temperature, for embeddings that name none."""
"""Each makes a sentence of every label."""


class ClassEmbeddings(NamedTuple):
    """What class_embeddings.safetensors holds: the classes' names, their vectors, and whose space
    they are of.
    """

    classes: tuple[str, ...]
    vectors: ClassVectors
    teacher: str | None
    templates: tuple[str, ...]
    text_weights: str | None

    @property
    def width(self) -> int:
        return self.vectors.embeddings.shape[1]


class _About(BaseModel):
    """The metadata of a file of class embeddings, as far as serving uses it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    classes: tuple[Text, ...]
    templates: Annotated[tuple[Text, ...], Field(max_length=MOST_TEMPLATES)] = ()
    teacher: Name | None = None
    text_weights_sha256: Sha256 | None = None
    logit_scale: Annotated[float, Field(gt=0, le=1e6)] = _SCALE


def read_class_embeddings(path: Path, data: bytes | None = None) -> ClassEmbeddings:
    """Read a file of `export.text`, or its bytes where they were read already; raises UserError for
    a damaged one, or one of another version.
    """
    again = "make it again with python -m export.text"
    # a client names its own file, which may be a link
    message, tensors = read_tensors(path, data, again, links=True)
    if message.get("format") != _FORMAT:
        version = message.get("format")
        raise UserError(
            f"{path} is of format {version!r:.20}, this version reads {_FORMAT}: {again}"
        )
    try:
        lists = {
            name: parse_json(message[name]) for name in ("classes", "templates") if name in message
        }
        about = _About.model_validate(message | lists)
        vectors = ClassVectors(
            tensors["embeddings"], about.logit_scale, tensors.get("norms"), tensors.get("bias")
        )
    except ValidationError as error:
        raise UserError(
            f"{path} does not hold class embeddings ({first_problem(error)}): {again}"
        ) from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} does not hold class embeddings ({first_line(error)}): {again}"
        ) from error
    rows = [tensor for tensor in (vectors.norms, vectors.bias) if tensor is not None]
    shaped = vectors.embeddings.ndim == 2 and all(
        row.shape == vectors.embeddings.shape[:1] for row in rows
    )
    if not shaped or len(rows) == 1 or len(about.classes) != len(vectors.embeddings):
        raise UserError(
            f"{path}: its tensors and its {len(about.classes)} classes do not belong together: "
            f"{again}"
        )
    if not all(
        part.dtype.kind == "f" and np.isfinite(part).all() for part in (vectors.embeddings, *rows)
    ):
        raise UserError(f"{path}: its tensors hold something else than finite numbers: {again}")
    return ClassEmbeddings(
        about.classes, vectors, about.teacher, about.templates, about.text_weights_sha256
    )


def zero_shot_parts(bundle: Bundle, settings: Settings) -> list[tuple]:
    """Configurations and files of `text_encoder` and `zero_shot`, as far as the bundle has what
    they need.

    Raises UserError for class embeddings that no teacher of the bundle fits.
    """
    if EMBEDDINGS not in bundle.manifest.files:
        return []
    result = read_class_embeddings(bundle.path / EMBEDDINGS, bundle.read(EMBEDDINGS))
    encoder, missing = _read_encoder(bundle, result)
    parts = [text_encoder(bundle, result, encoder, settings)] if encoder else []
    return [*parts, zero_shot(bundle, result, missing, settings)]


def _teacher_of(bundle: Bundle, result: ClassEmbeddings) -> str:
    """Label of the teacher whose image embeddings the classes are compared with; UserError if there
    is none, or several.

    The one that the embeddings name, else the CLIP teacher whose embeddings are as wide.
    """
    teachers = {teacher.label: teacher for teacher in bundle.manifest.teachers}
    outputs = {tensor.name for tensor in bundle.outputs}
    fitting = [
        label
        for label, teacher in teachers.items()
        if teacher.token_dim == result.width
        and f"{label}_token" in outputs
        and (label == result.teacher if result.teacher else teacher.role == "clip")
    ]
    if len(fitting) == 1:
        return fitting[0]
    widths = "; ".join(
        f"{label}: {teacher.role}, {teacher.token_dim}" for label, teacher in teachers.items()
    )
    whose = f"teacher '{result.teacher}'" if result.teacher else "a CLIP teacher"
    problem = (
        f"there are several ({', '.join(fitting)}): name one with --teacher"
        if fitting
        else f"there is none ({widths})"
    )
    raise UserError(
        f"{bundle.path / EMBEDDINGS} holds {result.width}-d vectors for {whose} with an image "
        f"embedding of that width, and {problem}; make it again with python -m export.text"
    )


def _read_encoder(bundle: Bundle, result: ClassEmbeddings) -> tuple[TextEncoder | None, str]:
    """The text encoder's description if it is of the embeddings' model, else None and why new
    labels are not supported.
    """
    if result.vectors.norms is not None:
        return None, "this bundle's classes are those of a classifier, which has no others"
    if TEXT_ENCODER not in bundle.manifest.files:
        return (
            None,
            "this bundle has no text encoder (python -m export.text --with-encoder adds one)",
        )
    about = read_text_encoder(bundle.path / TEXT_ENCODER, bundle.read(TEXT_ENCODER))
    if about.text_weights_sha256 != result.text_weights or not result.templates:
        return None, "this bundle's text encoder is of another model than its class embeddings"
    return about, ""


def text_encoder(
    bundle: Bundle, result: ClassEmbeddings, about: TextEncoder, settings: Settings
) -> tuple:
    """The model that embeds labels. Its files have fixed names, whatever the bundle's."""
    config = read_template("text_encoder")
    add_port(config.output, "embeddings", "TYPE_FP32", [-1, result.width])
    config.parameters["threads"].string_value = str(settings.threads)
    place_on_cpu(config)  # a few short sentences, once a label
    bound_queue(config, settings)
    vocabulary = about.tokenizer.vocabulary
    facts = {
        "sha256": {_GRAPH: about.graph.sha256, _VOCABULARY: vocabulary.sha256},
        "tokenizer": about.tokenizer.model_dump(mode="json"),
    }
    files = {
        "model.py": TEMPLATES / "text_encoder" / "1" / "model.py",
        **GRAPH_CODE,
        "clip_text.py": TEMPLATES / "clip_text.py",
        TEXT_ENCODER: json.dumps(facts).encode(),
        _GRAPH: bundle.part(about.graph.file),
        _VOCABULARY: bundle.part(vocabulary.file),
        "templates.json": json.dumps(result.templates).encode(),
    }
    return config, files


def zero_shot(bundle: Bundle, result: ClassEmbeddings, missing: str, settings: Settings) -> tuple:
    """The model that takes pictures and gives probabilities."""
    config = read_template("zero_shot")
    image = bundle.graphs[BACKBONE].inputs[0]
    add_tensor(config.input, image)
    config.input[-1].dims.insert(0, -1)  # the batch: written out where Triton does not batch
    bound_queue(config, settings)
    teacher = _teacher_of(bundle, result)
    vectors = {
        name: value
        for name, value in result.vectors._asdict().items()
        if isinstance(value, np.ndarray)
    }
    buffer = io.BytesIO()
    np.savez(buffer, **vectors)
    data = buffer.getvalue()
    resolution = bundle.manifest.resolution
    about = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "output": f"{teacher}_token",
        "scale": result.vectors.scale,
        "max_batch": settings.max_batch or bundle.manifest.max_batch,
        "classes": result.classes,
        **resolution.limits,
        "encoder": not missing,
        "encoder_missing": missing,
    }
    # the classes are in every answer: a parameter that differs would keep a new bundle from taking
    # over from this one
    answer = {
        "teacher": teacher,
        # `features` answers in the version that serves: of two bundles whose classes are of spaces
        # that differ, one would be compared with the other's vectors for a moment
        "text_weights": result.text_weights,
        "new_labels": not missing,
        "height": resolution.height,
        "width": resolution.width,
    }
    config.parameters["about"].string_value = json.dumps(answer)
    files = {
        "model.py": TEMPLATES / "zero_shot" / "1" / "model.py",
        "classes.npz": data,
        "class_scores.py": CONTRACT / "class_scores.py",
        **CALLING_CODE,
        "zero_shot.json": json.dumps(about).encode(),
    }
    return config, files
