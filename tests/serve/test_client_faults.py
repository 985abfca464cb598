"""serve.client and failures: servers that are not there, die, hang or want certificates; heads that
fail alone.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc

from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.client.aio import AsyncFeatureClient
from serve.client.breaker import Breaker, head_of
from serve.client.options import ADMIN
from serve.client.retry import Budget, Retry
from serve.client.tls import Tls
from serve.errors import ClientError, DeadlineExceeded, NotAllowed, Unavailable
from serve.server.stubs import find_stubs
from tests.conftest import need_tritonserver
from tests.serve.running import lasting_port


@pytest.fixture(scope="module")
def pixels():
    """A photograph as the small bundle reads it, uint8 [1, 64, 64, 3]."""
    return SQUASH.pixels(PackagedPhotos().load(0), 64, 64)[None]


class Proxy(socketserver.ThreadingTCPServer):
    """Passes connections on to a server; with certificates it ends TLS, asking clients for
    theirs.
    """

    allow_reuse_address = True

    def __init__(self, port: int, target: str, tls: ssl.SSLContext | None = None) -> None:
        host, _, its_port = target.rpartition(":")
        self.target, self.tls = (host, int(its_port)), tls
        super().__init__(("127.0.0.1", port), None)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def finish_request(self, request: socket.socket, address: object) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.target) as there:
            with (
                self.tls.wrap_socket(request, server_side=True)
                if self.tls
                else contextlib.nullcontext(request) as here
            ):
                back = threading.Thread(target=pump, args=(there, here))
                back.start()
                pump(here, there)
                back.join()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


def pump(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)


def test_a_server_that_comes_up_is_waited_for(server, pixels):
    port, proxies = lasting_port(), []
    timer = threading.Timer(1.0, lambda: proxies.append(Proxy(port, server.grpc)))
    timer.start()
    began = time.monotonic()
    with FeatureClient(f"127.0.0.1:{port}") as late:
        assert late.features(pixels[0], "depth")["depth"].shape == (1, 16)
    assert 0.9 < time.monotonic() - began < 10
    timer.join()
    proxies[0].close()


def test_retries_end_with_their_number_their_time_and_their_budget(pixels):
    url = f"127.0.0.1:{lasting_port()}"
    quick = Retry(most=2, first=0.01)
    with (
        FeatureClient(url, retry=quick) as client,
        pytest.raises(Unavailable, match="3 attempts"),
    ):
        client.features(pixels[0])
    began = time.monotonic()
    with (
        FeatureClient(url, retry=Retry(most=50)) as client,
        pytest.raises(Unavailable, match="its time is up"),
    ):
        client.features(pixels[0], timeout=1)
    assert time.monotonic() - began < 1.5
    with FeatureClient(url, retry=Retry(most=50, first=0.01), budget=(0.2, 3)) as client:
        for expected in (
            "4 attempts",
            *["1 attempt"] * 4,
            "2 attempts",
        ):  # a retry is earned by five calls
            with pytest.raises(Unavailable, match=f"{expected}, the budget"):
                client.features(pixels[0])


def test_the_budget_keeps_retries_below_its_share_of_the_calls():
    budget = Budget(ratio=0.1, burst=5)
    taken = 0
    for _ in range(1000):
        budget.add()
        while budget.take():
            taken += 1
    assert 100 <= taken <= 105


def test_waits_grow_stay_bounded_and_differ():
    retry = Retry(first=0.1, longest=1.0)
    waits = [[retry.wait(number) for _ in range(50)] for number in range(6)]
    assert all(0.05 <= wait <= 0.1 for wait in waits[0]) and all(
        0.5 <= wait <= 1.0 for wait in waits[5]
    )
    assert len(set(waits[0])) > 40


def test_a_breaker_opens_rests_tries_one_and_closes():
    now = [0.0]
    breaker = Breaker(failures=2, rest=10, clock=lambda: now[0])
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.allows()  # two, but not in a row
    breaker.failed()
    assert breaker.state == "open" and not breaker.allows() and breaker.left == 10
    now[0] = 10
    assert breaker.allows() and not breaker.allows()  # one at a time
    breaker.failed()
    assert not breaker.allows() and breaker.left == 10
    now[0] = 20
    assert breaker.allows()
    breaker.undecided()  # it ended without saying anything
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.allows()


def test_outputs_of_a_head_share_its_breaker():
    names = (
        "clip_token",
        "clip_patches",
        "backbone_global",
        "segmentation_logits",
        "depth",
        "_token",
    )
    assert [head_of(name) for name in names] == [
        "clip",
        "clip",
        "backbone",
        "segmentation",
        "depth",
        "_token",
    ]


# TLS


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """An authority, and certificates of a server and a client that it signed."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(
            ["openssl", *map(str, arguments)], cwd=folder, check=True, capture_output=True
        )

    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=test",
        "-days",
        "2",
    )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            "asked",
            "-subj",
            f"/CN={name}",
        )
        openssl(
            "x509",
            "-req",
            "-in",
            "asked",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "names",
            "-out",
            f"{name}.pem",
        )
    return folder


def test_tls_with_certificates_of_both_sides(server, papers, pixels):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers / "server.pem", papers / "server.key")
    context.load_verify_locations(papers / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    proxy = Proxy(0, server.grpc, context)
    url = f"127.0.0.1:{proxy.server_address[1]}"
    tls = Tls(papers / "ca.pem", papers / "client.pem", papers / "client.key")
    with FeatureClient(url, tls=tls) as client:
        assert client.features(pixels[0], "depth")["depth"].shape == (1, 16)

    async def ask():
        async with AsyncFeatureClient(url, tls=tls) as client:
            return await client.features(pixels[0], "depth")

    assert asyncio.run(ask())["depth"].shape == (1, 16)
    with (
        FeatureClient(url, tls=Tls()) as client,
        pytest.raises(NotAllowed, match="no TLS connection"),
    ):
        client.features(pixels[0])  # signed by nobody this machine knows
    proxy.close()


def test_tls_files_that_cannot_be_read_are_named(papers):
    with pytest.raises(NotAllowed, match="nowhere.pem"):
        FeatureClient(tls=Tls("nowhere.pem"))
    with pytest.raises(NotAllowed, match="both or none"):
        FeatureClient(tls=Tls(papers / "ca.pem", papers / "client.pem"))


# A server of its own, which is hurt


@pytest.fixture(scope="module")
def fragile(expensive, small_bundle, tmp_path_factory):
    """A server without a supervisor that no other test needs."""
    need_tritonserver()
    from serve.bundle import read_bundle
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder = tmp_path_factory.mktemp("fragile")
    # a model a graph, of which one may die alone
    settings = Settings(fused=False, parts="apart")
    make_repository(read_bundle(small_bundle), folder / "repository", settings)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=2)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, lambda line: None
    ) as found:
        yield found


def stub_of(server, model):
    """Process id of a model's backend."""
    (pid,) = [stub.pid for stub in find_stubs(server.process.pid) if stub.model == model]
    return pid


def revive(server, model):
    """Load a model whose backend died, as a supervisor does."""
    (server.repository / model / "1" / "model.py").touch()
    with grpc.InferenceServerClient(server.grpc) as triton:
        triton.load_model(model, headers={ADMIN: server.admin_key})


def test_requests_given_up_by_the_hundred_leave_the_server_alive(fragile, pixels):
    batch, given_up = np.repeat(pixels, 4, 0), []

    def ask(seed):
        for seconds in np.random.default_rng(seed).uniform(0.002, 0.03, 100):
            try:
                client.features(batch, timeout=float(seconds))
            except DeadlineExceeded as error:
                given_up.append(error)
            except Unavailable as error:
                assert "queue" in str(error)  # of requests that nobody waits for any more

    with FeatureClient(fragile.grpc, breaker=(10**6, 1)) as client:
        client.features(batch)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(4)))
        assert len(given_up) > 100 and all(
            "no answer in" in str(error) or "no time" in str(error) for error in given_up
        )
        # behind all that was given up, which the server works on to the end
        assert client.features(pixels, timeout=240)["depth"].shape == (1, 16)
    assert fragile.process.poll() is None


def test_a_dead_head_goes_missing_where_partial_answers_are_asked_for(fragile, pixels):
    os.kill(stub_of(fragile, "head_mae"), signal.SIGKILL)
    try:
        with FeatureClient(
            fragile.grpc, retry=Retry(most=1, first=0.01), breaker=(3, 1.5)
        ) as client:
            whole = client.describe().outputs
            with pytest.raises(Unavailable, match=r"head_mae.*2 attempts"):
                client.features(pixels)
            for reason in (
                "head_mae",
                "head_mae",
                "left alone",
            ):  # three failures in a row open the breaker
                began = time.monotonic()
                answer = client.features(pixels, partial=True)
                assert set(answer.missing) == {"mae_token", "mae_patches"}
                assert set(answer) == set(whole) - set(answer.missing)
                assert all(reason in str(error) for error in answer.missing.values())
            assert time.monotonic() - began < 0.5
            with pytest.raises(Unavailable, match="'mae' failed repeatedly"):
                client.features(pixels, ["mae_token", "cls_token"])
            with pytest.raises(Unavailable, match="'mae' failed repeatedly"):
                client.features(pixels, ["mae_token"], partial=True)  # nothing would be left
            assert list(client.features(pixels, ["cls_token"])) == ["cls_token"]
            revive(fragile, "head_mae")
            time.sleep(1.6)
            answer = client.features(pixels, partial=True)  # the one that is let through closes it
            assert not answer.missing and client.calls.breakers["mae"].state == "closed"
    finally:
        revive(fragile, "head_mae")


def test_a_head_that_hangs_goes_missing_and_the_others_are_answered(fragile, pixels):
    model = fragile.repository / "head_mae" / "1" / "model.py"
    code = model.read_text()
    # (a stopped process would not do: it may hold a lock, and Triton 2.51 aborts when it cannot get
    # it)
    slow = (
        "\n\n    def execute(self, requests):\n        __import__('time').sleep(4)\n        "
        "return super().execute(requests)\n"
    )
    model.write_text(code.rstrip() + slow)
    try:
        revive(fragile, "head_mae")

        async def ask():
            async with AsyncFeatureClient(fragile.grpc, timeout=3) as client:
                return await client.features(
                    pixels, ["mae_token", "cls_token", "backbone_global"], partial=True
                )

        with FeatureClient(fragile.grpc, timeout=3) as client:
            for answer in (client.features(pixels, partial=True), asyncio.run(ask())):
                assert {"cls_token", "backbone_global"} <= set(answer)
                assert (
                    set(answer.missing) <= {"mae_token", "mae_patches"}
                    and "mae_token" in answer.missing
                )
                assert all(isinstance(error, DeadlineExceeded) for error in answer.missing.values())
            assert (
                client.calls.breakers["mae"].in_a_row == 1
                and client.calls.breakers["cls"].in_a_row == 0
            )
    finally:
        model.write_text(code)
        revive(fragile, "head_mae")
    with FeatureClient(fragile.grpc) as client:
        assert not client.features(pixels, partial=True).missing


def test_a_backend_that_dies_and_is_brought_back_is_not_noticed(fragile, pixels):
    failures, answers, ended = [], [], threading.Event()

    def load():
        with FeatureClient(fragile.grpc) as client:
            while not ended.is_set():
                try:
                    answers.append(client.features(pixels, "cls_token")["cls_token"])
                except ClientError as error:
                    failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        os.kill(stub_of(fragile, "backbone"), signal.SIGKILL)
        time.sleep(1)
        revive(fragile, "backbone")
        time.sleep(3)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not failures and len(answers) > 10
    assert all(np.allclose(answer, answers[0], atol=1e-4) for answer in answers)


def test_a_server_that_stops_answers_what_it_took_and_refuses_the_rest_in_words(fragile, pixels):
    answers, errors = [], []

    def ask(number):
        with FeatureClient(fragile.grpc, retry=Retry(most=2, first=0.01)) as client:
            for _ in range(200):
                try:
                    answers.append(client.features(pixels, "depth")["depth"])
                except ClientError as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    fragile.drain()
    for thread in threads:
        thread.join()
    assert answers and all(isinstance(error, Unavailable) for error in errors), errors
