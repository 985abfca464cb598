"""Depth on frozen features (UMT A.1: NYUv2, RMSE): a linear binned head, or DPT on four layers."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from distill.evaluate.config import DepthConfig, EvaluationConfig
from distill.evaluate.datasets import Pairs, depth_scale, open_pairs, read_depth, read_matched
from distill.evaluate.dense import train_head
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import extract
from distill.evaluate.outcome import Outcome
from distill.evaluate.pictures import depth_figure
from distill.evaluate.windows import WindowLabels, WindowViews, merge_windows
from distill.heads import DPTDepth, LinearDepth, save_head
from distill.methods.deployment import BACKBONE

SHOWN = 4
"""Pictures in the figure."""

SILOG_LAMBDA, SILOG_WEIGHT = 0.85, 10.0
"""AdaBins' scale-invariant log loss."""


def evaluate(
    encoder: Encoder, data: Path, config: EvaluationConfig, cache: Path, folder: Path, binding: dict
) -> Outcome:
    """Train the head on the training split; RMSE, delta_1 and absolute relative error on the
    validation split.

    Writes `heads/depth.safetensors` (unless the backbone was trained along) and `depth.png`.
    Raises NotApplicable for a network that is more than timm's where the backbone is to be trained,
    and for one without four layers where these are read.
    """
    settings = config.depth
    if settings.head == "dpt" and settings.backbone_lr:
        encoder.need_bare("depth.backbone_lr trains", "set depth.backbone_lr=0")
    train, val = (open_pairs(data, s, "depth", config.dense.exif) for s in ("train", "val"))
    scale = depth_scale((train, val), settings.scale)
    size = encoder.fit(config.dense.size)
    views = {"train": WindowViews(train, size), "val": WindowViews(val, size)}

    def read(pairs: Pairs, number: int) -> np.ndarray:
        return read_depth(pairs, number, scale, settings.max_depth)

    torch.manual_seed(config.seed)  # the head's first weights must not depend on what ran before
    if settings.head == "linear":
        head, inputs = linear_head(encoder, views, config, cache)
        trained: tuple = ([], 0.0)
    else:
        if settings.backbone_lr:  # other tasks go on with the network as it was
            encoder = copy.deepcopy(encoder)
        head, inputs = dpt_head(encoder, views, config)
        trained = (
            (open_backbone(encoder), settings.backbone_lr) if settings.backbone_lr else ([], 0.0)
        )
    targets = WindowLabels(
        views["train"], lambda n: read(train, n), max(1, size // config.dense.loss_stride)
    )

    def loss(metres: Tensor, truth: Tensor) -> Tensor:
        metres = F.interpolate(
            metres.unsqueeze(1), size=truth.shape[-2:], mode="bilinear", align_corners=False
        )
        return silog(metres.squeeze(1), truth, valid_depth(truth, settings))

    train_head(head, inputs["train"], targets, loss, config, encoder.device, trained)

    rows, shown = [], []
    with torch.inference_mode():
        for number, windows in enumerate(views["val"].of_picture()):
            picture, truth = read_matched(val, number), read(val, number)
            maps = head(inputs["val"](windows)).unsqueeze(1)
            metres = merge_windows(maps, [views["val"].windows[n] for n in windows], *picture.size)[
                0
            ].cpu()
            rows.append(
                depth_errors(metres, torch.from_numpy(truth), settings, str(val.maps[number]))
            )
            if len(shown) < SHOWN:
                shown.append((np.asarray(picture), truth, metres.numpy()))
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    files = [depth_figure(folder / "depth.png", shown, settings.max_depth)]
    if not settings.backbone_lr:
        output = "patches" if settings.head == "linear" else "layers"
        about = {**binding, "output": output, "unit": "metre", "size": size, "scores": scores}
        files.append(save_head(folder / "heads", "depth", head, about))
    return Outcome(
        scores, {"size": size, "head": settings.head, "pictures": len(rows)}, tuple(files)
    )


def linear_head(
    encoder: Encoder, views: dict[str, WindowViews], config: EvaluationConfig, cache: Path
) -> tuple[nn.Module, dict[str, Callable]]:
    """The binned head and, for each split, what it reads of windows: cached patches."""
    features = {
        split: extract(encoder, view, cache, config.extract, patches=True, what=f"{split} windows")
        for split, view in views.items()
    }
    settings = config.depth
    head = LinearDepth(encoder.dims.patches, settings.bins, settings.min_depth, settings.max_depth)
    inputs = {
        s: (lambda numbers, f=f: f.patches(numbers).to(encoder.device)) for s, f in features.items()
    }
    return head, inputs


def dpt_head(
    encoder: Encoder, views: dict[str, WindowViews], config: EvaluationConfig
) -> tuple[nn.Module, dict[str, Callable]]:
    """The DPT head and, for each split, what it reads of windows: four layers, computed when asked
    for.

    Four layers of every picture would take four times the room of its patches, so they are not
    cached.
    """
    settings = config.depth
    if encoder.read_out != BACKBONE:
        raise UserError(
            f"--features {encoder.read_out}: depth.head = dpt reads four layers of the backbone "
            "(use --features backbone, or depth.head=linear)"
        )
    frozen = settings.backbone_lr == 0

    def layers(split: str, numbers: list[int]) -> list[tuple[Tensor, Tensor]]:
        images = torch.stack([views[split][number] for number in numbers]).to(encoder.device)
        with torch.no_grad() if frozen or split == "val" else torch.enable_grad():
            return encoder.layers(images)

    look = layers("val", [0])
    if not all(torch.isfinite(values).all() for layer in look for values in layer):
        raise UserError(f"{encoder.name}: its layers hold NaN or infinity: check its weights")
    widths = [patches.shape[-1] for _, patches in look]
    finest = views["val"].size / 4
    # 1/4, 1/8, 1/16 and 1/32 of the picture, whatever grid a layer has
    scales = [finest / 2**depth / patches.shape[1] for depth, (_, patches) in enumerate(look)]
    head = DPTDepth(widths, scales, settings.width, settings.min_depth, settings.max_depth)
    return head, {split: (lambda numbers, s=split: layers(s, numbers)) for split in views}


def open_backbone(encoder: Encoder) -> list[nn.Parameter]:
    """Let the network's weights be trained, and return them."""
    parameters = list(encoder.net.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def valid_depth(truth: Tensor, settings: DepthConfig) -> Tensor:
    """Pixels whose depth is known and within the range."""
    return (truth > settings.min_depth) & (truth <= settings.max_depth)


def silog(metres: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Scale-invariant log loss (Eigen et al. 2014, as AdaBins weighs it) over the valid pixels of a
    batch.
    """
    # Where nothing is valid the difference is zero, not NaN.
    difference = torch.where(
        valid, metres.clamp_min(1e-6).log() - truth.clamp_min(1e-6).log(), metres.new_zeros(())
    )
    count = valid.sum().clamp_min(1)
    mean, square = difference.sum() / count, difference.square().sum() / count
    return SILOG_WEIGHT * (square - SILOG_LAMBDA * mean.square()).clamp_min(1e-8).sqrt()


def depth_errors(
    metres: Tensor, truth: Tensor, settings: DepthConfig, name: str
) -> dict[str, float]:
    """Errors of one picture's prediction [H, W] in metres against the truth, over its valid pixels.

    RMSE in metres; delta1, the share of pixels with max(p/t, t/p) < 1.25; abs_rel, mean |p - t| /
    t.
    """
    valid = valid_depth(truth, settings)
    if settings.crop == "eigen":
        valid &= eigen_crop(*truth.shape)
    if not valid.any():
        raise UserError(
            f"{name} has no valid depth left (check depth.min_depth, depth.max_depth and "
            "depth.crop)"
        )
    p, t = metres[valid].clamp(settings.min_depth, settings.max_depth), truth[valid]
    ratio = torch.maximum(p / t, t / p)
    return {
        "rmse": float((p - t).square().mean().sqrt()),
        "delta1": float((ratio < 1.25).double().mean()),
        "abs_rel": float(((p - t).abs() / t).mean()),
    }


def eigen_crop(height: int, width: int) -> Tensor:
    """Eigen's rectangle on NYUv2 (rows 45-471 and columns 41-601 of 480x640), in proportion for
    other sizes.
    """
    inside = torch.zeros(height, width, dtype=torch.bool)
    rows, columns = (
        (round(45 / 480 * height), round(471 / 480 * height)),
        (round(41 / 640 * width), round(601 / 640 * width)),
    )
    inside[slice(*rows), slice(*columns)] = True
    return inside
