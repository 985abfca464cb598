"""`python -m serve.run`: a bundle becomes a running Triton Inference Server, watched until it is
told to stop.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from serve.errors import ServerError
from serve.repository.build import add_settings, make_repository, read_settings

EPILOG = """\
examples:
  python -m serve.run bundles/mine                              gRPC on 127.0.0.1:8001, HTTP on 8000, metrics on 8002
  python -m serve.run bundles/mine --repository repository      keep the repository: for rollouts, and to start faster
  python -m serve.run --repository repository                   serve it again as it is, whatever was rolled out
  python -m serve.run bundles/mine --grpc-port 9001 --http-port 9000 --metrics-port 9002
  python -m serve.run bundles/mine --backend tensorrt --kind gpu --devices 0 1 --host 0.0.0.0     in NVIDIA's image
  python -m serve.run bundles/mine --host 0.0.0.0 --ssl-certificate server.pem --ssl-key server.key
  python -m serve.run bundles/mine -- --trace-config rate=100 --trace-config mode=opentelemetry \\
      --trace-config opentelemetry,url=http://127.0.0.1:4318/v1/traces

Ctrl-C or SIGTERM: no new requests, those that were accepted are answered, then it ends; a second one ends it at once.
A model whose backend process dies is loaded again; `python -m serve.status --repository DIR` counts that.
Loading models, shared memory, tracing and logging need the key in DIR/.serve.json, over gRPC and HTTP (--open). With TLS, HTTP
(which has none) stays on 127.0.0.1. What follows -- goes to tritonserver as it is. More in docs/serving.md.
Exit status: 0 stopped as told, 2 a mistake in what was asked, 1 the server failed or requests were cut off.
"""

WORKSPACE = "serve-run-"
"""Prefix of temporary folders."""

_OURS = ("model-repository", "model-store", "model-control-mode", "load-model", "allow-http", "allow-grpc", "allow-metrics",
        "strict-readiness", "exit-on-error", "exit-timeout-secs", "disable-auto-complete-config", "backend-directory",
        "grpc-port", "grpc-address", "http-port", "http-address", "metrics-port", "metrics-address", "http-restricted-api",
        "grpc-restricted-protocol", "log-file")  # fmt: skip
"""Flags of tritonserver that `serve.run` sets or relies on."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--") if "--" in given else len(given)
    args = parser().parse_args(given[:split])
    return exit_status(lambda: run(args, given[split + 1 :]))


def parser() -> argparse.ArgumentParser:
    result = CommandLine(
        prog="python -m serve.run",
        description="Start a Triton Inference Server on a bundle and look after it.",
        usage="python -m serve.run [BUNDLE] [options] [-- flags of tritonserver]",
        epilog=EPILOG,
    )
    result.add_argument(
        "bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder with a manifest.json"
    )
    result.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="keep the repository there (a temporary folder)",
    )
    result.add_argument(
        "--tritonserver",
        type=Path,
        metavar="FILE",
        help="(NVIDIA's image's, PATH's, else nvidia-pytriton's)",
    )
    listening = result.add_argument_group("listening")
    listening.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: everybody (127.0.0.1)"
    )
    for name, port in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        listening.add_argument(
            f"--{name}-port", type=int, default=port, metavar="N", help=f"0: any free one ({port})"
        )
    listening.add_argument(
        "--ssl-certificate", type=Path, metavar="PEM", help="TLS on gRPC: the server's certificate"
    )
    listening.add_argument("--ssl-key", type=Path, metavar="PEM", help="and its key")
    listening.add_argument(
        "--ssl-root", type=Path, metavar="PEM", help="mTLS: who signs the clients that are let in"
    )
    listening.add_argument(
        "--open",
        nargs="+",
        default=[],
        metavar="ENDPOINT",
        help="need no key: model-repository, shared-memory, trace, logging",
    )
    listening.add_argument(
        "--start-timeout", type=float, default=120, metavar="S", help="seconds until ready (120)"
    )
    listening.add_argument(
        "--exit-timeout",
        type=int,
        default=30,
        metavar="S",
        help="seconds for accepted requests (30)",
    )
    add_settings(result.add_argument_group("models"))
    return result


def run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    from serve.bundle import read_bundle
    from serve.server.checks import check_backend, check_gpus, check_repository
    from serve.server.process import Server
    from serve.server.stubs import remove_stale_regions
    from serve.server.supervise import Supervisor
    from serve.server.triton import find_tritonserver

    options = _read_options(args, extra)
    settings = read_settings(args)
    with Signals() as signals, _make_workspace() as workspace:
        result = find_tritonserver(args.tritonserver, workspace)
        kept = args.repository is not None
        repository = args.repository if kept else workspace / "repository"
        # what can be refused is, before graphs are copied
        bundle = read_bundle(args.bundle) if args.bundle else None
        settings = check_repository(repository, bundle, settings)
        check_backend(result, settings.backend)
        check_gpus(settings, bundle)
        server = Server(
            result, repository, options.model_copy(update={"gpu": settings.kind == "gpu"}), say
        )
        server.check_ports()
        if not repository.exists() or not any(repository.iterdir()):
            make_repository(bundle, repository, settings, durable=kept)
        remove_stale_regions()
        signals.server = server
        try:
            seconds = server.start()
            show(server, seconds, kept)
            Supervisor(server, say).run()
        except ServerError:
            if not server.stopping:  # told to stop while it was starting: nothing failed
                raise
        finally:
            answered = server.stop()
        if not answered:
            raise ServerError(
                f"requests were cut off after {args.exit_timeout} s (--exit-timeout gives them "
                "more)"
            )
        say("stopped: every request that was accepted has been answered")
    return 0


@contextlib.contextmanager
def _make_workspace() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, as are those of runs that were killed: nobody
    holds their lock.
    """
    for old in Path(tempfile.gettempdir()).glob(f"{WORKSPACE}*/lock"):
        with contextlib.suppress(OSError), open(old, "rb") as file:  # another user's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=WORKSPACE) as folder,
        open(Path(folder) / "lock", "wb") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        yield Path(folder)


def say(line: str) -> None:
    """Print a line at once, also into a pipe; in one piece, because threads do."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Signals:
    """SIGINT and SIGTERM drain the server; before there is one they end the program, its folders
    removed; twice: at once.
    """

    def __init__(self) -> None:
        self.server = None
        self.before: dict[int, object] = {}

    def __call__(self, number: int, frame: object) -> None:
        if self.server is None:
            raise SystemExit(0)
        if self.server.stopping and self.server.process:
            os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.drain()

    def __enter__(self) -> "Signals":
        self.before = {
            number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _read_options(args: argparse.Namespace, extra: Sequence[str]):
    """How to listen; raises UserError for what makes no sense."""
    from serve.server.launch import RESTRICTED, Options, Tls

    for name in ("grpc_port", "http_port", "metrics_port"):
        if not 0 <= getattr(args, name) <= 65535:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: ports are 0 to 65535"
            )
    for name in ("start_timeout", "exit_timeout"):
        if getattr(args, name) <= 0:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: give more than 0 seconds"
            )
    unknown = sorted(set(args.open) - set(RESTRICTED))
    if unknown:
        raise UserError(f"--open {unknown[0]}: known are {', '.join(RESTRICTED)}")
    files = {
        "--ssl-certificate": args.ssl_certificate,
        "--ssl-key": args.ssl_key,
        "--ssl-root": args.ssl_root,
    }
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: no such file (a PEM file is wanted)")
        if path is None and name != "--ssl-root" and any(files.values()):
            raise UserError(f"{name} is missing: TLS takes --ssl-certificate and --ssl-key")
    for flag in extra:
        name = flag.removeprefix("--").split("=")[0]
        if flag.startswith("--") and name in _OURS:
            raise UserError(f"-- {flag}: serve.run sets --{name} itself (see its own options)")
    tls = (
        Tls(certificate=args.ssl_certificate, key=args.ssl_key, root=args.ssl_root)
        if args.ssl_certificate
        else None
    )
    return Options(
        host=args.host,
        grpc_port=args.grpc_port,
        http_port=args.http_port,
        metrics_port=args.metrics_port,
        tls=tls,
        open_endpoints=tuple(args.open),
        start_seconds=args.start_timeout,
        exit_seconds=args.exit_timeout,
        extra=tuple(extra),
    )


def show(server, seconds: float, kept: bool) -> None:
    """Print where it answers and what to type next."""
    tls = server.options.tls
    options = "" if server.grpc == "127.0.0.1:8001" else f" --url {server.grpc}"
    if tls:
        options += " --ssl-root CA.pem" + (
            " --ssl-certificate CLIENT.pem --ssl-key CLIENT.key" if tls.root else ""
        )
    where = (
        f"--repository {server.repository}"
        if kept
        else f"--url {server.http} --metrics {server.metrics}"
    )
    say("")
    say(f"ready     after {seconds:.1f} s: {server.found.executable}")
    say(f"grpc      {server.grpc}{' (TLS)' if tls else ''}")
    say(f"http      http://{server.http}")
    say(f"metrics   http://{server.metrics}/metrics")
    say("next      ask it for the features of a picture, look how it is, or stop it with Ctrl-C:")
    say(f"  python -m serve.client {_sample_picture()}{options}")
    say(f"  python -m serve.status {where}")
    say("")


def _sample_picture() -> str:
    """A photograph that is at hand: scikit-image brings some."""
    spec = importlib.util.find_spec("skimage")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "data" / "chelsea.png"
        if path.is_file():
            return str(path)
    return "photo.jpg"


if __name__ == "__main__":
    sys.exit(main())
