"""What the training loop, the plan, checkpoints and export know of a method: one base class, whose
defaults fit a method without schedules, momentum networks or parts that never ship.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from contract.errors import UserError
from distill.config import Recipe, Section
from distill.data.crops import View
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment
from distill.models.student import Student


class Progress(NamedTuple):
    """Where training stands, from which a method derives its schedules; nothing of it is saved."""

    step: int
    """Optimizer step about to be taken, or just taken, from 0."""
    steps: int
    """Optimizer steps of the whole run."""
    per_epoch: int
    """Optimizer steps an epoch of the main stream (without one: of the largest batch)."""

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.per_epoch

    @property
    def share(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.step / self.steps


def cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from `first` at progress 0 to `last` at 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


class ParameterGroup(NamedTuple):
    """Parameters that are optimised alike."""

    parameters: Sequence[nn.Parameter]
    decay: bool = True
    """Whether they follow `train.weight_decay`."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    frozen_epochs: float = 0.0
    """Epochs at the start without a step, moments or decay; gradients are computed all the same,
    for DDP waits for every one."""


class Method(nn.Module):
    """A student and the way it learns from its teachers.

    A subclass is built as `Kind(recipe, dims, inference)`: `dims` are the teachers' widths by
    label, `inference` leaves out what `train_only` names.
    """

    Config: ClassVar[type[Section]]
    """The recipe's section of this method; `Config.TINY` are its values in `tiny.py`'s recipes."""
    Sections: ClassVar[Mapping[str, type[Section]]] = {}
    """Further sections of the recipe, by name, which have a TINY too."""

    student: Student
    views: tuple[View, ...]
    """What the data stage cuts from every picture."""
    teacher_views: Mapping[str, str]
    """Name of the view each teacher sees, all its crops, by teacher label."""
    normalizers: nn.ModuleDict
    """A `targets.FeatureNormalizer` for each teacher whose statistics are fitted before training;
    may be empty."""
    train_only: tuple[str, ...] = ()
    """Submodules, parameters and buffers that never ship (momentum networks, projectors)."""
    ships_averaged: bool = False
    """Whether `student.safetensors` holds the weights of `averaged`, and `ema.safetensors` the
    student's."""
    several_maps: bool = False
    """Whether it learns from teachers with maps of several sizes, as detectors have."""
    shards: ClassVar[bool] = True
    """Whether FSDP2 may shard it; False for a method whose momentum network follows its weights."""

    def __init__(self, recipe: Recipe, dims: Mapping[str, FeatureDims], inference: bool = False):
        super().__init__()

    @classmethod
    def check(cls, recipe: Recipe) -> Recipe:
        """Check what the sections of a recipe say together, once it is read, and return it, perhaps
        without what the method will not use. Raises UserError.
        """
        cls.check_parallel(recipe)
        if not recipe.teachers:
            raise UserError("teachers: no teachers: list at least one (name, role)")
        for number, teacher in enumerate(recipe.teachers):
            if teacher.role == "detector" and not cls.several_maps:
                raise UserError(
                    f"teachers.{number}.role = detector: method {recipe.method} takes one map of a "
                    "teacher, and a detector has three: set method=kpu, or remove it"
                )
        return recipe

    @classmethod
    def check_parallel(cls, recipe: Recipe) -> None:
        """Raise UserError for FSDP2 with a method that it cannot shard."""
        if recipe.train.parallel == "fsdp" and not cls.shards:
            raise UserError(
                f"train.parallel = fsdp: method {recipe.method} cannot be sharded: set "
                "train.parallel=ddp"
            )

    def warnings(self, values: Mapping[str, float]) -> list[str]:
        """What is wrong with the values of a log line, a sentence each: a collapse, say."""
        return []

    def cautions(self) -> list[str]:
        """What a user should know before training starts, a sentence each."""
        return []

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the optimizer trains; by default everything, without decay on vectors and on what
        the student's timm class names.
        """
        return decay_groups(self, self.named_parameters())

    def before_step(self, progress: Progress) -> None:
        """Set temperatures, momenta and the like, once an optimizer step. Values belong into
        non-persistent 0-d buffers: a Python number would make torch.compile compile again.
        """

    def forward(
        self, views: Mapping[str, Tensor], targets: Mapping[str, Features]
    ) -> dict[str, Tensor]:
        """Return scalar losses of a micro-batch; "loss" carries the gradient.

        Every pass of a micro-batch happens inside this one call, since DDP allows one forward for
        each backward; statistics of the batch are reduced over the ranks in here. `views` by name:
        uint8 [crops * B, 3, S, S]; `targets` by teacher label, in the same order.
        """
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Update what follows the weights (a momentum network), once an optimizer step."""

    def averaged(self) -> Mapping[str, Tensor]:
        """Weights of the momentum network under the names of the student's, which `ema.safetensors`
        holds in their place; empty without such a network.
        """
        return {}

    def deploy(self) -> Deployment:
        """Return what ships."""
        raise NotImplementedError

    def describe(self) -> Mapping[str, Sequence[str]]:
        """Names of the "losses" that `forward` returns beside "loss", and of the "heads" of
        `deploy`.
        """
        raise NotImplementedError

    @classmethod
    def variants(cls, recipe: Recipe) -> tuple[str, Mapping[str, Recipe]]:
        """A part (submodule) and recipes by what to call them, for `--dry-run` to compare the
        part's cost in each; none by default.
        """
        return "", {}

    @classmethod
    def memory_switches(cls, recipe: Recipe) -> tuple[str, ...]:
        """Keys of the switches that trade time for memory, for `--dry-run` to compare; by default
        the student's.
        """
        return ("student.grad_checkpointing",)


def decay_groups(method: Method, named: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Trainable parameters with and without weight decay: none on vectors (norms, biases, tokens)
    and on what the student's timm class names.
    """
    skip = {f"student.{name}" for name in method.student.no_weight_decay()}
    decayed, plain = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name in skip or name.endswith(".bias")
            (plain if free else decayed).append(parameter)
    return [ParameterGroup(decayed), ParameterGroup(plain, decay=False)]
