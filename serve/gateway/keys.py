"""API keys: where they come from, and which of them a request has."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from contract.errors import UserError
from contract.untrusted import read_file

VARIABLE = "GATEWAY_API_KEYS"
"""Environment variable that holds keys, with blanks or commas between them."""

_LEAST, _MOST = 16, 512
"""Characters of a key."""
_MOST_BYTES = 2**20
_MAKE = "make one with: openssl rand -hex 32"


class Keys:
    """Keys of which any one opens the endpoint. They are held as hashes, and never written out."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def number(self, authorization: str) -> int | None:
        """Which key an Authorization header holds, counted from 1; None for no key of these."""
        scheme, _, key = authorization.partition(" ")
        given, found = _hash(key.strip()), None
        # every key is compared, in a time that does not depend on where they differ
        for number, known in enumerate(self._hashes, 1):
            if hmac.compare_digest(given, known):
                found = number
        return found if scheme.lower() == "bearer" else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Keys of a file, one a line (`#`: a comment), and of the environment; raises UserError for a
    file without any, and for what is no key.
    """
    found: list[tuple[str, str]] = []
    if path is not None:
        try:
            text = read_file(path, _MOST_BYTES, "name a file of keys, one a line", True).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"--api-key-file {path} is not text: write a key a line") from error
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        found += [
            (f"--api-key-file {path}, line {number}", line)
            for number, line in lines
            if line and not line.startswith("#")
        ]
        if not found:
            raise UserError(f"--api-key-file {path} holds no key: {_MAKE}")
    if VARIABLE in environment:
        listed = environment[VARIABLE].replace(",", " ").split()
        if not listed:
            raise UserError(f"{VARIABLE} is set and holds no key: unset it, or {_MAKE}")
        found += [(f"{VARIABLE}, key {number}", key) for number, key in enumerate(listed, 1)]
    for where, key in found:
        if not _LEAST <= len(key) <= _MOST or not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"{where}: a key is {_LEAST} to {_MOST} printable ASCII characters without blanks: "
                f"{_MAKE}"
            )
    return Keys(key for _, key in found)
