"""What a tritonserver has loaded after its start: all of it, or a broken new version left out, or
the reason why not.

Of a model that serves several versions Triton loads all or, at a start, none: one broken version
that a rollout left behind would keep the good one from serving. Such a model is loaded again with a
configuration that names the good versions.
"""

import re
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serve.errors import ServerError
from serve.repository.contents import read_made_with
from serve.server.rest import Refused, Rest

CONFIG = "config.pbtxt"


def load_rest(rest: Rest, repository: Path, log: Callable[[str], None]) -> dict[str, str]:
    """Get every model loaded; returns the configurations that had to be narrowed, by model.

    Raises ServerError with the reason of the first model that has no version to load.
    """
    narrowed: dict[str, str] = {}
    models = read_made_with(repository).models
    while True:
        index = _read_index(rest)
        states = {name: index.get(name, {}) for name in models}
        missing = [
            name
            for name, versions in states.items()
            if not any(state == "READY" for state, _ in versions.values())
        ]
        if not missing:
            return narrowed
        # an ensemble fails with its steps, and says nothing of itself: steps first
        name = min(missing, key=lambda name: (_is_ensemble(repository / name), name))
        failed = {
            version: reason
            for version, (_, reason) in states[name].items()
            if reason not in ("", "unloaded")
        }
        good = sorted(
            {path.name for path in (repository / name).iterdir() if path.name.isdecimal()}
            - set(failed),
            key=int,
        )
        reason = one_line(next(iter(failed.values()), ""))
        if _is_ensemble(repository / name):
            load(rest, name)
        elif good and failed and name not in narrowed and not _is_pinned(repository / name):
            log(
                f"warning: {name} version {', '.join(failed)} does not load: {reason}; serving "
                f"version {', '.join(good)}"
            )
            narrowed[name] = _with_versions(repository / name / CONFIG, good)
            load(rest, name, narrowed[name])
        else:
            raise ServerError(
                f"model '{name}' does not load: {reason or 'tritonserver gives no reason'}"
            )


def load(rest: Rest, name: str, config: str = "") -> None:
    """Load a model; raises ServerError with Triton's reason."""
    try:
        rest.load(name, config)
    except Refused as error:
        raise ServerError(f"model '{name}' does not load: {one_line(str(error))}") from error


def _read_index(rest: Rest) -> dict[str, dict[str, tuple[str, str]]]:
    """State and reason by model and version; a model that was never tried has a version ""."""
    result: dict[str, dict[str, tuple[str, str]]] = {}
    for entry in rest.index():
        versions = result.setdefault(entry["name"], {})
        versions[entry.get("version", "")] = entry.get("state", ""), entry.get("reason", "")
    return result


def read_config(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())


def _is_ensemble(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_config(folder / CONFIG).platform == "ensemble"


def _is_pinned(folder: Path) -> bool:
    """Whether a model's configuration is of one version: another one would be a rollout."""
    return bool(read_config(folder / CONFIG).version_policy.specific.versions)


def _with_versions(path: Path, versions: list[str]) -> str:
    """A configuration that serves these versions, as the JSON that Triton takes in place of the
    file.
    """
    config = read_config(path)
    config.version_policy.specific.versions[:] = map(int, versions)
    return json_format.MessageToJson(config, preserving_proto_field_name=True)


def one_line(text: str) -> str:
    """What Triton says, without the trace of a python model that follows."""
    lines = [line.strip() for line in re.split(r"\n|\\n", text) if line.strip()]
    return lines[0] if lines else ""
