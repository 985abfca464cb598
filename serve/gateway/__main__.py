"""`python -m serve.gateway`: an embeddings endpoint over HTTP in front of a running server."""

import argparse
import asyncio
import logging
import os
import socket
import ssl
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from contract.command_line import CommandLine, whole_number
from contract.errors import UserError, exit_status, printable
from contract.images import Limits
from serve.errors import BadRequest, ClientError, NotAllowed, need_packages
from serve.server.launch import is_loopback, listen

EPILOG = """\
examples:
  python -m serve.gateway
  python -m serve.gateway --url gpu-server:8001 --host 0.0.0.0 \\
      --api-key-file keys.txt
  curl http://127.0.0.1:8080/v1/models
  { printf '{"model": "backbone_global", "input": "data:image/jpeg;base64,'
    base64 -w0 photo.jpg; printf '"}'; } |
      curl http://127.0.0.1:8080/v1/embeddings --data-binary @- \\
          -H 'Content-Type: application/json'

POST /v1/embeddings takes and gives OpenAI's form, with pictures as data URIs;
GET /v1/models lists the outputs that are embeddings. URLs are never fetched.
/health/live, /health/ready and /metrics need no key. Without a server at
--url it starts, is not ready, and answers 503 until there is one.

Exit status: 0 stopped on request (requests under way are finished), 1 failure,
2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    if status := exit_status(_check_installed):
        return status
    args = _parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _check_installed() -> None:
    """Raise UserError if the extra is not installed."""
    packages = ("starlette", "uvicorn", "httptools", "orjson", "pybase64", "prometheus_client")
    need_packages("serve.gateway", (*packages, "tritonclient"), "gateway")


def _parser() -> argparse.ArgumentParser:
    from serve.client.tls import add_tls  # needs the extra, and says so less kindly

    limits = Limits()
    result = CommandLine(
        prog="python -m serve.gateway",
        description="Serve embeddings over HTTP in OpenAI's form, from a running server.",
        epilog=EPILOG,
    )
    result.add_argument(
        "--url",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="gRPC of the server (default: 127.0.0.1:8001)",
    )
    result.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0: all interfaces (default: 127.0.0.1)",
    )
    result.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=8080,
        metavar="N",
        help="port of the endpoint, 0: any (default: 8080)",
    )
    result.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys, one a line, of which /v1 wants one as Authorization: Bearer KEY; also taken "
        "from the environment, GATEWAY_API_KEYS",
    )
    result.add_argument(
        "--without-api-key",
        action="store_true",
        help="listen on a network although there is no key",
    )
    result.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for the server's part of a request (default: 30)",
    )
    result.add_argument(
        "--retries",
        type=whole_number(0, 100),
        default=3,
        metavar="N",
        help="retries while the server is unavailable (default: 3)",
    )
    result.add_argument(
        "--concurrency",
        type=whole_number(1, 4096),
        default=32,
        metavar="N",
        help="requests at the server at a time (default: 32)",
    )
    result.add_argument(
        "--max-requests",
        type=whole_number(1, 65536),
        default=64,
        metavar="N",
        help="requests under way at a time, beyond: 429 (default: 64)",
    )
    result.add_argument(
        "--max-pictures",
        type=whole_number(1, 65536),
        default=64,
        metavar="N",
        help="pictures and texts of a request (default: 64)",
    )
    result.add_argument(
        "--max-body",
        type=whole_number(1024, 2**31),
        default=32 * 2**20,
        metavar="BYTES",
        help="of a request; 16 of them are held at a time (default: 33554432)",
    )
    result.add_argument(
        "--max-image-bytes",
        type=whole_number(1),
        default=limits.max_bytes,
        metavar="BYTES",
        help=f"of a picture's file (default: {limits.max_bytes})",
    )
    result.add_argument(
        "--max-pixels",
        type=whole_number(1),
        default=limits.max_pixels,
        metavar="N",
        help=f"of a picture, read before it is decoded (default: {limits.max_pixels})",
    )
    result.add_argument(
        "--body-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for a client to send a request (default: 30)",
    )
    result.add_argument(
        "--exit-timeout",
        type=whole_number(0, 86400),
        default=30,
        metavar="S",
        help="seconds that requests under way get at the end (default: 30)",
    )
    result.add_argument(
        "--https-certificate", type=Path, metavar="PEM", help="serve HTTPS with this certificate"
    )
    result.add_argument("--https-key", type=Path, metavar="PEM", help="its private key")
    result.add_argument(
        "--no-access-log", action="store_true", help="do not write a line for each request"
    )
    add_tls(result)
    return result


def _run(args: argparse.Namespace) -> int:
    from serve.gateway.keys import read_keys

    keys = read_keys(args.api_key_file, os.environ)
    _check(args, bool(keys))
    with listen("--port", args.host, args.port) as door:
        return asyncio.run(_serve(args, keys, door))


def _check(args: argparse.Namespace, keys: bool) -> None:
    """Raise UserError for options that make no sense, or are not safe, together."""
    if not keys and not args.without_api_key and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} is reached from a network, and there is no API key: give "
            "--api-key-file FILE, or --without-api-key if everybody may use it"
        )
    for name in ("timeout", "body_timeout"):
        if not 0 < getattr(args, name) <= 86400:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name):g}: give seconds above 0")
    if (args.https_certificate is None) != (args.https_key is None):
        raise UserError("--https-certificate and --https-key go together: give both or none")
    if args.https_certificate is not None:
        _check_certificate(args.https_certificate, args.https_key)


def _check_certificate(certificate: Path, key: Path) -> None:
    """Raise UserError for files that HTTPS cannot be served with."""
    for option, path in (("certificate", certificate), ("key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--https-{option} {path}: {error.strerror} (give a PEM file)"
            ) from error
    try:
        # a key with a password would be asked for on the terminal
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            certificate, key, password=""
        )
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"--https-certificate {certificate} and --https-key {key} are not a certificate and "
            "its key without a password: give PEM files"
        ) from error


async def _serve(args: argparse.Namespace, keys: object, door: socket.socket) -> int:
    """Serve until a signal says to stop."""
    import uvicorn

    from serve.client.aio import AsyncFeatureClient
    from serve.client.retry import Retry
    from serve.client.tls import read_tls
    from serve.gateway.app import Gateway, GatewaySettings
    from serve.gateway.connections import BoundedConnection
    from serve.gateway.metrics import Metrics
    from serve.gateway.offer import Watch
    from serve.gateway.requests import RequestLimits

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # not as uvicorn does, which raises the signal again after it has stopped
            self.force_exit = self.should_exit
            self.should_exit = True

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("serve.gateway").setLevel(
        logging.WARNING if args.no_access_log else logging.INFO
    )
    limits = Limits(args.max_image_bytes, args.max_pixels)
    settings = GatewaySettings(
        limits=RequestLimits(limits, args.max_pictures),
        body=args.max_body,
        body_seconds=args.body_timeout,
        requests=args.max_requests,
        timeout=args.timeout,
    )
    options = {"timeout": args.timeout, "tls": read_tls(args), "limits": limits}
    retry, concurrency = Retry(most=args.retries), args.concurrency
    async with (
        AsyncFeatureClient(args.url, retry=retry, concurrency=concurrency, **options) as client,
        AsyncFeatureClient(
            args.url, retry=Retry(most=0), **options | {"timeout": min(5.0, args.timeout)}
        ) as asking,
    ):
        watch, state = Watch(asking), "ready"
        try:
            await watch.look()
        except (BadRequest, NotAllowed) as error:
            raise UserError(
                f"the server at {args.url} refuses this client: {error.message}"
            ) from error
        except ClientError:
            state = (
                "not ready: it does not answer (start one with python -m serve.run BUNDLE, or name "
                "another with --url)"
            )
        server = Server(
            uvicorn.Config(
                Gateway(client, watch, keys, Metrics(), settings),
                http=BoundedConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=args.exit_timeout,
                ssl_certfile=args.https_certificate,
                ssl_keyfile=args.https_key,
            )
        )
        scheme = "https" if args.https_certificate else "http"
        host, port = door.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"gateway   {scheme}://{host}:{port}/v1")
        print(f"server    {printable(args.url)}, {state}")
        print("stop      Ctrl-C", flush=True)
        watch.changed = partial(print, flush=True)
        watching = asyncio.create_task(watch.run())
        try:
            await server.serve(sockets=[door])
        finally:
            watching.cancel()
    return 0


if __name__ == "__main__":
    sys.exit(main())
