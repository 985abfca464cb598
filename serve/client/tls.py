"""TLS between client and server: the files of a connection, read where an error can still be
reported in one line.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import grpc

from serve.errors import NotAllowed


@dataclass(frozen=True)
class Tls:
    """PEM files. `root`: authority of servers (None: the system's); `certificate` and `key`: this
    client's (mTLS).
    """

    root: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC channel; raises NotAllowed for files that cannot be read, or half of a
        pair.
        """
        if (self.certificate is None) != (self.key is None):
            raise NotAllowed(
                "TLS: a client's certificate and its key go together: give both or none"
            )
        contents = {}
        for name in ("root", "certificate", "key"):
            path = getattr(self, name)
            try:
                contents[name] = None if path is None else Path(path).read_bytes()
            except OSError as error:
                raise NotAllowed(
                    f"TLS {name} {path}: {error.strerror} (give a PEM file)"
                ) from error
        return grpc.ssl_channel_credentials(
            contents["root"], contents["key"], contents["certificate"]
        )


def read_tls(args: argparse.Namespace) -> Tls | None:
    """TLS files from the options of `add_tls`; None without TLS."""
    if args.ssl or args.ssl_root or args.ssl_certificate or args.ssl_key:
        return Tls(args.ssl_root, args.ssl_certificate, args.ssl_key)
    return None


def add_tls(parser: argparse.ArgumentParser) -> None:
    """TLS options of commands that connect to a server; `read_tls` reads them."""
    parser.add_argument(
        "--ssl", action="store_true", help="use TLS and trust the system's authorities"
    )
    parser.add_argument(
        "--ssl-root",
        type=Path,
        metavar="PEM",
        help="TLS: authority that signed the server's certificate",
    )
    parser.add_argument(
        "--ssl-certificate", type=Path, metavar="PEM", help="mTLS: this client's certificate"
    )
    parser.add_argument("--ssl-key", type=Path, metavar="PEM", help="mTLS: its private key")
