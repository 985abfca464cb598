"""Liveness: one small request to every front door. Exit status 0 alive, 1 not; standard library
only.

Triton still reports READY when a python backend's process has died, and it never starts that
process again. So a probe has to send a request. A server that is merely busy is alive:
restarting it would only move its load to the others.
"""

import argparse
import json
import os
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib

_DOORS = ("features_encoded", "fused", "zero_shot", "text_encoder", "detection")
"""With the tasks that have a map, they reach every model a repository can have."""
_BUSY = (429, 503)


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
    args = parser.parse_args()
    try:
        problem = probe(args.url, args.repository, args.timeout)
    except (OSError, ValueError, LookupError) as error:
        problem = f"{args.url}: {error}"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problem else 0


def probe(url: str, repository: str, timeout: float) -> str:
    """What is wrong, "" if nothing is. Raises OSError if nothing answers."""
    end = time.monotonic() + timeout
    status, message = request(f"{url}/v2/health/live", timeout)
    if status != 200:
        return f"{url}/v2/health/live answered {status} {message[:300].decode(errors='replace')}"
    settings = json.loads(request(f"{url}/v2/models/decode/config", timeout)[1])["parameters"]
    height, width = (int(settings[side]["string_value"]) for side in ("height", "width"))
    # from the files, because a model that is gone and one that never was look alike over the
    # network
    models = [
        model
        for model in sorted(os.listdir(repository))
        if os.path.isdir(os.path.join(repository, model))
    ]
    # Triton takes turns between instances: one dead of eight fails every eighth request
    rounds = max([_instances(url, model, timeout) for model in models], default=1)
    tasks = [model for model in models if f"{model}_map" in models]
    for door in [door for door in (*tasks, *_DOORS) if door in models] * rounds:
        left = end - time.monotonic()
        if left < timeout / 2:
            return ""  # slow, but everything so far was answered
        before = _answered(url, left)
        try:
            status, message = request(
                f"{url}/v2/models/{door}/infer", left, *_question(door, height, width)
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


def _instances(url: str, model: str, timeout: float) -> int:
    """How many a model has, 1 where its configuration does not say."""
    groups = json.loads(request(f"{url}/v2/models/{model}/config", timeout)[1]).get(
        "instance_group", ()
    )
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
