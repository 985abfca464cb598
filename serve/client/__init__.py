"""Clients of a running server: `FeatureClient`, and
`serve.client.aio.AsyncFeatureClient` for asyncio.

`sync.py` and `aio.py` only wait differently; `calls.py` has the logic between sending and
receiving.
"""

from serve.client.sync import FeatureClient

__all__ = ["FeatureClient"]
