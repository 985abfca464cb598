"""What docs/serving.md says to those who do not use serve.client works as it is printed; and a
client that reaches the wrong port is told so.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from serve.client import FeatureClient
from serve.client.__main__ import main
from serve.client.retry import Retry
from serve.client.unreachable import explain
from serve.errors import NotAllowed, Unavailable

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"


def printed(language: str, word: str) -> str:
    """The one code block of the guide in a language that has a word."""
    section = GUIDE.read_text(encoding="utf-8").split("\n## Without serve.client\n")[1]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with cat.jpg."""
    from PIL import Image

    result = tmp_path_factory.mktemp("requests")
    Image.fromarray(data.chelsea()).save(result / "cat.jpg")
    return result


def run(server, folder: Path, text: str, *command: str) -> str:
    """Run a block, with the addresses of a server in place of the usual; its output."""
    for usual, address in (("127.0.0.1:8000", server.http), ("127.0.0.1:8001", server.grpc)):
        text = text.replace(usual, address)
    done = subprocess.run(
        command, input=text, text=True, capture_output=True, cwd=folder, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} command")


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_curl_sends_a_file_and_gets_json(server, folder, shell):
    need("curl")
    need(shell)
    answer = json.loads(run(server, folder, printed("sh", "head="), shell))
    (output,) = answer["outputs"]
    assert output["name"] == "backbone_global"
    with FeatureClient(server.grpc) as client:
        expected = client.features(folder / "cat.jpg", "backbone_global")["backbone_global"]
    found = np.reshape(output["data"], output["shape"])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_curl_asks_what_there_is(server, folder):
    need("curl")
    text = run(server, folder, printed("sh", "health"), "sh")
    about, status = text[: text.rindex("}") + 1], text[text.rindex("}") + 1 :]
    assert json.loads(about)["name"] == "features_encoded" and status.strip() == "200"


def test_node_gets_numbers(server, folder):
    need("node")
    text = printed("js", "fetch")
    (folder / "request.mjs").write_text(
        text.replace("127.0.0.1:8000", server.http), encoding="utf-8"
    )
    said = run(server, folder, "", "node", "request.mjs")
    assert re.match(r"backbone_global \[ 1, 48 \] \[", said), said


def test_kserve_gets_arrays(server, folder):
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("kserve is not installed")
    assert "backbone_global (1, 48)" in run(
        server, folder, printed("python", "kserve"), sys.executable, "-"
    )


def test_perf_analyzer_measures(server, folder):
    need("perf_analyzer")
    if subprocess.run(["perf_analyzer", "--version"], capture_output=True).returncode:
        pytest.skip("this perf_analyzer does not run here")
    text = printed("sh", "perf_analyzer").replace("224,224", "64,64")
    assert "Throughput" in run(server, folder, text, "sh")


def test_the_http_and_metrics_ports_are_named(server, folder):
    for address in (server.http, server.metrics):
        with FeatureClient(address, timeout=20) as client:
            with pytest.raises(NotAllowed, match="answers HTTP/1.1, not gRPC.* 8001"):
                client.features(folder / "cat.jpg")


def test_a_command_that_reaches_the_http_port_says_so(server, folder, capsys):
    assert main([str(folder / "cat.jpg"), "--url", server.http]) == 2
    message = capsys.readouterr().err
    assert "this is an HTTP or metrics port" in message and message.count("\n") == 1


def test_a_proxy_that_answers_is_named(server, folder, monkeypatch):
    """Triton's HTTP port is one that does not know CONNECT."""
    for name in ("no_proxy", "no_grpc_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://me:secret@{server.http}")
    with FeatureClient(server.grpc, timeout=20) as client:
        with pytest.raises(NotAllowed, match=f"the proxy {server.http} .http_proxy in the") as info:
            client.features(folder / "cat.jpg")
    assert "no_proxy" in str(info.value) and "secret" not in str(info.value)


def test_a_proxy_that_is_away_is_named(folder, monkeypatch):
    for name in ("no_proxy", "no_grpc_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with FeatureClient("127.0.0.1:8001", retry=Retry(most=0)) as client:
        with pytest.raises(Unavailable, match="no answer from the proxy 127.0.0.1:9 .http_proxy"):
            client.features(folder / "cat.jpg")


def test_tls_to_a_server_without(server, folder):
    from serve.client.tls import Tls

    with FeatureClient(server.grpc, tls=Tls()) as client:
        with pytest.raises(NotAllowed, match="leave out TLS"):
            client.features(folder / "cat.jpg")


@pytest.mark.parametrize(
    ("message", "environment", "expected"),
    [
        ("failed to connect to all addresses; last error: ipv4:10.0.0.7:8001: refused", {}, ""),
        # the server is not behind the proxy that is there
        (
            "failed to connect; ipv4:10.0.0.7:8001: refused",
            {"http_proxy": "http://proxy:3128"},
            "",
        ),
        (
            "failed to connect; ipv4:1.2.3.4:3128: refused",
            {"http_proxy": "http://proxy:3128"},
            "proxy",
        ),
        ("failed to connect", {"http_proxy": "http://proxy:many"}, ""),
        ("failed to connect", {"http_proxy": "proxy:3128"}, ""),
        ("Trying to connect an http1.x server (HTTP status 400)", {}, "8001"),
    ],
)
def test_what_grpc_says_is_explained(message, environment, expected):
    reason, _ = explain(message, environment)
    assert expected in reason and bool(expected) == bool(reason)
