"""timm networks of a folder or a hub's repository: `local-dir:FOLDER` and `hf-hub:OWNER/NAME`, with
timm's own config.json and weights.
"""

from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from contract.errors import UserError, first_line, suggest
from distill.config import StudentConfig
from distill.fields import source_of
from distill.models.hub import WEIGHTS, quiet_hub

LOCAL = "give a downloaded copy as local-dir:FOLDER, or timm's architecture and its file"
"""What to do where a hub cannot be reached, to be continued by the key of the file."""

ADAPTED = "vfm_distill_adapter"
"""What `export.hub` calls the architecture of a student that is more than a network of timm."""


class Source(NamedTuple):
    """What timm's config.json says: the architecture, its arguments, and the record of its
    weights.
    """

    architecture: str
    arguments: dict[str, Any]
    record: dict[str, Any]


def read_source(name: str) -> Source | None:
    """The config.json behind a name with one of timm's prefixes; None for a plain name of timm's.

    Raises UserError for a folder or repository that is missing, cannot be reached or is not timm's,
    and for a network that is none of timm's.
    """
    kind, place = source_of(name)
    if not kind:
        return None
    if kind not in ("hf-hub", "local-dir"):
        raise UserError(
            f"{name} is not a timm network, which is needed here: name one of timm's, "
            "hf-hub:OWNER/NAME or local-dir:FOLDER"
        )
    try:
        if kind == "local-dir":
            record, architecture, arguments = load_model_config_from_path(place)
        else:
            with quiet_hub():
                record, architecture, arguments = load_model_config_from_hf(place)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: its config.json is not timm's (no architecture): for a network of "
            f"transformers write hf:{place}"
        ) from error
    except Exception as error:  # the hub's client raises errors of many kinds
        if kind == "hf-hub":
            raise _unreachable(name, error) from error
        raise _missing(name, Path(place), error) from error
    if architecture == ADAPTED:
        raise UserError(
            f"{name}: a student with its adapter, which timm cannot build: give its run folder "
            "(name: run of a teacher, checkpoint of a student)"
        )
    if not timm.is_model(architecture):
        raise UserError(
            f"{name}: its architecture '{architecture}' is not one of this timm's: "
            f"{suggest(str(architecture), timm.list_models())}"
        )
    return Source(architecture, dict(arguments or {}), dict(record))


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(f"cannot read {name} ({first_line(error)}): {LOCAL} as checkpoint")


def _missing(name: str, folder: Path, error: Exception) -> UserError:
    if not folder.is_dir():
        return UserError(f"{name}: no such folder (correct it, or download the repository there)")
    if not (folder / "config.json").is_file():
        return UserError(
            f"{name}: config.json is missing: give a folder that timm has saved, or name the "
            "architecture and set checkpoint to the file of weights"
        )
    return UserError(f"{name}: config.json cannot be read ({first_line(error)})")


def need_weights(name: str) -> None:
    """Raise UserError for a folder without safe weights, of which timm would read a pickle."""
    kind, place = source_of(name)
    if kind == "local-dir" and not (Path(place) / WEIGHTS).is_file():
        raise UserError(
            f"{name}: {WEIGHTS} is missing: save the weights there, set checkpoint to their file, "
            "or pretrained to false for random ones"
        )


def settled_student(student: StudentConfig) -> StudentConfig:
    """A student of a folder or repository as its architecture, arguments and checkpoint, so that
    its run can be rebuilt without either.

    Raises UserError as `read_source` and `need_weights`, and for networks that are not timm's.
    """
    kind, place = source_of(student.name)
    if not kind:
        return student
    if kind not in ("hf-hub", "local-dir"):
        raise UserError(
            f"student.name = {student.name}: students are timm networks (a name of timm's, "
            "hf-hub:OWNER/NAME or local-dir:FOLDER); those of transformers and of own code can be "
            "teachers"
        )
    source = read_source(student.name)
    if student.pretrained and not student.checkpoint:
        need_weights(student.name)
    # the picture's side is the recipe's, and a student has no classifier
    own = {"img_size", "num_classes"}
    arguments = {k: v for k, v in source.arguments.items() if k not in own and v is not None}
    if source.record.get("global_pool") is not None:  # decides where a ViT's last norm is
        arguments.setdefault("global_pool", source.record["global_pool"])
    update: dict[str, Any] = {
        "name": source.architecture,
        "kwargs": arguments | student.kwargs,
        "pretrained": False,
    }
    if student.pretrained and not student.checkpoint:
        update["checkpoint"] = str(Path(place) / WEIGHTS) if kind == "local-dir" else student.name
        for key in ("mean", "std"):
            if source.record.get(key) and key not in student.model_fields_set:
                update[key] = tuple(source.record[key])
    return student.model_copy(update=update)
