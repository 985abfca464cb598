"""Training a head on frozen features: what segmentation and depth share."""

import sys
from collections.abc import Callable, Iterator

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract.errors import Failure
from distill.data.batches import prepare_worker
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.windows import WindowLabels
from distill.models.batch_norm import explained

_Loss = Callable[[Tensor, Tensor], Tensor]


def train_head(
    head: nn.Module,
    inputs: Callable[[list[int]], object],
    labels: WindowLabels,
    loss: _Loss,
    config: EvaluationConfig,
    device: torch.device,
    backbone: tuple[list[nn.Parameter], float] = ([], 0.0),
) -> nn.Module:
    """Fit `head` to map `inputs(window numbers)` to `labels`, by AdamW with warm-up and a
    polynomial decay.

    `loss(output of the head, labels [B, p, p])` is a scalar. `backbone` is parameters to train
    with the head and their rate over the head's. Raises Failure for a loss that is not finite.
    """
    dense = config.dense
    head.to(device).train()
    groups = [{"params": list(head.parameters()), "scale": 1.0}]
    if backbone[0]:
        groups.append({"params": backbone[0], "scale": backbone[1]})
    optimizer = torch.optim.AdamW(groups, lr=dense.lr, weight_decay=dense.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    batches = list(draw_batches(len(labels), dense.batch_size, dense.steps, generator))
    workers = 0 if labels.keep else config.extract.workers
    loader = DataLoader(
        _Numbered(labels),
        batch_sampler=batches,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=prepare_worker,
        multiprocessing_context="fork" if workers else None,
    )
    what = type(head).__name__
    for step, (numbers, truth) in enumerate(
        track(loader, total=len(batches), description=what, disable=not sys.stdout.isatty())
    ):
        for group in optimizer.param_groups:
            group["lr"] = dense.lr * group["scale"] * polynomial(step, dense.steps, dense.warmup)
        with explained(f"set dense.batch_size to 2 or more (now {len(numbers)})"):
            value = loss(head(inputs(numbers.tolist())), truth.to(device))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        # reading the loss waits for a GPU, so only now and then
        if (step % 50 == 0 or step == dense.steps - 1) and not torch.isfinite(value):
            raise Failure(
                f"{what}: the loss is {value.item()} at step {step}; lower dense.lr = {dense.lr:g}"
            )
    return head.eval()


class _Numbered:
    """A data set whose items come with their numbers."""

    def __init__(self, items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, self.items[number]


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


def polynomial(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then (1 - progress)^0.9."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return (1 - (step - first) / max(1, steps - first)) ** 0.9
