"""Instance retrieval with the revisited Oxford and Paris protocol (Radenović et al. 2018,
"Revisiting Oxford and Paris").

Queries are cut out of their pictures (or read whole); the database is ranked by the cosine of the
summaries.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from contract.errors import UserError, first_line
from distill.data.crops import to_tensor
from distill.data.pictures import digest
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import stamp
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import extract
from distill.evaluate.outcome import Outcome, first_alone
from distill.evaluate.plain_pickle import read_pickle
from distill.evaluate.reading import read_picture
from distill.figures import save_figure

_Box = tuple[float, float, float, float]

_LEVELS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Which labels are positives and which are left out of the ranking, in each of the protocol's
setups.
"""


@dataclass(frozen=True)
class _Query:
    """One query: its picture, the box (x1, y1, x2, y2) in pixels, and database indices under easy,
    hard and junk.
    """

    name: str
    box: _Box
    labels: dict[str, list[int]]

    def at(self, level: str) -> tuple[list[int], list[int]]:
        """Positives and ignored indices in a setup of `_LEVELS`."""
        positives, ignored = (
            [index for key in keys for index in self.labels[key]] for keys in _LEVELS[level]
        )
        return positives, ignored


def evaluate(
    encoder: Encoder, data: Path, config: EvaluationConfig, folder: Path, cache: Path | None = None
) -> Outcome:
    """Mean average precision of a retrieval data set in the Medium and Hard setups (Radenović et
    al. 2018).

    `data` holds one ground truth gnd_*.pkl (the official file) or gnd_*.json, and jpg/NAME.jpg.
    The longer side of every picture becomes `config.retrieval.size` pixels, and so does the other
    unless the shape is kept; both are rounded to the stride. Queries
    without a positive in a setup are left out of its mean; a setup in which no query has one has no
    score. Writes retrieval.png; features stay in `cache` (default: `folder`/cache). Raises
    UserError for missing or damaged files, indices or boxes outside what they point into, and
    features that are not finite.
    """
    names, queries = _read_ground_truth(data)
    paths = [data / "jpg" / f"{name}.jpg" for name in names]
    query_paths = [data / "jpg" / f"{query.name}.jpg" for query in queries]
    missing = [path for path in dict.fromkeys(paths + query_paths) if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, one of {len(missing)}: put the data set's pictures in "
            f"{data / 'jpg'}"
        )
    if not any(query.at("medium")[0] for query in queries):
        raise UserError(
            f"no query of {data} has a positive: its ground truth lists no easy and no hard picture"
        )
    settings, extraction = config.retrieval, config.extract
    side, stride = encoder.fit(settings.size), None
    if settings.shape == "kept":
        stride = encoder.stride
        _check_shapes(encoder, side)
        extraction = extraction.model_copy(update={"batch_size": 1})  # every shape is another
    # Queries first: a box outside its picture is reported before the long pass.
    cut_out = [
        (path, query.box if settings.query == "box" else None)
        for path, query in zip(query_paths, queries, strict=True)
    ]
    query_features, features = (
        F.normalize(
            extract(encoder, views, cache or folder / "cache", extraction, what=what).summaries(),
            dim=1,
        )
        for what, views in (
            ("retrieval queries", _Views(data, cut_out, side, stride)),
            ("retrieval database", _Views(data, [(path, None) for path in paths], side, stride)),
        )
    )
    rankings = (query_features @ features.T).argsort(dim=1, descending=True, stable=True).numpy()
    per_query: list[dict[str, Any]] = []
    for query, ranking in zip(queries, rankings, strict=True):
        row: dict[str, Any] = {"query": query.name}
        for level in _LEVELS:
            positives, ignored = query.at(level)
            row[level] = average_precision(ranking, positives, ignored) if positives else None
        per_query.append(row)
    means = {}
    for level in _LEVELS:
        values = [row[level] for row in per_query if row[level] is not None]
        if values:
            means[f"mAP {level}"] = float(np.mean(values))
    scores = {key: means[key] for key in ("mAP medium", "mAP hard") if key in means}
    details = {"mAP easy": means.get("mAP easy"), "images": len(names), "queries": per_query}
    first_alone(encoder.ranks)
    return Outcome(
        scores, details, (_draw(folder / "retrieval.png", paths, query_paths, queries, rankings),)
    )


def average_precision(ranking: np.ndarray, positives: list[int], ignored: list[int]) -> float:
    """Average precision of one ranking of database indices, by the protocol's trapezoid rule.

    `ignored` indices leave the ranking first. The j-th positive (from 0) at rank r (from 0)
    contributes the mean of the precision before it, j / r (1 at r = 0), and after it, (j + 1) / (r
    + 1). Raises ValueError without positives.
    """
    kept = ranking[~np.isin(ranking, ignored)]
    ranks = np.flatnonzero(np.isin(kept, positives))
    if not len(ranks):
        raise ValueError("average precision needs a positive")
    hits = np.arange(len(ranks))
    before = np.where(ranks > 0, hits / np.maximum(ranks, 1), 1.0)
    return float(np.mean((before + (hits + 1) / (ranks + 1)) / 2))


def _check_shapes(encoder: Encoder, side: int) -> None:
    """Raise UserError for a network that takes squares alone."""
    other = max(encoder.stride, side - encoder.stride)
    if not (encoder.takes(side, other) and encoder.takes(other, side)):
        raise UserError(
            f"retrieval.shape = kept: {encoder.name} does not take pictures of {side}x{other}: set "
            "retrieval.shape=square"
        )


class _Views:
    """Pictures below `root`, each cut to its box (if it has one), the longer side `side` pixels:
    squared, or with a `stride` in their own shape, no larger than they are.
    """

    def __init__(
        self, root: Path, pictures: list[tuple[Path, _Box | None]], side: int, stride: int | None
    ) -> None:
        self.root, self.pictures, self.side, self.stride = root, pictures, side, stride

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> Tensor:
        picture = _cut(self.pictures[number])
        size = self.side, self.side
        if self.stride:
            scale = min(1.0, self.side / max(picture.size)) / self.stride
            size = tuple(max(1, round(part * scale)) * self.stride for part in picture.size)
        return to_tensor(picture.resize(size, Image.Resampling.BICUBIC))

    def fingerprint(self) -> str:
        files = stamp(self.root, [path for path, _ in self.pictures])
        shape = f"shape {self.stride}" if self.stride else "square"
        return f"{files} {shape} {self.side} {digest((box,) for _, box in self.pictures)}"


def _cut(picture: tuple[Path, _Box | None]) -> Image.Image:
    """Decode a picture and cut its box out; raises UserError for a damaged file or a box outside
    it.
    """
    path, box = picture
    image = read_picture(path)
    if box is None:
        return image
    x1, y1, x2, y2 = (round(value) for value in box)
    inside = max(0, x1), max(0, y1), min(image.width, x2), min(image.height, y2)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise UserError(
            f"the box {list(box)} of query {path.stem} is outside its "
            f"{image.width}x{image.height} picture: correct the ground truth"
        )
    return image.crop(inside)


def _read_ground_truth(data: Path) -> tuple[list[str], list[_Query]]:
    """Database names and queries of the one gnd_*.pkl or gnd_*.json in a folder; raises UserError
    for anything malformed.
    """
    files = sorted([*data.glob("gnd_*.pkl"), *data.glob("gnd_*.json")])
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{data} needs exactly one gnd_*.pkl or gnd_*.json; it has {names}")
    path = files[0]
    content = read_pickle(path) if path.suffix == ".pkl" else _read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(k), list) for k in ("imlist", "qimlist", "gnd")
    ):
        raise UserError(f"{path} must be a dict with the lists imlist, qimlist and gnd")
    names, query_names, truth = content["imlist"], content["qimlist"], content["gnd"]
    for key, values in (("imlist", names), ("qimlist", query_names)):
        if not values or not all(
            isinstance(name, str) and not Path(name).is_absolute() for name in values
        ):
            raise UserError(f"{path}: {key} must list at least one picture, by name without .jpg")
    if len(query_names) != len(truth):
        raise UserError(
            f"{path}: qimlist has {len(query_names)} queries, gnd {len(truth)} entries: they must "
            "pair up"
        )
    return names, [
        _read_query(path, name, entry, len(names))
        for name, entry in zip(query_names, truth, strict=True)
    ]


def _read_query(path: Path, name: str, entry: Any, size: int) -> _Query:
    """Check one entry of gnd against a database of `size` pictures."""
    if not isinstance(entry, dict):
        raise UserError(
            f"{path}: the entry of query {name} must be a dict with bbx, easy, hard and junk"
        )
    box = entry.get("bbx")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, int | float) and abs(v) < 1e9 for v in box)
    ):
        raise UserError(
            f"{path}: bbx of query {name} is {box!r:.80}, expected [x1, y1, x2, y2] in pixels"
        )
    labels = {}
    for key in ("easy", "hard", "junk"):
        labels[key] = entry.get(key)
        if not isinstance(labels[key], list):
            raise UserError(
                f"{path}: query {name} has no list {key}: add indices into imlist, or []"
            )
        for index in labels[key]:
            if not isinstance(index, int) or not 0 <= index < size:
                raise UserError(
                    f"{path}: index {index!r:.40} under {key} of query {name} is not in "
                    f"0..{size - 1}"
                )
    return _Query(name, tuple(box), labels)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}): download it again") from error


def _draw(
    path: Path,
    paths: list[Path],
    query_paths: list[Path],
    queries: list[_Query],
    rankings: np.ndarray,
    top: int = 5,
) -> Path:
    """Picture of the first queries with their nearest pictures, framed green (positive), grey
    (junk) or red.
    """
    count = min(4, len(queries))
    figure, axes = plt.subplots(
        count, 1 + top, figsize=(2.1 * (1 + top), 2.1 * count), squeeze=False, layout="constrained"
    )
    for row, query, query_path, ranking in zip(axes, queries, query_paths, rankings, strict=False):
        positives, ignored = query.at("medium")
        nearest = ranking[:top].tolist()
        colours = [
            "tab:green" if i in positives else "grey" if i in ignored else "tab:red"
            for i in nearest
        ]
        pictures = [(query_path, query.box), *((paths[index], None) for index in nearest)]
        for axis in row[len(pictures) :]:
            axis.set_axis_off()
        for axis, picture, colour in zip(row, pictures, ["black", *colours], strict=False):
            axis.imshow(_cut(picture))
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=4)
    axes[0, 0].set_title("query", fontsize=10)
    return save_figure(figure, path)
