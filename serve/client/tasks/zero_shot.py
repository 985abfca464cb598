"""Zero-shot classification: a probability for each class, from a teacher's token and text
embeddings of the classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contract.class_scores import ClassVectors, probabilities
from contract.errors import UserError
from serve.client.calls import Calls
from serve.client.inputs import Images
from serve.client.options import RequestOptions
from serve.client.served import FRONT_DOOR, nearest
from serve.client.steps import Steps, Work
from serve.client.tasks import Side, check_labels, check_side
from serve.errors import BadRequest, NotServed, WrongAnswer
from serve.repository.zero_shot import ClassEmbeddings, read_class_embeddings


class ZeroShot(NamedTuple):
    """`probabilities` float32 [B, C], each row summing to 1, and the C classes."""

    probabilities: np.ndarray
    classes: tuple[str, ...]


def classify(
    client: Any,
    images: Images,
    labels: Sequence[str] | None = None,
    options: RequestOptions = RequestOptions(),
    *,
    side: Side = "server",
    embeddings: Path | str | None = None,
    **changes: Any,
) -> ZeroShot:
    """Probabilities of classes by the model `zero_shot`, or here from a teacher's token and a file
    of `export.text`.

    `labels`: on the server any words (the bundle needs its text encoder), here a choice of the
    file's classes; None: all classes. `embeddings`: a bundle's class_embeddings.safetensors, for
    side="client". Fields of `options` may be given as keyword arguments (`timeout`, `request_id`,
    `size`); `encoded` goes with side="client". Raises a ClientError.
    """
    options = replace(options, **changes)
    return client.run(_steps(client.calls, images, labels, side, embeddings, options))


def _steps(
    calls: Calls,
    images: Images,
    labels: Sequence[str] | None,
    side: Side,
    embeddings: Path | str | None,
    options: RequestOptions,
) -> Steps[ZeroShot]:
    """The task in steps; see serve.client.steps."""
    check_side(side)
    labels = None if labels is None else check_labels(labels)
    if side == "server":
        if embeddings is not None:
            raise BadRequest(
                "embeddings are used on the client: choose side='client', or leave them out"
            )
        result = yield from _on_server(calls, images, labels, options)
    else:
        if embeddings is None:
            raise BadRequest(
                "side='client' needs embeddings: give the bundle's class_embeddings.safetensors"
            )
        result = yield from _from_token(calls, images, labels, embeddings, options)
    if not np.allclose(result.probabilities.sum(1), 1, atol=1e-3):
        raise WrongAnswer("probabilities that do not sum to 1")
    return result


def _on_server(
    calls: Calls, images: Images, labels: list[str] | None, options: RequestOptions
) -> Steps[ZeroShot]:
    extra = {}
    if labels is not None:
        extra["labels"] = np.array([label.encode() for label in labels], dtype=np.object_)
    try:
        answer = yield from calls.features(
            images, ["probabilities", "classes"], replace(options, model="zero_shot"), extra
        )
    except NotServed as error:
        if "zero_shot" in error.message:
            error.message = (
                "the server has no zero_shot: its bundle has no class embeddings (python -m "
                "export.text adds them)"
            )
        raise
    classes = tuple(name.decode() for name in answer["classes"])
    if answer["probabilities"].shape[1] != len(classes) or (
        labels is not None and list(classes) != labels
    ):
        raise WrongAnswer(
            "'zero_shot' answered for other classes than those requested", answer.request_id
        )
    return ZeroShot(answer["probabilities"], classes)


def _from_token(
    calls: Calls,
    images: Images,
    labels: list[str] | None,
    embeddings: Path | str,
    options: RequestOptions,
) -> Steps[ZeroShot]:
    """Ask for the teacher's token and compare it with embeddings of a file."""
    try:
        file = yield Work(lambda: read_class_embeddings(Path(embeddings)))
    except UserError as error:
        raise BadRequest(str(error)) from error
    classes, vectors = _choose(file, labels, embeddings)
    output = yield from _token_of(calls, file, embeddings)
    answer = yield from calls.features(images, [output], options)
    tokens = answer[output]
    if tokens.shape[1] != file.width:
        raise BadRequest(
            f"{embeddings} holds {file.width}-d vectors, the server's {output} has "
            f"{tokens.shape[1]}"
        )
    return ZeroShot((yield Work(lambda: probabilities(tokens, vectors))), classes)


def _choose(
    file: ClassEmbeddings, labels: list[str] | None, path: Path | str
) -> tuple[tuple[str, ...], ClassVectors]:
    """Some classes of a file, all for None; raises BadRequest for one it has not."""
    if labels is None:
        return file.classes, file.vectors
    for label in labels:
        if label not in file.classes:
            raise BadRequest(
                f"label '{label}' is not among the {len(file.classes)} classes of "
                f"{path}{nearest(label, file.classes)} (new labels need the server's text "
                "encoder: side='server')"
            )
    rows = [file.classes.index(label) for label in labels]
    vectors = file.vectors
    chosen = {
        name: value[rows]
        for name, value in vectors._asdict().items()
        if isinstance(value, np.ndarray)
    }
    return tuple(labels), vectors._replace(**chosen)


def _token_of(calls: Calls, file: ClassEmbeddings, path: Path | str) -> Steps[str]:
    """The output that is of the embeddings' space: the teacher they name, else the one CLIP teacher
    of their width.
    """
    served = yield from calls.describe(FRONT_DOOR, fresh=True)
    about = served.facts("about") or {}
    clips = [
        teacher["label"] for teacher in about.get("teachers", ()) if teacher.get("role") == "clip"
    ]
    names = [f"{label}_token" for label in ([file.teacher] if file.teacher else clips)]
    fitting = [
        name
        for name in names
        if name in served.outputs and served.outputs[name].dims[-1] == file.width
    ]
    if len(fitting) == 1:
        return fitting[0]
    whose = f"teacher '{file.teacher}'" if file.teacher else "a CLIP teacher"
    raise BadRequest(
        f"{path} holds {file.width}-d vectors of {whose}, and the server has "
        f"{'several outputs' if fitting else 'no output'} for them (it has "
        f"{', '.join(name for name in served.outputs if name.endswith('_token'))})"
    )
