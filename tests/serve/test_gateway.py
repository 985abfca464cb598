"""`python -m serve.gateway` in front of a real server: OpenAI's own client and curl, what is
refused and in which words, and bad days.
"""

import asyncio
import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from contract.images import Limits
from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.errors import BadRequest, NotFinite
from tests.serve.running import until

pytest.importorskip("prometheus_client", reason="the optional extra [gateway] is not installed")
openai = pytest.importorskip("openai")

from serve.gateway.__main__ import main  # noqa: E402
from serve.gateway.app import _rows  # noqa: E402
from serve.gateway.errors import ApiError  # noqa: E402
from serve.gateway.keys import read_keys  # noqa: E402
from serve.gateway.offer import Embedding, Offer  # noqa: E402
from serve.gateway.requests import RequestLimits, read_request  # noqa: E402

KEY = "0123456789abcdef0123456789abcdef"


def encoded(number: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    PackagedPhotos().load(number).convert("RGB").resize((120, 90)).save(buffer, kind)
    return buffer.getvalue()


def uri(data: bytes, media: str = "image/jpeg") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


class Relay:
    """A way to the server that can be cut and held up; the server is shared with other tests."""

    def __init__(self, target: str) -> None:
        host, port = target.split(":")
        self.target, self.held, self.open = (host, int(port)), threading.Event(), True
        self.sockets: list[socket.socket] = []
        self.held.set()
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near, _ = self.door.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(self.target)
            self.sockets += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.held.wait()
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            each.close()

    def cut(self) -> None:
        self.open = False
        for each in self.sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.sockets.clear()


class Started:
    """The command as a process; `url` is what it printed, `log` what it has written so far."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.path = folder / "log"
        command = [sys.executable, "-m", "serve.gateway", "--port", "0", *map(str, arguments)]
        with open(self.path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        found = re.compile(r"^gateway +(\S+)/v1\n.*^stop", re.M | re.S)
        assert until(lambda: found.search(self.log) or self.process.poll() is not None, 60)
        self.url = found.search(self.log)[1]
        assert until(lambda: self.get("/health/ready").status_code == 200, 30), self.log

    @property
    def log(self) -> str:
        return self.path.read_text()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, body: object, key: str = KEY, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"authorization": f"Bearer {key}", "content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        url = f"{self.url}/v1/embeddings"
        return httpx.post(url, content=content, headers=given, timeout=60)

    def embed(self, *inputs: object, model: str = "backbone_global") -> httpx.Response:
        return self.post({"model": model, "input": list(inputs)})

    def raw(self, data: bytes) -> socket.socket:
        result = socket.create_connection(self.address, 30)
        result.sendall(data)
        return result

    def head(self, length: int) -> bytes:
        return (
            "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
        ).encode()


@pytest.fixture(scope="module")
def relay(server):
    result = Relay(server.grpc)
    yield result
    result.held.set()
    result.door.close()
    result.cut()


@pytest.fixture(scope="module")
def gateway(relay, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "keys").write_text(f"# team a\n{KEY}\n\n{KEY[::-1]}\n")
    bounds = ("--max-requests", 4, "--body-timeout", 1, "--max-body", 2**20, "--max-pictures", 6)
    result = Started(
        folder, "--url", relay.address, "--api-key-file", folder / "keys", "--retries", 0, *bounds
    )
    yield result
    relay.held.set()
    result.process.terminate()
    result.process.wait(60)


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


def test_openais_client_gets_the_vectors_of_serve_client_bit_for_bit(gateway, server):
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0)
    models = {model.id: model for model in client.models.list()}
    assert {"backbone_global", "mae_token"} <= set(models)
    assert not any(name.endswith(("_patches", "_logits")) or name == "depth" for name in models)
    files = [encoded(number) for number in range(5)]  # more than a batch of the model
    with FeatureClient(server.grpc) as ours:
        for name in ("backbone_global", "mae_token"):
            for given in (files[:1], files):
                expected = ours.features(given, [name], encoded=True)[name]
                for form in ("float", "base64"):
                    asked = {"model": name, "input": [uri(file) for file in given]}
                    found = client.embeddings.create(**asked, encoding_format=form, user="me")
                    assert [row.index for row in found.data] == list(range(len(given)))
                    rows = [
                        np.frombuffer(base64.b64decode(row.embedding), "<f4")
                        if isinstance(row.embedding, str)
                        else np.float32(row.embedding)
                        for row in found.data
                    ]
                    if len(given) == 1:  # alone in its batch, it is computed the same
                        assert np.array_equal(rows, expected)
                    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
                    assert expected.shape[1] == models[name].dimensions
            pixels = ours.features(files[:1], [name])[name]
            found = client.embeddings.create(
                model=name, input=uri(files[0]), dimensions=len(rows[0])
            )
            assert np.array_equal(np.float32(found.data[0].embedding), pixels[0])
    client.close()


def test_models_say_which_student_they_are_of(gateway):
    headers = {"authorization": f"Bearer {KEY}"}
    found = gateway.get("/v1/models/mae_token", headers=headers).json()
    assert found["student"] == "vit_tiny_patch16_224" and found["bundle"]
    assert found["teacher"]["label"] == "mae" and found["modalities"] == ["image"]
    assert found["view"] == "squash"
    assert gateway.get("/v1/models/nope", headers=headers).status_code == 404


def test_curl_and_every_form_of_a_picture(gateway, tmp_path):
    data = encoded()
    part = {"type": "image_url", "image_url": {"url": uri(data)}}
    forms = [{"input": one} for one in (uri(data), [part], [{"image": uri(data)}])]
    forms += [{"messages": [{"role": "user", "content": [part]}]}]
    broken = base64.encodebytes(data).decode()
    forms += [{"input": f"data:image/jpg;base64,{broken}"}]
    found = [gateway.post({"model": "backbone_global"} | form) for form in forms]
    assert [response.status_code for response in found] == [200] * len(forms)
    assert len({response.text for response in found}) == 1
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "backbone_global"} | forms[0]))
    words = ["curl", "-sS", f"{gateway.url}/v1/embeddings", "--data-binary", f"@{body}"]
    words += ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == found[0].text, done.stderr


BOMB = io.BytesIO()
Image.new("1", (10_000, 6_000)).save(BOMB, "PNG")
SMALL = uri(encoded())


@pytest.mark.parametrize(
    ("given", "status", "code", "param"),
    [
        ("https://example.com/cat.jpg", 400, "url_not_supported", "input[0]"),
        ([SMALL, "file:///etc/passwd"], 400, "url_not_supported", "input[1]"),
        ([{"type": "image_url", "image_url": {"url": "s3://a/b"}}], 400, "url_not_supported", None),
        ([uri(BOMB.getvalue(), "image/png")], 413, "image_too_large", "input[0]"),
        ([uri(b"x" * 70_000)], 413, "image_too_large", "input[0]"),
        ([SMALL, uri(b"not a picture")], 400, "invalid_image", "input[1]"),
        ([uri(b"")], 400, "invalid_image", "input[0]"),
        ([uri(b"GIF89a", "image/gif")], 415, "unsupported_media_type", "input[0]"),
        (["data:image/jpeg;base64,****"], 400, "invalid_data_uri", "input[0]"),
        (["data:image/jpeg,plain"], 400, "invalid_data_uri", "input[0]"),
        ([SMALL] * 4, 413, "too_many_inputs", "input"),
        ([], 400, "empty_input", "input"),
        (None, 400, "missing", "input"),
        ([1, 2, 3], 400, "invalid_input", "input"),
        ([[1, 2]], 400, "invalid_input", "input[0]"),
        ([{"type": "audio"}], 400, "invalid_input", "input[0]"),
        ([" "], 400, "invalid_input", "input[0]"),
        ([SMALL, f'"{SMALL}"'], 400, "invalid_data_uri", "input[1]"),
        ([f"a picture: {SMALL.upper()}"], 400, "invalid_data_uri", "input[0]"),
        ([SMALL.partition(",")[2]], 400, "invalid_data_uri", "input[0]"),
        (["\ufeff http://a/b.jpg"], 400, "url_not_supported", "input[0]"),
        (["\ud800"], 400, "invalid_text", "input[0]"),
    ],
)
def test_an_input_that_is_refused_is_named(given, status, code, param):
    limits = RequestLimits(Limits(max_bytes=60_000), inputs=3)
    with pytest.raises(ApiError) as found:
        read_request(json.dumps({"model": "m", "input": given}).encode(), limits)
    error = found.value
    assert (error.status, error.code) == (status, code) and param in (None, error.param)
    assert error.param is None or error.param == "input" or error.message.startswith(error.param)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"\xff", "invalid_json"),
        (b'{"model": "a", "model": "b"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"input": "x"}', "missing_model"),
        (b'{"model": "a", "input": "x", "dimension": 2}', "unknown_field"),
        (b'{"model": "a", "input": "x", "dimensions": "2"}', "invalid_value"),
        (b'{"model": "a", "input": "x", "encoding_format": "hex"}', "invalid_value"),
        (b'{"model": "a", "input": "x", "messages": []}', "invalid_value"),
        (b'{"model": "a", "messages": [{"content": []}]}', "invalid_value"),
    ],
)
def test_a_body_that_is_refused(body, code):
    with pytest.raises(ApiError) as found:
        read_request(body, RequestLimits())
    assert (found.value.status, found.value.code) == (400, code)


@pytest.mark.parametrize("blanks", [" ", "\n", "\u00a0", "\ufeff", " \u200b "])
def test_a_picture_between_blanks_is_no_text(blanks):
    given = [f"{blanks}{SMALL}{blanks}", {"image": f"{blanks}{SMALL}"}, "a cat"]
    asked = read_request(json.dumps({"model": "m", "input": given}).encode(), RequestLimits())
    assert asked.inputs.pictures == {0: encoded(), 1: encoded()}
    assert asked.inputs.texts == {2: "a cat"}


def test_names_of_megabytes_are_refused_and_not_compared(monkeypatch):
    def compare(name: str, *known: object, **options: object) -> list[str]:
        assert len(name) <= 100
        return []

    monkeypatch.setattr("difflib.get_close_matches", compare)
    offer, long = Offer({"mae_token": Embedding("mae_token", 3, False)}), "abcdefgh" * 2**17
    bodies = [b'{"%s": 1}' % long.encode(), b'{"model": "a", "%s": 1}' % long.encode()]
    asked = [lambda body=body: read_request(body, RequestLimits()) for body in bodies]
    for ask in (*asked, lambda: offer.choose(long), lambda: offer.choose("mae_tokn")):
        with pytest.raises(ApiError) as found:
            ask()
        error = found.value
        assert error.status in (400, 404) and len(error.message) < 300
        assert len(error.param) < 100


def test_all_wrong_inputs_are_named_at_once():
    body = json.dumps({"model": "m", "input": ["http://a", SMALL, uri(b"?")]}).encode()
    with pytest.raises(ApiError) as found:
        read_request(body, RequestLimits())
    assert re.fullmatch(r"input\[0\]: .*also wrong: input\[2\]\)", found.value.message)


def test_a_bad_picture_is_named_and_requests_beside_it_are_unharmed(gateway):
    """Half a JPEG has a sound header, so only the server's decoder finds it."""
    good, half = uri(encoded(1)), uri(encoded(2)[:1500])
    alone = gateway.embed(good).json()["data"][0]["embedding"]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            asked = [(good,), (good, half, good), (good,), (half,)]
            found = list(threads.map(lambda inputs: gateway.embed(*inputs), asked))
            assert [response.status_code for response in found] == [200, 400, 200, 400]
            for response in found[::2]:
                vector = response.json()["data"][0]["embedding"]
                np.testing.assert_allclose(vector, alone, rtol=1e-4, atol=1e-5)
            for response, place in zip(found[1::2], (1, 0), strict=True):
                error = error_of(response)
                assert (error["code"], error["param"]) == ("invalid_image", f"input[{place}]")
                assert "damaged" in error["message"]


def test_a_picture_whose_answer_is_not_finite_is_named():
    async def ask(given: list[str]) -> np.ndarray:
        if given == ["damaged"]:
            raise BadRequest("picture 0: it is damaged")
        if "bad" in given or len(given) > 2:
            raise NotFinite("output 'a' holds NaN or infinity")
        return np.ones((len(given), 2))

    assert set(asyncio.run(_rows({0: "a", 2: "b", 3: "c"}, ask))) == {0, 2, 3}
    with pytest.raises(ApiError) as found:
        asyncio.run(_rows({0: "a", 2: "bad", 3: "c"}, ask))
    assert (found.value.status, found.value.code) == (422, "not_finite")
    assert found.value.param == "input[2]" and found.value.message.startswith("input[2]: ")
    with pytest.raises(ApiError) as found:
        asyncio.run(_rows({0: "a", 2: "b", 3: "damaged"}, ask))
    assert (found.value.code, found.value.param) == ("invalid_image", "input[3]")


def test_requests_that_are_refused_before_their_body_is_read(gateway):
    body = {"model": "backbone_global", "input": SMALL}
    for key in ("x", KEY[:-1] + "0", KEY[::-1] + "x"):
        response = gateway.post(body, key)
        assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert gateway.post(body, KEY[::-1]).status_code == 200
    assert gateway.post(b"x" * 2**21).status_code == 413
    assert gateway.post(body, content_type="text/plain").status_code == 415
    assert gateway.post(body, content_encoding="gzip").status_code == 415
    for model, reason in (("backbone_globl", "did you mean"), ("mae_patches", "not one vector")):
        response = gateway.embed(SMALL, model=model)
        assert response.status_code == 404 and reason in error_of(response)["message"]
    response = gateway.embed("a cat")
    assert response.status_code == 400 and error_of(response)["code"] == "text_not_supported"
    response = gateway.post(body | {"dimensions": 3})
    assert response.status_code == 400 and error_of(response)["param"] == "dimensions"
    assert error_of(gateway.get("/nope"))["code"] == "not_found"
    wrong = gateway.get("/v1/embeddings", headers={"authorization": f"Bearer {KEY}"})
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_slow_clients_and_those_that_leave(gateway):
    body = json.dumps({"model": "backbone_global", "input": SMALL}).encode()
    with gateway.raw(gateway.head(len(body)) + body[:100]) as slow:
        answer = slow.makefile("rb").read().decode()
        assert "408 Request Timeout" in answer and "body_timeout" in answer
    with gateway.raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000) as large:
        with pytest.raises(ConnectionError):  # reset, or closed and then written to
            large.sendall(b"a" * 100_000)
            large.recv(10)
            large.sendall(b"a" * 100_000)
            raise ConnectionError
    gateway.raw(gateway.head(len(body)) + body[:100]).close()
    assert until(lambda: "code=client_gone" in gateway.log, 10)
    assert gateway.embed(SMALL).status_code == 200


def test_more_than_the_bound_is_refused_at_once_and_left_work_is_forgotten(gateway, relay):
    relay.held.clear()
    body = json.dumps({"model": "backbone_global", "input": SMALL}).encode()
    waiting = [gateway.raw(gateway.head(len(body)) + body) for _ in range(4)]
    in_hand = "gateway_requests_in_hand 4.0"
    assert until(lambda: in_hand in gateway.get("/metrics").text, 10)
    response = gateway.embed(SMALL)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert error_of(response)["type"] == "rate_limit_error"
    for each in waiting[:2]:
        each.close()
    assert until(lambda: "gateway_requests_in_hand 2.0" in gateway.get("/metrics").text, 10)
    relay.held.set()
    for each in waiting[2:]:
        assert each.recv(100).startswith(b"HTTP/1.1 200 OK")
        each.close()


def test_a_server_that_goes_away_and_comes_back(gateway, relay):
    relay.cut()
    response = gateway.embed(SMALL)
    assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
    error = error_of(response)
    assert error["code"] == "server_unavailable" and "127.0.0.1" not in error["message"]
    assert until(lambda: gateway.get("/health/ready").status_code == 503, 10)
    assert gateway.get("/health/live").status_code == 200
    assert gateway.embed(SMALL).status_code == 503
    relay.open = True
    assert until(lambda: gateway.get("/health/ready").status_code == 200, 20)
    assert gateway.embed(SMALL).status_code == 200
    assert "server lost: " in gateway.log and "server ready: " in gateway.log


def test_metrics_are_openmetrics_and_the_log_has_neither_keys_nor_pictures(gateway):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    gateway.post({"model": "backbone_global", "input": SMALL}, x_request_id="mine-1")
    gateway.embed("http://a/b")
    page = gateway.get("/metrics")
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    assert {"gateway_requests", "gateway_request_seconds", "gateway_inputs"} <= set(families)
    codes = {sample.labels["code"] for sample in families["gateway_errors"].samples}
    assert "url_not_supported" in codes
    routes = {sample.labels["route"] for sample in families["gateway_requests"].samples}
    assert routes <= {"/v1/embeddings", "/v1/models/{name}", "/v1/models", "/metrics", "other"} | {
        "/health/live",
        "/health/ready",
    }
    plain = gateway.get("/metrics", headers={"accept": "text/plain"})
    assert plain.headers["content-type"].startswith("text/plain")
    assert until(lambda: "id=mine-1" in gateway.log, 5)
    line = next(line for line in gateway.log.splitlines() if "id=mine-1" in line)
    assert re.search(
        r"POST /v1/embeddings 200 [\d.]+ms model=backbone_global inputs=1 .* key=1", line
    )
    assert KEY not in gateway.log and SMALL[30:60] not in gateway.log


def test_sigterm_lets_requests_under_way_end(server, tmp_path):
    relay = Relay(server.grpc)
    gateway = Started(tmp_path, "--url", relay.address)
    assert gateway.embed(SMALL).status_code == 200
    relay.held.clear()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(gateway.embed, SMALL)
        assert until(lambda: "in_hand 1.0" in gateway.get("/metrics").text, 10)
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            gateway.get("/health/live")
        relay.held.set()
        assert waiting.result(30).status_code == 200
    assert gateway.process.wait(30) == 0
    assert "Traceback" not in gateway.log
    relay.door.close()


def failed(capsys, *arguments: object) -> str:
    """The one line of a command that ends with status 2."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_a_command_line_that_is_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("# nothing yet\n")
    (tmp_path / "short").write_text("secret\n")
    keys = ("--api-key-file",)
    assert "holds no key" in failed(capsys, *keys, tmp_path / "empty")
    assert "is missing" in failed(capsys, *keys, tmp_path / "none")
    said = failed(capsys, *keys, tmp_path / "short")
    assert "line 1: a key is 16 to 512" in said and "secret" not in said
    monkeypatch.setenv("GATEWAY_API_KEYS", " ")
    assert "GATEWAY_API_KEYS is set and holds no key" in failed(capsys)
    monkeypatch.delenv("GATEWAY_API_KEYS")
    assert "there is no API key" in failed(capsys, "--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = failed(capsys, "--port", taken.getsockname()[1])
    assert "is in use: choose another with --port" in said
    for url in ("http://127.0.0.1:8001", ""):
        assert "url=" in failed(capsys, "--port", 0, "--url", url)
    assert "--timeout 0: give seconds" in failed(capsys, "--timeout", 0)
    assert "--max-requests" in failed(capsys, "--max-requests", 0)
    assert "go together" in failed(capsys, "--https-key", "k.pem")
    pair = ("--https-certificate", tmp_path / "empty", "--https-key", tmp_path / "short")
    assert "are not a certificate and its key" in failed(capsys, *pair)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vfm-distill[gateway]'" in failed(capsys)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    keys = read_keys(tmp_path / "keys", {"GATEWAY_API_KEYS": f"{KEY[::-1]}, {'x' * 16}"})
    assert keys.number(f"Bearer {KEY}") == 1 and keys.number(f"bearer {'x' * 16}") == 3
    for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer"):
        assert keys.number(header) is None
    assert not read_keys(None, {})


def test_another_port_of_the_server_is_refused(server, capsys):
    said = failed(capsys, "--port", 0, "--url", server.http)
    assert "refuses this client" in said and "HTTP" in said
