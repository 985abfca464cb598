"""A request's body, read and checked before anything is asked of the server: no picture is decoded
here, and no URL is ever fetched.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pybase64

from contract.errors import first_line, suggest
from contract.images import ImageTooLarge, Limits, UnreadableImage
from contract.picture_headers import check_header
from contract.untrusted import parse_json
from serve.errors import shorten
from serve.gateway.errors import ApiError

_FIELDS = ("model", "input", "messages", "encoding_format", "dimensions", "user")
_MEDIA = ("image/jpeg", "image/jpg", "image/png", "image/webp")
_LONGEST_HEAD = 200
"""Characters of a data URI before its comma."""
_BLANKS = "\ufeff\u200b\u2060"
"""What str.strip leaves: of files, and of texts copied from web pages."""
_ENCODED = re.compile(r";\s{0,8}base64\s{0,8},", re.IGNORECASE)
"""Of a data URI, wherever it begins."""
_FILES = ("/9j/", "iVBORw0KGgo", "UklGR")
"""How JPEG, PNG and WebP files begin in base64."""
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]{1,30}://|file:|blob:|//)", re.IGNORECASE)
_FORMS = (
    'a data URI, a text, {"type": "image_url", "image_url": {"url": "data:…"}} or {"type": '
    '"text", "text": "…"}'
)


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold."""

    images: Limits = Limits()
    """Bytes and pixels of a picture."""
    inputs: int = 64
    """Pictures and texts."""


class Inputs(NamedTuple):
    """What a request wants embedded: pictures' files and texts, each by its place in `input`."""

    pictures: dict[int, bytes]
    texts: dict[int, str]


class Asked(NamedTuple):
    """A request that is well formed."""

    model: str
    inputs: Inputs
    base64: bool
    """Write vectors as base64 of float32, the lowest byte first, not as lists of numbers."""
    dimensions: int | None


def read_request(body: bytes, limits: RequestLimits) -> Asked:
    """Read a body of POST /v1/embeddings; raises ApiError, which names the field and every input
    that is wrong.
    """
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise _wrong(f"the body is not JSON: {first_line(error)}", None, "invalid_json") from error
    if not isinstance(fields, dict):
        raise _wrong("the body is not a JSON object", None, "invalid_json")
    for name in fields:
        if name not in _FIELDS:
            raise _wrong(_unknown_field(name), shorten(name, 60), "unknown_field")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model: name one of GET /v1/models", "model", "missing_model")
    form = fields.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise _wrong(
            "encoding_format: give 'float' or 'base64'", "encoding_format", "invalid_value"
        )
    dimensions = fields.get("dimensions")
    if dimensions is not None and type(dimensions) is not int:
        raise _wrong("dimensions: give a whole number", "dimensions", "invalid_value")
    listed = list(_inputs(fields))
    if not listed:
        raise _wrong("input is empty: give at least one picture", "input", "empty_input")
    if len(listed) > limits.inputs:
        message = f"input holds {len(listed):,}, more than the {limits.inputs:,} a request may have"
        raise ApiError(413, message, "too_many_inputs", "input")
    return Asked(model, _read_inputs(listed, limits.images), form == "base64", dimensions)


def _unknown_field(name: str) -> str:
    return f"unknown field '{shorten(name, 60)}': {suggest(name, _FIELDS)}"


def _inputs(fields: dict[str, Any]) -> Iterator[Any]:
    """The values of `input`, or those of the one message of `messages`, as servers of multimodal
    models take it.
    """
    if "messages" not in fields:
        given = fields.get("input")
        if given is None:
            raise _wrong("input is missing: give a data URI, or a list of them", "input", "missing")
        if isinstance(given, list) and given and all(type(one) is int for one in given):
            raise _tokens(None)
        yield from given if isinstance(given, list) else [given]
        return
    messages = fields["messages"]
    if "input" in fields:
        raise _wrong("give input or messages, not both", "messages", "invalid_value")
    content = messages[0].get("content") if _is_one_object(messages) else None
    content = [content] if isinstance(content, str) else content
    if not isinstance(content, list) or len(content) != 1:
        raise _wrong(
            "messages: give one message whose content has one part, a picture or a text: a part is "
            "an embedding",
            "messages",
            "invalid_value",
        )
    yield content[0]


def _is_one_object(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict)


def _read_inputs(listed: Sequence[Any], limits: Limits) -> Inputs:
    """Every input as a file's bytes or a text. Raises ApiError for the first that is wrong, which
    names the others too, so that all of them can be mended at once.
    """
    result, errors = Inputs({}, {}), []
    for place, given in enumerate(listed):
        try:
            text = _text_of(given, place)
            bare = text.strip().strip(_BLANKS).strip()
            if bare[:5].lower() == "data:":
                result.pictures[place] = _read_picture(bare, place, limits)
            elif _URL.match(bare):
                raise _url(place)
            elif _ENCODED.search(text) or _is_file(bare):
                # a text encoder would give a vector, of nonsense
                raise _wrong_input(
                    place,
                    "it holds a picture and is not a data URI: send data:image/jpeg;base64,…",
                    "invalid_data_uri",
                )
            else:
                result.texts[place] = text
        except ApiError as error:
            errors.append(error)
    if errors:
        first, *others = errors
        if others:
            named = ", ".join(dict.fromkeys(error.param or "" for error in others[:8]))
            first.message += f" (also wrong: {named}{', …' if len(others) > 8 else ''})"
        raise first
    return result


def _is_file(text: str) -> bool:
    """Whether a text is a picture's file in base64 without the head of a data URI."""
    return len(text) > 64 and text.startswith(_FILES) and " " not in text[:64]


def _text_of(given: Any, place: int) -> str:
    """The text or data URI of an input in any of the forms that clients send."""
    if isinstance(given, list) and given and all(type(one) is int for one in given):
        raise _tokens(place)
    value = given
    if isinstance(given, dict):
        match given.get("type"):
            case "image_url" | "input_image":
                value = given.get("image_url")
                value = value.get("url") if isinstance(value, dict) else value
            case "text" | "input_text":
                value = given.get("text")
            case None:
                value = given.get("image", given.get("text"))
            case _:
                value = None
    if not isinstance(value, str) or not value.strip():
        raise _wrong_input(place, f"give {_FORMS}, not empty", "invalid_input")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _wrong_input(place, "it holds half a character", "invalid_text")
    return value


def _read_picture(uri: str, place: int, limits: Limits) -> bytes:
    """The file in a data URI; its header is read, its pixels are not decoded."""
    head, comma, _ = uri[:_LONGEST_HEAD].partition(",")
    media, *parameters = head[len("data:") :].lower().split(";")
    if not comma or "base64" not in parameters:
        raise _wrong_input(
            place, "the data URI is not data:image/jpeg;base64,…", "invalid_data_uri"
        )
    if media.strip() not in _MEDIA:
        message = f"input[{place}]: '{shorten(media, 60)}' is not taken: send JPEG, PNG or WebP"
        raise ApiError(415, message, "unsupported_media_type", f"input[{place}]")
    data = _decode_base64(uri[len(head) + 1 :], place, limits)
    try:
        check_header(data, limits)
    except ImageTooLarge as error:
        raise _too_large(place, error.reason) from error
    except UnreadableImage as error:
        raise _wrong_input(place, error.reason, "invalid_image") from error
    return data


def _decode_base64(text: str, place: int, limits: Limits) -> bytes:
    most = limits.max_bytes
    if most is not None and len(text) > 4 * (most // 3 + 2) + len(text) // 32:
        raise _too_large(place, f"the picture has more than the {most:,} bytes that are taken")
    try:
        # a hundred times as fast as binascii, which took half of the gateway's time for a picture
        return pybase64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        pass
    try:  # line breaks, which encoders for mail put in
        return pybase64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        message = "the data URI is not base64, padded with = at its end"
        raise _wrong_input(place, message, "invalid_data_uri") from error


def _too_large(place: int, reason: str) -> ApiError:
    return ApiError(413, f"input[{place}]: {reason}", "image_too_large", f"input[{place}]")


def _url(place: int) -> ApiError:
    return _wrong_input(
        place,
        "URLs are not fetched: send the picture itself, data:image/jpeg;base64,…",
        "url_not_supported",
    )


def _tokens(place: int | None) -> ApiError:
    message = "tokens are not taken: send text (LangChain: check_embedding_ctx_length=False)"
    if place is None:
        return _wrong(f"input: {message}", "input", "invalid_input")
    return _wrong_input(place, message, "invalid_input")


def _wrong_input(place: int, message: str, code: str) -> ApiError:
    return _wrong(f"input[{place}]: {message}", f"input[{place}]", code)


def _wrong(message: str, param: str | None, code: str) -> ApiError:
    return ApiError(400, message, code, param)
