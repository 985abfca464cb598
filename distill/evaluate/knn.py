"""k-nearest-neighbour classification of frozen features: cosine, votes weighted by temperature
(DINO's protocol).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.distributed import ALONE, Ranks
from distill.evaluate.classification import FrozenSplits, accuracy
from distill.evaluate.config import EvaluationConfig, KNNConfig
from distill.evaluate.outcome import Outcome

GIB = 2**30
_ROWS = 1024
"""Queries of one block, which one process looks up."""


def evaluate(splits: FrozenSplits, config: EvaluationConfig, ranks: Ranks = ALONE) -> Outcome:
    """Top-1 and top-5 of the validation split by its neighbours in the training split; blocks of
    queries are dealt out to `ranks`.
    """
    count = len(splits.classes)
    votes = knn_votes(splits.train, splits.train_labels, splits.val, count, config.knn, ranks)
    scores, report = accuracy(votes, splits.val_labels, splits.classes)
    if (
        config.knn.k < 5
    ):  # fewer neighbours than places: the rest of a top 5 would be classes without a vote
        scores.pop("top5", None)
    return Outcome(scores, {"per_class": report, "k": min(config.knn.k, len(splits.train))})


def knn_votes(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    config: KNNConfig,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Votes [q, classes] for every query [q, d] from its `k` most similar training features [n,
    d].

    Neighbour j votes exp((cosine_j - cosine_1) / T) for its class; subtracting the nearest's cosine
    scales all votes of a query equally and keeps small temperatures from overflowing. Similarities
    are computed in blocks of at most `block_gib`, and only each query's best k so far are kept:
    ImageNet's 50 000 x 1 281 167 never exist at once.
    """
    k = min(config.k, len(train))
    budget = int(config.block_gib * GIB / 4)
    # A block costs its similarities and, on top, what normalising its rows takes.
    rows = max(1, min(len(queries), _ROWS))
    columns = max(k, min(len(train), budget // (2 * (rows + train.shape[1]))))
    votes = torch.zeros(len(queries), classes, device=queries.device)
    blocks = list(zip(queries.split(rows), votes.split(rows), strict=True))
    for some, out in ranks.deal(blocks):
        some = F.normalize(some.float(), dim=1)
        best = torch.empty(len(some), 0, device=queries.device)
        voters = torch.empty(len(some), 0, dtype=torch.long, device=queries.device)
        for block, their_labels in zip(train.split(columns), labels.split(columns), strict=True):
            similarity = some @ F.normalize(block.to(queries.device).float(), dim=1).T
            near, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best = torch.cat((best, near), dim=1)
            voters = torch.cat((voters, their_labels.to(queries.device)[index]), dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            voters = voters.gather(1, order)
        out.scatter_add_(1, voters, ((best - best[:, :1]) / config.temperature).exp())
    return ranks.add(votes)  # every row is one process's, and zero in the others
