"""What `python -m serve.client` and `serve.trial` do: request a task, write arrays and pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from contract.detection import Detections
from contract.errors import UserError
from contract.files import write_atomically
from contract.images import Limits
from serve.client import FeatureClient
from serve.client.inputs import Picture
from serve.client.options import RequestOptions
from serve.client.pictures import (
    class_image,
    draw_boxes,
    features_figure,
    map_figure,
    plural,
    save,
    zero_shot_figure,
)
from serve.client.tasks import Side
from serve.client.tasks.detection import THRESHOLD, Detected, detect
from serve.client.tasks.maps import TaskMap, predict_map
from serve.client.tasks.zero_shot import classify


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

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """Pictures, and beginnings of the names of what is written about each: DIR/photo."""
        return list(zip(self.images, map(self.output.joinpath, _stems(self.images)), strict=True))


def answer(client: FeatureClient, command: Command) -> list[Path]:
    """Ask and write; the files written. Raises a ClientError."""
    match command.task:
        case "features":
            return _features(client, command)
        case "zero-shot":
            return _zero_shot(client, command)
        case "detection":
            return _detection(client, command)
        case _:
            return _map(client, command)


def _features(client: FeatureClient, command: Command) -> list[Path]:
    """Outputs, and the principal components of those that are maps."""
    answer = client.features(command.images, command.outputs, command.options)
    for name, reason in answer.missing.items():
        print(f"missing   {name}: {reason}")
    grids = {name: answer.grid(name) for name in answer if name.endswith("_patches")}
    for name, value in answer.items():
        grid = f", grid {grids[name][0]}x{grids[name][1]}" if name in grids else ""
        print(f"output    {name} {list(value.shape)}{grid}")
    facts = {"size": list(answer.size), "grids": {name: list(grid) for name, grid in grids.items()}}
    wrote = [_write_arrays(command, answer.arrays, facts)]
    for row, (path, stem) in enumerate(command.files if grids else ()):
        maps = {
            name.removesuffix("_patches"): answer[name][row].reshape(*grid, -1)
            for name, grid in grids.items()
        }
        wrote.append(save(features_figure(_photograph(path), maps), _named(stem, "features")))
    return wrote


def _map(client: FeatureClient, command: Command) -> list[Path]:
    """A task's map, as numbers and beside the photograph."""
    result = predict_map(client, command.task, command.images, command.options, side=command.side)
    task, kind = result.task, result.task.map.kind
    facts = {"classes": list(result.classes)} if kind == "classes" else {}
    facts |= {"unit": result.unit} if kind == "scalar" else {}
    wrote = [_write_arrays(command, {task.map.array: result.values}, facts)]
    for row, (path, stem) in enumerate(command.files):
        print(f"{path.name}: {_describe(result, row)}")
        if kind == "classes":
            image = class_image(result.values[row], len(result.classes))
            wrote.append(save(image, _named(stem, "classes")))
        wrote.append(save(map_figure(_photograph(path), result, row), _named(stem, task.name)))
    return wrote


def _describe(result: TaskMap, row: int) -> str:
    values, classes = result.values[row], result.classes
    match result.task.map.kind:
        case "classes":
            shares = np.bincount(values.ravel(), minlength=len(classes)) / values.size
            most = [n for n in shares.argsort()[::-1][:3] if shares[n]]
            return ", ".join(f"{classes[n]} {shares[n]:.0%}" for n in most)
        case "scalar":
            return f"{values.min():.2f} to {values.max():.2f} {plural(result.unit)}"
        case "vector":
            means = values.reshape(-1, values.shape[-1]).mean(0)
            return f"mean {', '.join(f'{mean:.2f}' for mean in means)}"


def _zero_shot(client: FeatureClient, command: Command) -> list[Path]:
    result = classify(
        client,
        command.images,
        command.labels,
        command.options,
        side=command.side,
        embeddings=command.embeddings,
    )
    arrays = {"probabilities": result.probabilities}
    wrote = [_write_arrays(command, arrays, {"classes": list(result.classes)})]
    for (path, stem), row in zip(command.files, result.probabilities, strict=True):
        message = ", ".join(
            f"{result.classes[n]} {row[n]:.1%}" for n in row.argsort(kind="stable")[::-1][:3]
        )
        print(f"{path.name}: {message}")
        figure = zero_shot_figure(_photograph(path), row, result.classes)
        wrote.append(save(figure, _named(stem, "zero_shot")))
    return wrote


def _detection(client: FeatureClient, command: Command) -> list[Path]:
    """Boxes, as numbers, in pixels as JSON, and drawn into the photograph."""
    result = detect(
        client,
        command.images,
        command.labels or (),
        command.options,
        threshold=command.threshold,
    )
    pictures, names = result.pictures, result.classes
    arrays = {
        name: np.concatenate([getattr(found, name) for found in pictures])
        for name in ("boxes", "scores", "labels")
    }
    arrays["counts"] = np.array([len(found.scores) for found in pictures], np.int64)
    facts = {"classes": list(names), "threshold": command.threshold}
    wrote = [_write_arrays(command, arrays, facts)]
    for (path, stem), found in zip(command.files, pictures, strict=True):
        scored = zip(found.labels[:3], found.scores[:3], strict=True)
        best = [f"{names[n]} {score:.2f}" for n, score in scored]
        print(f"{path.name}: {len(found.scores)} found{': ' * bool(best)}{', '.join(best)}")
        photo = _photograph(path)
        wrote.append(_write_boxes(stem, path, photo.size, result, found, command.threshold))
        wrote.append(save(draw_boxes(photo, found, names), _named(stem, "detection")))
    return wrote


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
    write_atomically(
        path, lambda temporary: temporary.write_text(text, "utf-8"), "choose another --output"
    )
    return path


def _photograph(path: Path) -> Image.Image:
    """The picture itself, for pictures of answers; it was decoded once before, or by the server."""
    return Picture(path, str(path)).open(Limits())


def _stems(paths: Sequence[Path]) -> list[str]:
    """Names of pictures' files, made distinct where two are the same."""
    result: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in result:
            name, number = f"{path.stem}_{number}", number + 1
        result.append(name)
    return result


def _named(stem: Path, what: str) -> Path:
    """DIR/photo.1_depth.png for DIR/photo.1."""
    return stem.with_name(f"{stem.name}_{what}.png")


def _write_arrays(command: Command, arrays: Mapping[str, np.ndarray], facts: dict) -> Path:
    """DIR/TASK.npz or .safetensors: arrays, and what they mean (in the npz as arrays, else as JSON
    metadata).
    """
    facts = {"images": [str(path) for path in command.images], **facts}
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
