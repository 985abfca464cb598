"""`python -m serve.status` against the real server."""

import json

import numpy as np
import pytest
import tritonclient.grpc as grpc

from serve.status import COLUMNS, latency, main
from tests.serve.running import until


def rows_of(server, capsys, *options):
    status = main(["--url", server.http, "--metrics", server.metrics, "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert status == 0 and found["ready"]
    return {row["model"]: row for row in found["models"]}


def ask(server, count, batch):
    """Requests for one output."""
    image = grpc.InferInput("image", [batch, 64, 64, 3], "UINT8")
    image.set_data_from_numpy(np.zeros((batch, 64, 64, 3), np.uint8))
    with grpc.InferenceServerClient(server.grpc) as client:
        for _ in range(count):
            client.infer(
                "features", [image], outputs=[grpc.InferRequestedOutput("backbone_global")]
            )


def test_requests_are_counted_where_they_ran(server, capsys):
    before = rows_of(server, capsys)
    ask(server, 4, 2)
    # Triton counts after it has answered
    assert until(
        lambda: (
            rows_of(server, capsys)["features"]["requests"] == before["features"]["requests"] + 4
        ),
        10,
    )
    after = rows_of(server, capsys)
    features = after["features"]
    assert features["executions"] == before["features"]["executions"] + 4
    assert after["fused"] == before["fused"]
    assert (
        features["state"] == "READY" and features["instances"] == 1 and 1 <= features["batch"] <= 4
    )
    assert features["compute"]["milliseconds"] > 0 and features["compute"]["is"] == "median"
    # of its graphs only executions are known
    graphs = {name: row for name, row in after.items() if name.startswith("features/")}
    assert {"features/backbone", "features/interaction", "features/head_cls"} <= set(graphs)
    assert all(row["state"] == "READY" and row["requests"] is None for row in graphs.values())

    def ran() -> dict[str, int]:
        now = {name: row["executions"] for name, row in rows_of(server, capsys).items()}
        counts = {name: now[name] - before[name]["executions"] for name in graphs}
        return {name: count for name, count in counts.items() if count}

    assert until(lambda: ran() == {"features/backbone": 4}, 10), "told a moment later"


def test_failures_are_counted_at_the_door_of_an_ensemble(apart_server, capsys):
    """Triton takes a python model's refusal for a success."""
    server = apart_server
    before = rows_of(server, capsys)
    encoded = grpc.InferInput("encoded", [1, 1], "BYTES")
    encoded.set_data_from_numpy(np.array([[b"no picture"]], dtype=np.object_))
    with (
        grpc.InferenceServerClient(server.grpc) as client,
        pytest.raises(grpc.InferenceServerException),
    ):
        client.infer(
            "features_encoded", [encoded], outputs=[grpc.InferRequestedOutput("backbone_global")]
        )
    failed = before["features_encoded"]["failed"]
    assert until(lambda: rows_of(server, capsys)["features_encoded"]["failed"] > failed, 10)


def test_the_table_has_a_row_a_model(server, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["--repository", str(server.repository)]) == 0
    head, *rows, view = capsys.readouterr().out.splitlines()
    assert view == "view of features version 1: squash"
    assert tuple(head.split()) == COLUMNS
    models = {path.parent.name for path in server.repository.glob("*/config.pbtxt")}
    assert {row.split()[0].partition("/")[0] for row in rows} == models
    rows = [row for row in rows if "/" not in row.split()[0]]
    assert all(row.split()[-1] == "0" for row in rows), "restarts are known from the repository"
    assert main(["--url", server.http, "--metrics", server.metrics]) == 0
    assert all(row.split()[-1] == "-" for row in capsys.readouterr().out.splitlines()[1:-1]), (
        "and not without it"
    )


def test_without_the_metrics_the_means_are_shown(server, capsys):
    ask(server, 1, 1)
    assert main(["--url", server.http, "--metrics", "127.0.0.1:1", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows["features"]["compute"]["is"] == "mean"


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--url", "127.0.0.1:1"], 1, "no Triton answers over HTTP at 127.0.0.1:1"),
        (["--url", "somewhere"], 2, "--url somewhere: write HOST:PORT"),
        (["--repository", "/nowhere"], 2, "--repository /nowhere: no server runs on it"),
        (["--repository", "/nowhere", "--url", "127.0.0.1:1"], 2, "leave out --url and --metrics"),
    ],
)
def test_a_mistake_is_one_line(capsys, options, status, said):
    assert main(options) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_grpc_port_is_told_from_http(server, capsys):
    assert main(["--url", server.grpc]) == 1
    assert "no Triton answers over HTTP" in capsys.readouterr().err


def test_medians_that_triton_forgot_are_means():
    duration = {"count": "4", "ns": "8000000"}
    assert (
        latency(duration, float("nan"))
        == latency(duration, None)
        == {"milliseconds": 2.0, "is": "mean"}
    )
    assert latency(duration, 1500.0) == {"milliseconds": 1.5, "is": "median"}
    assert latency({}, None) is None
