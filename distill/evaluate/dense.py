"""Training a head on a network's features and mapping whole pictures with it: what segmentation and
depth share.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract.errors import Failure, UserError
from distill.data.batches import item_bytes, worker_options
from distill.distributed import ALONE, Ranks
from distill.evaluate.augment import AugmentedPairs, Style
from distill.evaluate.config import DenseConfig, EvaluationConfig
from distill.evaluate.datasets import Pairs
from distill.evaluate.encoder import Encoder
from distill.evaluate.extract import cast, extract, precision_on
from distill.evaluate.outcome import first_alone
from distill.evaluate.windows import (
    SeenViews,
    WholeViews,
    WindowLabels,
    WindowViews,
    merge_windows,
)
from distill.models.batch_norm import explained

log = logging.getLogger(__name__)

_Loss = Callable[[Tensor, Tensor], Tensor]

_UNDECAYED = ("norm", "pos_embed", "cls_token")
"""Parts of names of a trained backbone's parameters without weight decay, as the papers'
configurations have it."""


class _Samples(Protocol):
    """What a head learns from, by (step, number): what its inputs are made of, and labels [p, p].

    `keep`: whether items stay in memory, so that processes would each read them again.
    """

    keep: bool

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Tensor]: ...


class _NumberedWindows:
    """Numbers of windows, whose features are at hand, with their labels; the same every step."""

    def __init__(self, labels: WindowLabels) -> None:
        self.labels, self.keep = labels, labels.keep

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor]:
        return key[1], self.labels[key[1]]


def train_head(
    head: nn.Module,
    inputs: Callable[[Tensor], object],
    samples: _Samples,
    loss: _Loss,
    config: EvaluationConfig,
    device: torch.device,
    backbone: tuple[list[tuple[str, nn.Parameter]], float] = ([], 0.0),
    ranks: Ranks = ALONE,
) -> nn.Module:
    """Fit `head` to map `inputs(batch of samples)` to their labels, by AdamW with warm-up and a
    decay.

    `loss(output of the head, labels [B, p, p])` is a scalar. `backbone` is named parameters to
    train with the head and their rate over the head's. Of several `ranks` each makes a part of
    every batch's inputs; the first one trains the head on all of them, and the others get it.
    Raises Failure for a loss that is not finite.
    """
    dense = config.dense
    head.to(device).train()
    groups = [{"params": list(head.parameters()), "scale": 1.0}]
    if backbone[0]:
        groups += _backbone_groups(*backbone)
    optimizer = torch.optim.AdamW(groups, lr=dense.lr, weight_decay=dense.weight_decay)
    workers = 0 if samples.keep else config.extract.workers
    count = min(dense.batch_size, len(samples))
    room = item_bytes(samples[0, 0]) * -(-count // ranks.world) if workers else 0
    loader = DataLoader(
        samples,
        batch_sampler=_Steps(len(samples), dense.batch_size, dense.steps, config.seed, ranks),
        generator=torch.Generator(),
        **worker_options(workers, room, wanted=2),
    )
    what = type(head).__name__
    ranks.barrier()
    for step, (batch, truth) in enumerate(
        track(loader, total=dense.steps, description=what, disable=not ranks.draws)
    ):
        seen, truth = inputs(batch), truth.to(device)
        if ranks.world > 1:
            seen, truth = _gather(seen, count, ranks), _gather(truth, count, ranks)
        if not ranks.first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = dense.lr * group["scale"] * rate_at(step, dense)
        with explained(f"set dense.batch_size to 2 or more (now {len(truth)})"):
            value = loss(head(seen), truth)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        # reading the loss waits for a GPU, so only now and then
        if (step % 50 == 0 or step == dense.steps - 1) and not torch.isfinite(value):
            raise Failure(
                f"{what}: the loss is {value.item()} at step {step}; lower dense.lr = {dense.lr:g}"
            )
    ranks.hand_out(head)
    return head.eval()


def _gather(values: Any, count: int, ranks: Ranks) -> Any:
    """Inputs of a head, tensors or tuples and lists of them, of the `count` samples of a batch, in
    the first process.
    """
    if isinstance(values, Tensor):
        return ranks.gather_rows(values, count)
    parts = [_gather(value, count, ranks) for value in values]
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


def sharing(
    encoder: Encoder, config: EvaluationConfig, count: int, what: str, trained: bool = False
) -> Ranks:
    """The processes that train a head and score it together: the encoder's, where every step runs
    its network on other pictures. Else the first process goes on alone, and this raises Left in
    others; so too where the network is `trained` along, and for batches of too few of the `count`
    pictures.
    """
    ranks, dense = encoder.ranks, config.dense
    if dense.augment and not trained and ranks.world <= min(dense.batch_size, count):
        return ranks
    first_alone(ranks, what)
    return ALONE


def _backbone_groups(named: list[tuple[str, nn.Parameter]], scale: float) -> list[dict]:
    """Parameter groups of a backbone, norms and embeddings without weight decay."""
    plain = [p for name, p in named if any(part in name for part in _UNDECAYED)]
    decayed = [p for name, p in named if not any(part in name for part in _UNDECAYED)]
    groups = [{"params": decayed, "scale": scale}]
    if plain:
        groups.append({"params": plain, "scale": scale, "weight_decay": 0.0})
    return groups


class _Steps:
    """Batches of (step, number): what `draw_batches` draws from a seed, dealt out to `ranks`."""

    def __init__(self, count: int, size: int, steps: int, seed: int, ranks: Ranks) -> None:
        self.count, self.size, self.steps, self.seed = count, size, steps, seed
        self.ranks = ranks

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        batches = draw_batches(self.count, self.size, self.steps, generator)
        for step, numbers in enumerate(batches):
            yield [(step, number) for number in self.ranks.deal(numbers)]


def draw_batches(
    count: int, size: int, steps: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """`steps` batches of distinct numbers below `count`, epoch after epoch of permutations."""
    size = min(size, count)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


def rate_at(step: int, dense: DenseConfig) -> float:
    """The rate of a step over the peak: linear warm-up over a share of the steps, then
    (1 - progress)^power, or half a cosine to zero.
    """
    first = max(1, round(dense.warmup * dense.steps))
    if step < first:
        return (step + 1) / first
    progress = (step - first) / max(1, dense.steps - first)
    if dense.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return (1 - progress) ** dense.power


def stored_patches(
    encoder: Encoder,
    views: dict[str, WindowViews],
    whole: WholeViews | SeenViews | None,
    config: EvaluationConfig,
    cache: Path,
) -> dict[str, Callable[[list[int]], Tensor]]:
    """By split, the patches [n, h, w, d] of windows by their numbers, computed now if the cache
    lacks them. A split of which every step or pass sees other pictures is left out: augmented,
    whole or mirrored ones.
    """
    dense = config.dense
    splits = {"train": not dense.augment, "val": whole is None and not dense.mirror}
    result = {}
    for split in (split for split, fixed in splits.items() if fixed):
        what = f"{split} windows"
        features = extract(encoder, views[split], cache, config.extract, patches=True, what=what)
        result[split] = lambda numbers, f=features: f.patches(numbers).to(encoder.device)
    return result


def patch_reader(
    encoder: Encoder, views: WindowViews, config: EvaluationConfig
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images [B, 3, h, w] to the frozen network's patches [B, h', w', d],
    computed as those in the cache are.

    Raises UserError for patches of the first of `views` that are not finite, where they are not
    cached and checked there.
    """
    precision = precision_on(encoder.device, config.extract)

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        with cast(encoder.device, precision):
            return encoder(images.to(encoder.device)).patches.float()

    if config.dense.augment and not torch.isfinite(read(views[0][None])).all():
        raise UserError(
            f"{encoder.name}: its patches hold NaN or infinity: check its weights (and "
            "extract.precision)"
        )
    return read


def training_samples(
    views: WindowViews,
    labels: Callable[[Pairs, int], np.ndarray],
    read: Callable[[Tensor], Any],
    stored: Callable[[list[int]], Any] | None,
    config: EvaluationConfig,
    style: Style,
) -> tuple[_Samples, Callable[[Tensor], Any]]:
    """What a head learns from, and a function from a batch of it to the head's inputs: augmented
    windows by `read`, or those of `views`, stored or by `read`.

    `labels(pairs, number)` gives a picture's map [H, W].
    """
    dense, pairs = config.dense, views.pairs
    points = max(1, views.size // dense.loss_stride)
    if dense.augment:
        window = views.size, points
        return AugmentedPairs(pairs, labels, window, dense.resize, style, config.seed), read

    def inputs(numbers: Tensor) -> Any:
        if stored:
            return stored(numbers.tolist())
        return read(torch.stack([views[number] for number in numbers.tolist()]))

    kept = WindowLabels(views, lambda number: labels(pairs, number), points)
    return _NumberedWindows(kept), inputs


def side_of(encoder: Encoder, dense: DenseConfig) -> int:
    """Side of windows and views in pixels: `dense.size`, or where `dense.test` is the view and no
    size is set the network's own, at which it is served.
    """
    served = dense.test == "view" and "size" not in dense.model_fields_set
    return encoder.fit(encoder.image_size if served else dense.size)


def whole_views(
    encoder: Encoder, views: WindowViews, config: EvaluationConfig
) -> WholeViews | SeenViews | None:
    """Whole validation pictures or what `extract.view` shows of them, where `dense.test` wants
    that; None, with a line in the log, for a network that does not take all of their shapes.
    """
    if config.dense.test == "windows":
        return None
    if config.dense.test == "view":
        return SeenViews(views.pairs, views.size, encoder.view_of(config.extract))
    whole = WholeViews(views.pairs, views.size, encoder.stride)
    for height, width in sorted(whole.shapes()):
        if not encoder.takes(height, width):
            log.warning(
                "test      %s does not take pictures of %dx%d: square windows instead of "
                "dense.test=whole",
                encoder.name,
                width,
                height,
            )
            return None
    return whole


class PictureMaps:
    """Maps [C, H, W] of whole pictures of a split: by their windows or, with `whole`, in one piece;
    with `mirror` the mean with the mirrored map of the mirrored picture.

    `read(images)` gives what `head` reads of uint8 images [n, 3, h, w]; `head` gives [n, C, h, w].
    `stored(window numbers)` replaces it where the windows' features are at hand.
    """

    def __init__(
        self,
        head: Callable[[Any], Tensor],
        read: Callable[[Tensor], Any],
        views: WindowViews,
        whole: WholeViews | SeenViews | None,
        mirror: bool,
        stored: Callable[[list[int]], Any] | None = None,
    ) -> None:
        self.head, self.read, self.views, self.whole = head, read, views, whole
        self.mirror, self.stored = mirror, stored
        self.windows = views.of_picture()

    @torch.inference_mode()
    def __call__(self, number: int, width: int, height: int) -> Tensor:
        """The map of picture `number`, which is `width` x `height` pixels."""
        if self.whole:
            views = self.whole[number]
            maps = self._maps(views if views.ndim == 4 else views[None])
            return self.whole.restore(maps, number, width, height)
        windows = self.windows[number]
        if self.stored and not self.mirror:
            maps = self.head(self.stored(windows))
        else:
            maps = self._maps(torch.stack([self.views[window] for window in windows]))
        return merge_windows(maps, [self.views.windows[w] for w in windows], width, height)

    def shown(self, width: int, height: int) -> Tensor | None:
        """Which pixels [height, width] of a picture have a map; None: all of them."""
        return self.whole.shown(width, height) if isinstance(self.whole, SeenViews) else None

    def _maps(self, images: Tensor) -> Tensor:
        maps = self.head(self.read(images))
        if self.mirror:
            maps = (maps + self.head(self.read(images.flip(-1))).flip(-1)) / 2
        return maps
