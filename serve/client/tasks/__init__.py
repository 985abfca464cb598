"""Tasks on features: maps (segmentation, depth) and zero-shot classification, by a head on the
server or on the client.

Every task is a function of a client and pictures. Given an AsyncFeatureClient it returns something
to await.
"""

from typing import Literal

from serve.errors import BadRequest

Side = Literal["server", "client"]
"""Where a task's last step runs: in the server's own model for it, or here, from features."""


def check_side(side: str) -> None:
    """Raise BadRequest for an unknown side."""
    if side not in ("server", "client"):
        raise BadRequest(f"side='{side}': choose 'server' or 'client'")
