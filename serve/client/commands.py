"""What `python -m serve.client` and `serve.trial` do: request a task, write arrays and pictures."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from contract.detection import Detections
from contract.errors import UserError, printable
from contract.files import write_atomically
from contract.images import Limits
from contract.views import UNSEEN
from serve.client import FeatureClient
from serve.client.answers import Answer, join
from serve.client.inputs import Picture
from serve.client.many import Pictures
from serve.client.options import RequestOptions
from serve.client.pictures import (
    NOTHING_SEEN,
    class_image,
    draw_boxes,
    features_figure,
    map_figure,
    plural,
    save,
    zero_shot_figure,
)
from serve.client.served import FRONT_DOOR
from serve.client.tasks import Side
from serve.client.tasks.detection import THRESHOLD, Detected, detect
from serve.client.tasks.maps import TaskMap, predict_map
from serve.client.tasks.zero_shot import ZeroShot, classify
from serve.errors import ClientError, WrongAnswer


@dataclass(frozen=True)
class Command:
    """A task for some picture files, and the folder and format of what is written."""

    images: Sequence[Path]
    task: str
    output: Path
    format: str = "npz"
    options: RequestOptions = RequestOptions()
    side: Side = "server"
    outputs: Sequence[str] | None = None
    """Of the task `features`: which, None for all."""
    labels: Sequence[str] | None = None
    """Of the tasks `zero-shot` and `detection`."""
    embeddings: Path | None = None
    """Of the task `zero-shot`."""
    threshold: float = THRESHOLD
    """Of the task `detection`."""


class Answered(NamedTuple):
    """What came of a command: at least one picture was answered."""

    wrote: list[Path]
    answered: int
    """How many pictures."""
    bad: dict[Path, str]
    """Why others were not."""
    failure: ClientError | KeyboardInterrupt | None
    """What ended it before the rest was asked about."""


def answer(client: FeatureClient, command: Command) -> Answered:
    """Ask and write, each picture's own files as soon as it is answered. A picture that cannot be
    read is left out; where the server breaks off, what it answered is written.

    Raises a ClientError or UserError where no picture was answered.
    """
    task = _HANDLING.get(command.task, _Map)()
    pictures = Pictures(command.images)
    stems = [command.output / stem for stem in _stems(command.images)]
    rows: list[int] = []
    results: list[Any] = []
    wrote: list[Path] = []

    def ask(paths: list[Path], number: str) -> Any:
        options = command.options
        if number and options.request_id:
            options = replace(options, request_id=f"{options.request_id}-{number}")
        return task.ask(client, replace(command, images=paths, options=options))

    for places, result in pictures.ask(_group_size(client, len(command.images)), ask):
        rows += places
        results.append(result)
        for row, place in enumerate(places):
            wrote += task.show(command, command.images[place], stems[place], result, row)
    if len(command.images) > 1:
        for place, error in sorted(pictures.bad.items()):
            path = command.images[place]
            reason = str(error).removeprefix(f"{path}: ")
            print(f"bad       {printable(f'{path}: {reason}')}", file=sys.stderr)
    if not rows:
        pictures.check()
    arrays, facts = task.arrays(command, task.join(results))
    facts = {"images": [str(command.images[row]) for row in rows], **facts}
    wrote.insert(0, _write_arrays(command, arrays, facts))
    bad = {command.images[place]: str(error) for place, error in pictures.bad.items()}
    return Answered(wrote, len(rows), bad, pictures.failure)


def _group_size(client: FeatureClient, pictures: int) -> int:
    """Pictures that are asked about at once: as many as keep all of the client's requests busy."""
    if pictures == 1:
        return 1
    batch = client.describe(FRONT_DOOR).max_batch
    return max(1, batch) * client.calls.options.concurrency


class _Handling(Protocol):
    """How a task is asked, its answers put together, and written."""

    def ask(self, client: FeatureClient, command: Command) -> Any: ...
    def join(self, results: list[Any]) -> Any: ...
    def arrays(self, command: Command, result: Any) -> tuple[dict[str, np.ndarray], dict]: ...
    def show(
        self, command: Command, path: Path, stem: Path, result: Any, row: int
    ) -> list[Path]: ...


class _Features:
    """Outputs, and the principal components of those that are maps."""

    def ask(self, client: FeatureClient, command: Command) -> Answer:
        return client.features(command.images, command.outputs, command.options)

    def join(self, results: list[Answer]) -> Answer:
        first = results[0]
        parts = [(result.arrays, result.missing) for result in results]
        _check_same(results, lambda result: result.view == first.view)
        return join(parts, first.size, first.request_id, first.view)

    def arrays(self, command: Command, result: Answer) -> tuple[dict[str, np.ndarray], dict]:
        for name, reason in result.missing.items():
            print(f"missing   {name}: {reason}")
        grids = {name: list(result.grid(name)) for name in _maps(result)}
        for name, value in result.items():
            grid = f", grid {grids[name][0]}x{grids[name][1]}" if name in grids else ""
            print(f"output    {name} {list(value.shape)}{grid}")
        facts = {"size": list(result.size), "grids": grids, "view": str(result.view)}
        return result.arrays, facts

    def show(
        self, command: Command, path: Path, stem: Path, result: Answer, row: int
    ) -> list[Path]:
        maps = {
            name.removesuffix("_patches"): result[name][row].reshape(*result.grid(name), -1)
            for name in _maps(result)
        }
        if not maps:
            return []
        photo = _photograph(path)
        region = result.view.region((photo.height, photo.width), result.size)
        return [save(features_figure(photo, maps, region), _named(stem, "features"))]


def _maps(answer: Answer) -> list[str]:
    return [name for name in answer if name.endswith("_patches")]


class _Map:
    """A task's map, as numbers and beside the photograph."""

    def ask(self, client: FeatureClient, command: Command) -> TaskMap:
        return predict_map(client, command.task, command.images, command.options, side=command.side)

    def join(self, results: list[TaskMap]) -> TaskMap:
        # a server that does not name its classes has as many as the picture shows
        longest = max((result.classes for result in results), key=len)
        _check_same(results, lambda result: longest[: len(result.classes)] == result.classes)
        values = tuple(value for result in results for value in result.values)
        return results[0]._replace(values=values, classes=longest)

    def arrays(self, command: Command, result: TaskMap) -> tuple[dict[str, np.ndarray], dict]:
        facts = {"classes": {"classes": list(result.classes)}, "scalar": {"unit": result.unit}}
        task = result.task.map
        if len({value.shape for value in result.values}) == 1:
            arrays = {task.array: np.stack(result.values)}
        else:
            arrays = {f"{task.array}.{row}": value for row, value in enumerate(result.values)}
        return arrays, facts.get(task.kind, {})

    def show(
        self, command: Command, path: Path, stem: Path, result: TaskMap, row: int
    ) -> list[Path]:
        print(f"{path.name}: {_describe(result, row)}")
        wrote = []
        if result.task.map.kind == "classes":
            image = class_image(result.values[row], len(result.classes))
            wrote.append(save(image, _named(stem, "classes")))
        figure = map_figure(_photograph(path), result, row)
        return [*wrote, save(figure, _named(stem, result.task.name))]


def _describe(result: TaskMap, row: int) -> str:
    values, classes = result.values[row], result.classes
    if np.all((values == UNSEEN) | np.isnan(values)):  # of a picture a pixel or two high
        return NOTHING_SEEN
    match result.task.map.kind:
        case "classes":
            seen = values[values != UNSEEN]
            shares = np.bincount(seen, minlength=len(classes)) / seen.size
            most = [n for n in shares.argsort()[::-1][:3] if shares[n]]
            return ", ".join(f"{classes[n]} {shares[n]:.0%}" for n in most)
        case "scalar":
            return f"{np.nanmin(values):.2f} to {np.nanmax(values):.2f} {plural(result.unit)}"
        case "vector":
            means = np.nanmean(values.reshape(-1, values.shape[-1]), 0)
            return f"mean {', '.join(f'{mean:.2f}' for mean in means)}"


class _ZeroShot:
    """Probabilities, and bars of the likeliest."""

    def ask(self, client: FeatureClient, command: Command) -> ZeroShot:
        return classify(
            client,
            command.images,
            command.labels,
            command.options,
            side=command.side,
            embeddings=command.embeddings,
        )

    def join(self, results: list[ZeroShot]) -> ZeroShot:
        _check_same(results, lambda result: result.classes == results[0].classes)
        values = np.concatenate([result.probabilities for result in results])
        return results[0]._replace(probabilities=values)

    def arrays(self, command: Command, result: ZeroShot) -> tuple[dict[str, np.ndarray], dict]:
        return {"probabilities": result.probabilities}, {"classes": list(result.classes)}

    def show(
        self, command: Command, path: Path, stem: Path, result: ZeroShot, row: int
    ) -> list[Path]:
        values = result.probabilities[row]
        best = values.argsort(kind="stable")[::-1][:3]
        print(f"{path.name}: {', '.join(f'{result.classes[n]} {values[n]:.1%}' for n in best)}")
        figure = zero_shot_figure(_photograph(path), values, result.classes)
        return [save(figure, _named(stem, "zero_shot"))]


class _Detection:
    """Boxes, as numbers, in pixels as JSON, and drawn into the photograph."""

    def ask(self, client: FeatureClient, command: Command) -> Detected:
        labels, threshold = command.labels or (), command.threshold
        return detect(client, command.images, labels, command.options, threshold=threshold)

    def join(self, results: list[Detected]) -> Detected:
        pictures = tuple(found for result in results for found in result.pictures)
        return results[0]._replace(pictures=pictures)

    def arrays(self, command: Command, result: Detected) -> tuple[dict[str, np.ndarray], dict]:
        arrays = {
            name: np.concatenate([getattr(found, name) for found in result.pictures])
            for name in ("boxes", "scores", "labels")
        }
        counts = [len(found.scores) for found in result.pictures]
        arrays["counts"] = np.array(counts, np.int64)
        return arrays, {"classes": list(result.classes), "threshold": command.threshold}

    def show(
        self, command: Command, path: Path, stem: Path, result: Detected, row: int
    ) -> list[Path]:
        found, names = result.pictures[row], result.classes
        scored = zip(found.labels[:3], found.scores[:3], strict=True)
        best = [f"{names[n]} {score:.2f}" for n, score in scored]
        print(f"{path.name}: {len(found.scores)} found{': ' * bool(best)}{', '.join(best)}")
        photo = _photograph(path)
        wrote = _write_boxes(stem, path, photo.size, result, found, command.threshold)
        return [wrote, save(draw_boxes(photo, found, names), _named(stem, "detection"))]


_HANDLING: dict[str, type[_Handling]] = {
    "features": _Features,
    "zero-shot": _ZeroShot,
    "detection": _Detection,
}
"""The others are maps."""


def _check_same(results: list[Any], same: Callable[[Any], bool]) -> None:
    """Raise WrongAnswer where groups of pictures were answered by models that differ."""
    if not all(map(same, results)):
        raise WrongAnswer("the model changed between the pictures: send them again")


def _write_boxes(
    stem: Path,
    image: Path,
    size: tuple[int, int],
    result: Detected,
    found: Detections,
    threshold: float,
) -> Path:
    """DIR/photo_detection.json: what was found in one picture of `size` (width, height)."""
    pixels = found.boxes * np.array(size * 2)
    content = {
        "image": str(image),
        "width": size[0],
        "height": size[1],
        "labels": list(result.classes),
        "threshold": threshold,
        "detections": [
            {
                "label": result.classes[number],
                "score": round(float(score), 4),
                "box": [round(float(edge), 1) for edge in box],
            }
            for box, number, score in zip(pixels, found.labels, found.scores, strict=True)
        ],
    }
    path = stem.with_name(f"{stem.name}_detection.json")
    text = json.dumps(content, indent=1, ensure_ascii=False)

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)  # it may be the first file of all
        temporary.write_text(text, "utf-8")

    write_atomically(path, write, "choose another --output")
    return path


def _photograph(path: Path) -> Image.Image:
    """The picture itself, for pictures of answers; it was decoded once before, or by the server."""
    return Picture(path, str(path)).open(Limits())


def _stems(paths: Sequence[Path]) -> list[str]:
    """Names of pictures' files, made distinct where two are the same."""
    result: dict[str, None] = {}
    number = dict.fromkeys((path.stem for path in paths), 2)
    for path in paths:
        name = path.stem
        while name in result:
            name = f"{path.stem}_{number[path.stem]}"
            number[path.stem] += 1
        result[name] = None
    return list(result)


def _named(stem: Path, what: str) -> Path:
    """DIR/photo.1_depth.png for DIR/photo.1."""
    return stem.with_name(f"{stem.name}_{what}.png")


def _write_arrays(command: Command, arrays: Mapping[str, np.ndarray], facts: dict) -> Path:
    """DIR/TASK.npz or .safetensors: arrays, and what they mean (in the npz as arrays, else as JSON
    metadata).
    """
    path = command.output / f"{command.task.replace('-', '_')}.{command.format}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if command.format == "npz":
            texts = {
                key: np.array(json.dumps(value) if isinstance(value, dict) else value)
                for key, value in facts.items()
            }
            np.savez(path, **arrays, **texts)
        else:
            from safetensors.numpy import save_file

            ordered = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            save_file(ordered, path, {key: json.dumps(value) for key, value in facts.items()})
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} (choose another --output)"
        ) from error
    return path
