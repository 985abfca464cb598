"""Licences and hashes of weights in a folder or repository of a model hub, as its card and
configuration state them.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from contract.errors import first_line
from contract.files import file_sha256
from contract.licences import LICENCE
from contract.tables import entry
from distill.models.hub import WEIGHTS, quiet_hub

log = logging.getLogger(__name__)

CONFIG = "config.json"

_UNREACHABLE = (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OSError,
    ValueError,
)
"""What the hub's client raises for what it cannot fetch."""

_MOST_CARD = 2**18
"""Bytes read of a card, whose front matter is at its start."""

_OURS = "inherited-from-teachers"
"""What cards of our own students name in a licence's place: the licences are listed elsewhere."""

_FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def plain_licence(value: object) -> str | None:
    """A licence's name as we write it, in lower case; None for what names none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    name = re.sub(r"\s+", "-", value.strip().lower()) if isinstance(value, str) else ""
    known = re.search(LICENCE, name) and len(name) <= 100 and name not in ("unknown", "none")
    return name if known else None


def _licence_of_card(path: Path) -> str | None:
    """`license` of a model card's front matter, or `license_name` where that is "other"."""
    try:
        with path.open(encoding="utf-8") as file:
            front = _FRONT.match(file.read(_MOST_CARD))
        values = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    licence, name = plain_licence(values.get("license")), values.get("license_name")
    if licence != "other":
        return licence
    return None if name == _OURS else plain_licence(name) or licence


def folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; empty where there is none that can be read."""
    return _read_config(folder / CONFIG)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def licence_in_folder(folder: Path) -> str | None:
    """What a folder says of its weights: its card, or timm's or transformers' config.json."""
    config = folder_config(folder)
    own = config.get("pretrained_cfg")
    recorded = own.get("license") if isinstance(own, dict) else config.get("license")
    if "vfm_distill" in config:  # the record is of the architecture's default weights
        recorded = None
    return _licence_of_card(folder / "README.md") or plain_licence(recorded)


def licence_on_hub(repository: str, revision: str | None = None) -> str | None:
    """What the card of a repository says, of the local cache or else fetched; None where it cannot
    be, or says nothing.
    """
    try:
        card = _on_hub(repository, "README.md", revision)
    except _UNREACHABLE:
        return None
    return _licence_of_card(card) if card else None


def config_on_hub(repository: str, revision: str | None = None) -> dict[str, Any] | None:
    """config.json of a repository, of the local cache or else fetched: empty where it has none that
    can be read, None where nobody knows, which is logged.
    """
    try:
        path = _on_hub(repository, CONFIG, revision)
    except _UNREACHABLE as error:
        words = (
            f"{CONFIG} of hf-hub:{repository} cannot be read ({first_line(error)}): its licence, "
            "and those of its own teachers if it is a student, are unknown"
        )
        log.warning("%s", entry("licences", words))
        return None
    return _read_config(path) if path else {}


def _on_hub(repository: str, name: str, revision: str | None) -> Path | None:
    """A file of a repository in the local cache, fetched where it is not there; None for a
    repository without one. Raises one of `_UNREACHABLE`.
    """
    path = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(path, str):
        return Path(path)
    if path is not None:  # the cache remembers that there is none
        return None
    try:
        with quiet_hub():
            return Path(hf_hub_download(repository, name, revision=revision))
    except RemoteEntryNotFoundError:
        return None


def sha256_from_hub(repository: str, revision: str | None = None) -> str | None:
    """Hash of a repository's weights in the local cache; None where they are not there."""
    try:
        path = try_to_load_from_cache(repository, WEIGHTS, revision=revision)
    except (HFValidationError, OSError, ValueError):
        return None
    return file_sha256(Path(path)) if isinstance(path, str) else None
