"""UMT: unified multi-teacher distillation through a learnable model token (papers' sections
3.2-3.4, A.2-A.3).

Usage: `method = UMT(recipe, dims)`; `method({"image": images}, targets)["loss"].backward()`.

Differs from the paper, where it is silent or contradicts itself (every choice is a field of
`Config`):
- One common width `space_dim` for all spaces. The paper lets it be d_Ti and yet shares modules over
  spaces, which
  needs equal widths; where a teacher's width differs, a Linear at the end maps to it.
- The channel order in front of the grouped convolution (`interleave`, see
  `interaction.interleave_groups`).
- 3.3 prints F_I^{j+1} = phi_I^j(F_C^j); we read F_I^j, the only index that fits Eq 3.
- For ViT students d_m = 64 and FFN ratio 1: with d_m = d_T the interaction would be 3.3 times the
  student.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contract.errors import UserError
from distill.config import Auto, Positive, Recipe, Section
from distill.data.crops import IMAGE, View
from distill.features import FeatureDims, Features
from distill.methods.deployment import COUPLING, Deployment, ShippedHead
from distill.methods.folding import fold
from distill.methods.interaction import LayerNorm
from distill.methods.losses import (
    Prediction,
    alignment_loss_names,
    alignment_losses,
    free_length_of_role,
)
from distill.methods.method import Method
from distill.methods.targets import FeatureNormalizer
from distill.methods.umt_blocks import build_cross, build_intra
from distill.models.preprocess import Preprocess
from distill.models.student import Student

CrossMode = Literal["channel", "token", "axial", "grouped"]


class Config(Section):
    """UMT's interaction (paper 3.2-3.4, A.2). `auto` values depend on the student's family."""

    # 8 groups divide 64 and M x 64
    TINY: ClassVar = {"space_dim": 32, "token_dim": 32, "groups": 8, "heads": "auto"}

    space_dim: Positive | Literal["auto", "student"] = Field(
        "auto",
        description="common width of the M spaces; auto: the teachers' width where all have the "
        "same, else the student's; student: the student's width",
    )
    token_dim: Positive | Auto = Field(
        "auto", description="d_m; auto: space_dim for a CNN student, 64 for a ViT"
    )
    depth: Positive | Auto = Field(
        "auto", description="N, alternations cross -> intra; auto: 2 for a CNN, 1 for a ViT"
    )
    model_token: bool = Field(True, description="ablation switch (Table 3)")
    cross_space: CrossMode | bool = Field(
        "channel",
        description="channel | token | axial | grouped; false is the ablation of Table 3, true is "
        "'channel'",
    )
    intra_space: bool = Field(True, description="ablation switch (Table 3)")
    groups: Positive | Auto = Field(
        "auto",
        description="CNN: groups of the 1x1 convolution (A.2: ResNet-50 128, ConvNeXt-B 64); "
        "auto: 64, or the greatest divisor it shares with the width",
    )
    interleave: bool = Field(
        True,
        description="CNN: shuffle channels so that every group sees every space; false: the "
        "paper's order",
    )
    heads: Positive | Auto = Field(
        "auto", description="ViT: heads of an intra-space block; cross uses M times as many"
    )
    cross_mlp_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0, description="ViT: hidden/width of the cross-space FFN"
    )
    intra_mlp_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0, description="ViT: hidden/width of the intra-space FFN"
    )
    share_token_head: bool | Auto = Field(
        "auto", description="one Linear for all teachers; auto: where widths agree"
    )
    token_pool: Literal["before", "after"] = Field(
        "before", description="pool the token before or after its head"
    )
    grad_checkpointing: bool = Field(
        False, description="compute the interaction again in the backward pass, to save memory"
    )

    @property
    def cross_mode(self) -> CrossMode | None:
        """The cross-space module to build, or None for the ablation without it."""
        if isinstance(self.cross_space, bool):
            return "channel" if self.cross_space else None
        return self.cross_space


class UMT(Method):
    """A student, its model token, N cross-/intra-space alternations, and a read-out per teacher."""

    Config = Config
    views = (View(IMAGE),)

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        self.teachers, self.grid = recipe.teachers, recipe.align.grid
        self.teacher_views = {teacher.label: IMAGE for teacher in recipe.teachers}
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = Student(recipe.student)  # F_S
        self.interaction = SpaceInteraction(
            recipe.umt, self.student, list(dims.values())
        )  # Gamma_i, P_m, psi, phi
        self.read_out = ReadOut(
            recipe.umt, dims, self.interaction.space_dim, self.interaction.token_dim
        )
        self.normalizers = nn.ModuleDict(
            {
                label: FeatureNormalizer(label, dim, recipe.targets.normalize)
                for label, dim in dims.items()
            }
        )

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Compute every loss from one student forward.

        `views["image"]`: uint8 [B, 3, S, S]; `targets`: each teacher's features of the same
        pictures. Returns the scalars of `losses.alignment_losses`.
        """
        features = self.student(self.preprocess(views[IMAGE]))
        spaces = self.interaction(features)
        grid = tuple(features.patches.shape[1:3])
        predictions = {label: self.read_out(label, spaces, grid) for label in self.teacher_views}
        normalized = {label: self.normalizers[label](target) for label, target in targets.items()}
        return alignment_losses(predictions, normalized, self.teachers, self.grid)

    def deploy(self) -> Deployment:
        """What ships: backbone, interaction (it needs all M spaces, cross-space mixes them) and M
        heads.
        """
        heads = {
            teacher.label: ShippedHead(
                SpaceHead(self.read_out, teacher.label, self.normalizers[teacher.label]),
                reads=(COUPLING,),
                has_token=self.read_out.predicts_token(teacher.label),
                free_length=free_length_of_role(teacher.role),
            )
            for teacher in self.teachers
        }
        return Deployment(self.preprocess, self.student, self.interaction, heads)

    def cautions(self) -> list[str]:
        """An interaction of more parameters than the student."""
        student, interaction = (
            sum(parameter.numel() for parameter in part.parameters())
            for part in (self.student, self.interaction)
        )
        if interaction <= student:
            return []
        return [
            f"the interaction has {interaction / 1e6:.1f} M parameters and the student "
            f"{student / 1e6:.1f} M: set a smaller umt.space_dim (now "
            f"{self.interaction.space_dim})"
        ]

    def describe(self) -> dict[str, list[str]]:
        """Losses and heads, a teacher each."""
        labels = list(self.teacher_views)
        with_token = [label for label in labels if self.read_out.predicts_token(label)]
        return {"losses": alignment_loss_names(labels, with_token), "heads": labels}

    @classmethod
    def memory_switches(cls, recipe: Recipe) -> tuple[str, ...]:
        """The student's and the interaction's."""
        return (*super().memory_switches(recipe), "umt.grad_checkpointing")

    @classmethod
    def variants(cls, recipe: Recipe) -> tuple[str, dict[str, Recipe]]:
        """The interaction with every `umt.cross_space`, unless the recipe goes without."""
        if recipe.umt.cross_mode is None:
            return "interaction", {}
        variants = {}
        for mode in get_args(CrossMode):
            umt = recipe.umt.model_copy(update={"cross_space": mode})
            variants[f"umt.cross_space={mode}"] = recipe.model_copy(update={"umt": umt})
        return "interaction", variants


class SpaceInteraction(nn.Module):
    """From F_S to M representational spaces that have interacted: [B, N, M, space_dim +
    token_dim].
    """

    def __init__(self, config: Config, student: Student, dims: list[FeatureDims]) -> None:
        super().__init__()
        cnn, spaces = student.family == "cnn", len(dims)
        self.spaces, self.recompute = spaces, config.grad_checkpointing
        self.with_class_token = student.has_class_token
        self.space_dim = resolve_space_dim(config, student.width, dims)
        self.token_dim = resolve_token_dim(config, cnn, self.space_dim)
        width = self.space_dim + self.token_dim
        depth = config.depth if config.depth != "auto" else (2 if cnn else 1)
        # Eq 1: the M projections Gamma_i as one Linear; on a CNN's map that is M 1x1 convolutions.
        self.reproject = nn.Linear(student.width, spaces * self.space_dim)
        nn.init.trunc_normal_(self.reproject.weight, std=0.02)
        nn.init.zeros_(self.reproject.bias)
        if config.model_token:
            self.model_token = nn.Parameter(torch.empty(self.token_dim).normal_(std=0.02))  # P_m
        self.cross = nn.ModuleList(build_cross(config, cnn, spaces, width) for _ in range(depth))
        self.intra = nn.ModuleList(build_intra(config, cnn, width) for _ in range(depth))

    def forward(self, features: Features) -> Tensor:
        """Re-project, attach the model token and alternate cross -> intra N times (Eq 1-3)."""
        grid = tuple(features.patches.shape[1:3])
        spaces = self.separate(self.positions(features))
        for cross, intra in zip(self.cross, self.intra, strict=True):
            if self.recompute and self.training and torch.is_grad_enabled():
                spaces = checkpoint(_alternate, cross, intra, spaces, grid, use_reentrant=False)
            else:
                spaces = _alternate(cross, intra, spaces, grid)
        return spaces

    def positions(self, features: Features) -> Tensor:
        """[B, N, d]: the class token, where the student has one, and its h*w patches."""
        positions = features.patches.flatten(1, 2)
        if self.with_class_token:
            positions = torch.cat((features.summary.unsqueeze(1), positions), dim=1)
        return positions

    def separate(self, positions: Tensor) -> Tensor:
        """[B, N, M, space_dim + d_m]: [B, N, d] in M spaces, each with the model token."""
        spaces = self.reproject(positions).unflatten(-1, (self.spaces, self.space_dim))
        if self.token_dim:
            # under autocast the parameter is wider than the features
            token = self.model_token.to(spaces.dtype).expand(*spaces.shape[:3], -1)
            spaces = torch.cat((spaces, token), dim=-1)
        return spaces

    def folded(self, heads: Mapping[str, ShippedHead]) -> tuple[nn.Module, dict[str, ShippedHead]]:
        """Itself and its heads as they serve, see `folding`."""
        return fold(self, heads)


def _alternate(cross: nn.Module, intra: nn.Module, spaces: Tensor, grid: tuple[int, int]) -> Tensor:
    return intra(cross(spaces, grid), grid)


class ReadOut(nn.Module):
    """From an interacted space back to its teacher: the token head and the feature head (3.4,
    A.3).
    """

    def __init__(
        self, config: Config, dims: Mapping[str, FeatureDims], space_dim: int, token_dim: int
    ) -> None:
        super().__init__()
        self.space_dim, self.pool = space_dim, config.token_pool
        self.order = {label: index for index, label in enumerate(dims)}
        # The chunk itself is the prediction where its width is the teacher's (the paper's case).
        self.feature_heads = nn.ModuleDict(
            {
                label: nn.Identity()
                if dim.patches == space_dim
                else nn.Linear(space_dim, dim.patches)
                for label, dim in dims.items()
            }
        )
        widths = {k: dim.summary for k, dim in dims.items() if dim.summary is not None}
        if token_dim and widths:
            self.token_norm = LayerNorm(token_dim)
            if share_token_head(config, widths):
                self.token_heads = nn.ModuleDict(
                    {"shared": nn.Linear(token_dim, next(iter(widths.values())))}
                )
            else:
                self.token_heads = nn.ModuleDict(
                    {label: nn.Linear(token_dim, width) for label, width in widths.items()}
                )
            self.with_token = frozenset(widths)
        else:
            self.with_token = frozenset()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, label: str, spaces: Tensor, grid: tuple[int, int]) -> Prediction:
        """Read teacher `label`'s space out of [B, N, M, c]; N may carry a class position before the
        h*w patches.
        """
        return self.of_space(label, spaces[:, :, self.order[label]], grid)

    def of_space(self, label: str, space: Tensor, grid: tuple[int, int]) -> Prediction:
        """The same of teacher `label`'s space alone, [B, N, c]."""
        features = self.feature_heads[label](space[..., : self.space_dim])
        prefix = space.shape[1] - grid[0] * grid[1]
        patches = features[:, prefix:].unflatten(1, grid)
        summary = features[:, 0] if prefix else features.mean(dim=1)
        token = self._token(label, space) if self.predicts_token(label) else None
        return Prediction(token, patches, summary)

    def predicts_token(self, label: str) -> bool:
        """Whether teacher `label` has a token head: it has a summary, and there is a model
        token.
        """
        return label in self.with_token

    def _token(self, label: str, space: Tensor) -> Tensor:
        head = self.token_heads["shared" if "shared" in self.token_heads else label]
        token = space[..., self.space_dim :]
        if (
            self.pool == "before"
        ):  # 3.4's order; A.3 says "project, then pool", which LayerNorm makes another thing
            return head(self.token_norm(token.mean(dim=1)))
        return head(self.token_norm(token)).mean(dim=1)


class SpaceHead(nn.Module):
    """One teacher's read-out as export ships it: interacted spaces in, predictions in the teacher's
    own units out.
    """

    def __init__(self, read_out: ReadOut, label: str, normalizer: FeatureNormalizer) -> None:
        super().__init__()
        self.read_out, self.label, self.normalizer = read_out, label, normalizer

    def forward(self, spaces: Tensor, grid: tuple[int, int]) -> Prediction:
        """Map [B, N, M, c] to this teacher's token, patches and summary."""
        return self.normalizer.restore(self.read_out(self.label, spaces, grid))

    def of_space(self, space: Tensor, grid: tuple[int, int]) -> Prediction:
        """The same of this teacher's space alone, [B, N, c]."""
        return self.normalizer.restore(self.read_out.of_space(self.label, space, grid))


def resolve_space_dim(config: Config, student_width: int, dims: list[FeatureDims]) -> int:
    """Common width of the M spaces: given, the student's, or (auto) the teachers' where they agree.

    Not the widest teacher's: the interaction grows with its square, and one of 1,280 makes it 20
    times a student of 2.8 million parameters.
    """
    if isinstance(config.space_dim, int):
        return config.space_dim
    widths = {dim.patches for dim in dims}
    return widths.pop() if config.space_dim == "auto" and len(widths) == 1 else student_width


def resolve_token_dim(config: Config, cnn: bool, space_dim: int) -> int:
    """d_m; 0 in the ablation without a model token."""
    if not config.model_token:
        return 0
    if config.token_dim == "auto":
        return space_dim if cnn else 64
    return config.token_dim


def share_token_head(config: Config, widths: Mapping[str, int]) -> bool:
    """Whether one Linear serves all teachers that have a summary, of these `widths` (A.3 shares
    it, which needs equal widths).
    """
    equal = len(set(widths.values())) == 1
    if config.share_token_head is True and not equal:
        listed = ", ".join(f"{label} {width}" for label, width in widths.items())
        raise UserError(
            f"umt.share_token_head = true needs equal summary widths, got {listed}: set it to auto"
        )
    return equal if config.share_token_head == "auto" else config.share_token_head
