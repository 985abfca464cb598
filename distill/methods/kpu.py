"""KPU: knowledge of several teachers, unified in one latent space, beside that of a frozen sentinel
(Knowledge Preservation and Unification, 2025).

    L = mean_t L_t2s + mean_t L_s2t + lambda mean_t L_rec                                  (Eq 4)

The student is a frozen ViT inside a trainable adapter (`models/vit_adapter.py`) with a global
feature x and maps V of several sizes. Every term is an alignment (Eq 1),

    L_align = 1 cos(x) + 0.9 cos(V) + 0.1 smooth-L1(V),

without the first part for teachers without a global feature: of the student translated to the
teacher's space (s2t), of the teacher translated to the student's (t2s, Eq 2), and of the teacher
with itself, translated there and back (rec, Eq 3). A teacher's map is aligned with the level of the
student that is closest in size.

Our reading where the paper is silent: levels that no teacher is closest to are aligned with the
closest map there is (`levels`), so that all of the adapter learns; several maps of a teacher count
by their mean; nothing is detached in t2s (`stop_gradient`).

A teacher with a `batch_size` sees pictures of its own, of its own size, and so does the student
(`student_size`): every stream has a forward pass, and all share one backward. Other teachers share
one view.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Area, Auto, Fraction, Positive, Recipe, Section
from distill.data.crops import IMAGE, MAIN, View
from distill.distributed import mean_over_ranks
from distill.features import FeatureDims, Features, resize_map
from distill.methods.alignment import (
    Levels,
    Pair,
    TeacherHead,
    Translator,
    align,
    choose_levels,
    exact,
    grid_of,
    levels_of,
    maps_of,
)
from distill.methods.deployment import Deployment, RestoredHead, ShippedHead
from distill.methods.method import Method, Progress
from distill.methods.targets import FeatureNormalizer
from distill.methods.unic import check_teachers, drops_of_step, keep_teachers
from distill.methods.weighting import Famo
from distill.models.layout import nearest_multiples
from distill.models.preprocess import Preprocess
from distill.models.student import Student
from distill.models.vit_adapter import AdapterConfig, ViTAdapter

log = logging.getLogger(__name__)

_NonNegative = Annotated[float, Field(ge=0)]
_Above = Annotated[float, Field(gt=0)]


class Config(Section):
    """KPU: a frozen sentinel, a trainable adapter, alignment in the teachers' spaces and in one."""

    TINY: ClassVar = {
        "hidden": 16,
        "adapter": {"blocks": 2, "heads": 2, "points": 2, "width": 32},
    }

    preserve: bool = Field(
        True,
        description="keep the student's weights frozen inside an adapter; false: train them, "
        "without adapter",
    )
    unify: bool = Field(True, description="align in the student's space too (L_t2s, Eq 2)")
    reconstruct: bool = Field(
        True, description="translate teachers there and back (L_rec, Eq 3); needs unify"
    )
    reconstruct_weight: _NonNegative = Field(1.0, description="lambda of Eq 4")
    align: tuple[_NonNegative, _NonNegative, _NonNegative] = Field(
        (1.0, 0.9, 0.1),
        description="weights in Eq 1 of the global feature's cosine, the maps' cosine and their "
        "smooth L1",
    )
    hidden: Positive | Auto = Field(
        "auto", description="hidden width of the translators; auto: the student's width"
    )
    levels: Levels = Field(
        "pick_and_fill",
        description="each teacher's map picks the level of closest size, and levels that nobody "
        "picked the closest map; pick: those are left untrained; every: each teacher is aligned "
        "with all levels",
    )
    stop_gradient: bool = Field(
        False, description="whether t2s moves the translated teachers alone, not the student"
    )
    weighting: Literal["equal", "famo", "teacher_drop"] = Field(
        "equal",
        description="of teachers (Figure 4): alike, by FAMO, or some dropped as in UNIC",
    )
    drop: Fraction = Field(
        0.5, description="teacher_drop: probability of dropping a teacher that is not the worst one"
    )
    famo_lr: _Above = Field(0.025, description="learning rate of FAMO's logits")
    famo_decay: _NonNegative = Field(0.01, description="L2 penalty of FAMO's logits")
    famo_update: Literal["same_batch", "next_batch"] = Field(
        "same_batch",
        description="what FAMO compares a step's losses with: those of the same pictures after it, "
        "by a further forward pass, or of the next ones, for free",
    )
    dense_scale: Area = Field(
        (0.5, 1.0),
        description="range of a crop's share of the picture's area, in streams of teachers without "
        "a global feature (detectors); other crops follow data.crop_scale",
    )
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)


class KPU(Method):
    """A sentinel with an adapter, and translators between its space and the teachers'."""

    Config = Config
    train_only = ("t2s", "rec", "famo")
    several_maps = True
    shards = False

    def __init__(
        self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False
    ) -> None:
        super().__init__(recipe, dims, inference)
        config = recipe.kpu
        self.config, self.seed = config, recipe.train.seed
        self.views, self.teacher_views = _views(recipe, dims)
        self.preprocess = Preprocess(
            recipe.student.image_size, recipe.student.mean, recipe.student.std
        )
        self.student = _student(recipe, inference)
        self.student_sizes = _student_sizes(recipe, self.student.stride)
        width = self.student.width
        hidden = width if config.hidden == "auto" else config.hidden
        levels = max(1, len(self.student.map_strides))
        self.heads = nn.ModuleDict(
            {label: TeacherHead(dim, width, hidden, levels) for label, dim in dims.items()}
        )
        self.normalizers = nn.ModuleDict(
            {label: _normalizer(recipe, label, dim) for label, dim in dims.items()}
        )
        if inference:
            return
        if config.unify:
            self.t2s = nn.ModuleDict(
                {label: Translator(dim, width, hidden, True) for label, dim in dims.items()}
            )
        if config.reconstruct:
            self.rec = nn.ModuleDict(
                {label: Translator(dim, width, hidden, False) for label, dim in dims.items()}
            )
        if config.weighting == "famo":
            self.famo = Famo(len(dims), config.famo_lr, config.famo_decay)
        self._due = False
        self._told_untrained = False

    @classmethod
    def check(cls, recipe: Recipe) -> Recipe:
        """Refuse what excludes each other, and weights of teachers."""
        kpu = recipe.kpu
        check_teachers(recipe)
        if kpu.reconstruct and not kpu.unify:
            raise UserError(
                "kpu.reconstruct = true: there is nothing to translate back with kpu.unify = "
                "false: set kpu.reconstruct=false"
            )
        if kpu.weighting != "equal" and len(recipe.teachers) == 1:
            raise UserError(
                f"kpu.weighting = {kpu.weighting}: there is a single teacher: set "
                "kpu.weighting=equal or add a teacher"
            )
        # what tiny.py sets is no wish of the user's
        unset = AdapterConfig(), AdapterConfig(**Config.TINY["adapter"])
        if not kpu.preserve and kpu.adapter not in unset:
            raise UserError(
                "kpu.adapter: kpu.preserve = false trains the student without an adapter: on the "
                "command line set kpu.adapter={} or kpu.preserve=true; in a file, start from a "
                "base without one"
            )
        own = [teacher.batch_size for teacher in recipe.teachers]
        if any(own) and not all(own):
            raise UserError(
                f"teachers.{own.index(None)}.batch_size = null: the other teachers have streams of "
                "their own: give each one a batch_size, or none"
            )
        if kpu.preserve and recipe.student.drop_path:
            raise UserError(
                f"student.drop_path = {recipe.student.drop_path:g}: the sentinel does not train: "
                "set student.drop_path=0 (and kpu.adapter.drop_path for the adapter's)"
            )
        if kpu.preserve and recipe.student.grad_checkpointing:
            raise UserError(
                "student.grad_checkpointing = true: the sentinel runs inside the adapter: set "
                "kpu.adapter.grad_checkpointing=true in its place"
            )
        return super().check(recipe)

    @classmethod
    def memory_switches(cls, recipe: Recipe) -> tuple[str, ...]:
        """The adapter's, or the student's where there is none."""
        own = ("kpu.adapter.grad_checkpointing",)
        return own if recipe.kpu.preserve else super().memory_switches(recipe)

    def before_step(self, progress: Progress) -> None:
        """Seed the step's drops, and note whether FAMO has losses of a step before to compare."""
        self._generator = drops_of_step(self.seed, progress.step, "cpu")
        self._due = progress.step > 0 and self.config.famo_update == "next_batch"

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Compute Eq 4 of a batch and, of every teacher, its parts: `loss.<teacher>.s2t`, `.t2s`
        and `.rec`. With teachers dropped or weighted also `weight.<teacher>`.
        """
        losses, parts = self.losses(views, targets)
        famo = self.config.weighting == "famo"
        if famo and self._due:  # the first micro-batch of a step
            self.famo.update(losses)
            self._due = False
        loss, weights = self._weigh(losses)
        if famo and self.config.famo_update == "same_batch" and not losses.is_meta:  # the plan's
            # FAMO looks at the same pictures again after the step, as precisely as now
            kind = losses.device.type
            amp = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            self._again = views, targets, amp
        if self.config.weighting != "equal":
            parts |= {f"weight.{label}": weights[row] for row, label in enumerate(targets)}
        return {"loss": loss, **parts}

    def after_step(self, progress: Progress) -> None:
        """Let FAMO see what the step did to the losses of its last micro-batch."""
        if self.config.weighting != "famo" or self.config.famo_update == "next_batch":
            return
        views, targets, (enabled, kind) = self._again
        device = self.famo.logits.device.type
        with torch.no_grad(), torch.autocast(device, kind, enabled=enabled):
            losses, _ = self.losses(views, targets)
        self.famo.update(losses)
        self._again = None

    def losses(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What every teacher adds to Eq 4, times their number, [T], and its parts."""
        students = {
            view.name: self._encode(view, views[view.name]).map(exact) for view in self.views
        }
        features = {label: students[self.teacher_views[label]] for label in targets}
        normalized = {label: self.normalizers[label](target) for label, target in targets.items()}
        pairs = choose_levels(
            {label: [grid_of(level) for level in levels_of(f)] for label, f in features.items()},
            {label: [grid_of(map_) for map_ in maps_of(f)] for label, f in targets.items()},
            self.config.levels,
        )
        rows, parts = [], {}
        spare = self._unaligned(pairs, students.values())
        for label, target in normalized.items():
            picked = pairs[label][: len(maps_of(target))]
            self.heads[label].remember([pair.level for pair in picked])
            kinds = self._compare(label, features[label], target, pairs[label])
            scales = {"rec": self.config.reconstruct_weight}
            rows.append(sum(scales.get(kind, 1) * loss for kind, loss in kinds.items()))
            parts |= {f"loss.{label}.{kind}": loss.detach() for kind, loss in kinds.items()}
        return torch.stack(rows) + spare, parts

    def _unaligned(
        self, pairs: Mapping[str, Sequence[Pair]], students: Iterable[Features]
    ) -> Tensor | float:
        """Zero, with a gradient of zero for the levels that are compared with nothing: DDP waits
        for every gradient.
        """
        strides = self.student.map_strides
        compared = {pair.level for chosen in pairs.values() for pair in chosen}
        idle = [level for level in range(len(strides)) if level not in compared]
        if not idle:
            return 0.0
        if not self._told_untrained:
            self._told_untrained = True
            log.warning(
                "kpu.levels = pick: no teacher has a map of the size of the student's at 1/%s, "
                "which stay untrained (set kpu.levels=pick_and_fill)",
                ", 1/".join(str(strides[level]) for level in idle),
            )
        return sum(0.0 * features.maps[level].sum() for features in students for level in idle)

    def _encode(self, view: View, images: Tensor) -> Features:
        """Features of uint8 crops [B, 3, S, S]: at the deployed size where teachers share a view,
        else at the teacher's `student_size`.
        """
        if view.stream == MAIN:
            return self.student(self.preprocess(images))
        size, stride = self.student_sizes[view.stream], self.student.stride
        if size == "auto":
            size = max(1, round(images.shape[-1] / stride)) * stride
        return self.student(self.preprocess(images, size))

    def _compare(
        self, label: str, student: Features, teacher: Features, pairs: Sequence[Pair]
    ) -> dict[str, Tensor]:
        """The teacher's alignments by name, each a number."""
        weights, levels, maps = self.config.align, levels_of(student), maps_of(teacher)
        head, summary = self.heads[label], teacher.summary
        vectors = None if summary is None else (head.summary(student.summary), summary)
        there = [
            (head.maps[m](resize_map(levels[level], grid_of(maps[m]))), maps[m])
            for level, m in pairs
        ]
        losses = {"s2t": align(vectors, there, weights)}
        if self.config.unify:
            into = self.t2s[label]
            known = [exact(layer(map_)) for layer, map_ in zip(into.maps, maps, strict=True)]
            known_summary = None if summary is None else into.summary(summary)
            here = student.map(Tensor.detach) if self.config.stop_gradient else student
            own = levels_of(here)
            vectors = None if summary is None else (here.summary, known_summary)
            both = [(own[level], resize_map(known[m], grid_of(own[level]))) for level, m in pairs]
            losses["t2s"] = align(vectors, both, weights)
        if self.config.reconstruct:
            back = self.rec[label]
            vectors = None if summary is None else (back.summary(known_summary), summary)
            again = [layer(map_) for layer, map_ in zip(back.maps, known, strict=True)]
            losses["rec"] = align(vectors, list(zip(again, maps, strict=True)), weights)
        return losses

    def _weigh(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all teachers' [T], and their weights."""
        if self.config.weighting == "famo":
            weights = self.famo.weights
            return self.famo(losses), weights
        if self.config.weighting == "equal":
            return losses.mean(), torch.full_like(losses.detach(), 1 / len(losses))
        worst = mean_over_ranks(losses).unsqueeze(1)
        keep = keep_teachers(worst, self._draw(worst), self.config.drop).squeeze(1)
        weights = keep / keep.sum()
        return (weights * losses).sum(), weights

    @torch.compiler.disable
    def _draw(self, losses: Tensor) -> Tensor:
        """Uniform numbers [T, 1] for the drops, the same in every process."""
        return torch.rand(losses.shape, generator=self._generator, device="cpu").to(losses.device)

    def deploy(self) -> Deployment:
        """What ships: the student, and of every teacher the translators into its space, on the
        levels that they were trained on.
        """
        heads, strides = {}, self.student.map_strides
        # Eq 1 compares the directions of global features alone
        free = ("token",) if self.config.align[2] else ("token", "patches", "maps")
        for label, head in self.heads.items():
            shipped = head.shipped()
            levels = sorted(set(shipped.levels))
            reads = tuple(f"maps.{strides[level]}" for level in levels) if strides else ("patches",)
            if head.summary is not None:
                reads += ("summary",)
            restored = RestoredHead(shipped, self.normalizers[label])
            heads[label] = ShippedHead(
                restored,
                reads,
                has_token=head.summary is not None,
                free_length=free,
                strides=tuple(strides[level] for level in shipped.levels) if strides else (),
            )
        return Deployment(self.preprocess, self.student, nn.Identity(), heads)

    def describe(self) -> dict[str, list[str]]:
        """Losses a teacher, its weight where they differ, and heads."""
        kinds = ["s2t"]
        kinds += ["t2s"] if self.config.unify else []
        kinds += ["rec"] if self.config.reconstruct else []
        names = [f"loss.{label}.{kind}" for label in self.heads for kind in kinds]
        if self.config.weighting != "equal":
            names += [f"weight.{label}" for label in self.heads]
        return {"losses": names, "heads": list(self.heads)}


def _student(recipe: Recipe, inference: bool) -> Student:
    if not recipe.kpu.preserve:
        return Student(recipe.student)
    student = ViTAdapter(recipe.student, recipe.kpu.adapter)
    known = recipe.student.pretrained or recipe.student.checkpoint
    if not known and not inference and not student.level_embed.is_meta:
        log.warning(
            "student.pretrained = false: the sentinel's weights are random, and stay so (set "
            "student.pretrained=true, or student.checkpoint)"
        )
    return student


def _views(
    recipe: Recipe, dims: Mapping[str, FeatureDims]
) -> tuple[tuple[View, ...], dict[str, str]]:
    """A view for every teacher with a batch of its own, one for all others, and who sees which."""
    views: dict[str, View] = {}
    seen = {}
    for teacher in recipe.teachers:
        view = View(IMAGE)
        if teacher.batch_size:
            dense = dims[teacher.label].summary is None
            scale = recipe.kpu.dense_scale if dense else None
            view = View(f"{teacher.label}_{IMAGE}", scale=scale, stream=teacher.label)
        views[view.name] = view
        seen[teacher.label] = view.name
    return tuple(views.values()), seen


def _student_sizes(recipe: Recipe, stride: int) -> dict[str, int | Auto]:
    """The side of the student's input in every teacher's stream."""
    for number, teacher in enumerate(recipe.teachers):
        size = teacher.student_size
        if size != "auto" and size % stride:
            raise UserError(
                f"teachers.{number}.student_size = {size}: the student's patch of {stride} pixels "
                f"does not divide it (use {nearest_multiples(size, stride)})"
            )
    return {teacher.label: teacher.student_size for teacher in recipe.teachers}


def _normalizer(recipe: Recipe, label: str, dims: FeatureDims) -> FeatureNormalizer:
    mode = recipe.targets.normalize
    if dims.maps and mode != "none":
        raise UserError(
            f"targets.normalize = {mode}: teacher '{label}' has several maps, of which only the "
            "first would be normalised: set targets.normalize=none"
        )
    return FeatureNormalizer(label, dims, mode)
