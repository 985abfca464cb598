"""What a program may hand to a client: features, or a ClientError in one short sentence; never any
other exception, and never a wait without end.
"""

import asyncio
import io
import os
import pickle
import tempfile
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from contract.images import Limits
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.client.aio import AsyncFeatureClient
from serve.client.inputs import list_pictures, to_tensor
from serve.client.tasks import check_labels
from serve.client.tasks.detection import detect
from serve.errors import BadRequest, ClientError, ServerFailed, shorten
from tests.serve.raw_requests import encode

SIZE = 64
PHOTO = PackagedPhotos().load(0).convert("RGB").resize((160, 120))
FILE = encode(PHOTO, "PNG")
PIXELS = SQUASH.pixels(PHOTO, SIZE, SIZE)


def decoded(images: object, encoded: bool = False) -> np.ndarray:
    """What a client would send."""
    pictures = list_pictures(images)
    return next(iter(to_tensor(pictures, (SIZE, SIZE), SQUASH, encoded, Limits()).values()))


class Reader:
    """A stream that cannot seek and gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.rest = io.BytesIO(data)

    def read(self, most: int = -1) -> bytes:
        return self.rest.read(min(most, 10_000))


class Fspath:
    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def closed_picture() -> Image.Image:
    picture = Image.open(io.BytesIO(FILE))
    picture.close()
    return picture


def raising() -> Iterator[object]:
    yield PIXELS
    raise KeyError("a\nb" * 1000)


def endless() -> list:
    inside: list = []
    inside.append(inside)
    return inside


def awaited() -> object:
    async def read(most: int = -1) -> bytes:
        return FILE

    return types.SimpleNamespace(read=read)


def test_files_are_read_from_where_they_stand_stay_open_and_may_be_given_again(tmp_path):
    path = tmp_path / "many pictures"
    path.write_bytes(b"header" + FILE)
    with open(path, "rb") as file:
        file.seek(6)
        for encoded in (False, True, False):
            found = decoded(file, encoded)
            assert found[0, 0] == FILE if encoded else np.array_equal(found[0], PIXELS)
            assert not file.closed and file.tell() == 6
    with tempfile.SpooledTemporaryFile() as file:
        file.write(FILE)
        file.seek(0)
        for form in (io.BytesIO(FILE), Reader(FILE), file):
            assert np.array_equal(decoded([form, PHOTO])[0], PIXELS)


def test_arrays_of_every_layout_are_read_alike():
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    strided = np.repeat(np.repeat(PIXELS, 2, 0), 2, 1)[::2, ::2]
    channels_first = np.ascontiguousarray(PIXELS.transpose(2, 0, 1)).transpose(1, 2, 0)
    rows = np.empty(2, object)
    rows[:] = [PIXELS, FILE]
    forms = (frozen, strided, channels_first, PIXELS[None], np.ma.masked_array(PIXELS), rows)
    for form in (*forms, memoryview(FILE), bytearray(FILE), (x for x in [PIXELS])):
        assert np.array_equal(decoded(form)[0], PIXELS)
    assert np.array_equal(decoded(PIXELS[::-1, ::-1])[0], PIXELS[::-1, ::-1])
    assert np.array_equal(decoded([[PIXELS, [FILE]], PHOTO]), np.stack([PIXELS] * 3))


BASE64 = "iVBORw0KGgo" * 200_000
BAD = {
    "None": (lambda: None, "of type NoneType"),
    "a number": (lambda: np.uint8(3), "of type uint8"),
    "no pictures": (list, "no pictures"),
    "a generator of none": (lambda: (x for x in ()), "no pictures"),
    "a list of None": (lambda: [PIXELS, None], "picture 1 is of type NoneType"),
    "lists of numbers": (lambda: PIXELS.tolist(), "picture 0.0.0 is of type int"),
    "a list in itself": (endless, "cannot be read: RecursionError"),
    "a generator that raises": (raising, "cannot be read: KeyError"),
    "a tensor": (lambda: torch.zeros(64, 64, 3, dtype=torch.uint8), "is a Tensor and not a numpy"),
    "a scalar tensor": (lambda: torch.tensor(1), "is a Tensor and not a numpy array"),
    "a list of tensors": (lambda: [torch.zeros(3, 64, 64)], "picture 0 is a Tensor"),
    "floats": (lambda: PIXELS / 255, "an array of float64: give uint8"),
    "NaN": (lambda: np.full((8, 8, 3), np.nan, np.float32), "an array of float32"),
    "big-endian": (lambda: PIXELS.astype(">u2"), "an array of >u2: give uint8"),
    "booleans": (lambda: PIXELS > 9, "an array of bool"),
    "a record": (lambda: np.zeros(3, [("a", "u1")]), "an array of"),
    "no axes": (lambda: np.array(3, np.uint8), r"an array \[\]"),
    "an object": (
        lambda: np.array(None, object),
        "cannot be read: TypeError: iteration over a 0-d array",
    ),
    "grey": (lambda: PIXELS[..., 0], r"an array \[64, 64\]"),
    "two channels": (lambda: PIXELS[..., :2], r"an array \[64, 64, 2\]"),
    "channels first": (lambda: PIXELS.transpose(2, 0, 1), r"an array \[3, 64, 64\]"),
    "an empty crop": (lambda: PIXELS[:, 5:5], "not empty"),
    "an empty crop of a picture": (lambda: PHOTO.crop((5, 5, 5, 9)), "0x4 pixels: .* not empty"),
    "half a picture": (lambda: Image.open(io.BytesIO(FILE[:5000])), "damaged"),
    "a closed picture": (closed_picture, "cannot be decoded"),
    "a mapping": (lambda: types.MappingProxyType({1: PIXELS}), "of type mappingproxy"),
    "an empty text": (lambda: "", "an empty text and not a path"),
    "base64": (lambda: BASE64, "a text of 2,200,000 characters and not a path"),
    "a data URL": (lambda: f"data:image/png;base64,{BASE64}", r"a URL \(data:\) and not a path"),
    "a URL": (lambda: "https://example.org/cat.jpg", r"a URL \(https:\) and not a path"),
    "a folder": (lambda: "/", "/: Is a directory"),
    "a device": (lambda: "/dev/zero", "/dev/zero: it is not a regular file"),
    "a zero byte": (lambda: "cat\0.jpg", "it is not a path: embedded null byte"),
    "half a character": (lambda: "cat\ud800.jpg", "cat\\?.jpg"),
    "a long name": (lambda: "ä" * 3000 + ".jpg", "File name too long"),
    "a text file": (lambda: io.StringIO("abc"), r"\.read\(\) gives str: open it in binary mode"),
    "a file at its end": (lambda: end(io.BytesIO(FILE)), r"stands at its end: call \.seek\(0\)"),
    "an empty file": (lambda: io.BytesIO(), "is empty"),
    "half a file": (lambda: io.BytesIO(FILE[:900]), "damaged"),
    "a closed file": (lambda: shut(io.BytesIO(FILE)), "cannot be read: ValueError"),
    "an upload": (awaited, r"\.read\(\) gives coroutine: .* the bytes of its \.read\(\)"),
    "too long a stream": (lambda: Reader(FILE + bytes(20_000_000)), "more than the 20,000,000"),
}


def end(file: io.BytesIO) -> io.BytesIO:
    file.seek(0, io.SEEK_END)
    return file


def shut(file: io.BytesIO) -> io.BytesIO:
    file.close()
    return file


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_picture_is_a_bad_request_in_a_short_line(case):
    make, words = BAD[case]
    with pytest.raises(BadRequest, match=words) as raised:
        decoded(make())
    said = str(raised.value)
    assert len(said) < 300 and said.isprintable()
    if "damaged" not in words and case not in ("an empty file",):
        with pytest.raises(BadRequest):
            decoded(make(), encoded=True)


def test_a_fifo_and_a_file_of_others_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    path = Fspath()
    path.path = tmp_path / "fifo"
    for form in (tmp_path / "fifo", path):
        for encoded in (False, True):
            with pytest.raises(BadRequest, match="fifo: it is not a regular file"):
                decoded(form, encoded)
    (tmp_path / "large.png").write_bytes(FILE)
    os.truncate(tmp_path / "large.png", 30_000_000)
    with pytest.raises(BadRequest, match="30,000,000 bytes, more than the 20,000,000"):
        decoded(tmp_path / "large.png")


def test_errors_are_one_short_line_and_cross_process_borders():
    error = ServerFailed("a\n" + "é" * 3_000_000 + "\0 the end", "i" * 500)
    assert len(str(error)) < 300 and str(error).isprintable() and "the end [request" in str(error)
    error.message += " (3 attempts)"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ServerFailed and again.request_id == error.request_id
    assert len(repr(error.args)) < 1500 and "the end" in again.message
    assert shorten("short", 10) == "short"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "http://127.0.0.1:8000"}, "HOST:PORT of the server's gRPC port .*without 'http:"),
        ({"url": ""}, "give HOST:PORT"),
        ({"url": None}, "url=None: give HOST:PORT"),
        ({"url": "a\nb:1"}, "give HOST:PORT"),
        ({"timeout": -1}, "timeout=-1: give seconds above 0"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf: give seconds above 0, at most"),
        ({"concurrency": 0}, "concurrency=0: give 1 or more"),
        ({"retry": 3}, "retry is of type int: give a Retry"),
        ({"admin_key": "schlüssel"}, "admin_key: give"),
    ],
)
def test_options_of_a_client_that_make_no_sense_are_refused_when_it_is_made(options, words):
    for kind in (FeatureClient, AsyncFeatureClient):
        with pytest.raises(BadRequest, match=words):
            kind(**options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"outputs": 5}, "outputs are of type int: give a list of names"),
        ({"outputs": [None]}, "an output is of type NoneType"),
        ({"outputs": [["depth"]]}, "an output is of type list"),
        ({"outputs": b"depth"}, "outputs are of type bytes"),
        ({"outputs": ["x" * 3_000_000]}, "no such output"),
        ({"model": None}, "model=None"),
        ({"model": "ä\ud800"}, "give a text of printable characters"),
        ({"model": "m" * 3_000_000}, "metadata size exceeds|mmm"),
        ({"request_id": 7}, "request_id=7"),
        ({"timeout": "soon"}, "timeout='soon'"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"size": 64}, r"size=64: give \(height, width\)"),
        ({"size": (0, 64)}, r"size=\(0, 64\)"),
        ({"size": "ab"}, "size='ab'"),
    ],
)
def test_calls_that_make_no_sense_are_refused_in_a_short_line(server, arguments, words):
    async def ask() -> None:
        async with AsyncFeatureClient(server.grpc) as client:
            await client.features(PIXELS, **arguments)

    with FeatureClient(server.grpc) as client:
        for call in (lambda: client.features(PIXELS, **arguments), lambda: asyncio.run(ask())):
            with pytest.raises(ClientError, match=words) as raised:
                call()
            assert len(str(raised.value)) < 300 and str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("cat", "give a list of them, not a str"),
        (b"cat", "not a bytes"),
        (None, "not a NoneType"),
        (["cat", None], "a label is of type NoneType"),
        (["cat\ud800"], "is not text"),
        ([], "at least one"),
    ],
)
def test_labels_that_are_no_texts_are_refused(labels, words):
    with pytest.raises(BadRequest, match=words) as raised:
        check_labels(labels)
    assert str(raised.value).isprintable()


def test_a_threshold_that_is_no_number_is_refused():
    with FeatureClient() as client, pytest.raises(BadRequest, match="threshold high: give a num"):
        detect(client, PIXELS, ["cat"], threshold="high")
