"""What a client may send by mistake or malice: refused in a sentence, and nobody else notices."""

import io
import json
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection

import grpc
import numpy as np
import pytest
from PIL import Image, ImageOps
from tritonclient.grpc.service_pb2 import ModelStatisticsRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from contract.dense import class_map, depth_map
from contract.images import read_views
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.bundle import read_bundle
from serve.repository.state import read_state
from serve.server.stubs import find_stubs
from tests.conftest import long_case, serving
from tests.serve.raw_requests import (
    Raw,
    array,
    arrays,
    chunk,
    encode,
    memory,
    png,
    reference,
    request,
    same,
    strings,
)

SIZE = 64
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PHOTO = PackagedPhotos().load(0).convert("RGB").resize((160, 120))
PIXELS = SQUASH.pixels(PHOTO, SIZE, SIZE)[None]
FILE = encode(PHOTO, "JPEG", quality=90)
ZEROS = np.zeros((1, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


@pytest.fixture(scope="module")
def triton(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def parts(apart_server):
    """A server whose graphs each have a model."""
    with grpc.insecure_channel(apart_server.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def known(bundle):
    """Every tensor of PIXELS, computed here."""
    found = reference(bundle, PIXELS)
    found["class_map"] = class_map(found["segmentation_logits"], SIZE, SIZE)
    found["depth_map"] = depth_map(found["depth"], SIZE, SIZE)
    return found


GOOD = {  # a right request to every model that bad ones are sent to: inputs, outputs
    "features": (["image"], ["backbone_global", "dino_token"]),
    "backbone": (["image"], ["backbone_patches"]),
    "fused": (["image"], ["mae_token"]),
    "interaction": (["features", "features_global"], ["spaces"]),
    "head_mae": (["spaces"], ["mae_token"]),
    "segmentation_head": (["spaces"], ["segmentation_logits"]),
    "depth_head": (["features"], ["depth"]),
    "segmentation": (["image"], ["class_map"]),
    "depth": (["image"], ["depth_map"]),
    "segmentation_map": (["segmentation_logits", "image"], ["class_map"]),
    "depth_map": (["depth", "image"], ["depth_map"]),
}


def good(model, known):
    """A right request and its answer."""
    if model == "features_encoded":
        file = encode(Image.fromarray(PIXELS[0]), "PNG")
        return request(model, [strings("encoded", [file])], ["depth"]), {"depth": known["depth"]}
    inputs, outputs = GOOD[model]
    return request(model, [array(name, known[name]) for name in inputs], outputs), {
        n: known[n] for n in outputs
    }


def refused(triton, known, bad, model="features"):
    """Code and words of the answer to a bad request; right requests beside it and after it are
    answered rightly.
    """
    fair, expected = good(model, known)
    beside = triton.ModelInfer.future(fair, timeout=30)
    pending = triton.ModelInfer.future(bad, timeout=30)
    others = [beside, triton.ModelInfer.future(fair, timeout=30)]
    with pytest.raises(grpc.RpcError) as raised:
        pending.result()
    for other in others:
        same(arrays(other.result()), expected)
    same(arrays(triton.ModelInfer(fair, timeout=30)), expected)
    said = raised.value.details()
    assert "Traceback" not in said and "\n" not in said and ".py" not in said
    return raised.value.code(), said


def image(pixels, **changes):
    return replace(array("image", pixels), **changes)


BAD_TENSORS = {
    "floats for bytes": (
        [array("image", ZEROS.astype(np.float32))],
        "'image' data-type is 'FP32', but .* 'UINT8'",
    ),
    "an unknown type": ([image(ZEROS, kind="FOO")], "'image' data-type is '<invalid>'"),
    "strings for pixels": ([image(ZEROS, kind="BYTES")], "'image' data-type is 'BYTES'"),
    "no batch axis": ([image(ZEROS[0])], "batch-size must be <= 4 for 'features'"),
    "an axis too many": ([image(ZEROS[None])], r"Expected \[-1,64,64,3\], got \[1,1,64,64,3\]"),
    "no axes": ([image(ZEROS, shape=())], "'image' has no shape"),
    "four channels": (
        [image(np.zeros((1, 64, 64, 4), np.uint8))],
        r"Expected \[-1,64,64,3\], got \[1,64,64,4\]",
    ),
    "no pictures": (
        [image(np.zeros((0, 64, 64, 3), np.uint8))],
        "byte size mismatch for input 'image'.* got 0",
    ),
    "no rows": ([image(np.zeros((1, 0, 64, 3), np.uint8))], r"got \[1,0,64,3\]"),
    "another size": ([image(np.zeros((1, 70, 64, 3), np.uint8))], r"got \[1,70,64,3\]"),
    "other multiples of the patch": (
        [image(np.zeros((1, 32, 128, 3), np.uint8))],
        r"got \[1,32,128,3\]",
    ),
    "a negative batch": ([image(ZEROS, shape=(-1, 64, 64, 3))], "mismatch|batch"),
    "too many pictures": (
        [image(np.zeros((5, 64, 64, 3), np.uint8))],
        "batch-size must be <= 4 for 'features'",
    ),
    "too few bytes": ([image(ZEROS, data=b"abc")], "Expected 12288, got 3"),
    "too many bytes": ([image(ZEROS, data=bytes(20000))], "Expected 12288, got 20000"),
    "no bytes": ([image(ZEROS, data=None)], "unable to find data for input tensor 'image'"),
    "no input": ([], r"missing required input\(s\) \['image'\]"),
    "an input too many": (
        [image(ZEROS), image(ZEROS, name="other")],
        "expected 1 inputs but got 2",
    ),
    "an input twice": ([image(ZEROS), image(ZEROS)], "input 'image' already exists"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_wrong_tensor_is_an_invalid_argument(triton, known, case):
    inputs, words = BAD_TENSORS[case]
    code, said = refused(triton, known, request("features", inputs, ["backbone_global"]))
    assert code == INVALID and re.search(words, said), said


BAD_NAMES = {
    "an unknown output": (
        request("features", [image(ZEROS)], ["nobody_token"]),
        INVALID,
        "output 'nobody_token'",
    ),
    "a tensor between graphs": (
        request("features", [image(ZEROS)], ["spaces"]),
        INVALID,
        "output 'spaces'",
    ),
    "an unknown model": (
        request("head_nobody", [image(ZEROS)]),
        MISSING,
        "unknown model: 'head_nobody'",
    ),
    "an unknown version": (
        request("features", [image(ZEROS)], version="7"),
        MISSING,
        "version 7 is not found",
    ),
    "a version in words": (
        request("features", [image(ZEROS)], version="new"),
        INVALID,
        "version string 'new'",
    ),
    "memory of nobody": (
        request("features", [image(ZEROS, region="mine")]),
        MISSING,
        "shared memory region: 'mine'",
    ),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_an_unknown_name_is_told(triton, known, case):
    bad, code, words = BAD_NAMES[case]
    found, said = refused(triton, known, bad)
    assert found == code and words in said, said


@pytest.mark.parametrize("model", ["features", "fused", "segmentation", "depth"])
def test_every_model_that_reads_pictures_refuses_wrong_ones(triton, known, model):
    for wrong in (ZEROS.astype(np.float32), ZEROS[:, :48], ZEROS[:0], np.repeat(ZEROS, 5, axis=0)):
        code, said = refused(triton, known, request(model, [array("image", wrong)]), model)
        assert code == INVALID and model in said


FLOATS = [(m, name) for m, (names, _) in GOOD.items() for name in names if name != "image"]


@pytest.mark.parametrize(("model", "name"), FLOATS)
def test_floats_that_are_not_finite_are_refused_where_floats_are_taken(parts, known, model, name):
    inputs, outputs = GOOD[model]
    for value in (np.nan, np.inf, -np.inf):
        broken = known[name].copy()
        broken.flat[-1] = value
        given = [array(n, broken if n == name else known[n]) for n in inputs]
        code, said = refused(parts, known, request(model, given, outputs), model)
        assert (code, said) == (
            INVALID,
            f"input '{name}' holds NaN or infinity: give finite numbers",
        )


def test_floats_whose_sum_is_large_are_not_taken_for_infinite(parts, known):
    large = np.full_like(known["depth"], 3e38)
    answer = parts.ModelInfer(
        request("depth_map", [array("depth", large), array("image", PIXELS)], ["depth_map"])
    )
    np.testing.assert_allclose(arrays(answer)["depth_map"], 3e38, rtol=1e-5)


def test_right_requests_in_one_batch_with_refused_ones_are_answered(parts, known):
    broken = np.full_like(known["spaces"], np.nan)
    names = ["mae_token", "mae_patches"]
    expected = {name: known[name] for name in names}

    def counts():
        stats = parts.ModelStatistics(ModelStatisticsRequest(name="head_mae")).model_stats[0]
        return stats.execution_count, stats.inference_count

    for _ in range(5):  # on a busy machine none may meet another
        before = counts()
        pending = []
        for turn in range(90):
            values = broken if turn % 3 == 1 else known["spaces"]
            ask = request("head_mae", [array("spaces", values)], names)
            pending.append((turn % 3 == 1, parts.ModelInfer.future(ask, timeout=30)))
        for bad, future in pending:
            if bad:
                assert future.exception().code() == INVALID
            else:
                same(arrays(future.result()), expected)
        runs, rows = (after - was for after, was in zip(counts(), before, strict=True))
        if rows > 1.2 * runs:
            break
    assert rows > 1.2 * runs, "requests were not batched: nothing was shown"


def test_a_batch_of_nothing_with_the_bytes_of_one_is_refused_and_harms_no_other(parts, known):
    # Triton takes these for requests without a batch, and by itself fails all requests of the batch
    # they come into
    for model in ("backbone", "interaction", "head_mae", "depth_head"):
        inputs, outputs = GOOD[model]
        empty = [
            replace(array(name, known[name]), shape=(0, *known[name].shape[1:])) for name in inputs
        ]
        fair, expected = good(model, known)
        pending = [
            (n % 3, parts.ModelInfer.future(request(model, empty) if n % 3 == 1 else fair))
            for n in range(30)
        ]
        for kind, future in pending:
            if kind == 1:
                error = future.exception()
                assert (error.code(), error.details()) == (
                    INVALID,
                    f"input '{inputs[0]}' is a batch of 0: give 1 or more",
                )
            else:
                same(arrays(future.result()), expected)
    said = refusal(parts, request("decode", [strings("encoded", [FILE], (0, 1))]))
    assert "unexpected number of string elements 1 for inference input 'encoded'" in said
    said = refusal(parts, request("decode", [strings("encoded", [], (0, 1))]))
    assert said == "input 'encoded' is a batch of 0: give 1 or more"


def test_models_without_batches_bound_the_pictures_of_a_request(parts, known):
    most = 4
    said = refusal(parts, request("decode", [strings("encoded", [FILE] * (most + 1))]))
    assert said == f"input 'encoded' has {most + 1} pictures: at most {most}"
    values, image = (np.repeat(tensor[:1], most + 1, 0) for tensor in (known["depth"], PIXELS))
    said = refusal(parts, request("depth_map", [array("depth", values), array("image", image)]))
    assert said.endswith(f"give as many of each, at most {most}")


# Picture files


def bomb():
    """30,000 x 30,000 pixels in 110 KB, whole and valid."""
    return png(30_000, 30_000, 1, 0, bytes(30_000 * 3751))


def large_png():
    """8,000 x 8,000 pixels: less than Pillow takes for a bomb, more than the server's limit."""
    return png(8000, 8000, 1, 0, bytes(1001 * 8000))


def long_text():
    """A PNG with 99 MB of text in 100 KB."""
    return grey(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(99_000_000), 9)))


def wide_webp():
    """A small animation on a canvas of 16,383 x 16,383."""
    frame = encode(Image.new("RGBA", (16, 16)), "WEBP", lossless=True)[12:]
    size = struct.pack("<I", 15)[:3] * 2
    frame = bytes(6) + size + b"\x10\0\0\0" + frame
    body = b"WEBPVP8X" + struct.pack("<IB", 10, 2) + bytes(3) + struct.pack("<I", 16382)[:3] * 2
    body += (
        b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans():
    """A progressive JPEG whose last scan comes 500 times."""
    whole = encode(PHOTO, "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * 500 + whole[-2:]


def damaged(data):
    """A file with some bytes of its middle turned over."""
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(255 - byte for byte in data[middle : middle + 20])
        + data[middle + 20 :]
    )


def grey(*extra):
    return png(16, 16, 8, 0, bytes(17 * 16), *extra)


NO_PICTURE = "the bytes are not a JPEG, PNG or WEBP picture: convert it to one of these"
BAD_FILES = {
    "nothing": (b"", "the picture is empty (0 bytes)"),
    "a truncated JPEG": (FILE[: len(FILE) // 2], "the picture cannot be decoded, it is damaged: "),
    "the start of a JPEG": (FILE[:200], "cannot be decoded"),
    "two bytes of a JPEG": (FILE[:2], NO_PICTURE),
    "a truncated PNG": (
        encode(PHOTO, "PNG")[:-3000],
        "the picture cannot be decoded, it is damaged: ",
    ),
    "a damaged PNG": (
        damaged(encode(PHOTO, "PNG")),
        "the picture cannot be decoded, it is damaged: ",
    ),
    "a truncated WebP": (
        encode(PHOTO, "WEBP")[:-500],
        "the picture cannot be decoded, it is damaged: ",
    ),
    "a GIF": (encode(PHOTO, "GIF"), NO_PICTURE),
    "a BMP": (encode(PHOTO, "BMP"), NO_PICTURE),
    "a TIFF": (encode(PHOTO, "TIFF"), NO_PICTURE),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_PICTURE),
    "a text": (b"photo.jpg", NO_PICTURE),
    "zeros": (bytes(5000), NO_PICTURE),
    "30,000 x 30,000 pixels": (
        bomb,
        "the picture has 900,000,000 pixels, more than the 50,000,000 that are taken: ",
    ),
    "8,000 x 8,000 pixels": (large_png, "the picture has 8000x8000 pixels, more than "),
    "a canvas of 16,383 x 16,383": (
        wide_webp(),
        "the picture has 268,402,689 pixels, more than the 50,000,000 that are",
    ),
    "a text of claimed 2 GB": (
        grey(struct.pack(">I", 0x7FFFFFFF) + b"tEXtabc"),
        "cannot be decoded",
    ),
    "510 scans": (many_scans, "the picture has 510 scans, more than the 100 that are taken"),
    "too many bytes": (
        FILE + bytes(20_000_000),
        "bytes, more than the 20,000,000 that are taken: make it smaller",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_must_not_be_decoded_is_an_invalid_argument(triton, known, case):
    data, words = BAD_FILES[case]
    data = data() if callable(data) else data
    bad = request("features_encoded", [strings("encoded", [data])], ["backbone_global"])
    code, said = refused(triton, known, bad, "features_encoded")
    assert code == INVALID and words in said, said


def test_of_several_pictures_the_bad_one_is_named(triton, known):
    bad = request(
        "features_encoded", [strings("encoded", [FILE, FILE, FILE[:900], b""])], ["backbone_global"]
    )
    code, said = refused(triton, known, bad, "features_encoded")
    assert code == INVALID and "picture 2: the picture cannot be decoded" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (strings("encoded", [FILE, FILE], (1, 2)), r"Expected \[-1,1\], got \[1,2\]"),
        (strings("encoded", [FILE], (1,)), r"Expected \[-1,1\], got \[1\]"),
        (strings("encoded", [FILE] * 5), "batch-size must be <= 4"),
        (strings("encoded", [FILE], (2, 1)), "expected 2 string elements .* got 1"),
        (strings("encoded", [FILE, FILE], (1, 1)), "unexpected number of string elements 2"),
        (Raw("encoded", "BYTES", (1, 1), FILE), "incomplete string data|unexpected number"),
        (Raw("encoded", "BYTES", (1, 1), b"ab"), "expecting 4 bytes but only 2"),
        (
            Raw("encoded", "BYTES", (1, 1), b"\xff\xff\xff\xffab"),
            "expecting string of length 4294967295 but only 2 bytes",
        ),
        (
            array("encoded", np.zeros((1, 1), np.uint8)),
            "data-type is 'UINT8', but .* expects 'BYTES'",
        ),
    ],
    ids=[
        "two axes",
        "no batch",
        "five",
        "one of two",
        "two of one",
        "no lengths",
        "half a length",
        "long",
        "numbers",
    ],
)
def test_wrongly_packed_files_are_an_invalid_argument(triton, known, given, words):
    bad = request("features_encoded", [given], ["backbone_global"])
    code, said = refused(triton, known, bad, "features_encoded")
    assert code == INVALID and re.search(words, said), said


def test_bombs_are_refused_from_their_headers(triton, server):
    (stub,) = (
        one for one in find_stubs(read_state(server.repository).server_pid) if one.model == "decode"
    )
    triton.ModelInfer(request("decode", [strings("encoded", [FILE])]))
    before = memory(stub.pid, "VmHWM")
    for data in (bomb(), wide_webp(), large_png()):
        with pytest.raises(grpc.RpcError, match="pixels|cannot be decoded"):
            triton.ModelInfer(request("decode", [strings("encoded", [data])]))
    triton.ModelInfer(request("decode", [strings("encoded", [long_text()])]))  # its text is left
    assert memory(stub.pid, "VmHWM") < before + 16_000  # of 900 MB; KiB
    assert stub in find_stubs(read_state(server.repository).server_pid)


def turned(tag):
    exif = Image.Exif()
    exif[0x112] = tag
    return encode(PHOTO.resize((640, 400)), "JPEG", exif=exif)


def unusual():
    """Files of kinds that decoders get wrong, and what they look like."""
    large = PHOTO.resize((640, 400))
    clear = large.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(large.size))
    palette = large.quantize(16)
    other = Image.new("RGB", large.size, "navy")
    on_white = Image.alpha_composite(Image.new("RGBA", large.size, "white"), clear).convert("RGB")
    values = np.asarray(large.convert("L")).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(large))
    exif = bytes.fromhex("ffe1 0018") + b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(6)
    jpeg = encode(large, "JPEG", quality=95)
    yield "CMYK JPEG", encode(large.convert("CMYK"), "JPEG", quality=95), large
    yield "grey JPEG", encode(large.convert("L"), "JPEG", quality=95), large.convert("L")
    yield "progressive JPEG", encode(large, "JPEG", quality=95, progressive=True), large
    yield "JPEG with a broken EXIF block", jpeg[:2] + exif + jpeg[2:], large
    yield "16-bit PNG", encode(Image.fromarray(values), "PNG"), large.convert("L")
    yield "1-bit PNG", encode(large.convert("1"), "PNG"), large.convert("1")
    yield "PNG with alpha", encode(clear, "PNG"), on_white
    yield "grey PNG with alpha", encode(clear.convert("LA"), "PNG"), on_white.convert("L")
    yield "palette", encode(palette, "PNG"), palette.convert("RGB")
    mask = Image.fromarray((np.asarray(palette) == 0).astype(np.uint8) * 255)
    seen = palette.convert("RGB")
    seen.paste("white", mask=mask)
    yield "palette with a clear colour", encode(palette, "PNG", transparency=0), seen
    corner = large.getpixel((0, 0))
    seen = np.asarray(large).copy()
    seen[(seen == corner).all(axis=-1)] = 255
    clear_colour = chunk(b"tRNS", struct.pack(">3H", *corner))
    yield (
        "RGB with a clear colour",
        png(*large.size, 8, 2, rows, clear_colour),
        Image.fromarray(seen),
    )
    yield "WebP with alpha", encode(clear, "WEBP", lossless=True, exact=True), on_white
    yield (
        "animated WebP",
        encode(large, "WEBP", save_all=True, append_images=[other], duration=40, quality=95),
        large,
    )
    yield (
        "animated PNG",
        encode(large, "PNG", save_all=True, append_images=[other], duration=40),
        large,
    )


def test_unusual_files_are_decoded_as_on_the_clients_side(triton):
    for kind, data, looks in unusual():
        found = arrays(triton.ModelInfer(request("decode", [strings("encoded", [data])])))["image"]
        assert np.array_equal(found[0], read_views(data, SQUASH, SIZE, SIZE)[0]), kind
        assert np.abs(found[0].astype(int) - SQUASH.pixels(looks, SIZE, SIZE)).mean() < 4, kind


@pytest.mark.parametrize("tag", [0, *range(1, 9), 9])
def test_pictures_are_turned_upright_as_on_the_clients_side(triton, tag):
    data = turned(tag)
    found = arrays(triton.ModelInfer(request("decode", [strings("encoded", [data])])))["image"]
    assert np.array_equal(found[0], read_views(data, SQUASH, SIZE, SIZE)[0])
    upright = SQUASH.pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), SIZE, SIZE)
    assert np.abs(found[0].astype(int) - upright).mean() < 2


# HTTP


def post(server, path, body, headers=None):
    """Status and error of a request; a right one after it is answered."""
    connection = HTTPConnection(server.http, timeout=30)
    try:
        connection.request("POST", f"/v2/models/{path}", body, headers or {})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        connection.request("POST", "/v2/models/features/infer", json.dumps(in_json()))
        assert connection.getresponse().status == 200
    finally:
        connection.close()
    return answer.status, said.get("error", "")


def in_json(**changes):
    tensor = {
        "name": "image",
        "shape": [1, SIZE, SIZE, 3],
        "datatype": "UINT8",
        "data": PIXELS.ravel().tolist(),
    }
    return {"inputs": [tensor | changes], "outputs": [{"name": "backbone_global"}]}


def binary(data, said=None):
    """Body and headers of a file sent as bytes after a JSON header."""
    packed = struct.pack("<I", len(data) if said is None else said) + data
    port = {
        "name": "encoded",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(packed)},
    }
    header = json.dumps({"inputs": [port], "outputs": [{"name": "backbone_global"}]}).encode()
    return header + packed, {"Inference-Header-Content-Length": str(len(header))}


HTTP = {
    "no body": ("features/infer", b"", {}, 400, "Expected 12288, got 0"),
    # Triton's answer to JSON that it cannot read is 500
    "no JSON": ("features/infer", b"{{{", {}, 500, "failed to parse the request JSON"),
    "no inputs": ("features/infer", b"[]", {}, 500, "Unable to parse 'inputs'"),
    "few numbers": (
        "features/infer",
        json.dumps(in_json(data=[1, 2])),
        {},
        500,
        "does not match true shape",
    ),
    "words for numbers": (
        "features/infer",
        json.dumps(in_json(data=["a"] * 12288)),
        {},
        500,
        "unsigned-integer",
    ),
    "another size": (
        "features/infer",
        json.dumps(in_json(shape=[1, 48, 85, 3], data=[0] * 12240)),
        {},
        400,
        "shape",
    ),
    "floats": (
        "features/infer",
        json.dumps(in_json(datatype="FP32")),
        {},
        400,
        "data-type is 'FP32'",
    ),
    "a long header": (
        "features/infer",
        b"abc",
        {"Inference-Header-Content-Length": "999"},
        400,
        "inference header size",
    ),
    "a model of nobody": (
        "nobody/infer",
        json.dumps(in_json()),
        {},
        404,
        "unknown model: 'nobody'",
    ),
    "a version of nobody": (
        "features/versions/9/infer",
        json.dumps(in_json()),
        {},
        404,
        "version 9 is not found",
    ),
    "a text": ("features_encoded/infer", *binary(b"hello"), 400, NO_PICTURE),
    "an empty file": (
        "features_encoded/infer",
        *binary(b""),
        400,
        "the picture is empty (0 bytes)",
    ),
    "half a file": (
        "features_encoded/infer",
        *binary(FILE[:900]),
        400,
        "the picture cannot be decoded",
    ),
    "a long length": (
        "features_encoded/infer",
        *binary(b"hello", 2**31),
        400,
        "expecting string of length 2147483648",
    ),
}


@pytest.mark.parametrize("case", HTTP)
def test_bad_requests_over_http_are_refused_in_a_sentence(server, case):
    path, body, headers, status, words = HTTP[case]
    found, said = post(server, path, body, headers)
    assert found == status and words in said and "Traceback" not in said, said


def test_parameters_that_are_no_text_are_refused_and_harm_no_other(triton, known, server):
    """Triton hands them on over HTTP as they came."""
    body = json.dumps(in_json() | {"parameters": {"task": "?"}}).encode().replace(b"?", b"\xff")
    expected = {"backbone_global": known["backbone_global"]}

    def counts():
        stats = triton.ModelStatistics(ModelStatisticsRequest(name="features")).model_stats[0]
        return stats.execution_count, stats.inference_count

    for _ in range(5):  # on a busy machine none may meet another
        before = counts()
        with ThreadPoolExecutor(8) as pool:
            wrong = [pool.submit(post, server, "features/infer", body, {}) for _ in range(16)]
            ask = request("features", [array("image", PIXELS)], ["backbone_global"])
            right = [triton.ModelInfer.future(ask, timeout=30) for _ in range(60)]
            for future in right:
                same(arrays(future.result()), expected)
            for future in wrong:
                status, said = future.result()
                assert status == 400 and "parameters are not UTF-8 text" in said, said
        runs, rows = (after - was for after, was in zip(counts(), before, strict=True))
        if rows > 1.2 * runs:
            break
    assert rows > 1.2 * runs, "requests were not batched: nothing was shown"


# Sizes that vary


@pytest.fixture(scope="module", params=["together", long_case("apart")])
def varying(request, varying_bundle, tmp_path_factory):
    """A server of a student that takes any multiples of 16 up to 64 x 96, in both forms."""
    settings = {"fused": False, "parts": request.param}
    folder = tmp_path_factory.mktemp("varying_server")
    with (
        serving(varying_bundle, folder, **settings) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        yield GRPCInferenceServiceStub(channel), read_bundle(varying_bundle)


def test_only_sizes_that_the_graph_answers_rightly_are_taken(varying):
    triton, bundle = varying
    names = ["backbone_global", "backbone_patches", "mae_token", "depth"]
    for height, width in ((64, 64), (64, 96), (32, 80), (48, 32)):
        pixels = SQUASH.pixels(PHOTO, height, width)[None]
        expected = reference(bundle, pixels)
        found = arrays(triton.ModelInfer(request("features", [array("image", pixels)], names)))
        same(found, {name: expected[name] for name in names})
        found = arrays(triton.ModelInfer(request("depth", [array("image", pixels)])))
        same(found, {"depth_map": depth_map(expected["depth"], height, width)})
    for model in ("features", "depth"):
        for height, width in ((70, 64), (64, 65), (8, 64), (64, 15)):
            said = refusal(
                triton, request(model, [array("image", np.zeros((1, height, width, 3), np.uint8))])
            )
            assert f"'image' is {height}x{width}: height and width must be multiples of 16" in said
        for height, width in ((80, 64), (64, 112), (1600, 1600)):
            said = refusal(
                triton, request(model, [array("image", np.zeros((1, height, width, 3), np.uint8))])
            )
            assert f"'image' is {height}x{width}: at most 64x96 is served" in said
        for height, width in ((16, 64), (64, 16)):
            said = refusal(
                triton, request(model, [array("image", np.zeros((1, height, width, 3), np.uint8))])
            )
            assert f"'image' is {height}x{width}: at least 32x32 is served" in said
        refusal(triton, request(model, [array("image", np.zeros((1, 0, 64, 3), np.uint8))]))


@pytest.mark.parametrize("varying", ["apart"], indirect=True)
def test_parts_refuse_more_positions_than_pictures_have(varying):
    triton, bundle = varying
    for count in (0, 1000):
        shapes = {
            tensor.name: [
                1,
                *(count if isinstance(axis, str) else axis for axis in tensor.shape[1:]),
            ]
            for tensor in bundle.graphs["depth"].inputs
        }
        given = [array(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()]
        said = refusal(triton, request("depth_head", given))
        assert re.search(
            rf"'features' is {count}x.*: it must not be empty, and at most 4x6x48 is served", said
        ), said
    picture, depth = np.zeros((1, 64, 96, 3), np.uint8), np.zeros((1, 23), np.float32)
    said = refusal(triton, request("depth_map", [array("depth", depth), array("image", picture)]))
    assert "input 'depth' does not belong to 'image': 23 positions do not form a grid of" in said
    said = refusal(
        triton, request("depth_map", [array("depth", depth), array("image", picture[:, :9, :9])])
    )
    assert "'image' is 9x9: height and width must be multiples of 16" in said


def refusal(triton, bad):
    """The words of an invalid argument."""
    with pytest.raises(grpc.RpcError) as raised:
        triton.ModelInfer(bad, timeout=30)
    assert raised.value.code() == INVALID, raised.value
    assert "Traceback" not in raised.value.details()
    return raised.value.details()
