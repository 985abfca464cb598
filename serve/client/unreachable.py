"""Why a connection to a server failed, where gRPC's own words hide it: another protocol's port, or
a proxy that the environment names.
"""

import os
import re
import socket
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

_HTTP = ("Expected SETTINGS frame", "http1.x server", "Failed parsing HTTP/2")
_HTTP_PORT = (
    "the server there answers HTTP/1.1, not gRPC: this is an HTTP or metrics port; gRPC's is 8001 "
    "unless serve.run printed another"
)
_CUT_OFF = re.compile(
    r"failed to connect.*ipv[46]:(?P<host>\S+):(?P<port>\d+): .*(Socket closed|[Cc]onnection reset)"
)
"""Of a peer that hangs up on gRPC's first bytes, as Triton's HTTP does, and a server that ends."""
_PROBE_SECONDS = 2.0
_PROXY_CODE = re.compile(r"HTTP proxy returned response code (\d+)")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables that gRPC reads, the first that is set; capitals are not read."""


def explain(message: str, environment: Mapping[str, str] = os.environ) -> tuple[str, bool]:
    """What gRPC's message of a connection that failed means, "" for nothing beyond what it says;
    and whether trying again may help.
    """
    if any(words in message for words in _HTTP):
        return _HTTP_PORT, False
    if "WRONG_VERSION_NUMBER" in message:
        return (
            "the server there does not answer in TLS: leave out TLS (--ssl), or name the gRPC port",
            False,
        )
    where, variable = _proxy(environment)
    code = _PROXY_CODE.search(message)
    remedy = "if the server is not behind it, name the server in the variable no_proxy"
    if code:
        proxy = f"the proxy {where} ({variable} in the environment)" if where else "the proxy"
        return f"{proxy} refused the connection with HTTP {code[1]}: {remedy}", False
    # gRPC names the address that it tried: that of the proxy, if it took one
    if where and re.search(rf":{where.rpartition(':')[2]}\b", message):
        return f"no answer from the proxy {where} ({variable} in the environment): {remedy}", True
    return "", True


def is_cut_off(message: str) -> bool:
    """Whether a peer hung up on gRPC's first bytes, so that `ask_in_http` may tell what it is."""
    return _CUT_OFF.search(message) is not None


def ask_in_http(message: str) -> str:
    """What the peer of a connection that was cut off is, if it is an HTTP port; "" otherwise. Opens
    a connection of its own.
    """
    match = _CUT_OFF.search(message)
    if match is None:
        return ""
    address = unquote(match["host"]).strip("[]"), int(match["port"])
    try:
        with socket.create_connection(address, _PROBE_SECONDS) as there:
            there.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: server\r\n\r\n")
            return _HTTP_PORT if there.recv(5, socket.MSG_WAITALL) == b"HTTP/" else ""
    except OSError:
        return ""


def _proxy(environment: Mapping[str, str]) -> tuple[str, str]:
    """HOST:PORT of the proxy that gRPC takes and the variable that names it; "" and "" for none."""
    for name in _PROXIES:
        if environment.get(name):
            try:
                address = urlsplit(environment[name])
                where = f"{address.hostname}:{address.port or 80}"
            except ValueError:  # a port that is no number
                break
            return (where, name) if address.hostname else ("", "")
    return "", ""
