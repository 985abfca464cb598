"""Lengths of a run, batch sizes of its streams, and what changes over its steps."""

from collections.abc import Sequence

from contract.errors import UserError
from distill.config import Recipe, TrainConfig
from distill.data.crops import MAIN, View, view_of
from distill.data.photometric import RECIPES
from distill.methods.method import Method, cosine
from distill.teachers import Teacher
from distill.training.suitability import check_student


class Schedule:
    """How a recipe's method, teachers and pictures become views, streams and steps.

    Raises UserError for a teacher with a batch size of its own if the method has no stream for it,
    for one with a size for the student but no stream, and for a student that cannot learn at the
    recipe's sizes (see `suitability`).
    """

    def __init__(
        self, recipe: Recipe, method: Method, teachers: Sequence[Teacher], pictures: int
    ) -> None:
        self.views = resolve_views(recipe, method, teachers)
        own = {teacher.label: teacher.batch_size for teacher in recipe.teachers}
        streams = list(dict.fromkeys(view.stream for view in self.views))
        for number, (label, size) in enumerate(own.items()):
            if size and (label == MAIN or label not in streams):
                raise UserError(
                    f"teachers.{number}.batch_size = {size}: method {recipe.method} gives teacher "
                    f"'{label}' the same pictures as the others: remove it, and set "
                    "train.batch_size"
                )
        for number, teacher in enumerate(recipe.teachers):
            if teacher.student_size != "auto" and not own[teacher.label]:
                raise UserError(
                    f"teachers.{number}.student_size = {teacher.student_size}: teacher "
                    f"'{teacher.label}' has no stream of its own: set its batch_size too, or "
                    "student.image_size in its place"
                )
        self.batch_sizes = {
            stream: (stream != MAIN and own.get(stream)) or recipe.train.batch_size
            for stream in streams
        }
        leading = MAIN if MAIN in streams else max(streams, key=self.batch_sizes.__getitem__)
        # A batch larger than the data is refused where batches are made
        self.per_epoch = max(1, pictures * recipe.data.repeats // self.batch_sizes[leading])
        self.steps = recipe.train.steps or recipe.train.epochs * self.per_epoch
        self.pictures_per_step = sum(self.batch_sizes.values())
        check_student(recipe, method, self.batch_sizes)


def resolve_views(recipe: Recipe, method: Method, teachers: Sequence[Teacher]) -> tuple[View, ...]:
    """The method's views with every size and scale filled in."""
    resolved = []
    for view in method.views:
        _check_photometric(view)
        seen_by = [t for t in teachers if view_of(method.teacher_views[t.label]) == view.name]
        size = view.size
        if size is None and recipe.data.image_size != "auto":
            size = recipe.data.image_size
        if size is None:
            students = [recipe.student.image_size]
            if view.stream != MAIN:
                own = (teacher.config.student_size for teacher in seen_by)
                students = [side for side in own if side != "auto"]
            size = max([*students, *(teacher.image_size for teacher in seen_by)])
        resolved.append(view._replace(size=size, scale=view.scale or recipe.data.crop_scale))
    return tuple(resolved)


def _check_photometric(view: View) -> None:
    unknown = set(view.photometric) - set(RECIPES)
    if unknown or len(view.photometric) not in (0, 1, view.crops):
        raise ValueError(
            f"view '{view.name}': photometric = {view.photometric} needs one name for all of its "
            f"{view.crops} crops or one for each, of {', '.join(RECIPES)}"
        )


def learning_rate(step: int, steps: int, per_epoch: int, settings: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr` (UMT 4.1).

    With `schedule: dino` the warm-up starts at 0 and ends at `lr`, and the cosine would reach its
    end one step after the last (DINO's and UNIC's `cosine_scheduler`).
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(settings.warmup_epochs * per_epoch)
    warmup = min(warmup, steps - 1)
    dino = settings.schedule == "dino"
    if step < warmup:
        share = step / max(1, warmup - 1) if dino else (step + 1) / (warmup + 1)
        return settings.lr * share
    progress = (step - warmup) / max(1, steps - warmup - (0 if dino else 1))
    return cosine(settings.lr, settings.min_lr, progress)


def weight_decay(step: int, steps: int, settings: TrainConfig) -> float:
    """A cosine from `weight_decay` to `weight_decay_end`, or the former throughout; ends as the
    learning rate's.
    """
    first, last = settings.weight_decay, settings.weight_decay_end
    if last is None:
        return first
    return cosine(first, last, step / max(1, steps - (0 if settings.schedule == "dino" else 1)))
