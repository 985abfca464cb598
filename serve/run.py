"""`python -m serve.run`: start a Triton Inference Server on a bundle and supervise it until it is
stopped.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from contract.claim import claimed
from contract.command_line import CommandLine
from contract.errors import UserError, exit_status, printable
from contract.signing import PublicKey, add_trust
from serve.errors import ServerError
from serve.repository.build import add_settings, make_repository, read_settings
from serve.repository.settings import Settings

if TYPE_CHECKING:
    from serve.server.golden import Policy
    from serve.server.launch import Options

EPILOG = """\
examples:
  python -m serve.run bundles/mine
  python -m serve.run bundles/mine --repository repository
  python -m serve.run --repository repository
  python -m serve.run bundles/mine --grpc-port 9001 --http-port 9000 \\
      --metrics-port 9002
  python -m serve.run bundles/mine --backend tensorrt --kind gpu --devices 0 1 \\
      --host 0.0.0.0
  python -m serve.run bundles/mine --host 0.0.0.0 --expose-embedded \\
      --ssl-certificate server.pem --ssl-key server.key
  python -m serve.run bundles/mine -- --trace-config rate=100 \\
      --trace-config mode=opentelemetry \\
      --trace-config opentelemetry,url=http://127.0.0.1:4318/v1/traces

--repository keeps the rendered repository: rollouts need it, and the next
start is faster. Without BUNDLE it is served as it is, rollouts included.
With --trust the bundle, or the one that a kept repository was rendered from,
must be signed by one of the keys (export.sign).
--backend tensorrt and onnxruntime need NVIDIA's container image.

The first Ctrl-C or SIGTERM refuses new requests and waits for those already
accepted; the second stops the server immediately. A model whose backend
process dies is loaded again; `python -m serve.status --repository DIR` counts
these restarts.

With the embedded Triton, clients reach gRPC through a small proxy, because it
crashes when they cancel requests, and --host needs --expose-embedded.

At every start, before clients are let in, the server must answer golden
pictures (photographs in the bundle, with the student's own answers): answers
outside the bundle's bounds end it (--golden).

Loading models, shared memory, tracing and logging require the key in
DIR/.serve.json, over both gRPC and HTTP, unless listed in --open. With TLS,
HTTP stays on 127.0.0.1, because Triton has no TLS for it. Arguments after --
are passed to tritonserver unchanged. See docs/serving.md.

Exit status: 0 stopped on request, 1 the server failed, answered otherwise
than at export, or requests were cut off, 2 usage error.
"""

_OURS = (
    "model-repository",
    "model-store",
    "model-control-mode",
    "load-model",
    "allow-http",
    "allow-grpc",
    "allow-metrics",
    "strict-readiness",
    "exit-on-error",
    "exit-timeout-secs",
    "disable-auto-complete-config",
    "backend-directory",
    "grpc-port",
    "grpc-address",
    "http-port",
    "http-address",
    "metrics-port",
    "metrics-address",
    "http-restricted-api",
    "grpc-restricted-protocol",
    "log-file",
)
"""Flags of tritonserver that `serve.run` sets or relies on."""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:split])
    return exit_status(
        lambda: _run(
            args.bundle,
            args.repository,
            args.tritonserver,
            _read_options(args, words[split + 1 :]),
            args.trust,
            read_settings(args),
            args.front,
            args.expose_embedded,
            args.golden,
        )
    )


def _parser() -> argparse.ArgumentParser:
    result = CommandLine(
        prog="python -m serve.run",
        description="Start a Triton Inference Server on a bundle and supervise it.",
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
        help="keep the repository there (default: a temporary folder)",
    )
    result.add_argument(
        "--tritonserver",
        type=Path,
        metavar="FILE",
        help="executable (default: NVIDIA image, PATH, nvidia-pytriton)",
    )
    add_trust(result)
    listening = result.add_argument_group("listening")
    listening.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0: all interfaces (default: 127.0.0.1)",
    )
    listening.add_argument(
        "--expose-embedded",
        action="store_true",
        help="allow --host for gRPC of the embedded, unpatched Triton",
    )
    listening.add_argument(
        "--front",
        choices=("auto", "on", "off"),
        default="auto",
        help="proxy between gRPC clients and Triton (auto: if it is the embedded one)",
    )
    for name, port in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        listening.add_argument(
            f"--{name}-port",
            type=int,
            default=port,
            metavar="N",
            help=f"0: any free port (default: {port})",
        )
    listening.add_argument(
        "--ssl-certificate", type=Path, metavar="PEM", help="TLS on gRPC: the server's certificate"
    )
    listening.add_argument("--ssl-key", type=Path, metavar="PEM", help="its private key")
    listening.add_argument(
        "--ssl-root",
        type=Path,
        metavar="PEM",
        help="mTLS: authority that signs client certificates",
    )
    listening.add_argument(
        "--open",
        nargs="+",
        default=[],
        metavar="ENDPOINT",
        help="need no key: model-repository, shared-memory, trace, logging",
    )
    listening.add_argument(
        "--start-timeout",
        type=float,
        default=120,
        metavar="S",
        help="seconds until ready (default: 120)",
    )
    listening.add_argument(
        "--exit-timeout",
        type=int,
        default=30,
        metavar="S",
        help="seconds for accepted requests (default: 30)",
    )
    models = result.add_argument_group("models")
    models.add_argument(
        "--golden",
        choices=("refuse", "warn", "skip"),
        default="refuse",
        help="what to do where the bundle's golden pictures are not answered as at export "
        "(default: refuse to serve)",
    )
    add_settings(models)
    return result


def _run(
    bundle_folder: Path | None,
    kept: Path | None,
    tritonserver: Path | None,
    options: "Options",
    trust: Sequence[Path],
    settings: Settings,
    front: str,
    exposed: bool,
    golden: "Policy",
) -> int:
    from serve.bundle import read_bundle
    from serve.repository.contents import is_filled, set_aside
    from serve.repository.model_config import FRONT_QUEUES
    from serve.repository.versions import settle
    from serve.server.checks import check_backend, check_gpus, check_host, check_repository
    from serve.server.golden import GoldenCheck
    from serve.server.launch import largest_request
    from serve.server.orphans import end_orphans
    from serve.server.process import Server
    from serve.server.space import check_shared_memory
    from serve.server.stubs import remove_stale_regions
    from serve.server.supervise import Supervisor
    from serve.server.triton import find_tritonserver
    from serve.server.workspace import REPOSITORY, make_workspace

    keys = [PublicKey(path) for path in trust]
    with Signals() as signals, make_workspace(say) as workspace, ExitStack() as stack:
        result = find_tritonserver(tritonserver, workspace)
        check_host(result, options.host, exposed)
        repository = kept or workspace / REPOSITORY
        other = "name another --repository"
        hold = partial(claimed, repository, "serve.run", f"stop it first, or {other}", other)
        if is_filled(repository):  # first of all: another start, or a rendering, may be under way
            stack.enter_context(hold())
        end_orphans(repository, say)
        # refuse what can be refused before graphs are copied
        bundle = read_bundle(bundle_folder, keys) if bundle_folder else None
        settings = check_repository(repository, bundle, settings, keys)
        check_backend(result, settings.backend)
        check_gpus(settings, bundle)
        update = {"gpu": settings.kind == "gpu"}
        if front == "on" or (front == "auto" and result.embedded):
            update["front"] = workspace
        server = Server(result, repository, options.model_copy(update=update), say)
        server.check_ports()
        if not is_filled(repository):
            make_repository(bundle, repository, settings, durable=kept is not None)
            stack.enter_context(hold())
            check_repository(repository, bundle, settings, keys)  # it is still the one just made
        set_aside(repository, say)
        settle(repository, say)
        server.front_requests = FRONT_QUEUES * settings.max_queue
        server.message_bytes = largest_request(repository, settings.max_image_bytes)
        remove_stale_regions()
        check_shared_memory(repository)
        server.check = GoldenCheck(server.repository, golden, say, options.start_seconds)
        signals.server = server
        try:
            seconds = server.start()
            show(server, seconds, kept is not None)
            Supervisor(server, say).run()
        except ServerError:
            if not server.stopping:  # stopped while it was starting: nothing failed
                raise
        finally:
            answered = server.stop()
        if not answered:
            raise ServerError(
                f"requests were cut off after {options.exit_seconds} s: raise --exit-timeout"
            )
        say("stopped: every request that was accepted has been answered")
    return 0


def say(line: str) -> None:
    """Print a line and flush it, in one write because threads print too. A full disk, or a reader
    that has gone, loses the line, not the server. What a bundle or a client made a part of it
    cannot steer a terminal.
    """
    try:
        sys.stdout.write(f"{printable(line.expandtabs())}\n")
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE):
            raise


class Signals:
    """The first SIGINT or SIGTERM drains the server, the second kills it; before it exists they end
    the program.
    """

    def __init__(self) -> None:
        self.server = None
        self.before: dict[int, object] = {}

    def __call__(self, number: int, frame: object) -> None:
        if self.server is None:
            raise SystemExit(0)
        if self.server.stopping and self.server.process:
            with contextlib.suppress(ProcessLookupError):
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


def _read_options(args: argparse.Namespace, extra: Sequence[str]) -> "Options":
    """How to listen; raises UserError for invalid values."""
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
        raise UserError(f"--open {unknown[0]}: choose from {', '.join(RESTRICTED)}")
    files = {
        "--ssl-certificate": args.ssl_certificate,
        "--ssl-key": args.ssl_key,
        "--ssl-root": args.ssl_root,
    }
    for name, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path}: no such file (give a PEM file)")
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
    """Print the addresses and the next commands."""
    from serve.client.served import whole_view
    from serve.server.launch import about_served

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
    say(f"ready     after {seconds:.1f} s: {server.tritonserver.executable}")
    behind = " behind a front" if server.front else ""
    say(f"grpc      {server.grpc}{' (TLS)' if tls else ''}{behind}")
    say(f"http      http://{server.http}")
    say(f"metrics   http://{server.metrics}/metrics")
    say("next      request features of a picture, show the status, or stop with Ctrl-C:")
    whole = whole_view(about_served(server.repository))
    view = f" --view {whole}" if whole else ""
    say(f"  python -m serve.client {_sample_picture()}{view}{options}")
    if (server.repository / "detection").is_dir():
        labels = '--task detection --labels cat dog "potted plant"'
        say(f"  python -m serve.client {_sample_picture()} {labels}{view}{options}")
    say(f"  python -m serve.status {where}")
    say("")


def _sample_picture() -> str:
    """A photograph of scikit-image, if it is installed."""
    spec = importlib.util.find_spec("skimage")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "data" / "chelsea.png"
        if path.is_file():
            return str(path)
    return "photo.jpg"


if __name__ == "__main__":
    sys.exit(main())
