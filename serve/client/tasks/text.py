"""Embeddings of texts in the space of a CLIP teacher's token, by the server's text encoder."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from serve.client.calls import Calls
from serve.client.options import RequestOptions
from serve.client.steps import Steps
from serve.errors import BadRequest, NotServed

TEXT_ENCODER = "text_encoder"
"""Triton's name of the model."""


def embed_texts(
    client: Any,
    texts: Sequence[str],
    options: RequestOptions = RequestOptions(),
    **changes: Any,
) -> np.ndarray:
    """A unit vector for each text, float32 [n, d], to compare by cosine with the token of the
    teacher that the server's `zero_shot` names.

    Each text is put into the bundle's prompt templates, as the labels of zero-shot classification
    are. Of `options`, `timeout` and `request_id` count. Raises a ClientError: NotServed if the
    bundle has no text encoder, BadRequest for an empty or too long text.
    """
    return client.run(_steps(client.calls, list(texts), replace(options, **changes)))


def _steps(calls: Calls, texts: list[str], options: RequestOptions) -> Steps[np.ndarray]:
    options = options.complete(calls.options)
    deadline = time.monotonic() + options.timeout
    try:
        labels = np.array([text.encode() for text in texts], dtype=np.object_)
    except UnicodeEncodeError as error:
        raise BadRequest("a text holds half a character: give valid Unicode") from error
    try:
        served = yield from calls.describe(TEXT_ENCODER, options.timeout, options.request_id)
    except NotServed as error:
        error.message = (
            "the server has no text encoder: python -m export.text --with-encoder adds it to the "
            "bundle"
        )
        raise
    answer = yield from calls.infer(
        served,
        {"labels": labels},
        ["embeddings"],
        deadline,
        len(texts),
        options.request_id,
        hurry=False,
    )
    return answer["embeddings"]
