"""The golden pictures are asked of what serves, at every start and before anybody is let in."""

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from contract.golden import GOLDEN, measure, read_golden
from export.run import main as export
from serve.bundle import read_bundle
from serve.errors import ServerError
from serve.repository.build import make_repository
from serve.repository.contents import foreign_file
from serve.repository.golden import golden_of
from serve.repository.settings import Settings, choose_runtime
from serve.repository.state import read_state
from serve.run import say
from serve.server.golden import GoldenCheck, GoldenRefused, runtime_of
from serve.server.processor import describe, describe_processor
from serve.server.rest import Rest
from serve.status import main as status
from tests.conftest import need_tritonserver, run_here
from tests.serve.running import Run, few_models, lasting_port, processes, until

DEPTH = f"features/1/{GOLDEN}"


@pytest.fixture
def golden(small_bundle):
    return golden_of(read_bundle(small_bundle))


def only_fused(bundle: Path, folder: Path) -> Path:
    """A repository of the graph of all outputs, which starts within seconds."""
    settings = Settings(runtime=choose_runtime("auto", "cpu"), instances=1, threads=1)
    make_repository(read_bundle(bundle), folder, settings, durable=False)
    return few_models(folder, "fused", "decode")


def spoil(repository: Path, **changes: object) -> None:
    """Let the golden set expect another depth, so that what is served is wrong."""
    golden = read_golden(repository / DEPTH)
    outputs = golden.outputs | {"depth": 1.2 * golden.outputs["depth"]}
    (repository / DEPTH).write_bytes(replace(golden, outputs=outputs, **changes).to_bytes())


def front_door(run: Run) -> str:
    """ "" if gRPC's clients are answered, else why not."""
    try:
        with grpc.InferenceServerClient(run.grpc) as client:
            client.is_server_ready(client_timeout=2)
    except grpc.InferenceServerException as error:
        return str(error)
    return ""


class TestMeasuring:
    def test_the_largest_error_of_the_export_comes_along(self, golden, small_bundle):
        rows = read_bundle(small_bundle).manifest.parity
        assert golden.measured.keys() == {row.output for row in rows}
        assert golden.measured["depth"] == max(r.relative for r in rows if r.output == "depth")
        again = read_golden(Path("g"), golden.to_bytes())
        assert again.measured == golden.measured and again.bounds == golden.bounds

    def test_within_its_bounds_an_output_may_be_conspicuous(self, golden):
        depth = golden.outputs["depth"]
        golden = replace(golden, measured={"depth": 1e-3}, bounds=(0.9, 0.01))
        notes = {
            factor: [one.note for one in measure(golden, golden.outputs | {"depth": f * depth})]
            for factor, f in (("same", 1.001), ("worse", 1.005), ("near", 1.0095))
        }
        assert not any(notes["same"])
        (worse,) = filter(None, notes["worse"])
        assert "output 'depth' is off by 0.005" in worse and "5.0 times at export" in worse
        (near,) = filter(None, notes["near"])
        assert "9.5 times at export" in near
        golden = replace(golden, measured={})
        (near,) = filter(None, (o.note for o in measure(golden, {"depth": 1.0095 * depth})))
        assert "near its bound" in near

    def test_rounding_is_not_compared_with_that_at_export(self, golden):
        golden = replace(golden, measured={"depth": 1e-7}, bounds=(0.9, 0.01))
        answers = golden.outputs | {"depth": golden.outputs["depth"] * (1 + 1e-5)}
        assert not any(one.note or one.problem for one in measure(golden, answers))

    def test_a_pictures_name_steers_no_terminal(self, golden, capsys):
        names = tuple("a\x1b[2J\nready     after 1 s\u202e" for _ in golden.pictures)
        known = replace(golden, pictures=names, measured={}, bounds=(0.9, 0.01))
        read = read_golden(Path("g"), known.to_bytes())
        answers = golden.outputs | {"depth": 1.0095 * golden.outputs["depth"]}
        (note,) = filter(None, (one.note for one in measure(read, answers)))
        assert note.isprintable() and "a\\x1b[2J\\nready" in note
        say("a\x1b[2J\tb")
        assert capsys.readouterr().out.rstrip("\n").isprintable()


class TestRunningServer:
    def test_the_graphs_and_the_fused_one_are_asked(self, server):
        lines: list[str] = []
        before = counts(server)
        state = GoldenCheck(server.repository, "refuse", lines.append)(Rest(server.http))
        assert state.outcome == "passed" and state.version == 1 and not state.messages
        assert len(lines) == 1 and "3 pictures answered" in lines[0]
        assert "by features and fused" in lines[0] and state.runtime in lines[0]
        asked = {name for name, count in counts(server).items() if count == before[name] + 3}
        assert asked == {"features", "fused"}

    def test_what_is_wrong_is_named_with_what_computed_it(self, server, tmp_path):
        copy = shutil.copytree(server.repository, tmp_path / "repository")
        spoil(copy)
        assert not foreign_file(copy)
        with pytest.raises(GoldenRefused) as refused:
            GoldenCheck(copy, "refuse", print)(Rest(server.http))
        message = str(refused.value)
        assert message.count("output '") == 1 and "\n" not in message
        assert "features: output 'depth'" in message and "at most 0.01 is allowed" in message
        assert any(f" on {name}," in message for name in read_golden(copy / DEPTH).pictures)
        assert "onnxruntime 1." in message and describe_processor() in message
        for remedy in ("--runtime", "--precision fp32", "export on this machine", "--golden warn"):
            assert remedy in message
        lines: list[str] = []
        state = GoldenCheck(copy, "warn", lines.append)(Rest(server.http))
        assert state.outcome == "outside" and "served all the same" in lines[0]

    def test_a_model_that_refuses_the_pictures_is_refused(self, server, tmp_path):
        copy = shutil.copytree(server.repository, tmp_path / "repository")
        golden = read_golden(copy / DEPTH)
        small = replace(golden, image=golden.image[:, :32, :32])
        (copy / DEPTH).write_bytes(small.to_bytes())
        with pytest.raises(GoldenRefused, match="'features' does not answer"):
            GoldenCheck(copy, "refuse", print)(Rest(server.http))

    def test_a_busy_server_is_asked_again_and_is_not_called_wrong(self, server):
        lines: list[str] = []
        with refusing(server.http, 2) as address:
            state = GoldenCheck(server.repository, "refuse", lines.append)(Rest(address))
        assert state.outcome == "passed" and len(lines) == 1
        with (
            refusing(server.http, 10**6) as address,
            pytest.raises(
                ServerError, match=r"not answered within 1 s.*maximum queue.*--start-t"
            ) as e,
        ):
            GoldenCheck(server.repository, "refuse", lines.append, 1.0)(Rest(address))
        assert not isinstance(e.value, GoldenRefused) and len(lines) == 1

    def test_a_repository_without_one_says_so(self, server, tmp_path):
        copy = shutil.copytree(server.repository, tmp_path / "repository")
        (copy / DEPTH).unlink()
        lines: list[str] = []
        state = GoldenCheck(copy, "refuse", lines.append)(Rest(server.http))
        assert state.outcome == "missing" and "answers are unchecked" in lines[0]
        state = GoldenCheck(copy, "skip", lines.append)(Rest(server.http))
        assert state.outcome == "skipped" and "--golden skip" in lines[1]


@pytest.mark.parametrize("parts", ["together", "apart"])
def test_graphs_in_bf16_are_told_from_those_in_float32(small_bundle, tmp_path, parts):
    bundle = read_bundle(small_bundle)
    bundle.manifest = bundle.manifest.model_copy(update={"openvino_precision": "bf16"})
    settings = Settings(runtime="openvino", parts=parts, fused=False)
    make_repository(bundle, tmp_path / "repository", settings, durable=False)
    runtime = runtime_of(tmp_path / "repository", 1)
    assert runtime == "openvino-bf16"
    openvino = pytest.importorskip("openvino")
    has = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert describe(settings, "", runtime).startswith("openvino-bf16 2" if has else "openvino 2")
    assert describe(settings, "").startswith("openvino 2")


def test_instructions_for_bf16_are_named(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name : X\nflags : fpu avx512_bf16 amx_bf16\n")
    assert describe_processor(tmp_path / "cpuinfo").startswith("X, AVX-512-bf16, AMX-bf16")


def counts(server) -> dict[str, int]:
    rows = Rest(server.http).statistics()
    return {row["name"]: int(row["inference_stats"]["success"]["count"]) for row in rows}


@contextmanager
def refusing(address: str, count: int) -> Iterator[str]:
    """A server's address behind a queue that is full for so many inferences."""
    left = [count]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.pass_on(b"")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if left[0] > 0:
                left[0] -= 1
                self.answer(503, {}, b'{"error": "Exceeds maximum queue size"}')
            else:
                self.pass_on(body)

        def pass_on(self, body: bytes) -> None:
            host, port = address.split(":")
            connection = HTTPConnection(host, int(port))
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            self.answer(answer.status, dict(answer.headers), answer.read())
            connection.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
            thread.join()


@pytest.mark.slow
class TestStarts:
    def test_a_start_whose_answers_are_wrong_is_refused_before_the_door_opens(
        self, small_bundle, tmp_path
    ):
        need_tritonserver()
        repository = only_fused(small_bundle, tmp_path / "repository")
        spoil(repository)
        port = lasting_port()
        ports = ("--grpc-port", port, "--http-port", 0, "--metrics-port", 0)
        opened = []
        with Run("--repository", repository, ports=ports) as run:
            while run.process.poll() is None:
                with socket.socket() as client:
                    opened += [port] if client.connect_ex(("127.0.0.1", port)) == 0 else []
                run.reader.join(0.02)
            run.reader.join(10)
        assert run.process.returncode == 1 and not opened
        assert run.lines[-1].startswith("error: answers differ from those at export: fused: output")
        assert "ready     after" not in run.text and read_state(repository) is None
        assert not processes(repository)

    def test_each_tritonserver_is_asked_while_clients_wait(self, small_bundle, tmp_path, capsys):
        need_tritonserver()
        repository = only_fused(small_bundle, tmp_path / "repository")
        good = (repository / DEPTH).read_bytes()
        spoil(repository)
        with Run("--repository", repository, "--golden", "warn") as run:
            run.ready()
            assert run.text.index("served all the same: --golden warn") < run.text.index("ready  ")
            assert status(["--repository", str(repository)]) == 0
            shown = capsys.readouterr().out
            assert "golden pictures: OUTSIDE THEIR BOUNDS" in shown and "output 'depth'" in shown
            (repository / DEPTH).write_bytes(good)
            os.kill(read_state(repository).server_pid, signal.SIGKILL)
            run.wait_for("supervisor: tritonserver is back")
            state = read_state(repository)
            assert state.golden.outcome == "passed" and not front_door(run)
            assert status(["--repository", str(repository)]) == 0
            assert "answered within their bounds (" in capsys.readouterr().out

    def test_a_restart_whose_answers_are_wrong_ends_it(self, small_bundle, tmp_path):
        """Nobody is let in meanwhile, though the front listens."""
        need_tritonserver()
        repository = only_fused(small_bundle, tmp_path / "repository")
        with Run("--repository", repository) as run:
            run.ready()
            assert not front_door(run)
            spoil(repository)
            killed, seen = threading.Event(), []

            def knock() -> None:
                while run.process.poll() is None:
                    was_killed, answer = killed.is_set(), front_door(run)
                    seen.extend([answer] if was_killed else [])

            knocking = threading.Thread(target=knock)
            knocking.start()
            os.kill(read_state(repository).server_pid, signal.SIGKILL)
            killed.set()
            assert until(lambda: run.process.poll() is not None, 60)
            knocking.join()
        run.reader.join(10)
        assert run.process.returncode == 1
        assert run.lines[-1].startswith("error: answers differ from those at export: fused: output")
        # gRPC's own server cancels what comes while the front ends
        refused = ("UNAVAILABLE", "CANCELLED")
        assert seen and all(any(word in answer for word in refused) for answer in seen), set(seen)
        assert not processes(repository)


@pytest.mark.long
@pytest.mark.skipif(
    "VNNI" not in describe_processor(), reason="its int8 products saturate in any case"
)
def test_int8_on_a_processor_without_vnni_is_told_from_that_of_the_export(
    small_bundle, tmp_path, monkeypatch
):
    """OpenVINO is kept from the instructions; the bounds lie between both errors."""
    need_tritonserver()
    pytest.importorskip("openvino")
    done = run_here(
        small_bundle.parent / "run",
        *("--output", tmp_path / "int8", "--precision", "int8", "--max-batch", 4),
        *("--calibration", "packaged-photos", "--calibration-images", 8),
        command=export,
    )
    assert done.returncode == 0, done.stderr
    repository = only_fused(tmp_path / "int8", tmp_path / "repository")
    golden = read_golden(repository / DEPTH)
    # without the instructions the error is two to five times as large, as that at export happens
    # to be
    tight = replace(golden, bounds=(0.99, 1.5 * max(golden.measured.values())))
    (repository / DEPTH).write_bytes(tight.to_bytes())
    with Run("--repository", repository) as run:
        run.ready()
        assert read_state(repository).golden.outcome != "outside"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with Run("--repository", repository, "--golden", "warn") as run:
        run.ready()
        state = read_state(repository).golden
        assert state.outcome == "outside" and "MAX_CPU_ISA=AVX2" in state.runtime
    with Run("--repository", repository) as run:
        assert run.process.wait(90) == 1
    run.reader.join(10)
    assert run.lines[-1].startswith("error: answers differ from those at export: fused: output")
