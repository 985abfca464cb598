"""The versions of a bundle in a repository's folders: which serves, which are there, how one is
added, tried and dropped.

Most models serve their latest versions and their configuration does not change. A pinned one serves
one version, as its configuration says: each version's is kept in that version's folder, and the one
in front of them is the one that serves. Ensembles are pinned, for the parts of one student belong
together; so is `features` where it holds the student itself, whose configuration describes the
bundle.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from contract.errors import UserError
from contract.files import new_folder, tidy, write_atomically
from contract.manifest import LIMITS
from contract.signature import BACKBONE, IDENTITY
from serve.bundle import Bundle
from serve.repository.build import write_model, write_version
from serve.repository.contents import (
    CONFIG,
    STAGED,
    RolloutUnderWay,
    read_made_with,
    remove_staged,
    rollout_lock,
)
from serve.repository.lint import lint
from serve.repository.models import Model, build_models
from serve.repository.settings import Settings

_DOOR = "features"
_FREE = {"threads", "intra_op_thread_count", "runtime", "view"}
"""Parameters that a new version may have otherwise: a number of threads is as good as another, and
`runtime` and the view (a parameter of `decode` in older repositories) are in model.json.
"""
_ROOM = "free some space on the disk of the repository"


class Repository:
    """A repository of serve.repository on disk; what a server has loaded of it is `Admin`'s."""

    def __init__(self, path: Path) -> None:
        self.path, self.made_with = path, read_made_with(path)
        self.settings: Settings = self.made_with.settings

    @property
    def serving(self) -> int:
        """The version the front door is made of."""
        return self.config(_DOOR).version_policy.specific.versions[0]

    @property
    def versions(self) -> list[int]:
        """Versions that are there, oldest first."""
        return sorted(
            int(path.name) for path in (self.path / self._first).iterdir() if path.name.isdecimal()
        )

    @property
    def _first(self) -> str:
        """The model that gets a version first and loses it first: without it, what is there of a
        version is not whole.
        """
        return BACKBONE if BACKBONE in self.made_with.models else _DOOR

    @property
    def models(self) -> list[str]:
        return sorted(self.made_with.models)

    def config(self, model: str) -> ModelConfig:
        return text_format.Parse(
            (self.path / model / CONFIG).read_text(encoding="utf-8"), ModelConfig()
        )

    def pinned(self) -> list[str]:
        """Names of the models that serve one version, in the order in which they are switched."""
        names = [name for name in self.models if is_pinned(self.config(name))]
        # an ensemble that clients use most is switched last, the student itself first: the others
        # of its version call it
        last = self.config(_DOOR).platform == "ensemble"
        return sorted(names, key=lambda name: ((name == _DOOR) is last, name))

    def render(self, bundle: Bundle, version: int) -> list[Model]:
        """The models of another bundle with this repository's settings; raises UserError if Triton
        would not serve them correctly.
        """
        models = build_models(bundle, self.settings.model_copy(update={"version": version}))
        wrong = lint({model.name: model.config for model in models})
        if wrong:
            raise UserError(
                f"{bundle.path} makes a repository that Triton would not serve correctly: "
                f"{'; '.join(wrong)}"
            )
        return models

    def check_interface(self, models: Sequence[Model]) -> None:
        """Raise UserError if models, inputs, outputs or batch sizes differ from those now
        served.
        """
        new, old = (
            {model.name: model.config for model in models},
            {name: self.config(name) for name in self.models},
        )
        if (
            BACKBONE in old
            and BACKBONE in new
            and IDENTITY in _outputs(new[BACKBONE])  # graphs of native backends tell nothing
            and _outputs(old[BACKBONE]) == _outputs(new[BACKBONE]) - {IDENTITY}
        ):
            raise UserError(
                f"{self.path} was rendered by an older version, whose models do not tell each "
                "other of which bundle they are: render a new one (python -m serve.repository "
                "BUNDLE --output DIR) and serve that"
            )
        for name in sorted(set(new) ^ set(old)):
            has = "also has" if name in new else "does not have"
            raise UserError(f"the new bundle {has} a model '{name}': give it a server of its own")
        for name, config in new.items():
            for what in ("input", "output", "max_batch_size"):
                now, then = getattr(config, what), getattr(old[name], what)
                if now != then:
                    raise UserError(
                        f"the new bundle's model '{name}' has another {what} ({_as_text(now)}; "
                        f"served now: {_as_text(then)}): clients rely on it, so give it a server "
                        "of its own"
                    )
            if is_pinned(config):
                _check_limits(name, config, old[name])
                continue
            now, then = _facts(config), _facts(old[name])
            for fact in sorted(set(now) | set(then)):
                if now.get(fact) != then.get(fact):
                    raise UserError(
                        f"the new bundle's model '{name}' has parameter {fact} "
                        f"{now.get(fact, 'no longer')} (served now: {then.get(fact, 'none')}): "
                        "render a new repository (python -m serve.repository BUNDLE --output DIR) "
                        "and serve that"
                    )

    def stage(self, models: Sequence[Model]) -> list[str]:
        """Write models under other names, each after those it is made of; returns the names."""
        self.unstage()
        try:
            for model in models:
                config = ModelConfig()
                config.CopyFrom(model.config)
                config.name = STAGED + model.name
                for step in config.ensemble_scheduling.step:
                    step.model_name = STAGED + step.model_name
                staged = Model(config, model.files, model.pinned)
                write_model(self.path / config.name, staged, _version_of(models))
        except BaseException:  # a full disk, a bundle that was changed meanwhile
            self.unstage()
            raise
        # Triton loads an ensemble's steps with it, but the other models must be tried too
        return [STAGED + model.name for model in models]

    def unstage(self) -> None:
        """Delete what was staged, also by a rollout that was killed; raises UserError for what a
        rollout did not make.
        """
        remove_staged(self.path, self.made_with.models)

    def add(self, models: Sequence[Model], version: int) -> Iterator[str]:
        """Put a version's files beside the others; yields each model that must be loaded now that
        its files are complete.
        """
        for model in models:
            place = self.path / model.name / str(version)
            tidy(place, lambda old: False)  # left by a killed rollout
            with new_folder(place, str(place)) as aside:
                write_version(aside, model)
            if not model.pinned:
                yield model.name

    def point(self, version: int) -> Iterator[str]:
        """Give every pinned model the configuration of a version; yields each, to be loaded."""
        for name in self.pinned():
            self._point(name, version)
            yield name

    def _point(self, model: str, version: int) -> None:
        config = (self.path / model / str(version) / CONFIG).read_bytes()
        write_atomically(self.path / model / CONFIG, partial(Path.write_bytes, data=config), _ROOM)

    def settle(self) -> Iterator[str]:
        """Undo what a rollout left half done: every pinned model is of the version that serves,
        which is the front door's, and newer versions are gone, as are those of which a part is
        gone; yields each model that must be loaded again.

        (A newer version than the one that serves would take its place among those that stay
        loaded.)
        """
        serving, whole = self.serving, self.versions
        for name in self.pinned():
            if list(self.config(name).version_policy.specific.versions) != [serving]:
                self._point(name, serving)
                yield name
        there = {
            int(path.name)
            for name in self.models
            for path in (self.path / name).iterdir()
            if path.name.isdecimal()
        }
        for version in sorted(there):
            if version > serving or version not in whole:
                yield from self.forget(version)

    def forget(self, version: int) -> Iterator[str]:
        """Delete a version that does not serve; yields each model that must be loaded again to drop
        it.
        """
        for name in sorted(self.models, key=lambda name: (name != self._first, name)):
            folder = self.path / name / str(version)
            if folder.exists():
                shutil.rmtree(folder)
                if not is_pinned(self.config(name)):
                    yield name


def settle(repository: Path, log: Callable[[str], None]) -> None:
    """Before a start: undo what a killed rollout left half done, unless one is under way."""
    if not (repository / _DOOR / CONFIG).is_file():  # of a few models, which no rollout changes
        return
    with contextlib.suppress(RolloutUnderWay), rollout_lock(repository):
        undone = sorted(set(Repository(repository).settle()))
        if undone:
            log(f"undone: a killed rollout's changes of {', '.join(undone)}")


def is_pinned(config: ModelConfig) -> bool:
    """Whether a model serves the one version that its configuration is of."""
    return bool(config.version_policy.specific.versions)


def _outputs(config: ModelConfig) -> set[str]:
    return {port.name for port in config.output}


def _version_of(models: Sequence[Model]) -> int:
    return next(m.config.version_policy.specific.versions[0] for m in models if m.pinned)


def _as_text(value: object) -> str:
    """Ports as `name[dims]`, numbers as they are."""
    if isinstance(value, int):
        return str(value)
    return ", ".join(f"{port.name}{list(port.dims)}" for port in value)


def _check_limits(name: str, new: ModelConfig, old: ModelConfig) -> None:
    """Raise UserError for a front door that takes pictures of other sizes than the one served."""
    if not {"about"} <= set(new.parameters) & set(old.parameters):
        return
    now, then = (json.loads(each.parameters["about"].string_value) for each in (new, old))
    for limit in LIMITS:
        if now.get(limit) != then.get(limit):
            raise UserError(
                f"the new bundle's model '{name}' has {limit} {now.get(limit)} (served "
                f"now: {then.get(limit)}): clients rely on it, so give it a server of its own"
            )


def _facts(config: ModelConfig) -> dict[str, str]:
    """A model's parameters, which a new version reads from the configuration that is there; but for
    its threads, with which any version runs, and those that each version has in files of its own.
    """
    return {
        name: value.string_value for name, value in config.parameters.items() if name not in _FREE
    }
