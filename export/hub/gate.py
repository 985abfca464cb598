"""What stands between a folder and its name: every loader, in a process of its own that knows
nothing of this package, must give the student's own features.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from contract.errors import Failure
from contract.views import ViewPolicy
from distill.features import Features
from distill.methods.deployment import BACKBONE, Deployment
from distill.methods.losses import Prediction
from distill.models.layout import Layout
from export.hub import loaders
from export.hub.network import Network, agree, difference

PICTURES = 8
"""Photographs that are compared, at most."""


@dataclass(frozen=True)
class Reference:
    """Photographs, their normalised pixels [N, 3, S, S], and what the student says of them."""

    photos: list[Image.Image]
    view: ViewPolicy
    pixels: Tensor
    predictions: dict[str, Prediction]

    @property
    def backbone(self) -> Features:
        """The student's own features."""
        own = self.predictions[BACKBONE]
        return Features(own.token, own.patches, own.maps, own.second)


@dataclass(frozen=True)
class Row:
    """A comparison: what a loader gives, and its largest difference from the student's over the
    largest value.
    """

    name: str
    difference: float


@torch.inference_mode()
def reference(
    deployment: Deployment, photos: Sequence[Image.Image], size: int, view: ViewPolicy
) -> Reference:
    """What a student says of photographs that `view` shows it at `size` pixels."""
    photos = list(photos[:PICTURES])
    images = torch.from_numpy(np.stack([view.pixels(photo, size, size) for photo in photos]))
    pixels = deployment.preprocess.normalize(images.permute(0, 3, 1, 2).float().div(255))
    pixels = pixels.contiguous()  # convolutions add up in another order where channels come last
    return Reference(photos, view, pixels, deployment.predict(pixels))


def check(folder: Path, network: Network, layout: Layout | None, wanted: Reference) -> list[Row]:
    """Compare what the loaders of a folder give with the student's own features; `layout` is that
    of timm's network where it is the whole student.

    Raises Failure for a loader that fails or disagrees.
    """
    with TemporaryDirectory() as place:
        work = Path(place)
        names = [f"{number}.png" for number in range(len(wanted.photos))]
        for name, photo in zip(names, wanted.photos, strict=True):
            photo.convert("RGB").save(work / name)
        request = {"timm": layout is not None, "pictures": names}
        (work / "request.json").write_text(json.dumps(request))
        save_file({"pixels": wanted.pixels.contiguous()}, work / "pixels.safetensors")
        _run(folder, work)
        answers = load_file(work / "answers.safetensors")
    rows, wrong = [], []
    for name, ours in _expected(network, layout, wanted, answers).items():
        theirs = answers.get(name.partition(" ")[0])
        if theirs is None:
            wrong.append(f"{name} is missing")
            continue
        theirs = _read(theirs, name, layout, wanted)
        rows.append(Row(name, difference(theirs, ours) if theirs.shape == ours.shape else np.inf))
        if not agree(theirs, ours):
            wrong.append(f"{name} differs by {rows[-1].difference:.2g} of its largest value")
    if wrong:
        raise Failure(
            "what other libraries load is not the student: " + "; ".join(wrong) + ": no folder "
            "was written"
        )
    return rows


def _expected(
    network: Network, layout: Layout | None, wanted: Reference, answers: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The student's own tensors by the names of the answers; after a space what is read of one."""
    own = wanted.backbone
    result = {"remote.pixels": wanted.pixels}
    if layout is not None:
        for loader in ("timm", "transformers"):
            result[f"{loader}.pixels"] = wanted.pixels
        for loader in ("timm", "transformers", "pipeline"):
            result |= {
                f"{loader}.output {kind}": tensor
                for kind, tensor in own.named().items()
                # of the pipeline's the picture is decoded and resized by it, so all is compared
            }
        if network.pooled:
            result["timm.pooled"] = result["transformers.pooled"] = own.summary
    for kind, tensor in own.named().items():
        result[f"remote.backbone.{kind}"] = tensor
    result["remote.backbone.tokens"] = own.patches.flatten(1, 2)
    for label, prediction in wanted.predictions.items():
        if label != BACKBONE:
            named = {"token": prediction.token, "patches": prediction.patches}
            named |= {f"maps.{number}": map_ for number, map_ in enumerate(prediction.maps)}
            result |= {f"remote.{label}.{k}": v for k, v in named.items() if v is not None}
    return result


def _read(theirs: Tensor, name: str, layout: Layout | None, wanted: Reference) -> Tensor:
    """The part of an answer that the name asks for."""
    _, _, kind = name.partition(" ")
    if not kind:
        return theirs
    second = wanted.backbone.second is not None
    return layout.read(theirs, tuple(wanted.pixels.shape[-2:]), second).named()[kind]


def _run(folder: Path, work: Path) -> None:
    """Run the loaders in a process without this package, network or the user's cache of code."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-P", loaders.__file__, str(folder), str(work)]
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, env=environment, cwd=work, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failure(f"the folder cannot be loaded: {lines[-1]}: no folder was written")
