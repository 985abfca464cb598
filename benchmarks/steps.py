"""One training step of each method as `distill.training.loop` takes it, and the parts it consists
of, each to be timed alone.
"""

import argparse
from collections.abc import Callable

import torch

from distill.config import Recipe
from distill.data.batches import Batch
from distill.data.crops import IMAGE, MAIN
from distill.distributed import Ranks
from distill.features import Features
from distill.methods import build_method
from distill.methods.losses import alignment_losses
from distill.methods.method import Progress
from distill.methods.self_supervised.dino import GLOBAL, LOCAL
from distill.teachers import build_teacher
from distill.training.loop import AUTOCAST, build_optimizer, take_step, teacher_features
from distill.training.schedule import Schedule

_MANY = 1_000_000
"""Pictures, as if there were enough for any batch."""


class Step:
    """One training step as `distill.training.loop` takes it, and its parts alone."""

    networks: tuple[str, ...] = ()
    """Of the parts, those that a ratio of their own is reported for: no step can do without."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace) -> None:
        self.ranks = Ranks(0, 1, torch.device(args.device))
        device = self.ranks.device
        self.teachers = [
            build_teacher(t, recipe.teacher_runtime, i).to(device)
            for i, t in enumerate(recipe.teachers)
        ]
        self.recipe = recipe
        self.method = (
            build_method(recipe, {t.label: t.dims for t in self.teachers}).to(device).train()
        )
        self.optimizer = build_optimizer(self.method, recipe.train, device)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.look = teacher_features(self.teachers, self.method.teacher_views, device)
        index = {MAIN: torch.arange(args.batch)}
        self.schedule = Schedule(recipe, self.method, self.teachers, _MANY)
        self.batch = Batch(self._random_views(device), index, index, [], {})
        self.progress = Progress(0, 1, 1)
        self.targets = self.look(self.batch)
        self.prepare()

    def _random_views(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Random bytes in the shapes of the method's views."""
        views = {}
        for view in self.schedule.views:
            shapes = view.shapes(self.schedule.batch_sizes[view.stream])
            for name, (shape, kind) in shapes.items():
                views[name] = torch.randint(0, 256, shape, dtype=kind, device=device)
        return views

    def prepare(self) -> None:
        """Make the inputs of the parts."""
        self.images = self.method.preprocess(self.batch.views[IMAGE])
        self.features, self.cotangent = self.encode(self.images)

    def encode(self, images: torch.Tensor) -> tuple[Features, Features]:
        """The student's features as leaves, and gradients for them."""
        with torch.no_grad(), self.autocast():
            features = self.method.student(images)
        leaves = features.map(lambda f: f.detach().requires_grad_())
        return leaves, leaves.map(torch.randn_like)

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        """What a step consists of, besides the optimizer."""
        return {
            "teachers": self.run_teachers,
            "student": self.run_student,
            "interaction": self.run_interaction,
        }

    def autocast(self) -> torch.autocast:
        precision = self.recipe.train.precision
        return torch.autocast(
            self.ranks.device.type, AUTOCAST[precision], enabled=precision != "fp32"
        )

    def whole(self) -> None:
        self.method.before_step(self.progress)
        targets = self.look(self.batch)
        with self.autocast():
            losses = self.method(self.batch.views, targets)
        losses["loss"].backward()
        self.optimize()
        self.method.after_step(self.progress)

    def run_teachers(self) -> None:
        self.look(self.batch)

    def run_student(self) -> None:
        self.run_network(self.images, self.cotangent)

    def run_network(self, images: torch.Tensor, cotangent: Features) -> None:
        with self.autocast():
            features = self.method.student(images)
        gradients = cotangent.named().values()
        torch.autograd.backward(list(features.named().values()), list(gradients))

    def run_interaction(self) -> None:
        method = self.method
        with self.autocast():
            spaces = method.interaction(self.features)
            grid = tuple(self.features.patches.shape[1:3])
            predictions = {
                label: method.read_out(label, spaces, grid) for label in method.teacher_views
            }
            losses = alignment_losses(predictions, self.targets, method.teachers, method.grid)
        losses["loss"].backward()

    def optimize(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        take_step(self.optimizer, self.scaler, ~torch.isfinite(norm))
        self.optimizer.zero_grad(set_to_none=True)


class UNICStep(Step):
    """UNIC's: the student's layers, the ladder, and everything after it."""

    def prepare(self) -> None:
        self.images = self.method.preprocess(self.batch.views[IMAGE])
        self.method.before_step(self.progress)
        with torch.no_grad(), self.autocast():
            layers = self.method._read_layers(self.images)
        self.layers = [
            type(layer)(*(t.detach().requires_grad_() for t in layer)) for layer in layers
        ]
        self.cotangents = [torch.randn_like(t) for layer in self.layers for t in layer]
        with torch.no_grad(), self.autocast():
            self.predictions = {k: head(self.layers) for k, head in self.method.heads.items()}
        self.predictions = {
            k: p._replace(
                token=p.token.detach().requires_grad_(), patches=p.patches.detach().requires_grad_()
            )
            for k, p in self.predictions.items()
        }

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "teachers": self.run_teachers,
            "student": self.run_student,
            "ladder": self.run_ladder,
            "losses": self.run_losses,
        }

    def run_student(self) -> None:
        with self.autocast():
            layers = self.method.student.every_layer(self.images)
        torch.autograd.backward([t for layer in layers for t in layer], self.cotangents)

    def run_ladder(self) -> None:
        with self.autocast():
            outputs = [
                tensor for head in self.method.heads.values() for tensor in head(self.layers)[:2]
            ]
        torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])

    def run_losses(self) -> None:
        """Standardise, compare and drop."""
        with self.autocast():
            loss, _ = self.method.compare(self.predictions, self.targets)
        loss.backward()


class SeFAStep(Step):
    """SeFA's with DINO: two crops of 224 px and eight of 96 of each picture."""

    def prepare(self) -> None:
        method = self.method
        method.before_step(self.progress)
        self.images = method.preprocess(self.batch.views[GLOBAL])
        self.local = method.preprocess.normalize(self.batch.views[LOCAL].float() / 255)
        self.features, self.cotangent = self.encode(self.images)
        local, _ = self.encode(self.local)
        self.local_cotangent = torch.randn_like(local.summary)
        self.summaries = torch.cat((self.features.summary, local.summary)).detach().requires_grad_()

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        return {
            "teachers": self.run_teachers,
            "student, 224 px": self.run_student,
            "student, 96 px": self.run_local,
            "momentum": self.run_momentum,
            "heads": self.run_heads,
            "DINO head and loss": self.run_dino,
            "follow": lambda: self.method.after_step(self.progress),
        }

    def run_local(self) -> None:
        with self.autocast():
            summary = self.method.student(self.local).summary
        summary.backward(self.local_cotangent)

    @torch.no_grad()
    def run_momentum(self) -> None:
        ssl = self.method.ssl
        with self.autocast():
            self.followed = ssl.momentum_head(ssl.momentum(self.images).summary).float()

    def run_heads(self) -> None:
        with self.autocast():
            loss, _ = self.method.compare(self.features, self.targets, None)
        loss.backward()

    def run_dino(self) -> None:
        with self.autocast():
            scores = self.method.ssl.head(self.summaries).float()
            loss, _ = self.method.ssl.compare(scores, self.followed)
        loss.backward()


class KPUStep(Step):
    """KPU's, a stream of its own for every teacher."""

    def prepare(self) -> None:
        method, stride = self.method, self.method.student.stride
        method.before_step(self.progress)
        self.streams = {}
        for view in method.views:
            images = self.batch.views[view.name]
            side = max(1, round(images.shape[-1] / stride)) * stride
            images = method.preprocess(images, side)
            self.streams[view.name] = images, *self.encode(images)
        self.networks = tuple(name for name in self.parts if name != "translators and losses")

    @property
    def parts(self) -> dict[str, Callable[[], None]]:
        students = {
            f"student, {images.shape[0]} of {images.shape[-1]} px": lambda i=images, c=cotangent: (
                self.run_network(i, c)
            )
            for images, _, cotangent in self.streams.values()
        }
        return {
            "teachers": self.run_teachers,
            **students,
            "translators and losses": self.run_losses,
        }

    def run_losses(self) -> None:
        """Everything after the student, from features that are there already."""
        leaves = {name: features for name, (_, features, _) in self.streams.items()}
        self.method._encode = lambda view, images: leaves[view.name]
        try:
            with self.autocast():
                loss = self.method(self.batch.views, self.targets)["loss"]
        finally:
            del self.method._encode
        loss.backward()


STEPS = {"umt": Step, "unic": UNICStep, "sefa": SeFAStep, "kpu": KPUStep}
