"""Licences of the weights that a student learns from, as far as their publishers state them: what
it inherits is recorded with it, and a run that must not inherit it is refused before it starts.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from pydantic import TypeAdapter, ValidationError

from contract.errors import UserError, printable
from contract.files import file_sha256
from contract.licences import Flag, LicenceRecord
from distill.config import DETECTOR, Recipe, StudentConfig, TeacherConfig
from distill.fields import source_of
from distill.models.cards import (
    config_on_hub,
    folder_config,
    licence_in_folder,
    licence_on_hub,
    plain_licence,
    sha256_from_hub,
)
from distill.models.hub import WEIGHTS
from distill.models.packaged import PACKAGE, WHEELS, checkpoint_path
from distill.models.start import is_of_a_run, run_metadata
from distill.models.user_code import code_sha256

KEY = "licences"
"""In the metadata of student.safetensors: a JSON list of `LicenceRecord`s."""

STUDENT = "student"
"""Label of the student's own starting weights."""

_STANDARD = frozenset(
    """0bsd afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0
    cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nd-4.0
    ecl-2.0 epl-2.0 eupl-1.2 gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl ncsa
    pddl postgresql unlicense wtfpl zlib""".split()
)
"""Licences of common texts; all others are flagged as custom, which somebody has to read."""

_NON_COMMERCIAL = re.compile(
    r"(^|[-_.])(nc|non-?commercial|research-only)([-_.]|$)"
    # Apple's for its research models, Meta's for SEER
    r"|^(apple-)?amlr$|^seer-license$"
)
"""Licences that forbid commercial use. DINOv3's allows it, on conditions of its own: custom."""

_ON_HUB = {
    # LICENSE of github.com/IDEA-Research/GroundingDINO
    "IDEA-Research/grounding-dino-tiny": "apache-2.0",
    "IDEA-Research/grounding-dino-base": "apache-2.0",
}
"""Repositories whose licence is known without asking a hub."""

_STATED = " (licence stated in the recipe)"

_RECORDS = TypeAdapter(tuple[LicenceRecord, ...])


class _Origin(NamedTuple):
    """What is known of weights. `inherited` is what they were learnt from themselves, None where
    they are a publisher's and their licence is of interest.
    """

    source: str
    sha256: str | None = None
    licence: str | None = None
    inherited: tuple[LicenceRecord, ...] | None = None


_RANDOM = _Origin("random weights", inherited=())


def flags_of(licence: str | None) -> tuple[Flag, ...]:
    """What a user must know of a licence; `unknown` for None."""
    if licence is None:
        return ("unknown",)
    flags: tuple[Flag, ...] = ("non-commercial",) if _NON_COMMERCIAL.search(licence) else ()
    return flags if licence in _STANDARD else (*flags, "custom")


def inherited(recipe: Recipe) -> tuple[LicenceRecord, ...]:
    """What a student of a recipe inherits: from its own starting weights, and from each teacher, in
    their order.

    Files are read once for a run (see `check_licences`): what it records is what it began with.
    """
    keys = [config.model_dump_json() for config in (recipe.student, *recipe.teachers)]
    return tuple(_with_hash(record) for record in _inherited(*keys))


@lru_cache(maxsize=16)
def _inherited(student: str, *teachers: str) -> tuple[LicenceRecord, ...]:
    """`inherited` of configurations as JSON, which is hashable."""
    start = StudentConfig.model_validate_json(student)
    records = []
    if start.checkpoint or start.pretrained:
        origin = (
            _of_checkpoint(start.name, start.checkpoint)
            if start.checkpoint
            else _of_name(start.name)
        )
        records += _records(STUDENT, start.name, origin, start.licence)
    for text in teachers:
        teacher = TeacherConfig.model_validate_json(text)
        records += _records(teacher.label, teacher.name, _of_teacher(teacher), teacher.licence)
    return tuple(records)


def _with_hash(record: LicenceRecord) -> LicenceRecord:
    """The record with the hash of what a hub has sent since the run began."""
    kind, place = source_of(record.source)
    if record.sha256 or kind not in ("hf-hub", "hf"):
        return record
    return record.model_copy(update={"sha256": sha256_from_hub(*_parted(place.split(" ")[0]))})


def check_licences(recipe: Recipe) -> None:
    """Read what a run of the recipe would inherit anew, and raise UserError for a licence that
    `train.allowed_licences` does not name.
    """
    _inherited.cache_clear()
    records, allowed = inherited(recipe), recipe.train.allowed_licences
    if allowed is None:
        return
    listed = ", ".join(allowed) or "none"
    keys = {teacher.label: f"teachers.{i}" for i, teacher in enumerate(recipe.teachers)}
    for record in records:
        label = record.label.partition(".")[0]
        key = keys.get(label, "student")
        whose = f"teacher '{record.label}'" if label in keys else "student"
        if "unknown" in record.flags:
            raise UserError(
                f"{whose}: the licence of {record.source} is unknown, and train.allowed_licences = "
                f"{listed}: state it with {key}.licence=ID if you know it, or use other weights"
            )
        if record.licence is not None and record.licence not in allowed:
            raise UserError(
                f"{whose}: {record.source} has the licence {record.licence}, which "
                f"train.allowed_licences = {listed} does not name: use other weights, or add it"
            )


def inheritance(recipe: Recipe) -> list[str]:
    """Lines for a terminal: what a student of a recipe inherits, and from whom."""
    lines = [record.words for record in inherited(recipe)]
    return lines or ["nothing: random weights and no teachers"]


def dump_licences(records: tuple[LicenceRecord, ...]) -> str:
    """The JSON of metadata."""
    return json.dumps([record.model_dump(mode="json") for record in records])


def recorded(metadata: Mapping[str, str], path: Path | str) -> tuple[LicenceRecord, ...]:
    """What the file of a run says that its student inherits. Of a file of earlier versions, which
    did not record it, all is unknown but what a name alone says (timm's, a package's).

    Raises UserError for a record that is damaged.
    """
    if KEY in metadata:
        try:
            return _RECORDS.validate_json(metadata[KEY])
        except ValidationError as error:
            raise UserError(
                f"{path}: what it says of {KEY} cannot be read: train again or copy it again"
            ) from error
    try:
        values = yaml.safe_load(metadata["recipe"])
        teachers = [TeacherConfig.model_validate(value) for value in values["teachers"]]
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        teachers = []
    records = []
    for teacher in teachers:
        file = teacher.checkpoint and not teacher.checkpoint.startswith(PACKAGE)
        named = not file and not source_of(teacher.name)[0]
        origin = _of_teacher(teacher) if named else _Origin("not recorded by an earlier version")
        records += _records(teacher.label, teacher.name, origin, teacher.licence)
    return tuple(records)


def without_folders(record: LicenceRecord) -> LicenceRecord:
    """A record for others to read: of files and folders of this machine only the last part of the
    name is told.
    """
    kind, _, place = record.source.partition(" ")
    source = record.source
    if kind in ("folder", "file", "run"):  # as the functions below write them
        stated = _STATED if place.endswith(_STATED) else ""
        source = f"{kind} {last_part(place.removesuffix(_STATED))}{stated}"
    name = shortened_name(record.name, hub_places([record]))
    return record.model_copy(update={"name": name, "source": source})


def hub_places(records: Iterable[LicenceRecord]) -> set[str]:
    """OWNER/NAME[@REVISION] of every record whose weights a hub sent."""
    sources = (source_of(record.source.removesuffix(_STATED)) for record in records)
    return {place for kind, place in sources if kind == "hf-hub"}


def shortened_name(name: str, on_hub: set[str]) -> str:
    """A network's name or a checkpoint of a recipe, whole where it is no place of this machine: a
    path by its last part. `hf:a/b` may be either, so that `on_hub` decides.
    """
    kind, place = source_of(name)
    if kind in ("hf-hub", "python") or name.startswith(PACKAGE) or place in on_hub:
        return name
    return f"{kind}:{last_part(place)}" if kind else last_part(name)


def last_part(path: str) -> str:
    """A path's last part, of either system's."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _records(label: str, name: str, origin: _Origin, stated: str | None) -> list[LicenceRecord]:
    """An origin's entry, and those of what it had learnt from; `stated` is the recipe's word, which
    for an earlier run fills in what that did not know.
    """
    licence = stated or origin.licence
    whole = licence is not None or origin.inherited is None  # an own student may have none
    own = LicenceRecord(
        label=label,
        name=printable(name)[:2000],
        source=printable(origin.source + (_STATED if stated else ""))[:2000],
        sha256=origin.sha256,
        licence=licence,
        flags=flags_of(licence) if whole else (),
    )
    result = [own]
    for record in origin.inherited or ():
        update: dict = {"label": f"{label}.{record.label}"[-400:]}
        if "unknown" in record.flags and stated:
            update |= {"licence": stated, "flags": flags_of(stated)}
            update["source"] = f"{record.source}{_STATED}"[:2000]
        result.append(record.model_copy(update=update))
    return result


def _of_teacher(config: TeacherConfig) -> _Origin:
    if config.name == "run":
        return _of_run(Path(config.checkpoint or ""), config.checkpoint or "")
    if config.name == DETECTOR:
        return _of_place(config.checkpoint) if config.checkpoint else _RANDOM
    if config.checkpoint:
        return _of_checkpoint(config.name, config.checkpoint)
    kind, _ = source_of(config.name)
    return _of_name(config.name) if config.pretrained or kind == "python" else _RANDOM


def _of_name(name: str) -> _Origin:
    """Of a network whose weights its name finds."""
    kind, place = source_of(name)
    if kind == "python":
        return _Origin(name, code_sha256(name))
    if kind:
        return _of_place(place, kind)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag, which building the network says
        config = None
    if config is None:
        return _Origin(name)
    repository = config.hf_hub_id
    source = f"hf-hub:{repository}" if repository else config.url or f"timm's {name}"
    return _Origin(source, licence=plain_licence(config.license))


def _of_place(place: str, kind: str = "hf") -> _Origin:
    """Of a folder as hubs have them, or of a hub's repository."""
    folder = Path(place)
    if kind == "local-dir" or folder.is_dir():
        file = folder / WEIGHTS
        return _Origin(
            f"folder {place}", _hash_of(file), licence_in_folder(folder), _of_our_folder(folder)
        )
    repository, revision = _parted(place)
    if kind == "hf-hub" and repository.startswith("timm/"):
        return _of_name(repository.removeprefix("timm/"))
    source = f"hf-hub:{place}"
    if repository in _ON_HUB:
        return _Origin(source, licence=_ON_HUB[repository])
    config = config_on_hub(repository, revision)
    if config is None:  # a card alone does not say what a student inherits
        return _Origin(source)
    licence = licence_on_hub(repository, revision)
    return _Origin(source, licence=licence, inherited=_of_ours(config, f"{source}: config.json"))


def _of_our_folder(folder: Path) -> tuple[LicenceRecord, ...] | None:
    return _of_ours(folder_config(folder), folder / "config.json")


def _of_ours(config: Mapping[str, Any], path: Path | str) -> tuple[LicenceRecord, ...] | None:
    """What a student of this project inherits, whose config.json at `path` `export.hub` has
    written; None for weights of others.
    """
    own = config.get("vfm_distill")
    if not isinstance(own, dict) or KEY not in own:
        return None
    return recorded({KEY: json.dumps(own[KEY])}, path)


def _parted(place: str) -> tuple[str, str | None]:
    """A hub's repository and the revision behind its name."""
    repository, _, revision = place.partition("@")
    return repository, revision or None


def _of_checkpoint(name: str, checkpoint: str) -> _Origin:
    """Of a recipe's `checkpoint`."""
    if checkpoint.startswith(PACKAGE):
        package = checkpoint.removeprefix(PACKAGE)
        if package in WHEELS:
            wheel = WHEELS[package]
            return _Origin(f"{checkpoint} of {wheel.requirement}", wheel.sha256, wheel.licence)
        return _Origin(checkpoint, _hash_of(checkpoint_path(checkpoint)), "apache-2.0")
    kind, place = source_of(checkpoint)
    if kind:
        return _of_place(place, kind)
    path = Path(checkpoint)
    if path.is_dir() or is_of_a_run(path):
        return _of_run(path, checkpoint)
    metadata = run_metadata(path)
    licence = plain_licence(metadata.get("licence") or metadata.get("license"))
    ours = None
    if path.stem in ("model", "pytorch_model"):  # a hub's names: beside others may lie anything
        licence, ours = licence or licence_in_folder(path.parent), _of_our_folder(path.parent)
    if licence is None and ours is None and "." in name and not source_of(name)[0]:
        # a tag says whose weights a file has, as it does for mean and deviation
        licence = _of_name(name).licence
    return _Origin(f"file {checkpoint}", _hash_of(path), licence, ours)


def _of_run(path: Path, name: str) -> _Origin:
    """Of a run's folder or student.safetensors; what is not there loading says."""
    file = path / "student.safetensors" if path.is_dir() else path
    return _Origin(f"run {name}", _hash_of(file), inherited=recorded(run_metadata(file), file))


def _hash_of(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
