"""The golden photographs, asked of a server that has just started, before clients are let in; of a
text encoder some of the classes whose vectors the bundle has.

Parity was checked at export, perhaps in another runtime and on another processor than these:
OpenVINO's int8 products saturate without VNNI, say, and then err several times as much.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np

from contract.errors import UserError, first_line, printable
from contract.golden import Deviation, Golden, measure
from contract.signature import BACKBONE, FUSED, IMAGE
from contract.untrusted import parse_json, read_file
from serve.errors import ServerError
from serve.repository.contents import read_made_with
from serve.repository.golden import DOOR, served_golden
from serve.repository.state import GoldenState
from serve.server.admin import Busy, http_client, infer
from serve.server.loading import CONFIG, read_config
from serve.server.processor import describe
from serve.server.rest import Refused, Rest

Policy = Literal["refuse", "warn", "skip"]
Again = Callable[[Busy], None]
"""Called before a request is repeated that a busy server did not answer; may raise."""
DOORS = (DOOR, FUSED)
"""Models that give all recorded outputs: of the graphs one by one, and of the one that has all."""

_WITH_RUNTIME = (DOOR, BACKBONE, FUSED)
"""Models of which one tells what it opens graphs in, whatever the others are."""
_MOST_BYTES = 2**20
"""Of model.json."""
_PAUSE_SECONDS = 0.5
"""Between two attempts at a busy server: its HTTP port is open while it is asked."""
_ZERO_SHOT, _TEXT_ENCODER = "zero_shot", "text_encoder"
_LABELS = 4
"""Classes that a text encoder is asked for."""
_SHORT = 256
"""Bytes of their names at most: the model refuses longer ones than 512."""
_LEAST_COSINE = 0.9999
"""Between its vectors and those of the export, both in float32 (export.text asks for 0.99999)."""
_MOST_TEXT = 2**28
"""Bytes of the classes' names."""
_SHOWN = 3
"""Deviations that a message has room for."""


class GoldenRefused(ServerError):
    """What this server answers is outside the bounds of its bundle."""


class GoldenCheck:
    """Asks a server on a repository, for at most so many seconds where it is busy; call it once the
    models are loaded.
    """

    def __init__(
        self,
        repository: Path,
        policy: Policy,
        log: Callable[[str], None],
        seconds: float = 120.0,
    ) -> None:
        self.repository, self.policy, self.log, self.seconds = repository, policy, log, seconds

    def __call__(self, rest: Rest) -> GoldenState:
        """Compare, and log what came of it; raises GoldenRefused for answers that the policy does
        not let pass, ServerError for a server that has gone or stays too busy, UserError for a
        damaged golden set.
        """
        made_with = read_made_with(self.repository)
        if self.policy == "skip":
            self.log("golden set: not asked (--golden skip)")
            return GoldenState(outcome="skipped")
        version = _serving(self.repository)
        doors = [name for name in DOORS if name in made_with.models]
        golden = served_golden(self.repository, version) if doors and version else None
        if golden is None:
            why = "its bundle is older than golden sets: export again" if doors else "no features"
            self.log(f"golden set: there is none in this repository ({why}): answers are unchecked")
            return GoldenState(outcome="missing", version=version)
        began = time.monotonic()

        def pictures(door: str) -> Callable[[Any, Again], list[Deviation]]:
            return lambda client, again: measure(golden, ask(client, door, version, golden, again))

        result = {door: self._ask(rest, door, pictures(door)) for door in doors}
        if _TEXT_ENCODER in made_with.models and (classes := _classes(self.repository, version)):
            result[_TEXT_ENCODER] = self._ask(rest, _TEXT_ENCODER, classes.measure)
        seconds = time.monotonic() - began
        used = runtime_of(self.repository, version)
        runtime = describe(made_with.settings, _version(rest), used)
        problems = _lines(result, "problem")
        notes = _lines(result, "note")
        state = GoldenState(
            outcome="outside" if problems else "conspicuous" if notes else "passed",
            version=version,
            runtime=runtime,
            messages=tuple(problems + notes),
            seconds=seconds,
        )
        if problems and self.policy == "refuse":
            raise GoldenRefused(
                f"answers differ from those at export: {_join(problems)} ({runtime}): choose "
                "another --runtime, a bundle of --precision fp32, or export on this machine "
                "(--golden warn serves all the same)"
            )
        for line in problems:
            self.log(f"warning: golden set: {line} ({runtime}); served all the same: --golden warn")
        for line in notes:
            self.log(f"warning: golden set: {line} ({runtime})")
        if not problems:
            share = max(one.share for deviations in result.values() for one in deviations)
            self.log(
                f"golden set: {len(golden.pictures)} pictures answered within their bounds "
                f"by {' and '.join(result)} in {seconds:.2f} s, at most {share:.0%} of a bound "
                f"({runtime})"
            )
        return state

    def _ask(
        self, rest: Rest, model: str, measured: Callable[[Any, Again], list[Deviation]]
    ) -> list[Deviation]:
        """Deviations of a model; an error of the model is one. Raises ServerError for a server that
        has gone or stays too busy.
        """
        end = time.monotonic() + self.seconds

        def again(error: Busy) -> None:
            if not rest.ready():
                raise error
            if time.monotonic() > end:
                raise Busy(
                    f"the golden pictures were not answered within {self.seconds:.0f} s ({error}): "
                    "keep clients away until the server is ready, or raise --start-timeout"
                ) from error
            time.sleep(_PAUSE_SECONDS)

        with http_client(rest.address, self.seconds) as client:
            try:
                return measured(client, again)
            except Busy:
                raise
            except ServerError as error:
                if not rest.ready():
                    raise
                return [Deviation(model, problem=str(error), share=np.inf)]


class _Classes(NamedTuple):
    """Some classes, and their vectors [n, d] of the export's text tower."""

    labels: Sequence[str]
    vectors: np.ndarray
    version: int

    def measure(self, client: Any, again: Again) -> list[Deviation]:
        """How far the text encoder's vectors are from them; raises ServerError."""
        inputs = {"labels": np.array([label.encode() for label in self.labels], dtype=object)}
        found = _patiently(
            lambda: infer(client, _TEXT_ENCODER, self.version, inputs, ["embeddings"]), again
        )["embeddings"]
        if found.shape != self.vectors.shape:
            problem = f"embeddings {list(found.shape)}, {list(self.vectors.shape)} were exported"
            return [Deviation("embeddings", problem=problem, share=np.inf)]
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(self.vectors, axis=1)
        cosines = (found * self.vectors).sum(1) / norms
        worst = int(np.nan_to_num(cosines, nan=-1).argmin())
        share = (1 - cosines[worst]) / (1 - _LEAST_COSINE)
        problem = ""
        if not share <= 1:  # NaN fails too
            problem = (
                f"embedding of '{printable(self.labels[worst])}' has cosine {cosines[worst]:.6f} "
                f"with that of the export, at least {_LEAST_COSINE} is required"
            )
        return [Deviation("embeddings", problem=problem, share=float(share))]


def _classes(repository: Path, version: int) -> _Classes | None:
    """Classes of a version that its text encoder makes vectors of, None where there are none;
    raises UserError for damaged files.
    """
    folder = repository / _ZERO_SHOT / str(version)
    if not folder.is_dir():
        return None
    try:
        about = parse_json(read_file(folder / "zero_shot.json", _MOST_TEXT))
        if not about["encoder"]:
            return None
        short = [n for n, name in enumerate(about["classes"]) if len(name.encode()) <= _SHORT]
        # numpy leaves a file open that is no archive
        with (
            (folder / "classes.npz").open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            vectors = arrays["embeddings"][short[:_LABELS]].astype(np.float32)
        labels = [about["classes"][n] for n in short[:_LABELS]]
        return _Classes(labels, vectors, version) if labels else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, BadZipFile) as error:
        raise UserError(
            f"{folder}: its classes cannot be read ({first_line(error)}): render the repository "
            "again"
        ) from error


def _version(rest: Rest) -> str:
    """Triton's version, "" of a server that does not say."""
    try:
        return rest.version()
    except (OSError, Refused):
        return ""


def runtime_of(repository: Path, version: int) -> str:
    """What the python backend opens the graphs of a version in, "" where nothing says it."""
    for name in _WITH_RUNTIME:
        # a rollout changes the version's file, and leaves the configuration as it is
        about, config = repository / name / str(version) / "model.json", repository / name / CONFIG
        with suppress(ValueError, AttributeError):  # an older version's, or none
            runtime = parse_json(read_file(about, _MOST_BYTES)).get("runtime")
            if isinstance(runtime, str):
                return runtime
        if config.is_file() and "runtime" in (parameters := read_config(config).parameters):
            return parameters["runtime"].string_value
    return ""


def _serving(repository: Path) -> int:
    """The version of the front door, 0 where there is none."""
    path = repository / DOOR / CONFIG
    if not path.is_file():
        return 0
    return next(iter(read_config(path).version_policy.specific.versions), 0)


def ask(
    client: object,
    model: str,
    version: int,
    golden: Golden,
    again: Again | None = None,
) -> dict[str, np.ndarray]:
    """A version's answers to the golden photographs, one picture a request; raises ServerError.

    `again` is called before a request is repeated that a busy server did not answer; it may raise.
    """
    names = list(golden.outputs)
    answers = [
        _patiently(
            lambda n=n: infer(client, model, version, {IMAGE: golden.image[n : n + 1]}, names),
            again,
        )
        for n in range(len(golden.image))
    ]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in names}


def _patiently(
    request: Callable[[], dict[str, np.ndarray]], again: Again | None
) -> dict[str, np.ndarray]:
    """A request's answer, repeated while the server is busy and `again` does not raise."""
    while True:
        try:
            return request()
        except Busy as error:
            if again is None:
                raise
            again(error)


def _lines(result: dict[str, list[Deviation]], kind: str) -> list[str]:
    """Sentences about outputs; of several models with the same output, the first one's."""
    lines: dict[str, str] = {}
    for door, deviations in result.items():
        for one in deviations:
            if text := getattr(one, kind):
                lines.setdefault(one.output, f"{door}: {text}")
    return list(lines.values())


def _join(lines: list[str]) -> str:
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {more} more outputs" if more > 0 else "")
