"""Task heads on frozen features: what `distill.evaluate` trains or `distill.attach` takes from a
teacher, and export ships beside the teachers' heads.

A head is `heads/TASK.safetensors`: its weights, and in its metadata all that is needed to rebuild
it, the names of its classes, the output of the student it reads, and the sha256 of that student's
weights. A head fits no other student.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from contract.errors import UserError, first_line
from distill.decoders.decoder import TeacherDecoder, check_sample
from distill.features import scaled
from distill.models.meta import building
from distill.models.user_code import check_trust
from distill.models.weights import misfit, read_tensors, write_tensors
from distill.runs import git_commit
from distill.upernet import UPerNet

FORMAT = 1
"""Version of the file; raise it with a named `_upgrade_` function when it changes."""


class Classifier(nn.Module):
    """One linear layer: summary [B, d] to logits [B, C]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.settings = {"width": width, "classes": classes}
        self.linear = nn.Linear(width, classes)

    def forward(self, summary: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.linear(summary)


class LinearSegmenter(nn.Module):
    """Batch norm and a 1x1 convolution (UMT A.1, after RADIO): patches [B, h, w, d] to logits [B,
    C, h, w].
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.settings = {"width": width, "classes": classes}
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits at the patches' resolution; resize them, not the labels."""
        return self.linear(self.norm(patches.permute(0, 3, 1, 2)))


class LinearDepth(nn.Module):
    """Binned depth (AdaBins with fixed, evenly spaced bins): patches [B, h, w, d] to metres [B, h,
    w].

    A softmax over `bins` candidates between `min_depth` and `max_depth`; the depth is their
    expectation.
    """

    def __init__(self, width: int, bins: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.settings = {
            "width": width,
            "bins": bins,
            "min_depth": min_depth,
            "max_depth": max_depth,
        }
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Conv2d(width, bins, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer(
            "centres", torch.linspace(min_depth, max_depth, bins), persistent=False
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Depth in metres at the patches' resolution."""
        share = self.linear(self.norm(patches.permute(0, 3, 1, 2))).softmax(dim=1)
        return torch.einsum("bnhw,n->bhw", share, self.centres)


class DPTDepth(nn.Module):
    """Dense Prediction Transformer head (Ranftl et al. 2021; UMT A.1): four layers to metres [B,
    4h, 4w].

    Every layer's map [B, h_i, w_i, d_i] reads its summary [B, d_i] ("project" read-out), goes to
    `width` channels and to 1/4, 1/8, 1/16 and 1/32 of the picture (of 16 pixels a patch), and is
    fused from coarse to fine. For a CNN the maps already have these resolutions and the summary is
    their spatial mean.
    """

    def __init__(
        self,
        widths: Sequence[int],
        scales: Sequence[float],
        width: int,
        min_depth: float,
        max_depth: float,
    ) -> None:
        super().__init__()
        self.settings = {
            "widths": list(widths),
            "scales": list(scales),
            "width": width,
            "min_depth": min_depth,
            "max_depth": max_depth,
        }
        self.scales, self.low, self.high = tuple(scales), min_depth, max_depth
        self.read = nn.ModuleList(nn.Sequential(nn.Linear(2 * d, d), nn.GELU()) for d in widths)
        self.reduce = nn.ModuleList(nn.Conv2d(d, width, 3, padding=1) for d in widths)
        self.fuse = nn.ModuleList(Fusion(width) for _ in widths)
        self.head = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(width // 2, 1, 1)
        )

    def forward(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Depth in metres from four (summary, map) pairs, shallow to deep."""
        maps = []
        for (summary, patches), read, reduce, scale in zip(
            layers, self.read, self.reduce, self.scales, strict=True
        ):
            glob = summary[:, None, None].expand_as(patches)
            x = read(torch.cat((patches, glob), dim=-1)).permute(0, 3, 1, 2)
            if scale != 1:
                size = [scaled(side, scale) for side in x.shape[-2:]]
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            maps.append(reduce(x))
        fused = None
        for x, fuse in zip(reversed(maps), self.fuse, strict=True):
            fused = fuse(x, fused)
        # metres need more digits than half precision has
        share = torch.sigmoid(self.head(fused).float()).squeeze(1)
        return self.low + (self.high - self.low) * share


class Fusion(nn.Module):
    """RefineNet-style fusion: add the coarser map, refine by residual convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lateral, self.out = Residual(width), Residual(width)

    def forward(self, x: Tensor, coarser: Tensor | None) -> Tensor:
        """Fuse a map [B, c, h, w] with the coarser one before it."""
        x = self.lateral(x)
        if coarser is not None:
            x = x + F.interpolate(coarser, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(x)


class Residual(nn.Module):
    """Two 3x3 convolutions with a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


DECODER = "teacher-decoder"
"""Kind of the heads of `distill.attach` that are not trained here."""

KINDS: dict[str, Callable[..., nn.Module]] = {
    "classifier": Classifier,
    "linear-segmentation": LinearSegmenter,
    "upernet-segmentation": UPerNet,
    "linear-depth": LinearDepth,
    "dpt-depth": DPTDepth,
    DECODER: TeacherDecoder,
}
"""Heads by the name their files give them. To add one: a module with `settings`, and a line here.
"""


@dataclass(frozen=True)
class Head:
    """A head from its file: the module in eval mode and what its metadata say (`reads`,
    `student_sha256`, classes, …).
    """

    task: str
    kind: str
    module: nn.Module
    about: dict[str, Any]


def save_head(folder: Path, task: str, module: nn.Module, about: dict[str, Any]) -> Path:
    """Write `folder/task.safetensors` by rename; `about` must be JSON."""
    kind = next(name for name, made in KINDS.items() if isinstance(module, made))
    metadata = {
        "format": str(FORMAT),
        "task": task,
        "kind": kind,
        "settings": json.dumps(module.settings),
        "about": json.dumps(about),
        "commit": git_commit(),
    }
    path = folder / f"{task}.safetensors"
    # weights that two names share are written twice: safetensors has no other way
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return write_tensors(path, weights, metadata, "choose another --output")


def load_head(path: Path, student_sha256: str | None = None, trust_code: bool = False) -> Head:
    """Rebuild a head; raises UserError for a file that is damaged, no head, or made for another
    student, and for one whose decoder is code of the user's own unless that is trusted: it is
    imported and called with what the file says.
    """
    if not path.exists():
        raise UserError(f"{path}: no such head (train it with distill.evaluate)")
    weights, metadata = read_tensors(path, "train the head again")
    if metadata.get("kind") not in KINDS:
        raise UserError(
            f"{path} is not a head of distill.evaluate: its metadata names no known kind"
        )
    if metadata.get("format") != str(FORMAT):
        raise UserError(
            f"{path} is of format {metadata.get('format')}, this version reads {FORMAT}: train the "
            "head again"
        )
    if "sha256" not in metadata:
        raise UserError(f"{path} does not record its sha256: it is damaged; train the head again")
    about, kind = json.loads(metadata["about"]), metadata["kind"]
    if student_sha256 and about.get("student_sha256") != student_sha256:
        raise UserError(
            f"{path} was trained on another student's features: train it again with "
            "distill.evaluate"
        )
    settings = json.loads(metadata["settings"])
    check_trust(f"{path} is a decoder", str(settings.get("decoder", "")), {}, trust_code)
    module = _rebuild(path, kind, settings, weights)
    if isinstance(module, TeacherDecoder):
        check_sample(module, about["sample"], str(path))
    return Head(metadata["task"], kind, module, about)


def _rebuild(
    path: Path, kind: str, settings: dict[str, Any], weights: dict[str, Tensor]
) -> nn.Module:
    """The module of a head with its weights, in eval mode."""
    make, wrong = KINDS[kind], None
    try:
        if kind != DECODER:  # the user's code may need real tensors
            with building():  # before memory is taken for whatever size the settings say
                wrong = misfit(make(**settings), weights)
        if not wrong:
            module = make(**settings)
            wrong = misfit(module, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        wrong = first_line(error)
    if wrong:
        again = "attach it" if kind == DECODER else "train the head"
        raise UserError(f"{path} does not fit its own settings ({wrong}): {again} again")
    module.load_state_dict(weights, strict=True)
    return module.eval().requires_grad_(False)


def kind_of_head(path: Path) -> str | None:
    """The kind of the head in a file, read from its metadata alone; None where there is no such
    file.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("kind")
    except (OSError, SafetensorError):
        return None
