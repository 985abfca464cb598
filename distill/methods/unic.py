"""UNIC: distillation from several teachers with teacher dropping (Sariyildiz et al. 2024), SeFA's
baseline (SeFA 3.1, Eq 1-3).

    L = sum keep * L_sim / sum keep      over teachers and images

Every teacher's features are standardised by running statistics. The loss of a teacher and an image
is the mean of that of its summary and of its map; of every image the worst teacher counts, and each
other one with probability 1 - `drop`. The student learns through a ladder of projectors, which are
thrown away afterwards, or through two MLPs a teacher, which ship as its heads.

Follows the authors' released configuration where SeFA's text says less: dropping by image
(`scope: batch` is the text's sentence), the mean in place of Eq 3's sum, the ladder, one augmented
crop. In that code teachers see the augmentation too, here with `teacher_photometric`.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Auto, Fraction, Positive, Recipe, Section, refuse_repeats
from distill.data.crops import IMAGE, View, plain_name
from distill.distributed import mean_over_ranks, own_share, sum_over_ranks, world_size
from distill.features import FeatureDims, Features, resize_map
from distill.methods.deployment import Deployment, RestoredHead, ShippedHead
from distill.methods.losses import (
    Prediction,
    free_length_of_similarity,
    similarity_loss_names,
    similarity_losses,
)
from distill.methods.method import Method, Progress, cosine
from distill.methods.projectors import FeatureHead, LadderHead, mlp
from distill.methods.standardize import FeatureStandardizer
from distill.models.preprocess import Preprocess
from distill.models.student import Layer, Student, freeze_unreached

log = logging.getLogger(__name__)

Momenta = tuple[Annotated[float, Field(gt=0, le=1)], Fraction]
"""Momentum of running statistics at the first step and at the last."""


class Config(Section):
    """UNIC (SeFA's baseline): similarity losses, teacher dropping, a ladder of projectors."""

    TINY: ClassVar = {"hidden": 16, "last_hidden": 32}

    drop: Fraction = Field(
        0.5, description="probability of dropping a teacher that is not the worst one"
    )
    scope: Literal["image", "batch"] = Field(
        "image",
        description="teachers are dropped for each image, or for a whole (micro-)batch",
    )
    cosine_weight: Fraction = Field(
        0.5, description="alpha of Eq 1: share of the cosine loss; the rest is smooth L1"
    )
    standardize_momentum: Momenta = Field(
        (1.0, 0.001),
        description="momentum of the running statistics of teacher features, first and last step",
    )
    heads: Literal["ladder", "mlp"] = Field(
        "ladder",
        description="ladder: projectors on every layer, not shipped; mlp: on the last one, shipped",
    )
    layers: Positive | Auto = Field(
        "auto", description="last layers with a projector in the ladder; auto: every one"
    )
    hidden: Positive = Field(768, description="hidden width of the ladder's projectors")
    last_hidden: Positive = Field(
        3072, description="hidden width of the last layer's projectors, and of heads=mlp"
    )
    teacher_photometric: bool = Field(
        False, description="whether teachers see the student's photometric augmentation"
    )


class UNIC(Method):
    """A student with projectors to standardised teachers, some of which are dropped."""

    Config = Config

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        config = recipe.unic
        self.config, self.grid, self.seed = config, recipe.align.grid, recipe.train.seed
        self.with_token = [label for label, dim in dims.items() if dim.summary is not None]
        plain = not config.teacher_photometric
        self.views = (View(IMAGE, photometric=("unic",), plain=plain),)
        seen = plain_name(IMAGE) if plain else IMAGE
        self.teacher_views = dict.fromkeys(dims, seen)
        self.train_only = ("heads", "standardizers") if config.heads == "ladder" else ()
        self.normalizers = nn.ModuleDict()
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = Student(recipe.student)
        self.register_buffer("momentum", torch.ones(()), persistent=False)
        self._step = 0
        self._generator: torch.Generator | None = None
        if config.heads == "ladder":
            self._open_ladder(recipe)
        if inference and config.heads == "ladder":
            self.heads = nn.ModuleDict()
            return
        self.heads = nn.ModuleDict(
            {label: self._build_head(recipe, dim) for label, dim in dims.items()}
        )
        self.standardizers = nn.ModuleDict(
            {label: FeatureStandardizer(dim) for label, dim in dims.items()}
        )

    @classmethod
    def check(cls, recipe: Recipe) -> Recipe:
        """Refuse `targets.normalize`, and teachers with weights, listed twice, or single and always
        dropped.
        """
        refuse_normalize(recipe)
        check_teachers(recipe)
        if recipe.unic.drop == 1 and len(recipe.teachers) == 1:
            raise UserError(
                "unic.drop = 1: there is a single teacher, which is never dropped: set unic.drop=0 "
                "or add a teacher"
            )
        if recipe.unic.drop and len(recipe.teachers) == 1:
            log.warning("unic.drop = %g: a single teacher is never dropped", recipe.unic.drop)
        return super().check(recipe)

    def before_step(self, progress: Progress) -> None:
        """Set the momentum of the running statistics, and note the step, which seeds the drops."""
        first, last = self.config.standardize_momentum
        self.momentum.fill_(standardize_momentum(progress.step, progress.steps, first, last))
        self._step, self._generator = progress.step, None

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch (`views["image"]` uint8 [B, 3, S, S]), its parts a teacher
        and `keep.<teacher>`, the share of images that a teacher was kept for.
        """
        images = self.preprocess(views[IMAGE])
        ladder = self.config.heads == "ladder"
        inputs = self._read_layers(images) if ladder else self.student(images)
        predictions = {label: head(inputs) for label, head in self.heads.items()}
        loss, parts = self.compare(predictions, targets)
        return {"loss": loss, **parts}

    def compare(
        self, predictions: Mapping[str, Prediction], targets: Mapping[str, Features]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of predictions and teacher features, and its parts; moves the statistics."""
        standardized = {}
        for label, target in targets.items():
            standardized[label] = self.standardizers[label](target)
            if self.training:
                self.standardizers[label].update(target, self.momentum)
        losses, parts = similarity_losses(
            predictions, standardized, self.config.cosine_weight, self.grid
        )
        uniforms = self._draw(losses)
        if self.config.scope == "image":
            keep = keep_teachers(losses.detach(), uniforms, self.config.drop)
            loss = kept_mean(losses, keep)
        else:
            overall = mean_over_ranks(losses.mean(1))
            keep = keep_teachers(overall.unsqueeze(1), uniforms, self.config.drop)
            loss = (keep.squeeze(1) * losses.mean(1)).sum()  # Eq 3
        kept = keep.float().mean(1)
        parts |= {f"keep.{label}": kept[row] for row, label in enumerate(targets)}
        return loss, parts

    @torch.compiler.disable
    def _draw(self, losses: Tensor) -> Tensor:
        """Uniform numbers for the drops [T, N], or [T, 1] where a batch is dropped as one: the same
        for an image however many ranks share the batch.
        """
        if self._generator is None:  # the first micro-batch of the step
            # the plan's meta device has no generators
            device = "cpu" if losses.is_meta else losses.device
            self._generator = drops_of_step(self.seed, self._step, device)
        teachers, images = losses.shape
        columns = images * world_size() if self.config.scope == "image" else 1
        generator = self._generator
        uniforms = torch.rand(teachers, columns, generator=generator, device=generator.device)
        uniforms = uniforms.to(losses.device)
        return own_share(uniforms) if self.config.scope == "image" else uniforms

    def deploy(self) -> Deployment:
        """What ships: the backbone, and the heads where they are MLPs."""
        shipped = {} if self.config.heads == "ladder" else self.heads
        heads = {
            label: ShippedHead(
                RestoredHead(head, self.standardizers[label]),
                has_token=head.token is not None,
                free_length=free_length_of_similarity(self.config.cosine_weight),
            )
            for label, head in shipped.items()
        }
        return Deployment(self.preprocess, self.student, nn.Identity(), heads)

    def describe(self) -> dict[str, list[str]]:
        """Losses a teacher, its share of images, and heads."""
        labels = list(self.teacher_views)
        names = similarity_loss_names(labels, self.with_token)
        names += [f"keep.{label}" for label in labels]
        return {"losses": names, "heads": [] if self.config.heads == "ladder" else labels}

    def _read_layers(self, images: Tensor) -> list[Layer]:
        """The layers that the ladder reads, their maps resampled to the last one's grid."""
        layers = self.student.every_layer(images)[-self.rungs :]
        grid = tuple(layers[-1].patches.shape[1:3])
        # some devices cannot resample in half precision
        return [
            layer
            if tuple(layer.patches.shape[1:3]) == grid
            else layer._replace(patches=resize_map(layer.patches.float(), grid))
            for layer in layers
        ]

    def _build_head(self, recipe: Recipe, dims: FeatureDims) -> nn.Module:
        hidden, last = self.config.hidden, self.config.last_hidden
        if self.config.heads == "mlp":
            return FeatureHead(lambda out: mlp((self.student.width, last, out)), dims)
        return LadderHead(self.layer_widths, hidden, last, dims)

    def _open_ladder(self, recipe: Recipe) -> None:
        """Note the widths of the layers that the ladder reads, and freeze what it never reaches: it
        reads layers before the final norm, whose weight and bias stay 1 and 0. DDP waits for every
        gradient.
        """
        widths = [
            layer.patches.shape[-1]
            for layer in freeze_unreached(self.student, recipe.student.image_size)
        ]
        self.rungs = len(widths) if self.config.layers == "auto" else self.config.layers
        if self.rungs > len(widths):
            raise UserError(
                f"unic.layers = {self.rungs}: student '{recipe.student.name}' has {len(widths)} "
                "layers: set unic.layers=auto"
            )
        self.layer_widths = widths[-self.rungs :]


def standardize_momentum(step: int, steps: int, first: float, last: float) -> float:
    """A cosine from `first` at step 0 towards `last` at `steps` (UNIC's `cosine_scheduler`)."""
    return cosine(first, last, step / steps)


def drops_of_step(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """The generator of a step's drops: the same in every process, whatever was drawn before."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed) & (2**63 - 1))


def keep_teachers(losses: Tensor, uniforms: Tensor, drop: float) -> Tensor:
    """The coefficients c of Eq 2, bool [T, N]: the teacher with the largest loss [T, N] of an image
    is kept, every other one where its number of `uniforms` [T, N] is at least `drop`.
    """
    return (uniforms >= drop).scatter(0, losses.argmax(0, keepdim=True), True)


def kept_mean(losses: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept losses [T, N] over teachers and images, also those of other ranks: the mean
    of what ranks return.
    """
    count = sum_over_ranks(keep.sum().to(losses.dtype))
    return world_size() * (losses * keep).sum() / count


def refuse_normalize(recipe: Recipe) -> None:
    """Raise UserError for `targets.normalize`, in methods that standardise on their own."""
    if recipe.targets.normalize != "none":
        raise UserError(
            f"targets.normalize = {recipe.targets.normalize}: method {recipe.method} standardises "
            "teacher features by running statistics: remove it"
        )


def check_teachers(recipe: Recipe) -> None:
    """Raise UserError for weights of teachers, and for one listed twice under two roles, in methods
    that take all teachers alike.
    """
    for number, teacher in enumerate(recipe.teachers):
        for name in ("weight", "token_weight", "feature_weight"):
            value = getattr(teacher, name)
            if value != 1:
                raise UserError(
                    f"teachers.{number}.{name} = {value:g}: method {recipe.method} takes all "
                    "teachers alike: remove it"
                )
    try:
        refuse_repeats(recipe.teachers, {"alias", "role"})
    except ValueError as error:
        raise UserError(str(error)) from error
