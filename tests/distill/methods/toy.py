"""A method that no shipped file knows, with everything a method may have: a momentum network, two
crops of different sides, a teacher with pictures and a batch of its own and without a summary, a
schedule, a layer that is frozen at first, a projector that never ships.

    python -m tests.distill.methods.toy run RECIPE --output DIR

runs `distill.run` (or `export`, `repository`) with the method registered: nothing else is touched.
"""

import copy
import math
import sys
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill.config import Positive, Recipe, Section
from distill.data.crops import View
from distill.features import FeatureDims, Features
from distill.methods import METHODS
from distill.methods.deployment import Deployment, ShippedHead
from distill.methods.losses import Prediction, pooled_cosine
from distill.methods.method import Method, ParameterGroup, Progress, decay_groups
from distill.models.preprocess import Preprocess
from distill.models.student import Student


class Config(Section):
    """The toy's section of a recipe."""

    TINY: ClassVar = {"hidden": 16}

    hidden: Positive = Field(16, description="width of the projector")


class Toy(Method):
    """Predicts one teacher's summary and map, another's map, and its own momentum network."""

    Config = Config
    train_only = ("momentum", "projector", "centre")
    shards = False

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        self.shared, self.own = dims
        self.views = (
            View("global", recipe.student.image_size, crops=2, photometric=("dino_global_1",)),
            View("local", recipe.student.image_size // 2, scale=(0.05, 0.4)),
            View("own", recipe.student.image_size, stream=self.own),
        )
        self.teacher_views = {self.shared: "global", self.own: "own"}
        self.normalizers = nn.ModuleDict()
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = Student(recipe.student)
        width = self.student.width
        self.heads = nn.ModuleDict({label: Head(width, dim) for label, dim in dims.items()})
        self.register_buffer("pull", torch.zeros(()), persistent=False)
        if not inference:
            self.momentum = copy.deepcopy(self.student).requires_grad_(False)
            self.projector = nn.Linear(width, recipe.toy.hidden)
            self.register_buffer("centre", torch.zeros(recipe.toy.hidden))

    def parameter_groups(self) -> list[ParameterGroup]:
        frozen = list(self.projector.parameters())
        named = [(n, p) for n, p in self.named_parameters() if not n.startswith("projector.")]
        return [*decay_groups(self, named), ParameterGroup(frozen, lr_scale=0.5, frozen_epochs=2)]

    def before_step(self, progress: Progress) -> None:
        self.pull.fill_(0.5 + 0.5 * (1 - math.cos(math.pi * progress.share)) / 2)

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        crops, local, own = (self._normalized(views[name]) for name in ("global", "local", "own"))
        features = self.student(crops)
        shared = self.heads[self.shared](features)
        dense = self.heads[self.own](self.student(own))
        with torch.no_grad():
            followed = self.projector(self.momentum(crops).summary.chunk(2)[0]) - self.centre
            self.centre.lerp_(followed.mean(0), 0.1)
        projected = self.projector(self.student(local).summary)
        losses = {
            f"loss.{self.shared}.token": F.mse_loss(shared.token, targets[self.shared].summary),
            f"loss.{self.shared}.patches": pooled_cosine(
                shared.patches, targets[self.shared].patches
            ),
            f"loss.{self.own}.patches": F.mse_loss(dense.patches, targets[self.own].patches),
            "loss.momentum": F.mse_loss(projected, followed),
        }
        losses["loss"] = sum(losses.values())
        return {name: loss if name == "loss" else loss.detach() for name, loss in losses.items()}

    def _normalized(self, images: Tensor) -> Tensor:
        return self.preprocess.normalize(images.float() / 255)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        pairs = zip(self.momentum.parameters(), self.student.parameters(), strict=True)
        for followed, parameter in pairs:
            followed.lerp_(parameter, 1 - self.pull)

    def averaged(self) -> Mapping[str, Tensor]:
        return {f"student.{name}": tensor for name, tensor in self.momentum.state_dict().items()}

    def deploy(self) -> Deployment:
        heads = {
            label: ShippedHead(head, has_token=head.token is not None, free_length=("patches",))
            for label, head in self.heads.items()
        }
        return Deployment(self.preprocess, self.student, nn.Identity(), heads)

    def describe(self) -> dict[str, list[str]]:
        kinds = [f"{self.shared}.token", f"{self.shared}.patches", f"{self.own}.patches"]
        losses = [f"loss.{kind}" for kind in [*kinds, "momentum"]]
        return {"losses": losses, "heads": list(self.heads)}


class Head(nn.Module):
    """Linear maps to a teacher's summary, if it has one, and to its map."""

    def __init__(self, width: int, dim: FeatureDims) -> None:
        super().__init__()
        self.token = None if dim.summary is None else nn.Linear(width, dim.summary)
        self.patches = nn.Linear(width, dim.patches)

    def forward(self, features: Features, grid: tuple[int, int] | None = None) -> Prediction:
        token = None if self.token is None else self.token(features.summary)
        return Prediction(token, self.patches(features.patches), self.patches(features.summary))


METHODS["toy"] = Toy

if __name__ == "__main__":
    import export.run
    import serve.repository.__main__
    from distill import run

    commands = {"run": run, "export": export.run, "repository": serve.repository.__main__}
    sys.exit(commands[sys.argv[1]].main(sys.argv[2:]))
