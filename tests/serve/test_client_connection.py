"""serve.client's connections: forgotten by a middle box, inherited by a fork, sent to another
process, used from several event loops, closed.
"""

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from serve.client import FeatureClient, connection
from serve.client.aio import AsyncFeatureClient
from serve.client.connection import TIME_IS_UP, Lines
from serve.errors import BadRequest, ClientError, DeadlineExceeded

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
LATE, BROKEN = InferenceServerException(*TIME_IS_UP), InferenceServerException("no")
OUTPUT = "backbone_global"


class MiddleBox:
    """Passes connections on to a server, until it forgets those there are: nothing passes on them
    any more, and nobody is told. New ones pass.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target, self.forgotten = (host, int(port)), 0
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, there = self.listener.accept()[0], socket.create_connection(self.target)
                self.pairs.append((here, there))
                for ends in ((here, there), (there, here)):
                    arguments = (len(self.pairs), *ends)
                    threading.Thread(target=self.pump, args=arguments, daemon=True).start()

    def pump(self, number: int, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if number > self.forgotten:
                    other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        self.forgotten = len(self.pairs)

    def close(self) -> None:
        self.listener.close()
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def box(server) -> Iterator[MiddleBox]:
    box = MiddleBox(server.grpc)
    yield box
    box.close()


def test_a_forgotten_connection_is_replaced_after_a_deadline(box):
    with FeatureClient(box.url) as client:
        expected = client.features(PIXELS[0], OUTPUT)[OUTPUT]
        for _ in range(2):
            box.forget()
            with pytest.raises(DeadlineExceeded):
                client.features(PIXELS[0], OUTPUT, timeout=1.1)
            assert np.array_equal(client.features(PIXELS[0], OUTPUT)[OUTPUT], expected)
        assert len(box.pairs) == 3
        # short deadlines need two
        box.forget()
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                client.features(PIXELS[0], OUTPUT, timeout=0.3)
        assert np.array_equal(client.features(PIXELS[0], OUTPUT)[OUTPUT], expected)
        # and a client of its own has a connection of its own
        box.forget()
        with FeatureClient(box.url, timeout=5) as other:
            assert np.array_equal(other.features(PIXELS[0], OUTPUT)[OUTPUT], expected)


def test_a_forgotten_connection_is_replaced_under_asyncio(box):
    async def ask() -> None:
        async with AsyncFeatureClient(box.url) as client:
            expected = (await client.features(PIXELS, OUTPUT))[OUTPUT]
            box.forget()
            with pytest.raises(DeadlineExceeded):
                await client.features(PIXELS, OUTPUT, timeout=1.1)
            found = (await client.features(PIXELS, OUTPUT))[OUTPUT]
            assert np.allclose(found, expected, atol=1e-4) and len(box.pairs) == 2

    asyncio.run(ask())


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr("serve.client.connection.time", self)

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now


def test_a_connection_on_which_anything_is_heard_is_kept(monkeypatch):
    clock = Clock(monkeypatch)
    lines = Lines(object)
    line = lines.take()

    def late(after: float, answered: bool = False) -> bool:
        """Whether a deadline replaces the connection, perhaps with another request answered."""
        began = clock.monotonic()
        clock.now += after
        if answered:
            lines.judge(line, clock.now, BROKEN)
        lines.judge(line, began, LATE)
        return lines.line is not line

    assert not any(late(10, answered=True) for _ in range(5))
    assert not any(late(0.002) for _ in range(20))  # it may not even be connected yet
    assert not late(0.9, answered=True) and not late(0.9) and late(0.9)
    assert not lines.spent()  # the request is under way on it
    line.busy = 0
    assert lines.spent() == [line] and not lines.spent()
    line = lines.take()
    assert late(1.1) and lines.hang_up() == [line]


# Forks


def in_child(work: Callable[[], object]) -> object:
    """What work returns, or raises, in a forked child; None if it has not ended after 20 s."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send(work())
        except BaseException as error:
            there.send(error)

    child = fork.Process(target=run)
    child.start()
    try:
        return here.recv() if here.poll(20) else None
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_client_that_was_used_answers_in_forked_children_and_in_the_parent(server, busy):
    ended = threading.Event()
    with FeatureClient(server.grpc) as client, ThreadPoolExecutor(2) as threads:
        asynchronous = AsyncFeatureClient(server.grpc)
        expected = client.features(PIXELS, OUTPUT)[OUTPUT]
        asyncio.run(asynchronous.features(PIXELS, OUTPUT))

        def load() -> int:
            answers = 0
            while not ended.is_set():
                answers += len(client.features(PIXELS[0], OUTPUT)[OUTPUT])
            return answers

        def ask() -> np.ndarray:
            return client.features(PIXELS, OUTPUT, timeout=5)[OUTPUT]

        def wait() -> np.ndarray:
            return asyncio.run(asynchronous.features(PIXELS, OUTPUT, timeout=5))[OUTPUT]

        loads = [threads.submit(load) for _ in range(2 if busy else 0)]
        try:
            for work in (ask, wait, ask):
                found = in_child(work)
                # what gRPC cannot do in the child of a busy process must still end
                if not (busy and isinstance(found, DeadlineExceeded)):
                    assert np.allclose(found, expected, atol=1e-4), found
        finally:
            ended.set()
        assert all(one.result() for one in loads)
        assert np.allclose(client.features(PIXELS, OUTPUT)[OUTPUT], expected, atol=1e-4)
        asyncio.run(asynchronous.close())


def test_a_client_used_under_asyncio_alone_answers_in_a_forked_child(server, monkeypatch):
    monkeypatch.setattr(connection.gate, "used", False)
    client = AsyncFeatureClient(server.grpc)

    def ask() -> np.ndarray:
        return asyncio.run(client.features(PIXELS, OUTPUT, timeout=5))[OUTPUT]

    expected = ask()
    assert np.allclose(in_child(ask), expected, atol=1e-4)
    asyncio.run(client.close())


def test_a_forked_child_shares_neither_connection_nor_memory_with_its_parent(server):
    with FeatureClient(server.grpc, shared_memory="system", admin_key=server.admin_key) as client:
        expected = client.features(PIXELS[:4], OUTPUT)[OUTPUT]
        (region,) = client.calls.pool.free

        def ask() -> tuple:
            found = client.features(PIXELS[:4], OUTPUT)[OUTPUT]
            names = [one.name for one in client.calls.pool.free]
            client.close()
            return found, names

        found, names = in_child(ask)
        assert np.array_equal(found, expected) and region.name not in names
        assert client.calls.pool.free == [region]
        assert np.array_equal(client.features(PIXELS[:4], OUTPUT)[OUTPUT], expected)
    assert not any(os.path.exists(f"/dev/shm/{name}") for name in (region.name, *names))


def ask_once(client: FeatureClient) -> np.ndarray:
    with client:
        return client.features(PIXELS[0], OUTPUT)[OUTPUT]


def test_clients_can_be_sent_to_other_processes(server):
    with FeatureClient(server.grpc, timeout=20) as client:
        expected = client.features(PIXELS[0], OUTPUT)[OUTPUT]
        assert np.array_equal(ask_once(pickle.loads(pickle.dumps(client))), expected)
    again = pickle.loads(pickle.dumps(AsyncFeatureClient(server.grpc, timeout=7)))
    assert again.url == server.grpc and again.calls.options.timeout == 7


# Event loops, and the end


def test_an_asyncio_client_may_be_used_from_one_event_loop_after_another_and_two_at_once(server):
    client = AsyncFeatureClient(server.grpc, concurrency=1)

    def ask(_: int) -> np.ndarray:
        return asyncio.run(client.features(PIXELS, OUTPUT))[OUTPUT]

    expected = ask(0)
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(ask, range(6)):
            assert np.allclose(found, expected, atol=1e-4)
    asyncio.run(client.close())


def test_a_closed_client_says_so(server):
    client = FeatureClient(server.grpc)
    client.features(PIXELS, OUTPUT)
    for _ in range(2):
        client.close()
        for call in (lambda: client.features(PIXELS, OUTPUT), client.describe):
            with pytest.raises(BadRequest, match="the client is closed: make a new one"):
                call()

    async def ask() -> None:
        client = AsyncFeatureClient(server.grpc)
        await client.features(PIXELS, OUTPUT)
        for _ in range(2):
            await client.close()
            with pytest.raises(BadRequest, match="the client is closed: make a new one"):
                await client.features(PIXELS, OUTPUT)

    asyncio.run(ask())
    unused = FeatureClient(server.grpc)
    unused.close()


def test_closing_while_others_are_answered_raises_nothing_but_client_errors(server):
    client, errors, answers = FeatureClient(server.grpc), [], []

    def load() -> None:
        try:
            while True:
                answers.append(client.features(PIXELS, OUTPUT))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    client.close()
    for thread in threads:
        thread.join(30)
    assert answers and len(errors) == 3
    assert all(isinstance(error, ClientError) for error in errors), errors


@pytest.mark.parametrize(
    "url", ["ünïcode.invalid:1", "no port", "127.0.0.1:99999", "a:b:c", "x" * 9]
)
def test_addresses_of_nobody_are_client_errors(url):
    with FeatureClient(url, timeout=0.5) as client, pytest.raises(ClientError) as raised:
        client.features(PIXELS[0])
    assert len(str(raised.value)) < 300

    async def ask() -> None:
        async with AsyncFeatureClient(url, timeout=0.5) as client:
            await client.features(PIXELS[0])

    with pytest.raises(ClientError) as raised:
        asyncio.run(ask())
    assert len(str(raised.value)) < 300


def test_threads_that_share_a_client_are_answered_what_they_asked(server, monkeypatch):
    """tritonclient's `async_infer` keeps a call in an attribute before it adds the callback: a
    thread that comes between would have its answer taken for another's.
    """

    def keep(self, call):
        self.kept = call
        time.sleep(0.05)

    late = property(lambda self: self.kept, keep)
    monkeypatch.setattr(InferenceServerClient, "_call_future", late, raising=False)
    with FeatureClient(server.grpc) as client, ThreadPoolExecutor(4) as threads:
        alone = [client.features(picture, OUTPUT)[OUTPUT] for picture in PIXELS[:4]]

        def ask(number: int) -> np.ndarray:
            # of one id, by which answers could be told apart
            return client.features(PIXELS[number], OUTPUT, request_id="one", timeout=60)[OUTPUT]

        for found, expected in zip(threads.map(ask, range(4)), alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
