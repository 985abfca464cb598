"""The golden photographs of a bundle in a repository: beside the version of the front door that
they are of, so that a start without the bundle, and one after a rollout, has them too.
"""

from dataclasses import replace
from pathlib import Path

from contract.errors import UserError
from contract.golden import GOLDEN, Golden, read_golden
from serve.bundle import Bundle

DOOR = "features"


def golden_of(bundle: Bundle) -> Golden:
    """A bundle's golden set, with the largest errors of its comparison added; raises UserError for
    a bundle that has none, and as `read_golden` does.
    """
    golden = read_golden(bundle.path / GOLDEN, bundle.read(GOLDEN))
    for tensor in bundle.outputs:
        if tensor.name not in golden.outputs:
            raise UserError(
                f"{bundle.path / GOLDEN} has no output '{tensor.name}', which the bundle has: "
                "export again"
            )
    measured: dict[str, float] = {}
    for row in bundle.manifest.parity:
        measured[row.output] = max(row.relative, measured.get(row.output, 0.0))
    return replace(golden, measured=measured)


def golden_file(bundle: Bundle) -> dict[str, bytes]:
    """The same as a file for a repository; none of a bundle that has no golden set."""
    return {GOLDEN: golden_of(bundle).to_bytes()} if GOLDEN in bundle.manifest.files else {}


def served_golden(repository: Path, version: int) -> Golden | None:
    """The golden set of a version of a repository, None where it has none; raises UserError for a
    damaged one.
    """
    path = repository / DOOR / str(version) / GOLDEN
    return read_golden(path) if path.is_file() else None
