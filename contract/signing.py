"""Signatures of bundles: ed25519 over the bytes of a manifest, which lists the sha256 of every
other file, in `manifest.sig` beside it. openssl makes and verifies the same.
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contract.errors import UserError
from contract.files import write_atomically
from contract.names import MANIFEST, SIGNATURE
from contract.untrusted import read_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MOST_BYTES = 2**16
"""Of a key's file."""
_MAKE = "make one with openssl genpkey -algorithm ed25519 -out key.pem"


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option `--trust`."""
    parser.add_argument(
        "--trust",
        type=Path,
        action="append",
        default=[],
        metavar="KEY",
        help="public key (PEM), may be given several times: refuse a bundle that none has signed",
    )


class PublicKey:
    """A key that signatures are checked with."""

    def __init__(self, path: Path) -> None:
        """Read a PEM file; raises UserError for a file that does not hold an ed25519 public key."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        again = "give a PEM file: openssl pkey -in key.pem -pubout -out public.pem"
        data = read_file(path, _MOST_BYTES, again, links=True)
        try:
            key = load_pem_public_key(data)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UserError(f"--trust {path} does not hold a public key: {again}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(f"--trust {path} is not a key of ed25519: {_MAKE}")
        self._key = key
        self.fingerprint = hashlib.sha256(key.public_bytes_raw()).hexdigest()
        """Names the key, in repositories that were rendered from what it signed."""

    def has_signed(self, data: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


def read_private_key(path: Path, option: str) -> "Ed25519PrivateKey":
    """Read a PEM file; raises UserError, which names the option, for a file that does not hold an
    ed25519 private key without a password.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_file(path, _MOST_BYTES, _MAKE, links=True)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise UserError(
            f"{option} {path} has a password: give a copy without (openssl pkey -in {path} -out "
            "plain.pem)"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{option} {path} does not hold a private key: {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{option} {path} is not a key of ed25519: {_MAKE}")
    return key


def write_signature(bundle: Path, manifest: bytes, key: "Ed25519PrivateKey") -> None:
    """Put the signature of a manifest's bytes beside it, by rename."""
    signature = key.sign(manifest)
    write_atomically(bundle / SIGNATURE, lambda temporary: temporary.write_bytes(signature))


def signer(bundle: Path, manifest: bytes, keys: Sequence[PublicKey]) -> PublicKey | None:
    """The key that has signed the bytes of a manifest, None where no keys are given; raises
    UserError where none of them has.
    """
    if not keys:
        return None
    again = f"sign it with python -m export.sign {bundle} --key KEY, or leave --trust out"
    if not os.path.lexists(bundle / SIGNATURE):
        raise UserError(f"{bundle} is not signed, and --trust asks for it: {again}")
    signature = read_file(bundle / SIGNATURE, _MOST_BYTES, again)
    for key in keys:
        if key.has_signed(manifest, signature):
            return key
    raise UserError(
        f"{bundle / SIGNATURE} is of none of the keys of --trust, or {MANIFEST} was changed after "
        f"it was signed: {again}"
    )
