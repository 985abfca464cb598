"""`python -m export.sign`: vouch for a bundle, so that servers with --trust take it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine
from contract.errors import UserError, exit_status
from contract.manifest import manifest_bytes, read_manifest
from contract.names import SIGNATURE
from contract.signing import read_private_key, write_signature
from export.bundle_files import verify_files

EPILOG = """\
examples:
  openssl genpkey -algorithm ed25519 -out key.pem
  openssl pkey -in key.pem -pubout -out public.pem
  python -m export.sign bundles/mine --key key.pem
  python -m serve.run bundles/mine --trust public.pem

Writes manifest.sig: an ed25519 signature over the bytes of manifest.json,
which lists the sha256 of every other file. A bundle whose files are not those
of its manifest is refused. Signing says that the bundle is yours, not that it
is good: python -m export.check verifies that. Sign again after export.text,
which changes the manifest and so removes the signature.

Exit status: 0 success, 2 usage error, or not a whole bundle.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = CommandLine(
        prog="python -m export.sign", description="Sign a bundle of export.run.", epilog=EPILOG
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="KEY", help="ed25519 private key (PEM)"
    )
    args = parser.parse_args(arguments)
    return exit_status(lambda: sign(args.bundle, args.key))


def sign(bundle: Path, key: Path) -> None:
    """Sign a bundle; raises UserError for a key that is not one, and for a folder that is not a
    whole bundle and nothing else.
    """
    private = read_private_key(key, "--key")
    data = manifest_bytes(bundle)
    for name, problem in verify_files(bundle, read_manifest(bundle, data)).items():
        if problem:
            raise UserError(
                f"{bundle}: {name[:200]!r}: {problem}: sign the bundle as it was exported"
            )
    write_signature(bundle, data, private)
    print(f"signed    {bundle / SIGNATURE}")


if __name__ == "__main__":
    sys.exit(main())
