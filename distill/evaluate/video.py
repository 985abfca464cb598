"""Video object segmentation by label propagation: DAVIS-2017, semi-supervised, with nothing
trained.

The protocol is DINO's (Caron et al. 2021, section 4.2.1): the first frame's mask travels through
the video along the nearest patches. The measures are DAVIS's (Perazzi et al. 2016; Pont-Tuset et
al. 2017).
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from skimage.morphology import dilation, disk
from torch import Tensor

from contract.errors import UserError, raise_trouble
from contract.picture_files import is_picture, subfolders
from distill.evaluate.config import EvaluationConfig, VideoConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Outcome, first_alone
from distill.evaluate.reading import read_picture
from distill.figures import save_figure

_FRAMES = Path("JPEGImages", "480p")
_MASKS = Path("Annotations", "480p")
_SPLIT = Path("ImageSets", "2017", "val.txt")

_BOUND = 0.008
"""Tolerance of the boundary measure, as a share of the picture's diagonal (DAVIS)."""

_VOID = 255
"""Label that DAVIS's own evaluation turns into background."""

_SIMILARITIES = 2**26
"""Cosines that one chunk of `propagate` may hold at once (256 MiB in float32)."""


@dataclass(frozen=True)
class _Sequence:
    """One video: its frames in order, the mask of each (which may be missing), the first mask and
    its objects.
    """

    name: str
    frames: list[Path]
    masks: list[Path]
    first: np.ndarray
    objects: list[int]


def evaluate(encoder: Encoder, data: Path, config: EvaluationConfig, folder: Path) -> Outcome:
    """Segment every video of a DAVIS-2017 folder from its first mask (DINO's protocol).

    `data` holds JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png (0 background, 1..K the
    objects) and the list ImageSets/2017/val.txt; without that file every sequence counts. As in
    DAVIS's semi-supervised track, the first and last frames are not scored, J and F are means over
    frames, then over all objects. Writes video_SEQ.png of the first sequence. Raises UserError for
    a folder with another layout, or with unreadable files or files of the wrong size.
    """
    sequences = [_read_sequence(data, name) for name in _sequence_names(data)]
    ranks, measured, picture = encoder.ranks, [], None
    for sequence in track(ranks.deal(sequences), "video", disable=not ranks.draws):
        shown = set(np.linspace(0, len(sequence.frames) - 1, 5).round().astype(int).tolist())
        kept, scores = {}, []
        for index, mask in enumerate(_segment(encoder, sequence, config.video)):
            if ranks.first and picture is None and index in shown:
                kept[index] = mask
            if 0 < index < len(sequence.frames) - 1:
                truth = _read_mask(sequence.masks[index], mask.shape)
                scores.append(
                    [_measure(mask == label, truth == label) for label in sequence.objects]
                )
        if ranks.first and picture is None:
            picture = _draw(folder / f"video_{sequence.name}.png", sequence, kept)
        measured.append(np.array(scores))  # [frames, objects, (J, F)]
    tables = ranks.collect(measured)
    first_alone(ranks)
    per_sequence, rows = {}, []
    for sequence, table in zip(sequences, tables, strict=True):
        objects = [
            {"object": label, "J": j, "F": f, "J recall": recall}
            for label, (j, f), recall in zip(
                sequence.objects,
                table.mean(0).tolist(),
                (table[..., 0] > 0.5).mean(0).tolist(),
                strict=True,
            )
        ]
        rows += objects
        per_sequence[sequence.name] = {
            "frames": len(table),
            **_average(objects),
            "objects": objects,
        }
    total = _average(rows)
    scores = {"J&F": (total["J"] + total["F"]) / 2, "J": total["J"], "F": total["F"]}
    details = {"J recall": total["J recall"], "objects": len(rows), "sequences": per_sequence}
    return Outcome(scores, details, (picture,))


def _average(rows: list[dict]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in ("J", "F", "J recall")}


def _measure(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """J and F of one object in one frame, at DAVIS's tolerance."""
    tolerance = math.ceil(_BOUND * math.hypot(*truth.shape))
    return region_similarity(prediction, truth), boundary_f(prediction, truth, tolerance)


def region_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """DAVIS's J: intersection over union of two boolean masks [H, W]; 1 when both are empty."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_f(prediction: np.ndarray, truth: np.ndarray, tolerance: int) -> float:
    """DAVIS's F: F-measure of the boundaries of two boolean masks [H, W].

    A boundary pixel is matched when one of the other mask's is within a disk of `tolerance`
    pixels. 1 when neither mask has a boundary, 0 when only one has.
    """
    ours, theirs = boundary(prediction), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    # Pixels beyond the box around both boundaries neither match nor need a match.
    either = ours | theirs
    rows, columns = (np.flatnonzero(either.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    ours, theirs, footprint = ours[box], theirs[box], disk(tolerance)
    precision = np.count_nonzero(ours & dilation(theirs, footprint)) / np.count_nonzero(ours)
    recall = np.count_nonzero(theirs & dilation(ours, footprint)) / np.count_nonzero(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a boolean mask [H, W] that differ from their right, lower or lower-right neighbour
    (DAVIS).
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def propagate(
    target: Tensor,
    sources: Tensor,
    labels: Tensor,
    neighbours: int,
    radius: int,
    temperature: float,
    limit: int = _SIMILARITIES,
) -> Tensor:
    """Give every patch of a frame the labels of its nearest source patches (DINO's protocol).

    `target` [h, w, d] and `sources` [n, h, w, d] are L2-normalised patches, `labels` [n, h, w, k]
    the sources' soft masks. A patch looks `radius` patches in every direction (a square window; 0:
    everywhere) in all sources together, keeps the `neighbours` largest cosines, and averages their
    labels with weights exp(cosine / temperature). Rows of the target are taken together until
    `limit` cosines are held. Returns [h, w, k].
    """
    n, h, w, d = sources.shape
    height = min(h, max(1, limit // (n * h * w * w)))
    across = torch.arange(w, device=target.device)
    result = []
    for start in range(0, h, height):
        stop = min(h, start + height)
        low, high = (max(0, start - radius), min(h, stop + radius)) if radius else (0, h)
        near, near_labels = (
            sources[:, low:high].reshape(-1, d),
            labels[:, low:high].reshape(-1, labels.shape[-1]),
        )
        cosines = target[start:stop].reshape(-1, d) @ near.T  # [rows * w, n * source rows * w]
        if radius:
            ys = torch.arange(start, stop, device=target.device)
            source_ys = torch.arange(low, high, device=target.device)
            by_row = (ys[:, None] - source_ys).abs() <= radius
            by_column = (across[:, None] - across).abs() <= radius
            window = by_row[:, None, :, None] & by_column[None, :, None, :]
            view = cosines.view(stop - start, w, n, high - low, w)
            view.masked_fill_(~window[:, :, None], -math.inf)
        best, index = cosines.topk(min(neighbours, len(near)), dim=1)
        # A window with fewer patches than `neighbours` leaves -inf here, which weighs nothing.
        weights = best.div(temperature).softmax(dim=1)
        result.append(torch.einsum("pk,pkc->pc", weights, near_labels[index]))
    return torch.cat(result).view(h, w, -1)


@torch.inference_mode()
def _segment(encoder: Encoder, sequence: _Sequence, config: VideoConfig) -> Iterator[np.ndarray]:
    """Yield the mask [H, W] of each frame of a video in the labels of its first mask, which comes
    out unchanged.

    Sources are the first frame and the `config.frames` before the present one, whose soft masks
    stay on the patch grid. The first mask is read at the centres of the patches, as DINO does. The
    shorter side becomes `config.size` pixels, both are rounded to the stride.
    """
    shape = sequence.first.shape
    names = np.array([0, *sequence.objects], dtype=np.uint8)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.frames)
    first = None
    height, width = (encoder.fit(side) for side in _resized(shape, config))
    for path in sequence.frames:
        patches = _frame_features(encoder, path, shape, (height, width))
        if first is None:
            channels = torch.from_numpy(sequence.first == names[:, None, None])[None].float()
            small = F.interpolate(channels, size=patches.shape[:2], mode="nearest-exact")[0]
            first = patches, small.permute(1, 2, 0).to(patches)
            yield sequence.first
            continue
        sources, labels = (torch.stack(tensors) for tensors in zip(first, *recent, strict=True))
        soft = propagate(
            patches, sources, labels, config.neighbours, config.radius, config.temperature
        )
        recent.append((patches, soft))
        yield names[hard_mask(soft, shape).cpu().numpy()]


def _resized(shape: tuple[int, int], config: VideoConfig) -> Iterator[float]:
    """Height and width of a frame of `shape` whose shorter side becomes `config.size`; the longer
    one is cut to a multiple of `config.multiple`.
    """
    for side in shape:
        longer = side * config.size / min(shape)
        if config.multiple and longer >= config.size + config.multiple:
            longer -= longer % config.multiple
        yield longer


def hard_mask(soft: Tensor, shape: tuple[int, int]) -> Tensor:
    """Channel [H, W] that wins at each pixel of soft masks [h, w, k], each stretched to [0, 1]
    first (DINO).
    """
    maps = F.interpolate(
        soft.permute(2, 0, 1)[None], size=shape, mode="bilinear", align_corners=False
    )[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A constant map has nothing to stretch: background that is nowhere, an object that fills the
    # frame.
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-12), maps).argmax(0)


def _frame_features(
    encoder: Encoder, path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """L2-normalised patches [h, w, d] of a frame of `shape`, resized to `size` (height, width)."""
    image = read_picture(path)
    if (image.height, image.width) != shape:
        raise UserError(
            f"{path} is {image.width}x{image.height}, but the first mask is {shape[1]}x{shape[0]}: "
            "resize one of them"
        )
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    patches = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(encoder.device)).patches[0]
    if not patches.isfinite().all():
        raise UserError(
            f"{encoder.name} returns features that are not finite for {path}: check its weights"
        )
    return F.normalize(patches, dim=-1)


def _sequence_names(data: Path) -> list[str]:
    """Names of the videos to score, from val.txt or else every folder of frames."""
    for part in (_FRAMES, _MASKS):
        if not (data / part).is_dir():
            raise UserError(
                f"{data} has no folder {part}: --data must be DAVIS-2017's folder at 480p"
            )
    split = data / _SPLIT
    if split.is_file():
        names = list(
            dict.fromkeys(line.strip() for line in split.read_text().splitlines() if line.strip())
        )
        source = split
    else:
        names = [folder.name for folder in subfolders(data / _FRAMES)]
        source = data / _FRAMES
    if not names:
        raise UserError(f"{source} lists no sequence: add at least one")
    return names


def _read_sequence(data: Path, name: str) -> _Sequence:
    """List a video's files and read its first mask; raises UserError for anything missing."""
    folder = data / _FRAMES / name
    if not folder.is_dir():
        raise UserError(
            f"sequence {name} has no folder {folder}: add its frames or remove it from {_SPLIT}"
        )
    frames = sorted(path for path in folder.iterdir() if is_picture(path.name))
    if len(frames) < 3:
        raise UserError(
            f"{folder} has {len(frames)} frames: 3 are needed, as the first and last are not scored"
        )
    masks = [data / _MASKS / name / f"{path.stem}.png" for path in frames]
    if not masks[0].is_file():
        raise UserError(
            f"sequence {name} has no annotation of its first frame: {masks[0]} is missing"
        )
    for mask in masks[1:-1]:
        if not mask.is_file():
            raise UserError(
                f"sequence {name} lacks the annotation {mask}: every frame but the last needs one"
            )
    image = read_picture(frames[0])
    first = _read_mask(masks[0], (image.height, image.width))
    objects = [int(label) for label in np.unique(first) if label]
    if not objects:
        raise UserError(f"{masks[0]} has no object: 0 is background, 1 to 254 are objects")
    return _Sequence(name, frames, masks, first, objects)


def _read_mask(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read the labels [H, W] of a palette or grey PNG; raises UserError unless it is one of that
    shape.
    """
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:  # Pillow's decoders fail in many ways on damaged files
        raise_trouble(path, error)
        raise UserError(f"cannot read the mask {path}: restore the file") from error
    if mode not in ("P", "L"):
        raise UserError(
            f"the mask {path} has mode {mode}: store labels as a palette or 8-bit grey PNG"
        )
    if mask.shape != shape:
        raise UserError(
            f"the mask {path} is {mask.shape[1]}x{mask.shape[0]}, but its frame is "
            f"{shape[1]}x{shape[0]}: resize one of them"
        )
    return np.where(mask == _VOID, 0, mask).astype(np.uint8)


def _draw(path: Path, sequence: _Sequence, masks: dict[int, np.ndarray]) -> Path:
    """Picture of some frames with their predicted masks laid over them."""
    figure, axes = plt.subplots(
        1, len(masks), figsize=(3.2 * len(masks), 2.6), squeeze=False, layout="constrained"
    )
    for axis, (index, mask) in zip(axes.flat, sorted(masks.items()), strict=True):
        axis.imshow(read_picture(sequence.frames[index]))
        order = np.searchsorted(sequence.objects, mask)
        axis.imshow(
            plt.get_cmap("tab10")(order % 10), alpha=0.6 * (mask > 0), interpolation="nearest"
        )
        axis.set_title(f"frame {index}" + (" (given)" if index == 0 else ""), fontsize=9)
        axis.set_axis_off()
    return save_figure(figure, path)
