"""Liveness: one small request to every front door; with --golden, once at the start, whether the
bundle's golden pictures are answered as at export. Exit status 0 yes, 1 no; standard library only.

Triton still reports READY when a python backend's process has died, and it never starts that
process again. So a probe has to send a request. A server that is merely busy is alive:
restarting it would only move its load to the others.
"""

import argparse
import json
import math
import operator
import os
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib

_DOORS = ("fused", "zero_shot", "text_encoder", "detection")
"""With `features` or `features_encoded`, and the tasks that `features` names, they reach every
model a repository can have.
"""
_BUSY = (429, 503)
_GOLDEN_DOORS = ("features", "fused")
"""Models that give every recorded output (serve/server/golden.py)."""
_FLAT = ("depth",)
"""Outputs [B, positions] with one number at every position (contract/positions.py)."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Liveness of a Triton: one small request to every front door."
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="Triton's HTTP address (default: http://127.0.0.1:8000)",
    )
    repository = os.environ.get("MODEL_REPOSITORY", "/models")
    parser.add_argument(
        "--repository",
        default=repository,
        help=f"the models it should serve (default: {repository})",
    )
    parser.add_argument(
        "--timeout", type=float, default=20, help="time limit in seconds (default: 20)"
    )
    parser.add_argument(
        "--golden", action="store_true", help="ask the golden pictures instead: for a startup probe"
    )
    args = parser.parse_args()
    try:
        check = check_golden if args.golden else probe
        problem = check(args.url, args.repository, args.timeout)
    except (OSError, ValueError, LookupError) as error:
        problem = f"{args.url}: {error}"
    if problem:
        # a picture's name may be any file's
        problem = "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problem else 0


def probe(url: str, repository: str, timeout: float) -> str:
    """What is wrong, "" if nothing is. Raises OSError if nothing answers."""
    end = time.monotonic() + timeout
    status, message = request(f"{url}/v2/health/live", timeout)
    if status != 200:
        return f"{url}/v2/health/live answered {status} {message[:300].decode(errors='replace')}"
    config = _config(url, "features", timeout)
    if not config:
        return "'features' is not loaded"
    about = json.loads(config["parameters"]["about"]["string_value"])
    size = about["height"], about["width"]
    # from the files, because a model that is gone and one that never was look alike over the
    # network
    models = [
        model
        for model in sorted(os.listdir(repository))
        if os.path.isdir(os.path.join(repository, model))
    ]
    # Triton takes turns between instances: one dead of eight fails every eighth request
    rounds = max([_instances(_config(url, model, timeout)) for model in models], default=1)
    # pictures of several views have no decoder in front of them
    front = "features_encoded" if "features_encoded" in models else "features"
    for door in [door for door in (*about["tasks"], front, *_DOORS) if door in models] * rounds:
        left = end - time.monotonic()
        if left < timeout / 2:
            return ""  # slow, but everything so far was answered
        before = _answered(url, left)
        try:
            status, message = request(
                f"{url}/v2/models/{door}/infer", left, *_question(door, *size)
            )
        except TimeoutError:
            if _answered(url, timeout) > before:
                return ""
            return (
                f"'{door}' did not answer in {left:.0f} s, nor was anything else answered meanwhile"
            )
        if status != 200 and status not in _BUSY:
            return f"'{door}' answered {status} {message[:300].decode(errors='replace')}"
    return ""


def check_golden(url: str, repository: str, timeout: float) -> str:
    """What `features` or `fused` answers otherwise than at export, "" if nothing, or if the
    repository has no golden set; for runtime and processor are other ones here. Raises OSError if
    nothing answers.
    """
    doors = [
        door
        for door in _GOLDEN_DOORS
        if door == "features" or os.path.isdir(os.path.join(repository, door))
    ]
    for door in doors:
        if request(f"{url}/v2/models/{door}/ready", timeout)[0] != 200:
            return f"{url}: '{door}' is not ready"
    config = _config(url, "features", timeout)
    version = config["version_policy"]["specific"]["versions"][0]
    path = os.path.join(repository, "features", str(version), "golden.safetensors")
    if not os.path.exists(path):
        return ""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    about = json.loads(header.pop("__metadata__")["golden"])
    stored = {
        name: (tensor["shape"], data[slice(*tensor["data_offsets"])])
        for name, tensor in header.items()
    }
    shape, pixels = stored.pop("image")
    for number, picture in enumerate(about["pictures"]):
        image = ("image", "UINT8", [1, *shape[1:]], _part(pixels, shape, number))
        for door in doors:
            status, message = request(f"{url}/v2/models/{door}/infer", timeout, *_body([image]))
            if status != 200:
                return f"'{door}' answered {status} {message[:300].decode(errors='replace')}"
            answers = _tensors(message)
            for name, (whole, wanted) in stored.items():
                got = answers.get(name, b"")
                if problem := _compare(name, got, _part(wanted, whole, number), whole, about):
                    return f"'{door}': output '{name}' on {picture}: {problem}"
    return ""


def _part(data: bytes, shape: list[int], number: int) -> bytes:
    """One picture's bytes of a tensor."""
    size = len(data) // shape[0]
    return data[number * size : (number + 1) * size]


def _compare(name: str, got: bytes, wanted: bytes, shape: list[int], about: dict) -> str:
    """What is wrong with a picture's float32 values, "" if they keep to the bounds of a golden set
    (contract/golden.py). `shape`: of the output, [pictures, ...].
    """
    if len(got) != len(wanted):
        return f"{len(got) // 4} values, recorded {len(wanted) // 4}"
    # an output that is not a map is one row
    width = shape[-1] if len(shape) > 2 else 1 if name in _FLAT else len(wanted) // 4
    row = struct.Struct(f"<{max(1, width)}f")
    aa = ab = bb = 0.0
    errors, lengths = [], []
    for a, b in zip(row.iter_unpack(got), row.iter_unpack(wanted), strict=True):
        errors.append(math.dist(a, b))
        lengths.append(math.hypot(*b))
        aa += math.hypot(*a) ** 2
        ab += sum(map(operator.mul, a, b))
        bb += lengths[-1] ** 2
    bounds = about.get("inexact", {}).get(name, about["bounds"])
    least, most = about["allowed"].get(name, bounds)
    cosine = ab / math.sqrt(aa * bb) if aa * bb > 0 else float(aa == bb)
    off = math.sqrt(sum(error * error for error in errors) / (bb or 1.0))
    if not cosine >= least:
        return f"cosine {cosine:.6f}, at least {least} is wanted"
    if not off <= most:
        return f"off by {off:.3g} of its length, at most {most} is allowed"
    is_map = len(shape) > 2 or name in _FLAT
    # a golden set of an earlier version has no bounds of positions
    if not is_map or name in about["allowed"] or not about.get("positions"):
        return ""
    return _far_positions(errors, lengths, *about["positions"][:3])


def _far_positions(
    errors: list[float], lengths: list[float], worst: float, near: float, share: float
) -> str:
    """What is wrong with single positions of a map, "" if nothing is: lengths of the differences
    against the wanted lengths or their median, as in contract/positions.py.
    """
    count = len(errors)
    if not count:
        return ""
    ordered = sorted(lengths)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    relative = []
    for error, length in zip(errors, lengths, strict=True):
        scale = max(length, median)
        relative.append(error / scale if scale > 0 else math.inf if error > 0 else 0.0)
    farthest = max(relative)
    if farthest > worst:
        return (
            f"off by {farthest:.3g} of its length at position {relative.index(farthest)} of "
            f"{count}, at most {worst:.3g} is allowed"
        )
    beyond, most = sum(error > near for error in relative), max(1, int(share * count))
    if beyond > most:
        return (
            f"{beyond} of {count} positions are off by more than {near:.3g} of their length, at "
            f"most {most} may be"
        )
    return ""


def _tensors(message: bytes) -> dict[str, bytes]:
    """The outputs of an answer in binary form, whose JSON comes first."""
    head, start = json.JSONDecoder().raw_decode(message.decode("latin-1"))
    result = {}
    for output in head["outputs"]:
        end = start + output["parameters"]["binary_data_size"]
        result[output["name"]] = message[start:end]
        start = end
    return result


def _config(url: str, model: str, timeout: float) -> dict:
    """A model's configuration, {} of one that is not loaded."""
    status, message = request(f"{url}/v2/models/{model}/config", timeout)
    return json.loads(message) if status == 200 else {}


def _instances(config: dict) -> int:
    """How many a model has, 1 where its configuration does not say."""
    groups = config.get("instance_group", ())
    return max(1, sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in groups))


def _answered(url: str, timeout: float) -> int:
    """Requests answered by any model since the server's start."""
    stats = json.loads(request(f"{url}/v2/models/stats", timeout)[1])["model_stats"]
    return sum(int(model["inference_stats"]["success"].get("count", 0)) for model in stats)


def _question(door: str, height: int, width: int) -> tuple[bytes, int]:
    """A request's body, and how much of it is JSON: a black picture as a file or as pixels, a
    label, or both.
    """
    pixels = ("image", "UINT8", [1, height, width, 3], bytes(height * width * 3))
    if door == "features_encoded":
        inputs = [("encoded", "BYTES", [1, 1], _string(png(32)))]
    elif door == "text_encoder":
        inputs = [("labels", "BYTES", [1], _string(b"probe"))]
    elif door == "detection":
        # another word each time: its model of words is not asked for those that it knows
        word = _string(str(time.time_ns() // 1000 % 1000).encode())
        inputs = [pixels, ("labels", "BYTES", [1], word)]
    else:
        inputs = [pixels]
    return _body(inputs)


def _body(inputs: list[tuple[str, str, list[int], bytes]]) -> tuple[bytes, int]:
    """A request's body for inputs (name, type, shape, bytes), and how much of it is JSON."""
    described = [
        {
            "name": name,
            "datatype": kind,
            "shape": shape,
            "parameters": {"binary_data_size": len(data)},
        }
        for name, kind, shape, data in inputs
    ]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(data for *_, data in inputs), len(head)


def _string(data: bytes) -> bytes:
    """An element of a BYTES tensor."""
    return struct.pack("<I", len(data)) + data


def png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = bytes((1 + 3 * side) * side)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def request(
    url: str, timeout: float, body: bytes | None = None, head: int = 0
) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST whose first `head` bytes are JSON."""
    headers = (
        {"Inference-Header-Content-Length": str(head), "Content-Type": "application/octet-stream"}
        if head
        else {}
    )
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, body, headers), timeout=timeout
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


if __name__ == "__main__":
    sys.exit(main())
