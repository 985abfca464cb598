"""The training loop: one file for every method and every number of processes, read top to
bottom.

Each step: `before_step` -> views of pictures -> frozen teachers (or their cache) -> one forward of
the method -> backward -> clip -> AdamW -> `after_step`. Nothing in a step waits for the device;
metrics are read where a log line is due.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contract.errors import Failure
from distill.config import Recipe, TrainConfig
from distill.data.batches import (
    Batch,
    CorruptLedger,
    StreamBatches,
    batch_bytes,
    make_loader,
)
from distill.data.crops import CropDataset
from distill.data.pictures import open_pictures
from distill.distributed import Ranks, full_state, load_full_state, without_sync, wrap
from distill.features import Features
from distill.methods import build_method
from distill.methods.lengths import with_lengths
from distill.methods.method import Method, Progress
from distill.methods.targets import fit_normalizers
from distill.recipe_io import dump_recipe
from distill.runs import dump_dims, save_student
from distill.teachers import Teacher, build_teacher
from distill.teachers.cache import bytes_a_slot, cache_folder, open_cache
from distill.teachers.precision import settle_precisions
from distill.training.checkpoint import CheckpointWriter, load_checkpoint, write_recipe
from distill.training.lengths import fit_shipped
from distill.training.loggers import Loggers, check_loggers
from distill.training.memory_format import set_arithmetic, set_memory_format
from distill.training.metrics import MetricsLog
from distill.training.resume import (
    check_length,
    check_pictures,
    check_teachers,
    check_weights,
    keep_list,
    seed_for_new_world,
)
from distill.training.schedule import Schedule, learning_rate, weight_decay
from distill.training.start import start_from_run
from distill.training.stop import StopSignal, random_state, set_random_state
from distill.training.suitability import check_compiler
from distill.training.watch import Score, Watch, check_score

log = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    resume: bool,
    stop: StopSignal,
    score: Score | None = None,
) -> bool:
    """Train `recipe` into `folder`, from its newest checkpoint if `resume`; `score` is for
    `monitor.data`, on the first rank.

    Returns whether training reached its last step; False means `stop` was requested and a
    checkpoint written. Raises UserError for mistakes a user can correct and Failure if training
    itself fails.
    """
    settings, device = recipe.train, ranks.device
    checkpoints = folder / "checkpoint"
    saved = load_checkpoint(checkpoints) if resume else None

    check_compiler(recipe, device)
    check_score(score, recipe, ranks)
    check_loggers(settings.all_loggers, ranks)

    # ---- pictures, teachers, method -------------------------------------------------------------
    pictures = open_pictures(recipe.data)
    listed = check_pictures(pictures, recipe, folder, saved, ranks)
    teachers = [
        build_teacher(t, recipe.teacher_runtime, i).to(device)
        for i, t in enumerate(recipe.teachers)
    ]
    taught_by = check_teachers(teachers, saved, ranks)
    if device.type == "cuda":
        set_arithmetic(settings, teachers)
    dims = {teacher.label: teacher.dims for teacher in teachers}
    torch.manual_seed(settings.seed)  # the same initial weights on every rank
    method = build_method(recipe, dims).to(device)
    if not saved:
        start_from_run(method, recipe)
    set_memory_format(method, settings, device)

    # ---- the order of pictures, and their teachers' features -------------------------------------
    schedule = Schedule(recipe, method, teachers, len(pictures))
    per_epoch, steps = schedule.per_epoch, schedule.steps
    for caution in method.cautions():
        log.warning(caution)

    def step_batches(first: int, last: int) -> StreamBatches:
        return StreamBatches(
            len(pictures),
            recipe.data.repeats,
            schedule.batch_sizes,
            last,
            first,
            ranks.rank,
            ranks.world,
            settings.accumulate,
            settings.seed,
            recipe.teacher_cache.views,
        )

    start = saved["step"] if saved else 0
    batches = step_batches(start, steps)
    if saved:
        check_length(saved, steps, recipe)
        check_weights(saved, method)
    place = cache_folder(recipe, folder) if recipe.teacher_cache.views else None
    precisions = settle_precisions(teachers, saved, place, ranks)
    # All user input has been checked by now: files are only written from here on.
    if ranks.first:
        write_recipe(folder, recipe)
        listed = keep_list(listed, folder)
    ranks.barrier()
    dataset = CropDataset(pictures, recipe.data, schedule.views, settings.seed)
    compute, cached_bytes = teacher_features(teachers, method.teacher_views, device), 0
    if recipe.teacher_cache.views and teachers:
        cache = open_cache(recipe, folder, dataset, teachers, method.teacher_views, compute, ranks)
        dataset.features, compute = cache.rows, cache.read
        cached_bytes = bytes_a_slot(cache.specs, cache.dtype)
    if not saved:
        few = min(recipe.targets.batches, steps)
        fit_normalizers(
            method.normalizers,
            make_loader(dataset, step_batches(0, few), 0, False, 0),
            compute,
            device,
        )

    # ---- optimizer, averaging, state -------------------------------------------------------------
    ranks.barrier()  # wrapping is a collective, which does not wait long for who reads slowly
    model = wrap(method, settings, ranks)
    optimizer = build_optimizer(method, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    average = None
    if settings.ema_decay:
        average = AveragedModel(
            method, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay), use_buffers=True
        )
    # skipped steps: all, in a row now, longest row
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    torch.manual_seed(settings.seed + 1 + ranks.rank)  # stochastic depth differs between ranks
    if saved:
        load_full_state(model, optimizer, with_lengths(saved["model"], method), saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        counters.copy_(saved["counters"])
        if average:
            average.load_state_dict(with_lengths(saved["average"], average))
        if saved["world"] == ranks.world:
            set_random_state(saved["rng"][ranks.rank], device)
        else:
            seed_for_new_world(saved, settings.seed, ranks)
        log.info("resumed from step %d of %d", start, steps)
    compiled = torch.compile(model) if settings.compile else model

    writer = CheckpointWriter(checkpoints, recipe.checkpoint.keep)
    watch = Watch(recipe, folder, method, dims, ranks, score)
    if saved:
        watch.resume()

    def save(step: int) -> None:
        weights, optim = full_state(model, optimizer)
        rng = ranks.gather(random_state(device))
        if ranks.first:
            state = {
                "model": weights,
                "optimizer": optim,
                "scaler": scaler.state_dict(),
                "rng": rng,
            }
            state |= {
                "counters": counters.cpu(),
                "world": ranks.world,
                "recipe": dump_recipe(recipe),
                "pictures": listed,
                "teachers": taught_by,
                "teacher_precision": precisions,
                "teacher_dims": dump_dims(dims),
            }
            state |= {"average": average.state_dict()} if average else {}
            writer.write(step, state)

    # ---- the loop --------------------------------------------------------------------------------
    ledger = CorruptLedger(len(pictures), recipe.data.max_corrupt_fraction)
    optimizer_step = OptimizerStep(
        method, model, compiled, compute, optimizer, scaler, average, counters, settings, ledger
    )
    sums: dict[str, Tensor] = {}
    wrong: list[str] = []
    since, since_step = time.perf_counter(), start
    model.train()
    sizes = {
        name: size // (ranks.world * settings.accumulate)
        for name, size in schedule.batch_sizes.items()
    }
    room = batch_bytes(schedule.views, sizes) + cached_bytes * sum(sizes.values())
    loader = iter(make_loader(dataset, batches, recipe.data.workers, device.type == "cuda", room))
    with (
        writer,
        MetricsLog(folder, steps, start, Loggers(settings.all_loggers, folder, recipe, start))
        if ranks.first
        else nullcontext() as metrics,
    ):
        for step in range(start, steps):
            progress = Progress(step, steps, per_epoch)
            lr = learning_rate(step, steps, per_epoch, settings)
            decay = weight_decay(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
                group["weight_decay"] = decay if group["decay"] else 0.0
            method.before_step(progress)

            losses, norm = optimizer_step(loader, progress, sums)
            done = step + 1
            watch_due = watch.due(done, steps)
            log_due = done % settings.log_every == 0 or done == steps or watch_due
            if device.type == "cpu" or log_due:  # reading a counter waits for a GPU
                _stop_if_diverged(counters, settings, done, losses)
            if log_due:
                span, now = done - since_step, time.perf_counter()
                values = ranks.mean(torch.stack([*sums.values(), norm * span]) / span).tolist()
                rate = span * schedule.pictures_per_step / (now - since)
                scores = watch(done, model, average) if watch_due else {}
                if metrics:
                    row = {
                        "step": done,
                        "epoch": done / per_epoch,
                        "lr": lr,
                        "images_per_second": rate,
                    }
                    row |= dict(zip([*sums, "grad_norm"], values, strict=True)) | {
                        "skipped_steps": int(counters[0])
                    }
                    metrics.write(row | {"skipped_images": len(ledger)} | scores)
                    now_wrong = method.warnings(row) if done / per_epoch >= 1 else []
                    if now_wrong and not wrong:  # once, until it is right again
                        log.warning("step %d: %s", done, "; ".join(now_wrong))
                    wrong = now_wrong
                sums, since, since_step = {}, time.perf_counter(), done
            # Several ranks must stop at the same step, and checking is a collective: only where a
            # line is due.
            stopping = stop.requested if ranks.world == 1 else log_due and ranks.any(stop.requested)
            if done % recipe.checkpoint.every_steps == 0 or stopping or done == steps:
                save(done)
            if stopping and done < steps:
                return False

    # ---- what ships ------------------------------------------------------------------------------
    weights, _ = full_state(model, optimizer)
    if average:
        weights = average.module.state_dict()
    if ranks.first:

        def first_batches() -> Iterable[Batch]:
            few = step_batches(0, min(recipe.targets.batches, steps))
            return make_loader(dataset, few, recipe.data.workers, False, room)

        def fit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return fit_shipped(recipe, dims, tensors, first_batches, compute, device)

        save_student(folder, weights, method, recipe, dims, steps, fit)
        watch.finish(fit)
    ranks.barrier()
    return True


@dataclass(frozen=True)
class OptimizerStep:
    """One step of the optimizer, of every method and number of processes; nothing in it waits for
    the device.
    """

    method: Method
    model: nn.Module
    """The method, wrapped for its processes."""
    forward: Callable[..., dict[str, Tensor]]
    """The model, or what was compiled of it."""
    compute: Callable[[Batch], dict[str, Features]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    counters: Tensor
    settings: TrainConfig
    ledger: CorruptLedger

    def __call__(
        self, batches: Iterator[Batch], progress: Progress, sums: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Take the step's micro-batches from `batches`, and add the means of their losses to
        `sums`. Returns the losses of the last one and the norm of all gradients.
        """
        count, device = self.settings.accumulate, self.counters.device
        kind = AUTOCAST[self.settings.precision]
        for micro in range(count):
            batch = next(batches)
            self.ledger.add(batch.skipped)
            batch = batch.to(device)
            targets = self.compute(batch)
            with without_sync(self.model, last=micro == count - 1):
                with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
                    losses = self.forward(batch.views, targets)
                self.scaler.scale(losses["loss"] / count).backward()
            for name, value in losses.items():
                value = value.detach() / count
                sums[name] = sums[name] + value if name in sums else value

        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.method.parameters() if p.requires_grad]
        norm = _clip_gradients(trained, self.settings)
        # Gradients are summed over ranks, so every rank gets the same result.
        bad = ~torch.isfinite(norm)
        for group in self.optimizer.param_groups:
            if progress.step < group["frozen_epochs"] * progress.per_epoch:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW skips it: no step, moments or decay
        take_step(self.optimizer, self.scaler, bad)
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(progress)
        if self.average:
            self.average.update_parameters(self.method)
        self.counters[0] += bad
        self.counters[1] = (self.counters[1] + 1) * bad
        self.counters[2] = torch.maximum(self.counters[2], self.counters[1])
        return losses, norm


def teacher_features(
    teachers: Sequence[Teacher], teacher_views: Mapping[str, str], device: torch.device
) -> Callable[[Batch], dict[str, Features]]:
    """A function from a `Batch` to every teacher's features of the view it sees, under
    `inference_mode`.
    """

    def compute(batch: Batch) -> dict[str, Features]:
        with torch.inference_mode():
            features = {
                teacher.label: teacher(batch.views[teacher_views[teacher.label]].to(device))
                for teacher in teachers
            }
        # Autograd cannot keep inference tensors for a backward pass; a copy made outside the mode
        # is an ordinary tensor.
        return {label: f.map(Tensor.clone) for label, f in features.items()}

    return compute


def build_optimizer(
    method: Method, settings: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW on the method's parameter groups, each with what the loop reads of it: `lr_scale`,
    `decay`, `frozen_epochs`.
    """
    groups = [
        {
            "params": list(group.parameters),
            "decay": group.decay,
            "lr_scale": group.lr_scale,
            "frozen_epochs": group.frozen_epochs,
        }
        for group in method.parameter_groups()
        if len(group.parameters)
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )


def _clip_gradients(parameters: Sequence[nn.Parameter], settings: TrainConfig) -> Tensor:
    """Clip gradients to `settings.clip_grad` and return their norm before that, over all of them
    (and over all ranks' shards).
    """
    limit = settings.clip_grad or math.inf
    if settings.clip_mode == "global":
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, limit)
    return norm


def take_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """Step unless gradients are `bad`, without waiting for a GPU: fused AdamW (on a CPU too) takes
    the flag as a tensor.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips by its own count of non-finite gradients
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None
        optimizer.step()
    elif not bad:
        optimizer.step()


def _stop_if_diverged(
    counters: Tensor, settings: TrainConfig, step: int, losses: dict[str, Tensor]
) -> None:
    """Raise Failure after `max_bad_steps` steps in a row without finite gradients, naming the
    losses at fault.
    """
    if int(counters[2]) < settings.max_bad_steps:
        return
    named = [name for name, value in losses.items() if not torch.isfinite(value)]
    raise Failure(
        f"step {step}: {int(counters[2])} steps in a row had non-finite gradients (non-finite now: "
        f"{', '.join(named) or 'gradients only'}); lower train.lr = {settings.lr:g}, raise "
        "train.warmup_steps, or use train.precision=fp32; the last checkpoint is good"
    )
