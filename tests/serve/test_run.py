"""`python -m serve.run`: it starts, says where it is, keeps strangers out, answers what it
accepted, and leaves nothing.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tritonclient.grpc as grpc

from contract.manifest import BundledEngine
from serve.bundle import read_bundle
from serve.errors import ServerError
from serve.repository.build import make_repository
from serve.repository.settings import Settings
from serve.repository.state import STATE, State, read_state
from serve.repository.versions import Repository
from serve.run import main
from serve.server import checks
from serve.server.process import Options, Server
from serve.server.rest import Refused, Rest
from serve.server.triton import find_tritonserver
from tests.conftest import need_tritonserver
from tests.serve.running import ANY_PORTS, Load, Run, ask, processes, small_repository, until

SIZE = 64
NOT_TAKEN = "Server is stopping"
"""What a server says of a request that reached it after it was told to stop."""


@pytest.fixture(autouse=True, scope="module")
def tritonserver() -> None:
    need_tritonserver()


@pytest.fixture(scope="module")
def made(small_bundle, tmp_path_factory) -> Path:
    """A repository as serve.repository makes it, for tests to copy."""
    folder = tmp_path_factory.mktemp("made") / "repository"
    make_repository(read_bundle(small_bundle), folder, Settings(fused=False))
    return folder


@pytest.fixture
def repository(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "repository")


@pytest.fixture(scope="module")
def kept(expensive, small_bundle, tmp_path_factory):
    """A running serve.run on the bundle with a kept repository, and that repository."""
    folder = tmp_path_factory.mktemp("kept") / "repository"
    with Run(small_bundle, "--repository", folder, "--no-fused", "--instances", 1) as run:
        yield run.ready(), folder


class TestRunning:
    def test_what_it_prints_answers(self, kept):
        run, repository = kept
        with grpc.InferenceServerClient(run.grpc) as client:
            assert ask(client, SIZE) == ""
        assert Rest(run.http).ready()
        assert b"nv_inference_request_success" in Rest(run.metrics).call("GET", "/metrics")
        assert b"nv_inference_queue_summary_us" in Rest(run.metrics).call("GET", "/metrics")
        command = run.wait_for(r"^  (python -m serve\.status .*)$")[1].split()
        done = subprocess.run(
            [sys.executable, *command[1:]], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "features" in done.stdout

    def test_the_request_to_copy_names_a_picture_and_the_server(self, kept):
        run, _ = kept
        command = run.wait_for(r"^  python -m serve\.client (\S+) --url (\S+)$")
        assert Path(command[1]).is_file() and command[2] == run.grpc

    def test_its_log_has_nothing_of_gpus_that_are_not_there_and_no_key(self, kept):
        run, repository = kept
        assert "successfully loaded 'features'" in run.text
        for word in (
            "CUDA",
            "pinned system memory",
            "pool disabled",
            "unable to create stream",
            read_state(repository).admin_key,
        ):
            assert word not in run.text

    def test_it_listens_on_this_machine_only(self, kept):
        run, repository = kept
        listening = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        for address in (run.grpc, run.http, run.metrics):
            port = f"{int(address.split(':')[1]):04X}"
            hosts = {
                words[1][:-5]
                for words in listening
                if words[1].endswith(f":{port}") and words[3] == "0A"
            }
            assert hosts and hosts <= {"0100007F", "0000000000000000FFFF00000100007F"}

    def test_the_key_is_for_the_owner_alone(self, kept):
        _, repository = kept
        assert (repository / STATE).stat().st_mode & 0o777 == 0o600

    def test_admin_endpoints_are_closed_over_http_without_the_key(self, kept):
        run, repository = kept
        state = read_state(repository)
        calls = [
            ("POST", "/v2/repository/index", b"{}"),
            ("POST", "/v2/repository/models/backbone/unload", b"{}"),
            ("POST", "/v2/repository/models/backbone/load", b"{}"),
            ("GET", "/v2/systemsharedmemory/status", None),
            ("GET", "/v2/cudasharedmemory/status", None),
            ("GET", "/v2/trace/setting", None),
            ("GET", "/v2/logging", None),
        ]
        for rest in (Rest(run.http), Rest(run.http, "guess")):
            for method, path, body in calls:
                with pytest.raises(Refused) as refused:
                    rest.call(method, path, body)
                assert refused.value.status == 403, path
        assert {entry["name"] for entry in Rest(run.http, state.admin_key).index()} >= {
            "decode",
            "features",
        }
        assert Rest(run.http).statistics()

    def test_admin_endpoints_are_closed_over_grpc_without_the_key(self, kept):
        run, repository = kept
        key = {"triton-grpc-protocol-admin-key": read_state(repository).admin_key}
        with grpc.InferenceServerClient(run.grpc) as client:
            calls = (
                client.get_model_repository_index,
                lambda **h: client.load_model("decode", **h),
                lambda **h: client.unload_model("decode", **h),
                client.get_system_shared_memory_status,
                client.get_trace_settings,
                client.get_log_settings,
            )
            for call in calls:
                with pytest.raises(grpc.InferenceServerException, match="restricted"):
                    call()
            assert client.get_model_repository_index(headers=key).models
            assert client.get_system_shared_memory_status(headers=key) is not None
            assert client.get_inference_statistics().model_stats

    def test_a_second_start_on_the_same_repository_is_refused(self, kept, small_bundle, capsys):
        run, repository = kept
        assert main([str(small_bundle), "--repository", str(repository)]) == 2
        assert f"is in use by process {run.process.pid}" in capsys.readouterr().err

    def test_a_port_in_use_is_named_before_anything_is_made(
        self, kept, small_bundle, tmp_path, capsys
    ):
        port = kept[0].grpc.split(":")[1]
        folder = tmp_path / "never"
        assert main([str(small_bundle), "--grpc-port", port, "--repository", str(folder)]) == 2
        said = capsys.readouterr().err
        assert (
            said == f"error: port {port} is in use: choose another with --grpc-port, or stop the "
            "process that listens there\n"
        )
        assert not folder.exists()


@pytest.mark.slow
class TestEnding:
    def test_sigterm_under_load_answers_what_was_accepted_and_leaves_nothing(
        self, small_bundle, tmp_path
    ):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        with Run(
            small_bundle, "--no-fused", "--instances", 2, "--threads", 1, temporary=temporary
        ) as run:
            run.ready()
            (workspace,) = temporary.iterdir()
            assert processes(workspace)
            with Load(run.grpc, SIZE) as load:
                assert until(lambda: len(load.answers) > 40, 30)
                told = time.monotonic()
                assert run.end(signal.SIGTERM) == 0
            before = [(ended, error) for sent, ended, error in load.answers if sent < told]
            assert not [error for _, error in before if error and NOT_TAKEN not in error]
            assert [ended for ended, error in before if ended > told and not error], (
                "none was under way"
            )
        assert run.lines[-1] == "stopped: every request that was accepted has been answered"
        assert not processes(workspace)
        assert not list(temporary.iterdir())

    def test_sigint_is_as_good(self, repository):
        with Run("--repository", repository) as run:
            run.ready()
            assert run.end(signal.SIGINT) == 0
        assert not (repository / STATE).exists() and not processes(repository)

    def test_a_signal_while_it_starts_ends_it_in_order(self, repository):
        with Run("--repository", repository) as run:
            run.wait_for("loading: features")
            assert run.end(signal.SIGTERM) == 0
        assert not processes(repository)

    def test_killed_it_leaves_no_process_behind(self, repository, tmp_path):
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        with Run("--repository", repository, temporary=temporary) as run:
            run.ready()
            assert processes(repository)
            front = Path(f"/proc/{read_state(repository).front_pid}")
            assert front.exists()
            run.end(signal.SIGKILL)
        assert until(lambda: not processes(repository), 40), processes(repository)
        assert until(lambda: not front.exists(), 40)
        (left,) = temporary.glob("serve-run-*")
        with Run(
            "--repository", repository, temporary=temporary
        ) as again:  # the stale state file does not stop it
            again.ready()
            assert not left.exists()


@pytest.mark.slow
class TestStarting:
    def test_a_broken_version_does_not_keep_the_other_from_serving(
        self, tmp_path, small_bundle, capsys
    ):
        repository = tmp_path / "repository"
        settings = Settings(fused=False, parts="apart")
        make_repository(read_bundle(small_bundle), repository, settings)
        made = Repository(repository)
        list(made.add(made.render(read_bundle(small_bundle), 2), 2))
        list(made.point(2))
        with open(repository / "head_cls" / "1" / "model.onnx", "ab") as file:
            file.write(b"!")
        shutil.copytree(repository / "head_cls" / "1", repository / "head_cls" / "3")
        with Run("--repository", repository) as run:
            run.ready()
            # of a rollout that was killed before it switched
            assert "undone: a killed rollout's changes of head_cls" in run.text
            assert "warning: head_cls version 1 does not load" in run.text and "sha256" in run.text
            with grpc.InferenceServerClient(run.grpc) as client:
                assert ask(client, SIZE) == ""
                assert client.is_model_ready("head_cls", "2")

    def test_a_model_that_does_not_load_is_named_with_its_reason(self, repository, capsys):
        with open(repository / "features" / "1" / "head_cls.onnx", "ab") as file:
            file.write(b"!")
        with Run("--repository", repository) as run:
            assert run.process.wait(90) == 1
        run.reader.join(10)
        assert (
            run.lines[-1].startswith("error: model 'features' does not load: ")
            and "sha256" in run.lines[-1]
        )
        assert not processes(repository)

    def test_flags_after_two_dashes_go_to_tritonserver(self, repository, capsys):
        with Run(
            "--repository", repository, "--", "--log-format=ISO8601", "--trace-config=rate=7"
        ) as run:
            run.ready()
            key = read_state(repository).admin_key
            assert (
                json.loads(Rest(run.http, key).call("GET", "/v2/trace/setting"))["trace_rate"]
                == "7"
            )
            assert run.wait_for(r"^\d{4}-\d\d-\d\dT[\d:]+Z I .*features")
        assert (
            main(["--repository", str(repository), *map(str, ANY_PORTS), "--", "--nonsense=3"]) == 2
        )
        assert (
            "rejects the arguments after -- (--nonsense=3): unrecognized option"
            in capsys.readouterr().err
        )

    def test_a_request_is_traced_through_its_models_under_its_id(self, repository):
        spans: list[dict] = []

        class Collector(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                spans.extend(
                    s
                    for r in content["resourceSpans"]
                    for scope in r["scopeSpans"]
                    for s in scope["spans"]
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
            threading.Thread(target=collector.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
            settings = (
                "rate=1",
                "level=TIMESTAMPS",
                "mode=opentelemetry",
                f"opentelemetry,url={url}",
                "opentelemetry,bsp_schedule_delay=200",
            )
            with Run(
                "--repository", repository, "--", *(f"--trace-config={text}" for text in settings)
            ) as run:
                run.ready()
                with grpc.InferenceServerClient(run.grpc) as client:
                    assert ask(client, SIZE, request_id="seen-again") == ""

                def traced() -> set[str]:
                    has = [(s["name"], a["value"]) for s in spans for a in s.get("attributes", ())]
                    return {name for name, value in has if value == {"stringValue": "seen-again"}}

                assert until(lambda: traced() >= {"features"}, 30), traced()
                assert "decode" not in traced()
            collector.shutdown()

    def test_of_the_embedded_server_only_grpc_is_on_the_network(self, repository):
        with Run("--repository", repository, "--host", "0.0.0.0", "--expose-embedded") as run:
            run.ready()
            lines = [
                line.split()[1:4]
                for name in ("tcp", "tcp6")
                for line in Path(f"/proc/net/{name}").read_text().splitlines()
            ]
            for address, hosts in (
                (run.grpc, {"00000000", 32 * "0"}),
                (run.http, {"0100007F"}),
                (run.metrics, {"0100007F"}),
            ):
                port = f"{int(address.split(':')[1]):04X}"
                open_on = {at[:-5] for at, _, state in lines if at[-4:] == port and state == "0A"}
                assert open_on and open_on <= hosts, address

    def test_mutual_tls_lets_in_only_whom_it_knows(self, repository, tmp_path):
        if shutil.which("openssl") is None:
            pytest.skip("no openssl command to make certificates with")
        files = certificates(tmp_path)
        options = (
            "--ssl-certificate",
            files["server.pem"],
            "--ssl-key",
            files["server.key"],
            "--ssl-root",
            files["ca.pem"],
        )
        with Run("--repository", repository, *options) as run:
            run.ready()
            known = {
                "root_certificates": files["ca.pem"],
                "private_key": files["client.key"],
                "certificate_chain": files["client.pem"],
            }
            with grpc.InferenceServerClient(run.grpc, ssl=True, **known) as client:
                assert ask(client, SIZE) == ""
            for strangers in (
                {},
                {"ssl": True, "root_certificates": files["ca.pem"]},
                {"ssl": True},
            ):
                with grpc.InferenceServerClient(run.grpc, **strangers) as client:
                    assert "UNAVAILABLE" in ask(client, SIZE)
            assert Rest(run.http).ready()  # for the supervisor: on this machine


def certificates(folder: Path) -> dict[str, str]:
    """A certificate authority, and a server and a client that it signed."""
    names = ("ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key")
    files = {name: str(folder / name) for name in names}

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        files["ca.key"],
        "-out",
        files["ca.pem"],
        "-subj",
        "/CN=test authority",
        "-addext",
        "keyUsage=critical,keyCertSign",
        "-days",
        "2",
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        request = str(folder / f"{name}.csr")
        openssl(
            "req", *key, "-keyout", files[f"{name}.key"], "-out", request, "-subj", f"/CN={name}"
        )
        openssl(
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            files["ca.pem"],
            "-CAkey",
            files["ca.key"],
            "-CAcreateserial",
            "-out",
            files[f"{name}.pem"],
            "-days",
            "2",
            "-extfile",
            str(folder / "names"),
        )
    return files


class TestMistakes:
    """A user's mistake is one line and exit status 2, before anything is started."""

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (
                ["--backend", "onnxruntime"],
                "--backend onnxruntime: .* has no such backend \\(it has python\\)",
            ),
            (["--grpc-port", "9", "--http-port", "9"], "--http-port 9 is also --grpc-port"),
            (["--grpc-port", "70000"], "--grpc-port 70000: ports are 0 to 65535"),
            (
                ["--host", "192.0.2.1", "--expose-embedded"],
                "--host 192.0.2.1: not an address of this machine",
            ),
            (["--host", "0.0.0.0"], "--host 0.0.0.0: the embedded Triton 2.51 .*CVE-2025-23310"),
            (["--tritonserver", "/nowhere"], "--tritonserver /nowhere: not an executable file"),
            (["--ssl-certificate", "/nowhere"], "--ssl-certificate /nowhere: no such file"),
            (["--ssl-key", __file__], "--ssl-certificate is missing"),
            (["--open", "everything"], "--open everything: choose from model-repository"),
            (["--exit-timeout", "0"], "--exit-timeout 0: give more than 0"),
            (["--", "--http-port=9"], "serve.run sets --http-port itself"),
            (["--instances", "0"], "--instances 0: give 1 or more"),
        ],
    )
    def test_an_option_that_cannot_be(self, small_bundle, capsys, options, said):
        assert main([str(small_bundle), *map(str, ANY_PORTS), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(said, error), error

    def test_no_bundle(self, tmp_path, capsys):
        assert main([]) == 2
        assert "name a BUNDLE" in capsys.readouterr().err
        assert main([str(tmp_path)]) == 2
        assert "is not a bundle" in capsys.readouterr().err
        (tmp_path / "file").touch()
        assert main(["--repository", str(tmp_path)]) == 2
        assert "is not a repository of serve.repository" in capsys.readouterr().err

    def test_no_tritonserver(self, small_bundle, capsys, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr("serve.server.triton.IMAGE_PATH", Path("/nowhere"))
        monkeypatch.setattr("serve.server.triton.importlib.util.find_spec", lambda name: None)
        assert main([str(small_bundle), "--runtime", "auto"]) == 2
        assert "no tritonserver found" in capsys.readouterr().err

    def test_gpus_that_are_not_here(self, small_bundle, capsys, monkeypatch):
        monkeypatch.setattr(checks, "compute_capabilities", lambda: ())
        assert main([str(small_bundle), "--kind", "gpu"]) == 2
        assert "--kind gpu: this machine has no CUDA GPU" in capsys.readouterr().err
        monkeypatch.setattr(checks, "compute_capabilities", lambda: ("8.9",))
        assert main([str(small_bundle), "--kind", "gpu", "--devices", "0", "1"]) == 2
        assert "--devices 1: this machine has 1 GPU" in capsys.readouterr().err

    def test_engines_of_another_gpu(self, small_bundle, monkeypatch):
        bundle = read_bundle(small_bundle)
        engine = BundledEngine.model_construct(
            graph="backbone",
            flavour="tensorrt",
            compute_capabilities=("8.0",),
            file="backbone.engine",
        )
        bundle.manifest = bundle.manifest.model_copy(update={"engines": (engine,)})
        monkeypatch.setattr(checks, "compute_capabilities", lambda: ("9.0",))
        with pytest.raises(
            checks.UserError, match="for GPUs of compute capability 8.0, GPU 0 has 9.0"
        ):
            checks.check_gpus(Settings(backend="tensorrt", kind="gpu"), bundle)

    def test_a_repository_of_another_bundle_or_other_settings(
        self, small_bundle, repository, capsys
    ):
        assert (
            main(
                [
                    str(small_bundle),
                    "--repository",
                    str(repository),
                    "--instances",
                    "1",
                    "--max-queue",
                    "7",
                ]
            )
            == 2
        )
        assert "was rendered with" in capsys.readouterr().err
        made_with = repository / "made_with.json"
        made_with.write_text(
            json.dumps(json.loads(made_with.read_text()) | {"bundle": "0123456789ab"})
        )
        assert main([str(small_bundle), "--repository", str(repository)]) == 2
        said = capsys.readouterr().err
        assert "was rendered from bundle 0123456789ab" in said and "serve.rollout" in said


def test_a_state_file_whose_process_is_gone_says_nothing(tmp_path):
    state = State(
        pid=os.getpid(), server_pid=os.getpid(), grpc="", http="", metrics="", admin_key=""
    )
    (tmp_path / STATE).write_text(state.model_dump_json())
    assert read_state(tmp_path) is None  # a process of that id runs, but is no tritonserver
    (tmp_path / STATE).write_text("{")
    assert read_state(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize(("hangs", "starts"), [(1, 2), (9, 3)])
def test_a_start_that_hangs_is_cut_and_followed_by_another(
    small_bundle, tmp_path, monkeypatch, hangs, starts
):
    monkeypatch.setattr("serve.server.process._HANG_SECONDS", 5.0)
    repository = small_repository(small_bundle, tmp_path / "repository", instances=1)
    found, count, lines = find_tritonserver(None, tmp_path), tmp_path / "count", []
    script = tmp_path / "tritonserver"
    script.write_text(
        f"#!/bin/sh\necho >> {count}\n"
        f'[ $(wc -l < {count}) -gt {hangs} ] || exec sleep 1000\nexec {found.executable} "$@"\n'
    )
    script.chmod(0o755)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    server = Server(replace(found, executable=script), repository, options, lines.append)
    if hangs < starts:
        with server:
            assert server.rest.ready()
    else:
        with pytest.raises(ServerError, match="tritonserver hung 3 times while it started"):
            server.start()
    assert count.read_text().count("\n") == starts
    assert sum("did nothing for 5 s: starting it again" in line for line in lines) == starts - 1


@pytest.mark.slow
def test_the_next_start_ends_a_tritonserver_that_was_left_and_will_not_end(small_bundle, tmp_path):
    repository = small_repository(small_bundle, tmp_path / "repository", instances=1)
    with Run("--repository", repository) as run:
        run.ready()
        left = processes(repository)
        for pid in left:
            os.kill(pid, signal.SIGSTOP)
        run.end(signal.SIGKILL)
    with Run("--repository", repository) as run:
        run.ready()
        assert f"which serve.run {run.process.pid}" not in run.text
        assert re.search(r"^ending tritonserver \d+, which serve\.run \d+ left", run.text, re.M)
        assert not set(left) & set(processes(repository))


@pytest.mark.slow
@pytest.mark.parametrize(("crashes", "starts"), [(2, 3), (9, 3)])
def test_a_crash_while_it_starts_is_followed_by_another_start(
    small_bundle, tmp_path, crashes, starts
):
    """As Triton's python backend aborts now and then on a busy machine; after the third it is
    told.
    """
    need_tritonserver()
    make_repository(
        read_bundle(small_bundle), tmp_path / "repository", Settings(fused=False, encoded=False)
    )
    found, count, lines = find_tritonserver(None, tmp_path), tmp_path / "count", []
    script = tmp_path / "tritonserver"
    script.write_text(
        f"#!/bin/sh\nulimit -c 0\necho >> {count}\n"
        f'[ $(wc -l < {count}) -gt {crashes} ] || kill -ABRT $$\nexec {found.executable} "$@"\n'
    )
    script.chmod(0o755)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    server = Server(
        replace(found, executable=script), tmp_path / "repository", options, lines.append
    )
    if crashes < starts:
        with server:
            assert server.rest.ready()
    else:
        with pytest.raises(ServerError, match="signal 6"):
            server.start()
    assert count.read_text().count("\n") == starts
    assert (
        sum("crashed while it started (signal 6): starting it again" in line for line in lines) == 2
    )
    assert not processes(tmp_path)
