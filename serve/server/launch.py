"""Options of a tritonserver, its command line, and free ports."""

import errno
import ipaddress
import json
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from tritonclient.grpc.model_config_pb2 import ModelConfig

from contract.errors import UserError
from serve.repository.contents import read_made_with
from serve.repository.native import native_flags
from serve.server.loading import CONFIG, read_config
from serve.server.rest import ADMIN_HEADER
from serve.server.triton import Tritonserver

RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
"""Endpoints that change a server or read its memory require the key; statistics are open.
"""

_LEAST_MESSAGE = 256 * 2**20
_LONGEST_SOCKET = 100
"""Bytes of a Unix socket's path; Linux allows 107."""


class Tls(BaseModel):
    """PEM files for TLS on gRPC; with a `root` clients must show a certificate that it signed
    (mTLS).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path
    key: Path
    root: Path | None = None


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    grpc_port: int = Field(default=8001, ge=0, le=65535)
    """0: any free port, also for the others."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    metrics_port: int = Field(default=8002, ge=0, le=65535)
    tls: Tls | None = None
    open_endpoints: tuple[str, ...] = ()
    """Those of RESTRICTED that need no key."""
    start_seconds: float = Field(default=120.0, gt=0)
    exit_seconds: int = Field(default=30, ge=1)
    """How long requests that were accepted may take to be answered after a stop."""
    cache_bytes: int = Field(default=64 * 2**20, ge=1)
    """Of the response cache, if a model has one."""
    gpu: bool = False
    front: Path | None = None
    """Clients reach gRPC through a front (serve.server.front): a private folder for the socket
    between it and tritonserver. None: they reach tritonserver itself.
    """
    extra: tuple[str, ...] = ()
    """Further arguments of tritonserver."""


def command_line(
    tritonserver: Tritonserver,
    repository: Path,
    options: Options,
    listening: dict[str, tuple[str, int]],
    admin_key: str,
) -> list[str]:
    """tritonserver's command line; `listening`: host and port of "grpc", "http" and "metrics"."""
    line = [str(tritonserver.executable), f"--model-repository={repository}"]
    if tritonserver.backends:
        line.append(f"--backend-directory={tritonserver.backends}")
    if tritonserver.caches:
        line.append(f"--cache-directory={tritonserver.caches}")
    for name, (host, port) in listening.items():
        line += [f"--{name}-address={host}", f"--{name}-port={port}"]
    line += [
        "--model-control-mode=explicit",
        # those that the repository was made with: all else in its folder may be anybody's
        *(f"--load-model={name}" for name in read_made_with(repository).models),
        # a broken new version must not keep the old one from starting: serve.server.loading
        # decides, not Triton
        "--exit-on-error=false",
        "--strict-readiness=false",
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={options.exit_seconds}",
        "--metrics-config=summary_latencies=true",
        f"--allow-gpu-metrics={'true' if options.gpu else 'false'}",
    ]
    if not options.gpu:
        line.append("--pinned-memory-pool-byte-size=0")
    line += native_flags(repository)
    closed = ",".join(name for name in RESTRICTED if name not in options.open_endpoints)
    if closed:
        # gRPC and HTTP are restricted each on its own
        line += [
            f"--{flag}={closed}:{ADMIN_HEADER}={admin_key}"
            for flag in ("grpc-restricted-protocol", "http-restricted-api")
        ]
    if options.tls:
        line += [
            f"--grpc-use-ssl{'-mutual' if options.tls.root else ''}=true",
            f"--grpc-server-cert={options.tls.certificate}",
            f"--grpc-server-key={options.tls.key}",
        ]
        line += [f"--grpc-root-cert={options.tls.root}"] if options.tls.root else []
    if _caches_answers(repository):
        line.append(f"--cache-config=local,size={options.cache_bytes}")
    return [*line, *options.extra]


def _caches_answers(repository: Path) -> bool:
    """Whether a model of the repository wants Triton's response cache."""
    models = read_made_with(repository).models
    return any(read_config(repository / name / CONFIG).response_cache.enable for name in models)


def choose_ports(requested: dict[str, int], host: str) -> dict[str, int]:
    """Ports with every 0 replaced by a free one; raises UserError if two are the same."""
    result, held = {}, []
    for name, port in requested.items():
        if port == 0:
            held.append(
                listen(f"--{name}-port", host, 0)
            )  # held until all are chosen, so that they differ
            port = held[-1].getsockname()[1]
        if port in result.values():
            other = next(key for key, value in result.items() if value == port)
            raise UserError(f"--{name}-port {port} is also --{other}-port: give each its own")
        result[name] = port
    for one in held:
        one.close()
    return result


def listen(option: str, host: str, port: int) -> socket.socket:
    """A socket that listens as tritonserver's will; raises UserError, which names the port's
    option, for a port or address that is not available.
    """
    result = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        result = socket.socket(family, kind, protocol)
        result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        result.bind(address)
        result.listen()
        return result
    except UnicodeError as error:
        raise UserError(f"--host {host}: not an address of this machine") from error
    except OSError as error:
        if result:
            result.close()
        if error.errno == errno.EADDRINUSE:
            remedy = f"choose another with {option}, or stop the process that listens there"
            raise UserError(f"port {port} is in use: {remedy}") from error
        if isinstance(error, PermissionError):
            raise UserError(f"port {port} requires root: choose another with {option}") from error
        raise UserError(
            f"--host {host}: not an address of this machine ({error.strerror})"
        ) from error


def largest_request(repository: Path, max_image_bytes: int) -> int:
    """Bytes that a request to any of a repository's models may have: a batch of pictures, encoded
    or not, and some room for names; at least 256 MiB.
    """
    config = _front_door(repository)
    if config is None:  # of other models
        return _LEAST_MESSAGE
    about = _about(config)
    pixels = 3 * about.get("height", 0) * about.get("width", 0)
    batch = max(1, config.max_batch_size)
    return max(_LEAST_MESSAGE, batch * max(max_image_bytes, pixels) + 2**20)


def about_served(repository: Path) -> dict:
    """What a repository's front door tells of the bundle; nothing in one of other models."""
    config = _front_door(repository)
    return _about(config) if config else {}


def _front_door(repository: Path) -> ModelConfig | None:
    path = repository / "features" / CONFIG
    return read_config(path) if path.exists() else None


def _about(config: ModelConfig) -> dict:
    return json.loads(config.parameters["about"].string_value or "{}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name is looked up, and unknown ones are not
    loopback.
    """
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # the latter of names that cannot be
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def inner_address(folder: Path) -> tuple[str, int]:
    """Host and port for a tritonserver behind a front: a socket in a private folder, which no other
    user reaches, or a port of 127.0.0.1 where that folder's path is too long for one.
    """
    path = f"unix:{folder.absolute() / 'grpc'}"  # tritonserver appends the port
    if len(f"{path}:1") < _LONGEST_SOCKET:
        return path, 1
    return "127.0.0.1", choose_ports({"grpc": 0}, "127.0.0.1")["grpc"]
