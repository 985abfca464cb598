"""k-NN votes against a direct definition and scikit-learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from distill.evaluate.classification import FrozenSplits
from distill.evaluate.config import EvaluationConfig, KNNConfig
from distill.evaluate.knn import evaluate, knn_votes


def test_votes_by_hand():
    train = torch.tensor([[1.0, 0], [0, 2.0], [3.0, 3.0]])
    votes = knn_votes(
        train, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0]]), 2, KNNConfig(k=2, temperature=0.5)
    )
    # the two nearest: [1, 0] at cosine 1, [3, 3] at cosine 1/sqrt 2
    torch.testing.assert_close(votes, torch.tensor([[1.0, math.exp(2 / math.sqrt(2) - 2)]]))


@pytest.mark.parametrize("block_gib", [4.0, 1e-6])
def test_votes_equal_scikit_learns_weighted_neighbours_in_any_blocks(block_gib):
    train, queries = torch.randn(300, 16), torch.randn(50, 16)
    labels = torch.randint(7, (300,))
    config = KNNConfig(k=20, temperature=0.07, block_gib=block_gib)
    votes = knn_votes(train, labels, queries, 7, config)
    reference = KNeighborsClassifier(
        20, metric="cosine", weights=lambda d: torch.tensor((1 - d) / 0.07).exp().numpy()
    )
    reference.fit(train, labels)
    torch.testing.assert_close(
        (votes / votes.sum(1, keepdim=True)).double(),
        torch.tensor(reference.predict_proba(queries)),
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_small_temperature_overflows_nothing():
    train = torch.randn(50, 8)
    votes = knn_votes(train, torch.arange(50) % 3, train, 3, KNNConfig(temperature=1e-4))
    assert torch.isfinite(votes).all() and (votes.argmax(1) == torch.arange(50) % 3).all()


def test_top5_is_left_out_where_fewer_than_five_vote():
    names = tuple(str(n) for n in range(9))
    splits = FrozenSplits(
        torch.randn(90, 8), torch.arange(90) % 9, torch.randn(9, 8), torch.arange(9), names
    )
    assert set(evaluate(splits, EvaluationConfig(knn=KNNConfig(k=4))).scores) == {"top1"}
    assert set(evaluate(splits, EvaluationConfig(knn=KNNConfig(k=5))).scores) == {"top1", "top5"}


def test_more_neighbours_than_features_take_them_all():
    train = F.normalize(torch.randn(5, 4), dim=1)
    votes = knn_votes(train, torch.tensor([0, 0, 1, 1, 1]), train, 2, KNNConfig(k=20))
    assert votes.shape == (5, 2) and torch.isfinite(votes).all()


def test_blocks_stay_within_their_memory():
    """Half precision features of 20 000 pictures in blocks of 8 MiB: no block's similarities may
    exceed that.
    """
    config = KNNConfig(block_gib=8 / 1024)
    sizes = []
    original = torch.Tensor.topk

    def watch(self, *args, **kwargs):
        sizes.append(self.numel() * 4)
        return original(self, *args, **kwargs)

    torch.Tensor.topk = watch
    try:
        knn_votes(
            torch.randn(20_000, 32).half(),
            torch.randint(10, (20_000,)),
            torch.randn(64, 32),
            10,
            config,
        )
    finally:
        torch.Tensor.topk = original
    assert max(sizes) <= 8 * 2**20 and len(sizes) > 2
