"""Full fine-tuning with layer-wise learning-rate decay (UMT A.1), through timm's optimizer and
schedule.
"""

import copy
import random
import sys
from pathlib import Path

import torch
from rich.progress import track
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from contract.errors import Failure, UserError
from distill.data.batches import prepare_worker
from distill.evaluate.classification import accuracy
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import ClassFolders, open_classes, read_picture
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import CentreViews
from distill.evaluate.outcome import Outcome
from distill.methods.deployment import BACKBONE


class _AugmentedPictures(Dataset):
    """Randomly cropped and mirrored pictures, normalised for one network, with their labels."""

    def __init__(self, folders: ClassFolders, transform) -> None:
        self.folders, self.transform = folders, transform

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(read_picture(self.folders.files[number])), int(
            self.folders.labels[number]
        )


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig) -> Outcome:
    """Train a copy of the whole network with a new classifier; top-1 and top-5 after the last
    epoch.

    Raises UserError for a teacher's head (only backbones are fine-tuned) and Failure for a loss
    that is not finite.
    """
    if encoder.read_out != BACKBONE:
        raise UserError(
            f"--features {encoder.read_out}: finetune trains the backbone (use --features backbone)"
        )
    train = open_classes(data, "train")
    val = open_classes(data, "val", train.classes)
    settings = config.finetune
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    net = build_classifier(encoder, len(train.classes))
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
    batch = min(settings.batch_size, len(train))
    loader = DataLoader(
        _AugmentedPictures(train, transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=config.extract.workers,
        generator=torch.Generator().manual_seed(config.seed),
        multiprocessing_context="fork" if config.extract.workers else None,
        worker_init_fn=prepare_worker,
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
        num_epochs=settings.epochs,
        warmup_epochs=min(settings.warmup_epochs, settings.epochs - 1),
        warmup_lr=settings.lr / 100,
        min_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    device, step = encoder.device, 0
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    net.train()
    schedule.step_update(0)
    epochs = track(range(settings.epochs), description="finetune", disable=not sys.stdout.isatty())
    for epoch in epochs:
        for images, labels in loader:
            with cast:
                value = loss(net(images.to(device)).float(), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            step += 1
            schedule.step_update(step)
        if not torch.isfinite(value):
            raise Failure(
                f"finetune: the loss is {value.item()} in epoch {epoch + 1}; lower finetune.lr = "
                f"{settings.lr:g}"
            )
    logits = _predict(net.eval(), encoder, val, config)
    scores, report = accuracy(logits, torch.from_numpy(val.labels), train.classes)
    return Outcome(
        scores, {"per_class": report, "epochs": settings.epochs, "last_loss": value.item()}
    )


def build_classifier(encoder: Encoder, classes: int) -> nn.Module:
    """A trainable copy of the encoder's timm network with a new classifier of `classes` outputs."""
    net = copy.deepcopy(encoder.net)
    net.reset_classifier(classes)
    return net.requires_grad_(True).to(encoder.device)


@torch.inference_mode()
def _predict(
    net: nn.Module, encoder: Encoder, folders: ClassFolders, config: EvaluationConfig
) -> Tensor:
    """Logits [n, C] of centre crops."""
    views = CentreViews(folders, encoder.image_size, config.extract.crop)
    loader = DataLoader(
        views,
        batch_size=config.extract.batch_size,
        num_workers=config.extract.workers,
        generator=torch.Generator(),
        multiprocessing_context="fork" if config.extract.workers else None,
        worker_init_fn=prepare_worker,
    )
    return torch.cat(
        [net(encoder.normalize(images.to(encoder.device))).float().cpu() for images in loader]
    )
