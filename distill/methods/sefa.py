"""SeFA: distillation from several teachers joined with self-supervision (paper 3, Eq 4-6).

    L = lambda_1 L_SSL + (1 - lambda_1) L_distil,    L_distil = sum_i L_sim,i

L_sim (`losses.similarity`) compares, in the space of each teacher's standardised features, what a
head says of the student's features with the teacher's, for the summary and for the map. L_SSL is
DINO's, iBOT's or UDI's objective (`self_supervised/`), on the same forward passes: the student is
distilled on its two global crops.

Our reading where the paper is silent (every choice is a key): both kinds of features are distilled
(`tokens`), heads are MLPs without DINO's bottleneck (`head`), teachers see the global crops
(`distil_view`), features are standardised as in UNIC (`standardize`).
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Fraction, Positive, Recipe, Section
from distill.data.crops import IMAGE, View, plain_name
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment, RestoredHead, ShippedHead
from distill.methods.losses import (
    free_length_of_similarity,
    similarity_loss_names,
    similarity_losses,
)
from distill.methods.method import Method, ParameterGroup, Progress, decay_groups
from distill.methods.projectors import FeatureHead, mlp
from distill.methods.self_supervised import OBJECTIVES
from distill.methods.self_supervised import Config as SSLConfig
from distill.methods.self_supervised.dino import DINO, DISTRIBUTION_NAMES, GLOBAL, Head
from distill.methods.standardize import FeatureStandardizer
from distill.methods.targets import FeatureNormalizer
from distill.methods.unic import Momenta, check_teachers, standardize_momentum
from distill.models.preprocess import Preprocess
from distill.models.student import Student

LEAST_INFORMATION = 0.01
"""Nats a picture must tell of its prototype; both a constant and a uniform teacher have 0."""

LEAST_DEVIATION = 0.01
"""Deviation of unit summaries times sqrt(width); a constant student has 0."""


class Config(Section):
    """SeFA: distillation and self-supervision in one loss; the latter's section is `ssl`."""

    TINY: ClassVar = {"hidden": 16}

    ssl_weight: Fraction = Field(
        0.5, description="lambda_1 of Eq 4; 1: self-supervision alone, 0: distillation alone"
    )
    cosine_weight: Fraction = Field(
        0.5, description="alpha of Eq 6: share of the cosine loss; the rest is smooth L1"
    )
    tokens: Literal["both", "summary"] = Field(
        "both",
        description="what moves the student: summary and patches, or the summary alone (heads of "
        "patches then learn from features that they do not change)",
    )
    distil_view: Literal["globals", "own"] = Field(
        "globals", description="distil on the two global crops, or on a crop of its own"
    )
    distil_masked: Literal["all", "visible", "own"] = Field(
        "all",
        description="iBOT: distil all positions of the masked crops, those not hidden, or an own "
        "pass without a mask",
    )
    teacher_reduction: Literal["sum", "mean"] = Field("sum", description="over teachers (Eq 5)")
    standardize: Literal["ema", "fit", "layernorm", "none"] = Field(
        "ema",
        description="of teacher features: running statistics, fitted once (targets.normalize, or "
        "standardize), none a channel, or raw",
    )
    standardize_momentum: Momenta = Field(
        (1.0, 0.001), description="momentum of running statistics, first and last step"
    )
    head: Literal["mlp", "dino_literal"] = Field(
        "mlp", description="dino_literal: with DINO's bottleneck of length 1"
    )
    hidden: Positive = Field(2048, description="hidden width of a head's three layers")
    teacher_photometric: bool = Field(
        False, description="whether teachers see the student's photometric augmentation"
    )


class SeFA(Method):
    """A student, a head for each teacher, and a self-supervised objective."""

    Config = Config
    Sections: ClassVar = {"ssl": SSLConfig}
    shards = False

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        self.config, self.grid = recipe.sefa, recipe.align.grid
        self.train_only = ("ssl",) if self.config.ssl_weight else ()
        self.with_token = [label for label, dim in dims.items() if dim.summary is not None]
        objective = OBJECTIVES[recipe.ssl.kind]
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = Student(recipe.student)
        second = getattr(self.student.net, "reg_token", None) is not None
        if recipe.ssl.kind == "udi" and self.config.ssl_weight and second:
            self.student.second_token = True
            if not recipe.student.pretrained:  # timm leaves it near zero
                nn.init.trunc_normal_(self.student.net.reg_token, std=0.02)
        self.heads = nn.ModuleDict(
            {label: self._build_head(recipe, dim) for label, dim in dims.items()}
        )
        self.normalizers = nn.ModuleDict(
            {label: self._build_normalizer(recipe, label, dim) for label, dim in dims.items()}
        )
        self.register_buffer("momentum", torch.ones(()), persistent=False)
        self.most_entropy = math.log(recipe.ssl.prototypes)
        self.ships_averaged = recipe.ssl.ship == "ema"
        if inference or not self.config.ssl_weight:
            self.ssl = None
        else:
            self.ssl = objective(recipe, self.student)
        self.views = self._views(recipe, objective, bool(dims))
        seen = IMAGE if self.config.distil_view == "own" else GLOBAL
        self.teacher_views = dict.fromkeys(
            dims, seen if self.config.teacher_photometric else plain_name(seen)
        )
        self.names = objective.losses if self.config.ssl_weight else ()

    @classmethod
    def check(cls, recipe: Recipe) -> Recipe:
        """Drop the teachers of self-supervision alone, and refuse what excludes each other."""
        sefa, ssl = recipe.sefa, recipe.ssl
        if recipe.targets.normalize != "none" and sefa.standardize != "fit":
            raise UserError(
                f"targets.normalize = {recipe.targets.normalize}: sefa.standardize = "
                f"{sefa.standardize} already brings features to one scale: set sefa.standardize="
                "fit, or targets.normalize=none"
            )
        if sefa.ssl_weight:
            _check_objective(recipe)
        elif ssl.ship == "ema":
            raise UserError(
                "ssl.ship = ema: with sefa.ssl_weight = 0 there is no momentum network: set "
                "ssl.ship=student"
            )
        if sefa.ssl_weight == 1:
            cls.check_parallel(recipe)
            return recipe.model_copy(update={"teachers": ()})
        check_teachers(recipe)
        return super().check(recipe)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Everything, the last layer of the self-supervised head frozen at first."""
        frozen = self.ssl.frozen_parameters() if self.ssl else []
        ids = {id(parameter) for parameter in frozen}
        named = [(name, p) for name, p in self.named_parameters() if id(p) not in ids]
        epochs = self.ssl.config.freeze_last_layer if self.ssl else 0
        return [*decay_groups(self, named), ParameterGroup(frozen, frozen_epochs=epochs)]

    def before_step(self, progress: Progress) -> None:
        """Set the momentum of the running statistics and the objective's temperature."""
        first, last = self.config.standardize_momentum
        self.momentum.fill_(standardize_momentum(progress.step, progress.steps, first, last))
        if self.ssl:
            self.ssl.before_step(progress)

    def after_step(self, progress: Progress) -> None:
        """Let the momentum network follow."""
        if self.ssl:
            self.ssl.after_step(self.student, progress)

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Compute Eq 4 of a batch, and its parts; `ssl.*` are the objective's."""
        # crops that teachers see may be larger than the student's input; local ones are smaller
        images = {
            view.name: self.preprocess.normalize(views[view.name].float() / 255)
            if view.size
            else self.preprocess(views[view.name])
            for view in self.views
        }
        weight, values, loss = self.config.ssl_weight, {}, None
        features = mask = None
        if self.ssl:
            features, ssl_loss, values, mask = self.ssl.encode(self.student, images, views)
            loss = weight * ssl_loss
        if targets:
            features, mask = self._distilled(features, mask, images)
            distilled, parts = self.compare(features, targets, mask)
            values = {"loss.distil": distilled.detach(), **parts, **values}
            share = (1 - weight) * distilled
            loss = share if loss is None else loss + share
        return {"loss": loss, **values}

    def _distilled(
        self, features: Features | None, mask: Tensor | None, images: Mapping[str, Tensor]
    ) -> tuple[Features, Tensor | None]:
        """The student's features that teachers are compared with, and which positions are
        hidden.
        """
        if self.config.distil_view == "own":
            return self.student(images[IMAGE]), None
        if features is None or (mask is not None and self.config.distil_masked == "own"):
            return self.student(images[GLOBAL]), None
        return features, mask if self.config.distil_masked == "visible" else None

    def compare(
        self, features: Features, targets: Mapping[str, Features], mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_distil of Eq 5 and its parts a teacher; moves the statistics. `mask` bool [N, h, w]:
        positions to leave out.
        """
        predictions = {label: head(features) for label, head in self.heads.items()}
        standardized = {}
        for label, target in targets.items():
            standardized[label] = self.normalizers[label](target)
            if self.training and self.config.standardize == "ema":
                self.normalizers[label].update(target, self.momentum)
        visible = None if mask is None else (~mask).float()
        losses, parts = similarity_losses(
            predictions,
            standardized,
            self.config.cosine_weight,
            self.grid,
            visible,
            apart=self.config.tokens == "summary",
        )
        each = losses.mean(1)
        return each.sum() if self.config.teacher_reduction == "sum" else each.mean(), parts

    def averaged(self) -> Mapping[str, Tensor]:
        """The momentum network, under the student's names."""
        if not self.ssl:
            return {}
        network = self.ssl.momentum
        return {f"student.{name}": tensor for name, tensor in network.state_dict().items()}

    def warnings(self, values: Mapping[str, float]) -> list[str]:
        """A collapse of the momentum teacher's distributions or of the student's summaries."""
        found = []
        if values.get("ssl.information", 1) < LEAST_INFORMATION:
            entropy = values["ssl.entropy"]
            # all pictures alike: either one prototype, or all of them evenly
            advice = "lower" if entropy > self.most_entropy / 2 else "raise"
            found.append(
                f"collapse: the momentum teacher tells pictures apart by "
                f"{values['ssl.information']:.4f} nats (entropy {entropy:.2f} of at most "
                f"{self.most_entropy:.2f}): {advice} ssl.teacher_temp, or lower train.lr"
            )
        if values.get("ssl.deviation", 1) < LEAST_DEVIATION:
            found.append(
                f"collapse: the student's summaries differ by {values['ssl.deviation']:.4f} of "
                "what independent ones would: lower train.lr"
            )
        return found

    def deploy(self) -> Deployment:
        """What ships: the student, and the distillation heads."""
        heads = {
            label: ShippedHead(
                RestoredHead(head, self.normalizers[label]),
                has_token=head.token is not None,
                free_length=free_length_of_similarity(self.config.cosine_weight),
            )
            for label, head in self.heads.items()
        }
        return Deployment(self.preprocess, self.student, nn.Identity(), heads)

    def describe(self) -> dict[str, list[str]]:
        """Losses of the objective and of each teacher, and heads."""
        labels = list(self.heads)
        names = [*self.names, *(DISTRIBUTION_NAMES if self.names else ())]
        if labels:
            names += ["loss.distil", *similarity_loss_names(labels, self.with_token)]
        return {"losses": names, "heads": labels}

    def _views(
        self, recipe: Recipe, objective: type[DINO], with_teachers: bool
    ) -> tuple[View, ...]:
        """The objective's views, or the global ones alone without it, and the teachers' own."""
        config = self.config
        kind = objective if config.ssl_weight else DINO  # the plainest views
        crops, *others = kind.views(recipe, self.student)
        plain = with_teachers and not config.teacher_photometric
        if config.distil_view == "globals":
            crops = crops._replace(plain=plain)
        if not config.ssl_weight:
            others = []
        views = (crops, *others)
        if config.distil_view == "own" and with_teachers:
            own = View(IMAGE, photometric=("unic",), plain=plain)
            views = (own, *views) if config.ssl_weight else (own,)
        return views

    def _build_head(self, recipe: Recipe, dims: FeatureDims) -> nn.Module:
        width, hidden = self.student.width, self.config.hidden
        ssl, literal = recipe.ssl, self.config.head == "dino_literal"

        def make(out: int) -> nn.Module:
            if literal:
                return Head(width, out, hidden, ssl.bottleneck, norm_last_layer=False)
            return mlp((width, hidden, hidden, out))

        alone = self.config.tokens == "summary" and dims.summary is not None
        return FeatureHead(make, dims, detach_patches=alone)

    def _build_normalizer(self, recipe: Recipe, label: str, dims: FeatureDims) -> nn.Module:
        if self.config.standardize == "ema":
            return FeatureStandardizer(dims)
        mode = self.config.standardize
        if mode == "fit":
            mode = recipe.targets.normalize
            mode = "standardize" if mode == "none" else mode
        return FeatureNormalizer(label, dims, mode)


def _check_objective(recipe: Recipe) -> None:
    """Raise UserError for settings of self-supervision that cannot go together."""
    ssl, train = recipe.ssl, recipe.train
    if ssl.kind == "udi" and not ssl.locals:
        raise UserError("ssl.locals = 0: ssl.kind = udi needs local crops: set ssl.locals=6")
    if train.epochs:
        for name in ("temp_warmup_epochs", "freeze_last_layer"):
            if getattr(ssl, name) > train.epochs:
                raise UserError(
                    f"ssl.{name} = {getattr(ssl, name)} is more than train.epochs = "
                    f"{train.epochs}: set at most that"
                )
    if ssl.kind == "ibot":
        ratios, spreads = ssl.ibot.mask_ratio, ssl.ibot.ratio_spread
        if len(ratios) != len(spreads):
            raise UserError(
                f"ssl.ibot.ratio_spread = {list(spreads)}: give one for each of "
                f"ssl.ibot.mask_ratio = {list(ratios)}"
            )
        for ratio, spread in zip(ratios, spreads, strict=True):
            if not spread <= ratio <= 1 - spread:
                raise UserError(
                    f"ssl.ibot.ratio_spread = {spread}: {ratio} +- {spread} is no share in [0, 1]: "
                    "set a smaller one"
                )
