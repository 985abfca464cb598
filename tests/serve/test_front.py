"""The front of the embedded server: what clients do never reaches tritonserver as a cancellation,
everything else passes unchanged, and what is in hand is bounded.
"""

import asyncio
import io
import os
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.grpc.service_pb2 import ModelInferRequest

from contract.errors import UserError
from serve.errors import ServerError
from serve.repository.state import read_state
from serve.server import front_process
from serve.server.front import FrontOptions
from serve.server.front_process import Front, split_flags
from serve.server.launch import is_loopback
from tests.conftest import need_tritonserver
from tests.serve.raw_requests import array, memory, strings
from tests.serve.raw_requests import request as message
from tests.serve.running import Run, ask, until

SIZE = 64
SERVICE = "/inference.GRPCInferenceService/"
INFER = f"{SERVICE}ModelInfer"


@pytest.fixture(scope="module")
def kept(expensive, small_bundle, tmp_path_factory):
    """A running serve.run with its front, and its repository."""
    need_tritonserver()
    folder = tmp_path_factory.mktemp("front") / "repository"
    with Run(small_bundle, "--repository", folder, "--no-fused", "--instances", 1) as run:
        yield run.ready(), folder


@contextmanager
def front(
    upstream: str, log: Callable[[str], None] = print, **changes: object
) -> Iterator[tuple[str, Front]]:
    """Another front of a server; yields its address, and itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = FrontOptions(listen=address, upstream=upstream)
    result = Front(replace(options, **changes), log)
    result.start()
    try:
        yield address, result
    finally:
        result.stop()


def inner_address(run: Run, folder: Path) -> str:
    """Where tritonserver itself answers."""
    words = Path(f"/proc/{read_state(folder).server_pid}/cmdline").read_text().split("\0")
    flags = dict(word.split("=", 1) for word in words if "=" in word)
    return f"{flags['--grpc-address']}:{flags['--grpc-port']}"


def call(channel: grpc.Channel, path: str, data: bytes = b"", **options: object) -> tuple:
    """Status, message, metadata and answer of one call."""
    try:
        answer, done = channel.unary_unary(path).with_call(data, timeout=30, **options)
    except grpc.RpcError as error:
        return error.code(), error.details(), tuple(error.trailing_metadata() or ()), b""
    return done.code(), done.details(), tuple(done.trailing_metadata() or ()), answer


def at_once(channel: grpc.Channel, count: int) -> Counter:
    """Status and message of as many requests of one picture."""
    return Counter((one.code(), one.details()) for one in send(channel, count))


def send(channel: grpc.Channel, count: int) -> list[Any]:
    """As many requests under way, of one picture each."""
    image = array("image", np.zeros((1, SIZE, SIZE, 3), np.uint8))
    data = message("features", [image], ["backbone_global"]).SerializeToString()
    return [channel.unary_unary(INFER).future(data, timeout=30) for _ in range(count)]


def picture() -> triton.InferInput:
    image = np.full((1, SIZE, SIZE, 3), 128, np.uint8)
    port = triton.InferInput("image", image.shape, "UINT8")
    port.set_data_from_numpy(image)
    return port


OUTPUT = [triton.InferRequestedOutput("backbone_global")]


class TestCancelling:
    def test_deadlines_of_milliseconds_do_no_harm(self, kept):
        """Without the front, tritonserver 2.51 dies of this within seconds."""
        run, folder = kept
        pid, end, statuses = read_state(folder).server_pid, time.monotonic() + 6, Counter()

        def work(seed: int) -> None:
            draw = random.Random(seed)
            with triton.InferenceServerClient(run.grpc) as client:
                while time.monotonic() < end:
                    try:
                        seconds = draw.uniform(0.002, 0.05)
                        client.infer("features", [picture()], client_timeout=seconds)
                    except triton.InferenceServerException as error:
                        statuses[str(error.status())] += 1

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses["StatusCode.DEADLINE_EXCEEDED"] > 20
        assert statuses.keys() <= {"StatusCode.DEADLINE_EXCEEDED", "StatusCode.UNAVAILABLE"}
        with triton.InferenceServerClient(run.grpc) as client:
            assert until(lambda: ask(client, SIZE) == "", 20)
        assert read_state(folder).server_pid == pid and "died" not in run.text

    def test_streams_that_are_broken_off(self, kept):
        run, folder = kept
        pid = read_state(folder).server_pid
        for number in range(10):
            with triton.InferenceServerClient(run.grpc) as client:
                client.start_stream(lambda result, error: None)
                for _ in range(20):
                    client.async_stream_infer("features", [picture()], outputs=OUTPUT)
                time.sleep(0.01 * number)
                client.stop_stream(cancel_requests=True)
        with triton.InferenceServerClient(run.grpc) as client:
            assert ask(client, SIZE) == ""
        assert read_state(folder).server_pid == pid


class TestPassing:
    @pytest.mark.parametrize(
        ("path", "data"),
        [
            (f"{SERVICE}ServerLive", b""),
            (f"{SERVICE}ServerMetadata", b""),
            ("/grpc.health.v1.Health/Check", b""),
            (f"{SERVICE}RepositoryIndex", b""),
            ("/nobody.Knows/This", b""),
            (INFER, b""),
            (INFER, b"\xff\xff\xff"),
            (INFER, ModelInferRequest(model_name="nobody").SerializeToString()),
            (INFER, ModelInferRequest(model_name="features", id="x").SerializeToString()),
            (INFER, message("decode", [strings("encoded", [b"no picture"])]).SerializeToString()),
        ],
    )
    def test_answers_and_errors_are_those_of_tritonserver(self, kept, path, data):
        run, folder = kept
        with (
            grpc.insecure_channel(run.grpc) as outer,
            grpc.insecure_channel(inner_address(run, folder)) as inner,
        ):
            assert call(outer, path, data) == call(inner, path, data)

    def test_the_key_opens_what_it_opens(self, kept):
        run, folder = kept
        key = {"triton-grpc-protocol-admin-key": read_state(folder).admin_key}
        with triton.InferenceServerClient(run.grpc) as client:
            assert client.get_model_repository_index(headers=key).models

    @pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
    def test_compressed_requests(self, kept, algorithm):
        with triton.InferenceServerClient(kept[0].grpc) as client:
            result = client.infer(
                "features",
                [picture()],
                outputs=OUTPUT,
                request_id="mine",
                compression_algorithm=algorithm,
            )
        assert result.get_response().id == "mine"
        assert result.as_numpy("backbone_global").shape == (1, 48)

    def test_a_stream_has_every_answer(self, kept):
        answers: list[tuple] = []
        with triton.InferenceServerClient(kept[0].grpc) as client:
            client.start_stream(lambda result, error: answers.append((result, error)))
            for number in range(30):
                client.async_stream_infer(
                    "features", [picture()], outputs=OUTPUT, request_id=str(number)
                )
            client.async_stream_infer("nobody", [picture()])
            client.stop_stream()
        ids = {result.get_response().id for result, error in answers if error is None}
        assert ids == {str(number) for number in range(30)}
        assert ["unknown model" in str(error) for _, error in answers if error] == [True]

    def test_flags_of_connections_are_the_fronts(self):
        flags = ("--log-verbose=1", "--grpc-keepalive-time=30000", "--grpc-max-connection-age", "9")
        left, arguments, compression = split_flags(
            [*flags, "--grpc-infer-response-compression-level=high"]
        )
        assert left == ("--log-verbose=1",) and compression == "gzip"
        assert arguments == {"grpc.keepalive_time_ms": 30000, "grpc.max_connection_age_ms": 9}
        with pytest.raises(UserError, match="--grpc-keepalive-time=soon: give a whole number"):
            split_flags(["--grpc-keepalive-time=soon"])


class TestBounds:
    def test_more_requests_than_may_wait_for_the_decoder(self, kept):
        """A queue in tritonserver itself: so is a server that has no front."""
        run, folder = kept
        buffer = io.BytesIO()
        Image.effect_noise((1200, 1200), 60).convert("RGB").save(buffer, "JPEG")
        data = message(
            "features_encoded",
            [strings("encoded", [buffer.getvalue()] * 4)],
            ["backbone_global"],
        ).SerializeToString()
        with grpc.insecure_channel(run.grpc) as channel:
            calls = [channel.unary_unary(INFER).future(data, timeout=60) for _ in range(120)]
            errors = Counter((one.code(), one.details()) for one in calls)
        assert set(code for code, _ in errors) == {
            grpc.StatusCode.OK,
            grpc.StatusCode.UNAVAILABLE,
        }, errors
        assert all("Exceeds maximum queue size" in text for code, text in errors if text), errors
        answered = sum(count for (code, _), count in errors.items() if code is grpc.StatusCode.OK)
        assert 64 <= answered < 120

    def test_more_requests_than_the_front_holds(self, kept):
        with (
            front(inner_address(*kept), requests=2) as (address, _),
            grpc.insecure_channel(address) as channel,
        ):
            errors = at_once(channel, 60)
            refused = (
                grpc.StatusCode.UNAVAILABLE,
                ("Exceeds maximum queue size: 2 requests are in hand: try again later"),
            )
            assert errors[refused] > 10 and errors[grpc.StatusCode.OK, ""] >= 2
            assert errors.total() == errors[refused] + errors[grpc.StatusCode.OK, ""]
            assert call(channel, f"{SERVICE}ServerReady")[0] is grpc.StatusCode.OK

    def test_more_bytes_than_the_front_holds(self, kept):
        with (
            front(inner_address(*kept), bytes=2 * SIZE * SIZE * 3) as (address, _),
            grpc.insecure_channel(address) as channel,
        ):
            errors = at_once(channel, 60)
            assert errors[grpc.StatusCode.OK, ""] >= 1
            del errors[grpc.StatusCode.OK, ""]
            assert errors and all(
                code is grpc.StatusCode.UNAVAILABLE and "MiB of requests are in hand" in text
                for code, text in errors
            ), errors
            assert at_once(channel, 1) == {(grpc.StatusCode.OK, ""): 1}  # all were given back

    def test_a_request_that_is_too_large(self, kept):
        limits = {"bytes": 3 << 20, "message_bytes": 2 << 20}
        with (
            front(inner_address(*kept), **limits) as (address, _),
            grpc.insecure_channel(address) as channel,
        ):
            large = call(channel, INFER, bytes(5 << 20))
            assert large[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            # small on the wire only
            large = call(channel, INFER, bytes(5 << 20), compression=grpc.Compression.Gzip)
            assert large[0] is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_requests_that_arrive_slowly_make_room(self, kept):
        """Bodies that never come, on connections that stay open."""
        with front(inner_address(*kept), arriving=2) as (address, _):
            hanging = [Hanging(address) for _ in range(6)]
            try:
                with triton.InferenceServerClient(address) as client:
                    assert ask(client, SIZE) == ""
            finally:
                for one in hanging:
                    one.close()

    def test_a_front_that_cannot_listen(self, kept):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            options = FrontOptions(listen=f"127.0.0.1:{taken.getsockname()[1]}", upstream="x:1")
            with pytest.raises(ServerError, match="the front does not start: front: "):
                Front(options, lambda line: None).start()

    def test_an_overload_harms_nobody(self, kept):
        """In Triton 2.51 a step with a full queue ends the server, if others of its request run."""
        run, folder = kept
        pid, end, statuses = read_state(folder).server_pid, time.monotonic() + 8, Counter()
        image = array("image", np.zeros((1, SIZE, SIZE, 3), np.uint8))
        data = message("features", [image]).SerializeToString()

        async def ask_again(method: grpc.aio.UnaryUnaryMultiCallable) -> None:
            while time.monotonic() < end:
                try:
                    await method(data, timeout=60)
                    statuses["OK"] += 1
                except grpc.RpcError as error:
                    found = re.search("Exceeds maximum queue size", error.details())
                    statuses[found[0] if found else error.details()] += 1
                    await asyncio.sleep(0.05)

        async def overload() -> None:
            async with grpc.aio.insecure_channel(run.grpc) as channel:
                method = channel.unary_unary(INFER)
                await asyncio.gather(*(ask_again(method) for _ in range(400)))

        asyncio.run(overload())
        assert statuses.keys() == {"OK", "Exceeds maximum queue size"}, statuses
        assert read_state(folder).server_pid == pid


class Hanging:
    """A request whose body stops after its first bytes, as HTTP/2 frames on a socket."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.socket = socket.create_connection((host, int(port)))
        # header fields without Huffman coding and without the table
        fields = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": INFER.encode(),
            b":authority": b"here",
            b"te": b"trailers",
            b"content-type": b"application/grpc",
        }
        block = b"".join(
            b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in fields.items()
        )
        half = struct.pack(">BI", 0, 1000) + bytes(10)
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block)
        )
        self.socket.sendall(frame(0, 0, 1, half))

    def close(self) -> None:
        self.socket.close()


def pass_on_late(listening: socket.socket, path: str) -> None:
    """Accept connections and connect each with a socket, after a second."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    with suppress(OSError):  # until it is closed
        while True:
            near, far = listening.accept()[0], socket.socket(socket.AF_UNIX)
            far.connect(path)
            time.sleep(1)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=copy, args=ends, daemon=True).start()


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


class TestDying:
    def test_a_front_that_is_killed_comes_back(self, kept):
        run, folder = kept
        pid = read_state(folder).front_pid
        with triton.InferenceServerClient(run.grpc) as client:
            assert ask(client, SIZE) == ""
            os.kill(pid, 9)
            assert until(lambda: ask(client, SIZE) == "", 30)
        run.wait_for(r"^front: it ended \(signal 9\): starting it again")
        assert until(lambda: read_state(folder).front_pid not in (None, pid), 10)

    def test_a_front_that_is_stuck_is_replaced(self, kept, monkeypatch):
        monkeypatch.setattr(front_process, "_SILENT_SECONDS", 4)
        lines: list[str] = []
        with front(inner_address(*kept), log=lines.append) as (address, running):
            os.kill(running.process.pid, signal.SIGSTOP)
            with triton.InferenceServerClient(address) as client:
                assert until(lambda: lines and ask(client, SIZE) == "", 40), lines
        assert lines[0] == "front: no sign of life for 4 s: ending it"

    def test_one_that_was_being_started_hears_whether_to_let_anybody_in(self, kept, monkeypatch):
        """It has its options, and no handlers for signals, when that changes."""
        begin, wanted = front_process.Child, []

        def child(*arguments: object, **options: object) -> object:
            process = begin(*arguments, **options)
            running.hold(wanted.pop())
            return process

        def answer() -> grpc.StatusCode | str:
            with grpc.insecure_channel(address) as channel:
                code, why, *_ = call(channel, f"{SERVICE}ServerLive")
            return "held" if "is being started again" in why else code

        with front(inner_address(*kept)) as (address, running):
            monkeypatch.setattr(front_process, "Child", child)
            for held, answers in ((True, "held"), (False, grpc.StatusCode.OK)):
                wanted.append(held)
                os.kill(running.process.pid, 9)
                assert until(lambda answers=answers: not wanted and answer() == answers, 20)

    def test_stopping_waits_for_requests_but_not_for_bodies_that_never_come(self, kept):
        with front(inner_address(*kept)) as (address, running):
            hanging = Hanging(address)
            with grpc.insecure_channel(address) as channel:
                calls = send(channel, 10)
                assert call(channel, f"{SERVICE}ServerLive")[0] is grpc.StatusCode.OK
                running.drain()
                errors = Counter((one.code(), one.details()) for one in calls)
            assert running.process.wait(20) == 0
            hanging.close()
        assert errors.keys() <= {
            (grpc.StatusCode.OK, ""),
            (grpc.StatusCode.UNAVAILABLE, "Server is stopping: try another one, or again later"),
        }
        assert errors[grpc.StatusCode.OK, ""]

    def test_a_tritonserver_that_is_killed_is_awaited(self, kept):
        """The client hears UNAVAILABLE, without addresses, and then answers, on one connection."""
        run, folder = kept
        state = read_state(folder)
        errors: list[str] = []
        with triton.InferenceServerClient(run.grpc) as client:
            assert ask(client, SIZE) == ""
            os.kill(state.server_pid, 9)
            assert until(lambda: errors.append(ask(client, SIZE)) or errors[-1] == "", 60)
        assert errors[:-1]
        assert all("[StatusCode.UNAVAILABLE]" in error for error in errors[:-1]), errors
        assert not [error for error in errors if re.search(r"unix:|ipv4:|/", error)], errors
        # written a moment after the first answer
        assert until(lambda: (now := read_state(folder)) and now.front_pid == state.front_pid, 10)

    def test_a_tritonserver_too_busy_to_shake_hands_is_awaited(self, kept):
        """A connection that is slow to come up is not one that was lost."""
        path = inner_address(*kept).removeprefix("unix:")
        with socket.create_server(("127.0.0.1", 0)) as slow:
            threading.Thread(target=pass_on_late, args=(slow, path), daemon=True).start()
            with front(f"127.0.0.1:{slow.getsockname()[1]}") as (address, _):
                with triton.InferenceServerClient(address) as client:
                    assert ask(client, SIZE) == ""

    def test_it_does_not_grow(self, kept):
        """Given-up requests leave nothing behind in the front."""
        run, folder = kept
        pid = read_state(folder).front_pid

        def give_up(_: int) -> int:
            """Requests given up; a fast machine answers some of them in a millisecond."""
            count = 0
            with triton.InferenceServerClient(run.grpc) as client:
                for _ in range(25):
                    try:
                        client.infer("features", [picture()], client_timeout=0.001)
                    except triton.InferenceServerException:
                        count += 1
            return count

        # An allocator's arenas fill over the first rounds and then stop; what is left
        # behind grows with every round, by about 10 MB of pictures.
        count, size, grown = 0, memory(pid), []
        with ThreadPoolExecutor(4) as pool:
            while len(grown) < 8 and (count <= 100 or min(grown) > 2 * 1024):
                count += sum(pool.map(give_up, range(8)))
                grown.append(memory(pid) - size)
                size += grown[-1]
        assert count > 100
        assert min(grown) <= 2 * 1024, grown


def test_which_addresses_are_of_this_machine_alone():
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "10.1.2.3", "192.0.2.1", "no.such.name.invalid"):
        assert not is_loopback(host), host
