"""`python -m serve.demo`: a web page that shows a running server's answers for a photograph."""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.images import Limits
from serve.client.tls import Tls, add_tls, read_tls
from serve.errors import NotAllowed, NotServed, ServerError, Unavailable, need_packages

if TYPE_CHECKING:  # needs an optional extra, for which `_run` prints a message
    from serve.client import FeatureClient

EPILOG = """\
examples:
  python -m serve.demo
  python -m serve.demo --url gpu-server:8001 --port 8080
  python -m serve.demo --labels "a cat" "a dog" "a cup of coffee"

Serves http://127.0.0.1:7860 by default. The page shows principal components of
the patches of the backbone and of each head, segmentation, depth, zero-shot
classes and detected objects, and for each request its latency and the models
that ran. It connects only to the server. Ctrl-C stops it and deletes the
uploaded pictures.

Exit status: 0 stopped on request, 1 no server, 2 usage error.
"""

_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # no telemetry, no look for a newer version
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_RUN_HISTORY": "False",  # nothing is kept in the browser
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandLine(
        prog="python -m serve.demo",
        description="Show a running server's answers for a photograph on a web page.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="gRPC of the server (default: 127.0.0.1:8001)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="port of the page (default: 7860)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0: all interfaces (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="initial zero-shot classes (default: the bundle's) and objects to look for",
    )
    add_tls(parser)
    args = parser.parse_args(arguments)
    return exit_status(lambda: _run(args.url, args.host, args.port, args.labels, read_tls(args)))


def _run(
    url: str | None, host: str, port: int, labels: Sequence[str] | None, tls: Tls | None
) -> int:
    need_packages("serve.demo", ("gradio", "tritonclient"), "demo")
    from serve.client import FeatureClient
    from serve.client.retry import Retry
    from serve.client.sync import DEFAULT_URL

    _check_port(host, port)
    with (
        FeatureClient(url or DEFAULT_URL, timeout=20.0, retry=Retry(most=2), tls=tls) as client,
        tempfile.TemporaryDirectory(prefix="serve-demo-") as folder,
    ):
        _check_server(client, labels)
        os.environ.update(_ENVIRONMENT, GRADIO_TEMP_DIR=folder)  # read when gradio is imported
        show(client, host, port, labels)
    return 0


def _check_port(host: str, port: int) -> None:
    """Raise UserError if the page cannot listen there."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: ports are 1 to 65535")
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0]) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address[4])
    except socket.gaierror as error:
        raise UserError(f"--host {host}: no such address ({error.strerror})") from error
    except OSError as error:
        raise UserError(
            f"port {port} of {host}: {error.strerror} (choose another with --port)"
        ) from error


def _check_server(client: "FeatureClient", labels: Sequence[str] | None) -> None:
    """Raise an error that names the remedy if there is no server, or it cannot classify labels."""
    try:
        client.describe()
        if labels:
            _check_labels(client)
    except Unavailable as error:
        raise ServerError(
            f"no server answers at {client.url}: start one with python -m serve.run BUNDLE, or "
            "name another with --url"
        ) from error
    except NotAllowed as error:
        raise UserError(
            f"the server at {client.url} refuses this client: {error.message}"
        ) from error
    except NotServed as error:
        raise UserError(
            f"the server at {client.url} has no model 'features': is it one of serve.run?"
        ) from error


def _check_labels(client: "FeatureClient") -> None:
    """Raise UserError for a server without a model that takes labels."""
    for model in ("zero_shot", "detection"):
        try:
            client.describe(model)
            return
        except NotServed:
            continue
    raise UserError(
        "--labels: the server has no zero_shot and no detection (python -m export.text and "
        "export.run --detector add them to a bundle)"
    )


def show(client: "FeatureClient", host: str, port: int, labels: Sequence[str] | None) -> None:
    import gradio

    from serve.demo.cards import CSS
    from serve.demo.page import build

    answer = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: answer.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    page = build(client, labels)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=Limits().max_bytes,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            footer_links=[],
            theme=gradio.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
            css=CSS,
        )
        print(f"page      {address.rstrip('/')}", flush=True)
        print(f"server    {client.url}", flush=True)
        print("stop      Ctrl-C", flush=True)
        answer.wait()
    finally:
        page.close(verbose=False)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
