"""Depth on frozen features (UMT A.1: NYUv2, RMSE): a linear binned head, or DPT on four layers.

`dense.augment` and `dense.mirror` make it Proteus's training and test, which UMT follows.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.errors import UserError
from distill.distributed import Ranks
from distill.evaluate.augment import DEPTH
from distill.evaluate.config import DepthConfig, EvaluationConfig
from distill.evaluate.datasets import Pairs, depth_scale, open_pairs, read_depth, read_matched
from distill.evaluate.decoded import decoder_reader
from distill.evaluate.dense import (
    PictureMaps,
    patch_reader,
    sharing,
    side_of,
    stored_patches,
    train_head,
    training_samples,
    whole_views,
)
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Outcome, first_alone
from distill.evaluate.pictures import depth_figure
from distill.evaluate.windows import WindowViews
from distill.heads import DPTDepth, Head, LinearDepth, save_head
from distill.methods.deployment import BACKBONE
from distill.models.student import Layer

SHOWN = 4
"""Pictures in the figure."""

SILOG_WEIGHT = 10.0
"""Of AdaBins' scale-invariant log loss."""


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
    size = side_of(encoder, config.dense)
    dense = config.dense
    views = {
        "train": WindowViews(train, size),
        "val": WindowViews(val, size, dense.window_step),
    }
    whole = whole_views(encoder, views["val"], config)

    def read(pairs: Pairs, number: int) -> np.ndarray:
        return read_depth(pairs, number, scale, settings.max_depth)

    torch.manual_seed(config.seed)  # the head's first weights must not depend on what ran before
    stored: dict[str, Callable] = {}
    trained: tuple = ([], 0.0)
    if settings.head == "linear":
        stored = stored_patches(encoder, views, whole, config, cache)
        width = encoder.dims.patches
        head = LinearDepth(width, settings.bins, settings.min_depth, settings.max_depth)
        look = patch_reader(encoder, views["val"], config)
    else:
        if settings.backbone_lr:  # other tasks go on with the network as it was
            encoder = copy.deepcopy(encoder)
        head, look = dpt_head(encoder, views["val"], config)
        if settings.backbone_lr:
            trained = open_backbone(encoder), settings.backbone_lr
    samples, inputs = training_samples(
        views["train"], read, look, stored.get("train"), config, DEPTH
    )

    def loss(metres: Tensor, truth: Tensor) -> Tensor:
        metres = F.interpolate(
            metres.unsqueeze(1), size=truth.shape[-2:], mode="bilinear", align_corners=False
        )
        valid = valid_depth(truth, settings)
        return silog(metres.squeeze(1), truth, valid, settings.loss_lambda)

    team = sharing(encoder, config, len(train), "depth", bool(trained[0]))
    train_head(head, inputs, samples, loss, config, encoder.device, trained, team)
    maps = PictureMaps(
        lambda seen: head(seen).unsqueeze(1),
        look,
        views["val"],
        whole,
        dense.mirror,
        stored.get("val"),
    )

    scores, count, figure = _score(maps, val, read, settings, folder, team)
    files = [figure]
    if not trained[0]:
        output = "patches" if settings.head == "linear" else "layers"
        about = {**binding, "output": output, "unit": "metre", "size": size, "scores": scores}
        files.append(save_head(folder / "heads", "depth", head, about))
    test = config.dense.test if whole else "windows"
    details = {"size": size, "head": settings.head, "test": test, "pictures": count}
    return Outcome(scores, details, tuple(files))


def evaluate_decoder(
    encoder: Encoder, head: Head, data: Path, config: EvaluationConfig, folder: Path
) -> Outcome:
    """Score a teacher's decoder on an encoder's features; nothing is trained, and only the
    validation split is read.

    Raises UserError for a decoder whose unit is not the metre.
    """
    unit = head.about.get("unit", "metre")
    if unit != "metre":
        raise UserError(f"the decoder of depth gives {unit}s, and errors are those of metres")
    settings = config.depth
    val = open_pairs(data, "val", "depth", config.dense.exif)
    scale = depth_scale((val, val), settings.scale)
    size = side_of(encoder, config.dense)
    views = WindowViews(val, size, config.dense.window_step)
    whole = whole_views(encoder, views, config)
    look, answer = decoder_reader(encoder, head, config)
    maps = PictureMaps(
        lambda seen: answer(seen).unsqueeze(1), look, views, whole, config.dense.mirror
    )

    def read(pairs: Pairs, number: int) -> np.ndarray:
        return read_depth(pairs, number, scale, settings.max_depth)

    scores, count, figure = _score(maps, val, read, settings, folder, encoder.ranks)
    test = config.dense.test if whole else "windows"
    details = {"size": size, "head": "decoder", "test": test, "pictures": count}
    return Outcome(scores, details, (figure,))


def _score(
    maps: PictureMaps,
    val: Pairs,
    read: Callable[[Pairs, int], np.ndarray],
    settings: DepthConfig,
    folder: Path,
    ranks: Ranks,
) -> tuple[dict[str, float], int, Path]:
    """Mean errors, the number of pictures, and a figure of a few maps."""
    rows, shown = [], []
    for number in ranks.deal(range(len(val))):
        picture, truth = read_matched(val, number), read(val, number)
        metres = maps(number, *picture.size)[0].cpu()
        seen = maps.shown(*picture.size)
        if seen is not None:
            truth = np.where(seen.numpy(), truth, 0)  # no depth, which is not scored
        rows.append(depth_errors(metres, torch.from_numpy(truth), settings, str(val.maps[number])))
        if len(shown) < SHOWN:
            shown.append((np.asarray(picture), truth, metres.numpy()))
    rows, shown = ranks.collect(rows), ranks.collect(shown)[:SHOWN]
    first_alone(ranks)
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return scores, len(rows), depth_figure(folder / "depth.png", shown, settings.max_depth)


def dpt_head(
    encoder: Encoder, views: WindowViews, config: EvaluationConfig
) -> tuple[nn.Module, Callable[[Tensor], list[Layer]]]:
    """The DPT head, and a function from images to what it reads: four layers.

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

    def read(images: Tensor) -> list[Layer]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return encoder.layers(images.to(encoder.device))

    with torch.no_grad():
        look = read(views[0][None])
    if not all(torch.isfinite(values).all() for layer in look for values in layer):
        raise UserError(f"{encoder.name}: its layers hold NaN or infinity: check its weights")
    widths = [patches.shape[-1] for _, patches in look]
    finest = views.size / 4
    # 1/4, 1/8, 1/16 and 1/32 of the picture, whatever grid a layer has
    scales = [finest / 2**depth / patches.shape[1] for depth, (_, patches) in enumerate(look)]
    return DPTDepth(widths, scales, settings.width, settings.min_depth, settings.max_depth), read


def open_backbone(encoder: Encoder) -> list[tuple[str, nn.Parameter]]:
    """Let the network's weights be trained, and return them with their names."""
    parameters = list(encoder.net.named_parameters())
    for _, parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def valid_depth(truth: Tensor, settings: DepthConfig) -> Tensor:
    """Pixels whose depth is known and within the range."""
    return (truth > settings.min_depth) & (truth <= settings.max_depth)


def silog(metres: Tensor, truth: Tensor, valid: Tensor, forgiven: float) -> Tensor:
    """Scale-invariant log loss (Eigen et al. 2014, as AdaBins weighs it) over the valid pixels of a
    batch; `forgiven` is how far a common factor counts as no error.
    """
    # Where nothing is valid the difference is zero, not NaN.
    difference = torch.where(
        valid, metres.clamp_min(1e-6).log() - truth.clamp_min(1e-6).log(), metres.new_zeros(())
    )
    count = valid.sum().clamp_min(1)
    mean, square = difference.sum() / count, difference.square().sum() / count
    return SILOG_WEIGHT * (square - forgiven * mean.square()).clamp_min(1e-8).sqrt()


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
