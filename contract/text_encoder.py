"""text_encoder.json of a bundle: which graph embeds sentences, and how they become its tokens.

Whoever reads it uses this schema, because a bundle may come from anybody.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from contract.engine_record import first_problem
from contract.errors import UserError, first_line
from contract.names import Axis, FileName, GraphFile, Name, Sha256
from contract.untrusted import parse_json, read_file

TEXT_ENCODER = "text_encoder.json"
FORMAT: Literal[1] = 1
"""Version of the file."""

_MOST_BYTES = 2**20
_MOST_TOKENS = 2**20
_Token = Annotated[int, Field(ge=0, lt=_MOST_TOKENS)]


class _Part(BaseModel):
    """A part of the file: what serving does not use may be there too."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GraphOf(_Part):
    """The text tower's graph."""

    file: GraphFile
    sha256: Sha256
    opset: Annotated[int, Field(ge=7, le=100)]


class VocabularyOf(_Part):
    """The vocabulary of the tokens."""

    file: FileName
    sha256: Sha256


class Special(_Part):
    """A token that no text makes."""

    token: Annotated[str, StringConstraints(pattern=r"^<[a-z_]+>$", max_length=40)]
    id: _Token


class TokenizerOf(_Part):
    """CLIP's byte-pair encoding."""

    kind: Literal["clip-bpe"]
    vocabulary: VocabularyOf
    vocabulary_size: Annotated[int, Field(ge=2, le=_MOST_TOKENS)]
    context_length: Annotated[int, Field(ge=3, le=1024)]
    pattern: Annotated[str, StringConstraints(max_length=400)]
    """What open_clip cuts words with, for the reader: no expression of a file is ever compiled."""
    clean: Literal["lower", "whitespace", "canonicalize"]
    pad_id: _Token
    start: Special
    end: Special


class TensorOf(_Part):
    """The graph's input or output."""

    name: Name
    dtype: Literal["int64", "float32"]
    shape: Annotated[tuple[Axis, ...], Field(min_length=1, max_length=4)]


class TextEncoder(_Part):
    """A text tower whose embeddings are of the same space as a teacher's image embeddings."""

    format: Literal[1]
    text_weights_sha256: Sha256
    graph: GraphOf
    input: TensorOf
    output: TensorOf
    tokenizer: TokenizerOf


def read_text_encoder(path: Path, data: bytes | None = None) -> TextEncoder:
    """Read text_encoder.json, or its bytes where they were read already; raises UserError for a
    file that is not of this schema.
    """
    again = "make it again with python -m export.text --with-encoder"
    data = read_file(path, _MOST_BYTES, again) if data is None else data
    try:
        return TextEncoder.model_validate(parse_json(data))
    except ValidationError as error:
        raise UserError(
            f"{path} does not describe an encoder: {first_problem(error)} ({again})"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {again}") from error
