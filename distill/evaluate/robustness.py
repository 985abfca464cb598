"""ImageNet's variants read with a classifier of ImageNet's 1000 classes.

ImageNet-A (Hendrycks et al. 2021, "Natural Adversarial Examples"), -R (Hendrycks et al. 2021, "The
Many Faces of Robustness"), -V2 (Recht et al. 2019), -C (Hendrycks & Dietterich 2019) and -9 (Xiao
et al. 2021, "Noise or Signal: The Role of Image Backgrounds in Object Recognition"), each in the
folders its authors publish.
"""

import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import multiclass_accuracy

from contract.errors import UserError, suggest
from contract.picture_files import picture_files, subfolders
from contract.views import EVALUATED, ViewPolicy
from distill.distributed import ALONE, Ranks
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import stamp
from distill.evaluate.dealt import map_views
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import as_tensor, extract
from distill.evaluate.outcome import Outcome
from distill.evaluate.reading import read_view

_Classifier = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] on the CPU in, logits [B, 1000] out."""

_LogitsOf = Callable[["Pictures"], Tensor]
"""Pictures in, their logits [n, 1000] on the CPU out: `live(…)` or `cached(…)`."""

_CLASSES = 1000
_CROPPED = ViewPolicy("centre-crop", 1.0)
"""Of pictures that are published cropped: all of them."""
_CHUNK = 8192
"""Summaries that a head reads at once."""
SEVERITIES = ("1", "2", "3", "4", "5")
_GROUPS = ("noise", "blur", "weather", "digital", "extra")
_EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Corruptions that ImageNet-C's authors keep for validation; mCE leaves them out."""

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's top-1 error on each corruption, mean over severities (hendrycks/robustness)."""

_BACKGROUNDS = (
    "original",
    "mixed_same",
    "only_fg",
    "mixed_rand",
    "mixed_next",
    "no_fg",
    "only_bg_b",
    "only_bg_t",
)
"""ImageNet-9's sets in the order of SeFA's Table 21."""
_COARSE_MAP = "in_to_in9.json"


def accuracy(
    logits: Tensor, labels: Tensor, topk: int = 1, among: Sequence[int] | None = None
) -> float:
    """Share of rows of logits [n, C] whose label [n] is among the `topk` largest; `among` restricts
    the classes to these.

    Raises UserError for logits that are not finite, or a label outside `among`.
    """
    _check_finite(logits)
    if among is not None:
        place = {label: position for position, label in enumerate(among)}
        outside = set(labels.tolist()) - place.keys()
        if outside:
            raise UserError(
                f"label {min(outside)} is not among the {len(place)} classes of this data set: "
                "remove its pictures"
            )
        logits = logits[:, list(among)]
        labels = torch.tensor([place[label] for label in labels.tolist()])
    return multiclass_accuracy(
        logits, labels, num_classes=logits.shape[1], average="micro", top_k=topk
    ).item()


def coarse_accuracy(logits: Tensor, labels: Tensor, coarse: Tensor) -> float:
    """ImageNet-9: share of rows of logits [n, C] whose largest belongs to the coarse label [n].

    `coarse` [C] is each class's coarse class, -1 for none; such a prediction is wrong.
    """
    _check_finite(logits)
    return (coarse[logits.argmax(dim=1)] == labels).double().mean().item()


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
) -> tuple[str, float, dict[str, float]]:
    """ImageNet-C's mCE: the name and value of the mean, and each corruption's own error over
    AlexNet's.

    `errors[corruption]` are the top-1 errors at the five severities. With fewer than the 15
    corruptions the mean is named "mCE of n corruptions": it compares with no published one.
    """
    relative = {name: sum(values) / len(values) / ALEXNET[name] for name, values in errors.items()}
    name = "mCE" if len(relative) == len(ALEXNET) else f"mCE of {len(relative)} corruptions"
    return name, sum(relative.values()) / len(relative), relative


def _check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise UserError(
            "the classifier returns logits that are not finite: check its weights and precision"
        )


def own_classifier(encoder: Encoder) -> _Classifier:
    """A timm network's own ImageNet head as a classifier.

    Raises UserError unless it has 1000 classes, and for one without trained weights: random, or
    not in the checkpoint.
    """
    net = encoder.net
    classes = getattr(net, "num_classes", 0)
    if classes != _CLASSES:
        raise UserError(
            f"{encoder.name} has a head of {classes} classes, not ImageNet's {_CLASSES}: set "
            "robustness.classifier=probe"
        )
    config = encoder.teacher.config if hasattr(encoder, "teacher") else None
    random = config is not None and not config.pretrained and config.checkpoint is None
    if random or not getattr(net, "classifier_loaded", True):
        raise UserError(
            f"{encoder.name} has no trained classifier (its weights do not include one): set "
            "robustness.classifier=probe"
        )

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        return net.forward_head(
            net.forward_features(encoder.normalize(images.to(encoder.device)))
        ).float()

    return classify


class Pictures(Dataset):
    """Files below `root` as uint8 [3, size, size]; raises UserError for one that cannot be read.
    `name` is shown to users.
    """

    def __init__(
        self, root: Path, files: list[Path], size: int, view: ViewPolicy, name: str
    ) -> None:
        self.root, self.files, self.size, self.view, self.name = root, files, size, view, name

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return as_tensor(read_view(self.files[index], self.view, self.size))

    def fingerprint(self) -> str:
        return f"{stamp(self.root, self.files)} {self.size} {self.view}"


def live(classify: _Classifier, config: EvaluationConfig, ranks: Ranks = ALONE) -> _LogitsOf:
    """Logits by running a classifier over every picture, with nothing kept, a part in each of
    `ranks`.
    """

    def logits(pictures: Pictures) -> Tensor:
        return map_views(pictures, classify, config.extract, ranks, pictures.name)

    return logits


def cached(head: nn.Module, encoder: Encoder, cache: Path, config: EvaluationConfig) -> _LogitsOf:
    """Logits by a head [B, d] to [B, 1000] on the encoder's summaries, which `extract` keeps in
    `cache` and resumes.
    """
    head = head.to(encoder.device).eval()

    def logits(pictures: Pictures) -> Tensor:
        result = extract(encoder, pictures, cache, config.extract, what=pictures.name).summaries()
        with torch.inference_mode():
            return torch.cat(
                [head(part.to(encoder.device)).float().cpu() for part in result.split(_CHUNK)]
            )

    return logits


@dataclass(frozen=True)
class _Reader:
    """A source of logits, with what it needs to read files."""

    logits_of: _LogitsOf
    image_size: int
    data: Path
    config: EvaluationConfig
    view: ViewPolicy

    def logits(self, folder: Path, files: list[Path], view: ViewPolicy) -> Tensor:
        """Logits [n, 1000] of what `view` shows of `folder`'s pictures."""
        name = folder.relative_to(self.data).as_posix()
        result = self.logits_of(Pictures(self.data, files, self.image_size, view, name))
        if result.shape != (len(files), _CLASSES):
            raise UserError(
                f"the classifier returns {list(result.shape[1:])} logits a picture, expected "
                f"[{_CLASSES}]"
            )
        return result


def evaluate_variants(
    logits_of: _LogitsOf,
    image_size: int,
    data: Path,
    config: EvaluationConfig,
    view: ViewPolicy = EVALUATED,
) -> Outcome:
    """Score every variant in `data`: imagenet-a, imagenet-r, imagenet-v2, imagenet-c,
    imagenet-9.

    `logits_of` is `live(…)` or `cached(…)`. Pictures are seen by `view` at `image_size`; those
    of ImageNet-C and ImageNet-9, which are published cropped to 224 pixels, whole, as their authors
    do. Scores are top-1 accuracies in [0, 1], mCE (1 is
    AlexNet) and BG-gap = accuracy(mixed_same) - accuracy(mixed_rand).

    Raises UserError for a folder with no variant, a folder that is not a class, missing severities,
    ImageNet-9 without its authors' class map, an unreadable picture, and logits that are not finite
    or not 1000.
    """
    present = [name for name in _VARIANTS if (data / name).is_dir()]
    if not present:
        raise UserError(
            f"--data {data} has no variant of ImageNet: use a folder with any of "
            f"{', '.join(_VARIANTS)}"
        )
    # Report missing files before spending hours on the others.
    if "imagenet-c" in present:
        _corruption_folders(data / "imagenet-c")
    if "imagenet-9" in present:
        _coarse_classes(data / "imagenet-9")
    reader, scores, details = _Reader(logits_of, image_size, data, config, view), {}, {}
    for name in present:
        result, details[name] = _VARIANTS[name](reader, data / name)
        scores |= {f"{name} {metric}": value for metric, value in result.items()}
    return Outcome(scores, details)


def _read_subset(reader: _Reader, folder: Path) -> tuple[dict, dict]:
    """ImageNet-A or -R: top-1 among its 200 classes."""
    among = subset_indices(folder.name.replace("-", "_"))
    allowed = {wnid: index for wnid, index in class_index().items() if index in among}
    files, labels = _labelled_files(
        folder, allowed, f"one of its {len(allowed)} classes' WordNet ids"
    )
    score = accuracy(reader.logits(folder, files, reader.view), labels, among=among)
    return {"top1": score}, {"images": len(files), "classes": len(labels.unique())}


def _read_v2(reader: _Reader, folder: Path) -> tuple[dict, dict]:
    """ImageNet-V2: top-1; its authors name the folders by class number."""
    known = class_index() | {str(index): index for index in range(_CLASSES)}
    files, labels = _labelled_files(folder, known, "a class number from 0 to 999 or a WordNet id")
    score = accuracy(reader.logits(folder, files, reader.view), labels)
    return {"top1": score}, {"images": len(files), "classes": len(labels.unique())}


def _read_corruptions(reader: _Reader, folder: Path) -> tuple[dict, dict]:
    """ImageNet-C: mCE."""
    errors: dict[str, list[float]] = {}
    for corruption, place in _corruption_folders(folder).items():
        errors[corruption] = []
        for severity in SEVERITIES:
            files, labels = _labelled_files(place / severity, class_index(), "a WordNet id")
            errors[corruption].append(
                1 - accuracy(reader.logits(place / severity, files, _CROPPED), labels)
            )
    name, value, relative = mean_corruption_error(errors)
    missing = [corruption for corruption in ALEXNET if corruption not in errors]
    return {name: value}, {"corruption_errors": relative, "errors": errors, "missing": missing}


def _read_backgrounds(reader: _Reader, folder: Path) -> tuple[dict, dict]:
    """ImageNet-9: accuracy on every set of backgrounds, and BG-gap where both of its sets are
    there.
    """
    coarse, scores, images = _coarse_classes(folder), {}, {}
    for name in _BACKGROUNDS:
        if not (folder / name).is_dir():
            continue
        known = {
            child.name: int(child.name[:2])
            for child in _subfolders(folder / name / "val")
            if _is_coarse(child.name)
        }
        files, labels = _labelled_files(folder / name / "val", known, "a coarse class like 00_dog")
        scores[name] = coarse_accuracy(
            reader.logits(folder / name, files, _CROPPED), labels, coarse
        )
        images[name] = len(files)
    if not scores:
        raise UserError(f"{folder} has no set of backgrounds: add any of {', '.join(_BACKGROUNDS)}")
    if "mixed_same" in scores and "mixed_rand" in scores:
        scores["BG-gap"] = scores["mixed_same"] - scores["mixed_rand"]
    return scores, {
        "images": images,
        "missing": [name for name in _BACKGROUNDS if name not in images],
    }


_VARIANTS = {
    "imagenet-a": _read_subset,
    "imagenet-r": _read_subset,
    "imagenet-v2": _read_v2,
    "imagenet-c": _read_corruptions,
    "imagenet-9": _read_backgrounds,
}


@cache
def class_index() -> dict[str, int]:
    """ImageNet's class number of every WordNet id."""
    return {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}


@cache
def subset_indices(name: str) -> tuple[int, ...]:
    """Class numbers of "imagenet_a" or "imagenet_r", as timm lists them."""
    return tuple(
        int(line) for line in pkgutil.get_data("timm.data", f"_info/{name}_indices.txt").split()
    )


def _corruption_folders(folder: Path) -> dict[str, Path]:
    """The folder of each of mCE's corruptions in `folder`, directly or in its group's; raises
    UserError.
    """
    children = [child for child in _subfolders(folder) if child.name not in _GROUPS]
    for group in _GROUPS:
        children += _subfolders(folder / group) if (folder / group).is_dir() else []
    by_name = {child.name: child for child in children}
    for name in by_name:
        if name not in ALEXNET and name not in _EXTRA:
            raise UserError(
                f"{by_name[name]}: '{name}' is not a corruption of ImageNet-C: "
                f"{suggest(name, ALEXNET)}"
            )
    result = {name: by_name[name] for name in ALEXNET if name in by_name}
    if not result:
        raise UserError(f"{folder} has no corruption: add any of {', '.join(ALEXNET)}")
    for place in result.values():
        missing = [severity for severity in SEVERITIES if not (place / severity).is_dir()]
        if missing:
            raise UserError(
                f"{place} lacks severity {', '.join(missing)}: download it, as mCE needs the "
                "folders 1 to 5"
            )
    return result


def _coarse_classes(folder: Path) -> Tensor:
    """Coarse class [1000] of every ImageNet class, -1 for none, from the authors' file; raises
    UserError.
    """
    path = folder / _COARSE_MAP
    if not path.is_file():
        raise UserError(
            f"{path} is missing: copy {_COARSE_MAP} from the repository "
            "MadryLab/backgrounds_challenge"
        )
    try:
        table = {int(index): int(coarse) for index, coarse in json.loads(path.read_text()).items()}
        return torch.tensor([table[index] for index in range(_CLASSES)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not give each of {_CLASSES} classes a number: copy the authors' file "
            "again"
        ) from error


def _is_coarse(name: str) -> bool:
    """Whether a folder's name starts with a coarse class, as in 00_dog."""
    return name[:2].isdecimal() and int(name[:2]) < 9 and name[2:3] == "_"


def _subfolders(folder: Path) -> list[Path]:
    """Folders in `folder`, by name, without hidden ones; raises UserError if it is not a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (download it, or remove its parent)")
    return subfolders(folder)


def _labelled_files(
    folder: Path, known: Mapping[str, int], naming: str
) -> tuple[list[Path], Tensor]:
    """Pictures in `folder`'s class folders, and their labels [n]; `known` is the label of every
    legal folder name.
    """
    files, labels = [], []
    for place in _subfolders(folder):
        if place.name not in known:
            raise UserError(f"{place}: '{place.name}' is not a class: name the folder by {naming}")
        here = [Path(path) for path in picture_files(place)]
        files += here
        labels += [known[place.name]] * len(here)
    if not files:
        raise UserError(f"{folder} has no pictures: put them into folders named by {naming}")
    return files, torch.tensor(labels)
