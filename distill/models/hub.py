"""Fetching weights from the Hugging Face hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download

from contract.errors import UserError, first_line

HUB = "hf-hub:"
"""Prefix of a checkpoint that is a repository."""

WEIGHTS = "model.safetensors"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's client from printing every retry; what fails at last is said in one line."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def file_on_hub(place: str) -> Path:
    """The weights of OWNER/NAME[@REVISION] in the hub's local cache, fetched where they are not
    there; raises UserError where they cannot be.
    """
    repository, _, revision = place.partition("@")
    try:
        with quiet_hub():
            return Path(hf_hub_download(repository, WEIGHTS, revision=revision or None))
    except Exception as error:  # the hub's client raises errors of many kinds
        raise UserError(
            f"cannot fetch {WEIGHTS} of {HUB}{place} ({first_line(error)}): give a downloaded "
            "file as checkpoint"
        ) from error
