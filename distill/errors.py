"""The one exception type for a user's mistake; commands turn it into one line and exit status 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for: the message names the thing, the value and the remedy."""


class TrainingError(RuntimeError):
    """Training itself failed (it diverged, say); commands turn it into one line and exit status 1."""


def suggest(value: str, known: Iterable[str], show: int = 8) -> str:
    """Return "did you mean 'x'?" for the known name nearest to `value`, else the first known names."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    listed = ", ".join(known[:show]) + (", …" if len(known) > show else "")
    return f"known: {listed}"
