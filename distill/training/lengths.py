"""After training: the lengths of heads that were trained by cosine (`methods.lengths`)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from distill.config import Recipe
from distill.data.batches import Batch
from distill.features import FeatureDims, Features
from distill.methods.deployment import Deployment
from distill.methods.lengths import FreeHead, fit_lengths
from distill.methods.losses import Prediction
from distill.runs import build_shipped

log = logging.getLogger(__name__)


def fit_shipped(
    recipe: Recipe,
    dims: Mapping[str, FeatureDims],
    weights: Mapping[str, Tensor],
    batches: Callable[[], Iterable[Batch]],
    look: Callable[[Batch], Mapping[str, Features]],
    device: torch.device,
) -> dict[str, Tensor]:
    """A method's `weights` with the lengths of its heads fitted to what the teachers say (`look`)
    of `batches`; unchanged where no length is free.
    """
    method = build_shipped(recipe, dims)
    shipped = {name: tensor for name, tensor in weights.items() if name in method.state_dict()}
    method.load_state_dict(shipped)
    deployment = method.to(device).deploy()
    free = {
        label: FreeHead(head.normalizer, tuple(kinds))
        for label, head in deployment.shipped.items()
        if head.normalizer is not None
        and (kinds := [kind for kind in head.free_length if kind != "maps"])
    }
    if not free:
        return dict(weights)
    log.info("fitting the lengths of %s", ", ".join(free))
    fit_lengths(free, _pairs(deployment, method.teacher_views, batches(), look, device))
    lengths = {
        name: tensor.cpu()
        for name, tensor in method.state_dict().items()
        if ".lengths." in name and name in weights
    }
    return {**weights, **lengths}


@torch.no_grad()
def _pairs(
    deployment: Deployment,
    teacher_views: Mapping[str, str],
    batches: Iterable[Batch],
    look: Callable[[Batch], Mapping[str, Features]],
    device: torch.device,
) -> Iterator[tuple[dict[str, Prediction], Mapping[str, Features]]]:
    """What the heads predict, at the deployed size, and what the teachers say, batch by batch."""
    for batch in batches:
        batch = batch.to(device)
        predictions: dict[str, Prediction] = {}
        for view in dict.fromkeys(teacher_views.values()):
            said = deployment.predict(deployment.preprocess(batch.views[view]))
            predictions |= {k: said[k] for k, own in teacher_views.items() if own == view}
        yield predictions, look(batch)
