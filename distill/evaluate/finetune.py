"""Full fine-tuning with layer-wise learning-rate decay (UMT A.1), through timm's optimizer and
schedule; from a new classifier, or from the best linear probe's (LP-FT, Kumar et al. 2022; SeFA
Table 10).
"""

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from timm.data import create_transform
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from contract.errors import Failure, UserError
from distill.data.batches import worker_options
from distill.distributed import Ranks, data_parallel, without_sync
from distill.evaluate.classification import accuracy, open_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import Labelled
from distill.evaluate.dealt import map_views
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import PolicyViews
from distill.evaluate.linear_probe import check_imagenet, trained_probe
from distill.evaluate.outcome import Outcome, first_alone
from distill.evaluate.shared_files import first_sees
from distill.heads import Classifier
from distill.methods.deployment import BACKBONE
from distill.models.batch_norm import explained
from distill.models.weights import read_tensors, write_tensors
from distill.runs import git_commit

log = logging.getLogger(__name__)

FINETUNED = "finetuned.safetensors"
"""Weights of the fine-tuned network, in the folder of the row."""

_FORMAT = "1"
_NORMS = ("fc_norm", "head.norm")
"""Norms of timm's classifiers that lie between a network's features and its last layer."""


class _AugmentedPictures(Dataset):
    """Randomly cropped and mirrored pictures, normalised for one network, with their labels, by
    (epoch, number): the same whichever process reads them.
    """

    def __init__(self, split: Labelled, transform, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = key
        picture = self.split.picture(number)
        with _seeded(self.seed, epoch, number):
            return self.transform(picture), int(self.split.labels[number])


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Context in which Python's and torch's own generators, from which timm's transforms draw, give
    what belongs to some numbers.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(before)


class _Epochs:
    """Batches of (epoch, number), of which each process gets its part; the last pictures of an
    epoch that fill no batch are left out.
    """

    def __init__(self, count: int, batch: int, passes: int, seed: int, ranks: Ranks) -> None:
        self.count, self.batch, self.passes, self.seed = count, batch, passes, seed
        self.ranks = ranks
        self.per_epoch = count // batch

    def __len__(self) -> int:
        return self.passes * self.per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.passes):
            order = torch.randperm(self.count, generator=generator)
            for numbers in order.split(self.batch)[: self.per_epoch]:
                yield [(epoch, number) for number in self.ranks.deal(numbers).tolist()]


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig, folder: Path) -> Outcome:
    """Train a copy of the whole network with a new classifier, or with `finetune.init` = probe the
    best linear probe's; top-1 and top-5 after the last epoch. The encoder's processes share every
    batch.

    The probe is heads/classification.safetensors in `folder`, where `finetuned.safetensors` is
    written. Raises UserError for a teacher's head (only backbones are fine-tuned), and for a probe
    that is missing, of other classes or of another vector than the network's own classifier reads;
    NotApplicable for a network that is more than timm's; Failure for a loss that is not finite.
    """
    if encoder.read_out != BACKBONE:
        raise UserError(
            f"--features {encoder.read_out}: finetune trains the backbone (use --features backbone)"
        )
    encoder.need_bare("finetune trains", "use --tasks linear")
    train, val = open_splits(data)
    settings, probe = config.finetune, None
    if settings.init == "probe":
        probe = _probe_of(encoder, train.classes, folder)
    ranks, batch = encoder.ranks, min(settings.batch_size, len(train))
    if batch < ranks.world:
        raise UserError(
            f"finetune takes batches of {batch} pictures here, fewer than the {ranks.world} "
            "processes: start fewer, or raise finetune.batch_size"
        )
    torch.manual_seed(config.seed)
    net, without = build_classifier(encoder, len(train.classes)), []
    if probe is not None:
        without = put_probe(net, encoder, probe)
    net = _for_ranks(net, encoder, settings.accumulate)
    mean, std = (
        buffer.flatten().tolist() for buffer in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    size = encoder.image_size
    transform = create_transform(
        (3, size, size),
        is_training=True,
        scale=settings.crop_scale,
        color_jitter=None,
        interpolation="bicubic",
        mean=mean,
        std=std,
    )
    batches = _Epochs(len(train), batch, settings.passes, config.seed, ranks)
    loader = DataLoader(
        _AugmentedPictures(train, transform, config.seed),
        batch_sampler=batches,
        generator=torch.Generator(),
        # float32 pixels and a label
        **worker_options(
            config.extract.workers, (4 * 3 * size**2 + 8) * -(-batch // ranks.world), wanted=2
        ),
    )
    optimizer = create_optimizer_v2(
        net,
        opt="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    # timm's schedulers, unlike torch's, apply the per-layer scale that layer decay sets in the
    # groups
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=settings.passes,
        warmup_epochs=min(settings.warmup_epochs, settings.passes - 1),
        warmup_lr=settings.lr / 100,
        min_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=batches.per_epoch,
    )
    loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    device = encoder.device
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    net.train()
    ranks.barrier()  # wrapping is a collective, which does not wait long for who reads slowly
    model = data_parallel(net, ranks)
    torch.manual_seed(config.seed + ranks.rank)  # dropout differs between processes
    schedule.step_update(0)
    shown = track(loader, "finetune", total=len(batches), disable=not ranks.draws)
    for step, (images, labels) in enumerate(shown, start=1):
        optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=device)
        count = count_parts(batch, ranks.world, settings.accumulate)
        parts = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
        for number, (some, classes) in enumerate(parts, start=1):
            share = len(some) / batch
            with without_sync(model, last=number == len(parts)):
                with cast, explained(f"set finetune.batch_size to 2 or more (now {batch})"):
                    part = share * loss(model(some.to(device)).float(), classes.to(device))
                (part * ranks.world).backward()  # of gradients, processes take the mean
            value = value + part.detach()
        optimizer.step()
        schedule.step_update(step)
        if step % batches.per_epoch == 0 and not torch.isfinite(ranks.add(value)):
            raise Failure(
                f"finetune: the loss is {value.item()} in epoch {step // batches.per_epoch}; lower "
                f"finetune.lr = {settings.lr:g}"
            )
    logits = _predict(net.eval(), encoder, val, config)
    scores, report = accuracy(logits, torch.from_numpy(val.labels), train.classes)
    first_alone(ranks)
    path = _save(folder / FINETUNED, net, encoder, train.classes, without, scores)
    details = {"per_class": report, "epochs": settings.passes, "last_loss": value.item()}
    return Outcome(scores, details, (path,))


def count_parts(batch: int, world: int, accumulate: int) -> int:
    """Into how many parts every one of `world` processes divides its share of a batch: as many in
    each, also where shares differ, since batch normalisation waits for all of them.
    """
    return min(accumulate, batch // world)


def build_classifier(encoder: Encoder, classes: int) -> nn.Module:
    """A trainable copy of the encoder's timm network with a new classifier of `classes` outputs."""
    net = copy.deepcopy(encoder.net)
    net.reset_classifier(classes)
    return net.requires_grad_(True).to(encoder.device)


def _probe_of(encoder: Encoder, classes: tuple[str, ...], folder: Path) -> Classifier:
    """The linear probe of these classes; raises UserError."""
    path = folder / "heads" / "classification.safetensors"
    head = trained_probe(encoder, path, "finetune.init=probe")
    if tuple(head.about["classes"]) != classes:
        raise UserError(
            f"{path} has {len(head.about['classes'])} classes, but the training split has "
            f"{len(classes)}, or others: run --tasks linear on this data"
        )
    return head.module


@torch.no_grad()
def put_probe(net: nn.Module, encoder: Encoder, probe: Classifier) -> list[str]:
    """Make a probe the classifier of `build_classifier`'s network, so that it gives the probe's
    logits.

    A norm of the network's own classifier that the encoder's summaries do not pass (ConvNeXt's, of
    a student) is taken out; returns the names of these. Raises UserError for a network that
    classifies another vector than its summary.
    """
    last = net.get_classifier()
    shape = probe.linear.weight.shape
    if isinstance(last, nn.Linear) and last.weight.shape == shape and last.bias is not None:
        last.load_state_dict(probe.linear.state_dict())
        side = encoder.image_size
        images = torch.arange(3 * side * side).mul(7919).remainder(256).to(torch.uint8)
        images = images.view(1, 3, side, side).to(encoder.device)
        pixels, wanted = encoder.normalize(images), encoder(images).summary
        modules = dict(net.named_modules())
        for without in ([], *([name] for name in _NORMS if name in modules)):
            _take_out(net, without)
            read = _read_by(last, net, pixels)
            if torch.allclose(read, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()):
                return without
            for name in without:
                net.set_submodule(name, modules[name])
    raise UserError(
        f"finetune.init=probe: {encoder.name} classifies another vector than the linear probe "
        "reads (set finetune.init=random)"
    )


def _read_by(last: nn.Module, net: nn.Module, pixels: Tensor) -> Tensor:
    """What a network's last layer reads of pictures, in eval mode."""
    seen, was_training = [], net.training
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        net.eval()(pixels)
    finally:
        hook.remove()
        net.train(was_training)
    return seen[0].float()


def _take_out(net: nn.Module, names: list[str]) -> None:
    for name in names:
        net.set_submodule(name, nn.Identity())


def _save(
    path: Path,
    net: nn.Module,
    encoder: Encoder,
    classes: tuple[str, ...],
    without: list[str],
    scores: dict[str, float],
) -> Path:
    """Write the fine-tuned weights, and in the metadata what they belong to."""
    about = {
        "student_sha256": encoder.weights_sha256,
        "image_size": encoder.image_size,
        "classes": classes,
        "without": without,
        "scores": scores,
    }
    metadata = {
        "format": _FORMAT,
        "about": json.dumps(about),
        "commit": git_commit(),
    }
    return write_tensors(path, net.state_dict(), metadata, "choose another --output")


def finetuned_classifier(encoder: Encoder, path: Path) -> Callable[[Tensor], Tensor]:
    """The fine-tuned network in `path`: uint8 images [B, 3, S, S] to ImageNet logits [B, 1000].

    Raises UserError if there is no such file, or it is damaged, was fine-tuned from other weights
    or at another size, or not on ImageNet's 1000 classes; NotApplicable as `evaluate`.
    """
    encoder.need_bare("robustness.classifier=finetuned reads", "set robustness.classifier=probe")
    remedy = "run --tasks finetune again"
    if not first_sees(path, encoder.ranks):
        raise UserError(
            f"{path}: no such file; robustness.classifier=finetuned needs it: run --tasks finetune "
            "first"
        )
    weights, metadata = read_tensors(path, remedy)
    if metadata.get("format") != _FORMAT or "about" not in metadata:
        raise UserError(f"{path} is not a fine-tuned network of this version: {remedy}")
    about = json.loads(metadata["about"])
    here = {"student_sha256": encoder.weights_sha256, "image_size": encoder.image_size}
    for key, value in here.items():
        if about[key] != value:
            raise UserError(
                f"{path} was fine-tuned with {key} = {str(about[key]):.12}, but it is now "
                f"{str(value):.12}: {remedy}"
            )
    check_imagenet(about["classes"], path)
    net = build_classifier(encoder, len(about["classes"]))
    _take_out(net, about["without"])
    net.load_state_dict(weights, strict=True)
    net.eval().requires_grad_(False)

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        return net(encoder.normalize(images.to(encoder.device))).float()

    return classify


def _for_ranks(net: nn.Module, encoder: Encoder, accumulate: int) -> nn.Module:
    """A network that several processes can train as one, if the encoder has several.

    Raises UserError for batch normalisation where processes cannot share its statistics.
    """
    ranks = encoder.ranks
    normed = any(isinstance(module, _BatchNorm) for module in net.modules())
    if normed and accumulate > 1:
        log.warning(
            "finetune  %s has batch normalisation, whose statistics are those of a part of a batch "
            "with finetune.accumulate = %d",
            *(encoder.name, accumulate),
        )
    if ranks.world == 1:
        return net
    if normed and encoder.device.type == "cpu":
        raise UserError(
            f"{encoder.name} has batch normalisation, and processes on a CPU cannot share its "
            "statistics: run --tasks finetune in one process, or on GPUs"
        )
    if normed:
        net = convert_sync_batchnorm(net)
    # DDP waits for the gradient of every parameter that is to have one
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=encoder.device)
    net.eval()(pixels).sum().backward()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    return net


@torch.inference_mode()
def _predict(net: nn.Module, encoder: Encoder, split: Labelled, config: EvaluationConfig) -> Tensor:
    """Logits [n, C] of what `extract.view` shows of the pictures."""
    views = PolicyViews(split, encoder.image_size, encoder.view_of(config.extract))

    def classify(images: Tensor) -> Tensor:
        return net(encoder.normalize(images.to(encoder.device)))

    return map_views(views, classify, config.extract, encoder.ranks, "validation split")
