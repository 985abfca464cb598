"""One pass of a network over pictures of which nothing is kept on disk, a part in each process."""

from collections.abc import Callable

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data.batches import worker_options
from distill.distributed import Ranks
from distill.evaluate.config import ExtractConfig
from distill.evaluate.extract import Views


def map_views(
    views: Views,
    work: Callable[[Tensor], Tensor],
    config: ExtractConfig,
    ranks: Ranks,
    what: str = "pictures",
) -> Tensor:
    """`work` of every batch of views, uint8 [b, 3, H, W] on the CPU: float32 [n, ...] on the CPU of
    every process. Batches are those of one process, dealt out; the first has a progress bar.
    """
    batches = ranks.deal(torch.arange(len(views)).split(config.batch_size))
    workers = min(config.workers, len(batches))
    room = views[0].nbytes * config.batch_size if workers else 0
    loader = DataLoader(
        views,
        batch_sampler=[batch.tolist() for batch in batches],
        generator=torch.Generator(),
        **worker_options(workers, room, wanted=2),
    )
    shown = track(loader, what, total=len(batches), disable=not ranks.draws)
    return torch.cat(ranks.collect([work(images).float().cpu() for images in shown]))
