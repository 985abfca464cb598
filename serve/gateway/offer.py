"""What the server behind the gateway has, asked again and again: which outputs are embeddings, and
whether it answers at all.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from contract.tasks import TASKS
from serve.client.aio import AsyncFeatureClient
from serve.client.served import ENCODED, FRONT_DOOR, Served, nearest, whole_view
from serve.client.tasks.text import TEXT_ENCODER
from serve.errors import ClientError, NotServed, shorten
from serve.gateway.errors import ApiError, unavailable

LOG = logging.getLogger("serve.gateway")

_EVERY, _EVERY_DOWN = 5.0, 1.0
"""Seconds between questions to a server that answers, and to one that does not."""
_ZERO_SHOT = "zero_shot"
_LONGEST_NAME = 100
"""Characters of a model's name: a longer one is not looked for."""


class Embedding(NamedTuple):
    """An output with one vector a picture."""

    name: str
    width: int
    texts: bool
    """Whether the server has the text encoder of the same space."""


@dataclass(frozen=True)
class Offer:
    """What a server has: its embeddings by name, and what it says of its bundle."""

    embeddings: Mapping[str, Embedding]
    others: tuple[str, ...] = ()
    """Outputs that are not embeddings."""
    about: Mapping[str, Any] = field(default_factory=dict)
    decodes: bool = False
    """Whether the server takes pictures as files."""
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def view(self) -> str | None:
        """The view that pictures are asked for with; None: the bundle's."""
        return whole_view(self.about)

    def choose(self, name: str) -> Embedding:
        """An embedding by name; raises ApiError for one that is not there."""
        if len(name) > _LONGEST_NAME:
            reason = f"no model '{shorten(name, 60)}' (GET /v1/models lists them)"
            raise ApiError(404, reason, "model_not_found", "model")
        if name in self.embeddings:
            return self.embeddings[name]
        if name in self.others:
            reason = f"the output '{name}' is not one vector a picture: ask python -m serve.client"
        else:
            near = nearest(name, self.embeddings)
            reason = f"no model '{shorten(name, 60)}'{near or ' (GET /v1/models lists them)'}"
        raise ApiError(404, reason, "model_not_found", "model")

    def listed(self, embedding: Embedding) -> dict[str, object]:
        """An embedding as an entry of GET /v1/models."""
        keys = ("student", "method", "precision", "bundle")
        teacher = embedding.name.removesuffix("_token")
        facts = next((t for t in self.about.get("teachers", ()) if t["label"] == teacher), None)
        return {
            "id": embedding.name,
            "object": "model",
            "created": self.since,
            "owned_by": "vfm-distill",
            "dimensions": embedding.width,
            "modalities": ["image", "text"] if embedding.texts else ["image"],
            **{key: self.about.get(key) for key in keys},
            "view": self.view or self.about.get("view"),
            "teacher": facts,
        }


class Watch:
    """Keeps an Offer that is as new as a few seconds. It has a client of its own, so that its
    questions take nothing from the retries of requests.
    """

    def __init__(self, client: AsyncFeatureClient) -> None:
        self.client = client
        self.changed: Callable[[str], None] = lambda line: None
        """Called with a line when the server is lost and when it is back."""
        self.reason: str | None = "it has not been asked yet"
        """Why the server cannot be used, None if it can."""
        self._offer = Offer({})
        self._doubt = asyncio.Event()

    @property
    def offer(self) -> Offer:
        """What the server has; raises ApiError while it does not answer."""
        if self.reason is not None:
            raise unavailable(self.reason)
        return self._offer

    def doubt(self) -> None:
        """A request has failed as it does when the server is gone: look at once."""
        self._doubt.set()

    async def look(self) -> None:
        """Ask the server once; raises ClientError if it does not answer."""
        try:
            found = await self._ask()
        except ClientError as error:
            before, self.reason = self.reason, error.message
            if before is None:
                self.changed(f"server lost: {error.message}")
            raise
        if found.about != self._offer.about or found.embeddings != self._offer.embeddings:
            if found.view and not self._offer.view:  # once, until another view is served
                LOG.warning(
                    f"the bundle's view is {found.about['view']}, and tiles have no one vector: "
                    f"embeddings are of the whole picture, view {found.view}"
                )
            self._offer = found
        if self.reason is not None:
            self.reason = None
            self.changed(f"server ready: {', '.join(found.embeddings) or 'no embeddings'}")

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            wait = _EVERY if self.reason is None else _EVERY_DOWN
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._doubt.wait(), wait)
                await asyncio.sleep(0.1)  # many requests fail together
            self._doubt.clear()
            with contextlib.suppress(ClientError):
                await self.look()

    async def _ask(self) -> Offer:
        front_door = await self._describe(FRONT_DOOR)
        if front_door is None:
            raise NotServed(f"it has no model '{FRONT_DOOR}': is it one of serve.run?")
        decoder, zero_shot, encoder = [
            await self._describe(model) for model in (ENCODED, _ZERO_SHOT, TEXT_ENCODER)
        ]
        about = (zero_shot.facts("about") if zero_shot else None) or {}
        texts = f"{about.get('teacher')}_token" if about.get("new_labels") and encoder else None
        scores = {task.output for task in TASKS.values()}
        embeddings = {
            port.name: Embedding(port.name, port.dims[0], port.name == texts)
            for port in front_door.outputs.values()
            if port.kind == "FP32" and len(port.dims) == 1 and port.name not in scores
        }
        others = tuple(name for name in front_door.outputs if name not in embeddings)
        return Offer(embeddings, others, front_door.facts("about") or {}, decoder is not None)

    async def _describe(self, model: str) -> Served | None:
        """A model as the server has it now, None for one that it has not."""
        try:
            return await self.client.run(self.client.calls.describe(model, fresh=True))
        except NotServed:
            return None
