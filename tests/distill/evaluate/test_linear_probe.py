"""The probe's one-pass sweep against one ordinary optimizer a rate, and its head on disk."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from contract.errors import UserError
from distill.evaluate.classification import FrozenSplits, accuracy
from distill.evaluate.config import EvaluationConfig, ProbeConfig
from distill.evaluate.linear_probe import choose, evaluate, hold_out, sweep_rates, train_sweep
from distill.heads import load_head


@pytest.fixture(scope="module")
def digits() -> FrozenSplits:
    """Real features: the 64 pixels of scikit-learn's handwritten digits."""
    data = load_digits()
    pixels, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    names = tuple(str(n) for n in range(10))
    return FrozenSplits(pixels[:1200], labels[:1200], pixels[1200:], labels[1200:], names)


def test_sweep_has_the_papers_45_rates_from_1e_4_to_10():
    rates = sweep_rates(ProbeConfig())
    assert len(rates) == 45
    assert rates[0].item() == pytest.approx(1e-4) and rates[-1].item() == pytest.approx(10)
    steps = rates.log().diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=0)


def test_one_pass_equals_one_sgd_run_per_rate(digits):
    config = ProbeConfig(rates=5, lowest=1e-3, highest=1.0, epochs=3, batch_size=64)
    sweep = train_sweep(digits.train, digits.train_labels, 10, config, seed=3)
    for number, rate in enumerate(sweep.rates.tolist()):
        linear = torch.nn.Linear(64, 10)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
        generator = torch.Generator().manual_seed(3)
        steps, done = 3 * (1200 // 64), 0
        for _ in range(3):
            for chosen in torch.randperm(1200, generator=generator)[: 1200 // 64 * 64].split(64):
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * done / steps)) / 2
                optimizer.zero_grad()
                F.cross_entropy(
                    linear(digits.train[chosen]), digits.train_labels[chosen]
                ).backward()
                optimizer.step()
                done += 1
        torch.testing.assert_close(
            sweep.weight[number], linear.weight.detach(), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(sweep.bias[number], linear.bias.detach(), rtol=1e-3, atol=1e-5)


def test_probe_comes_close_to_logistic_regression(digits, tmp_path):
    config = EvaluationConfig(probe=ProbeConfig(epochs=60, batch_size=128))
    found = evaluate(
        digits, config, tmp_path, {"reads": "backbone", "student_sha256": "s", "output": "summary"}
    )
    reference = LogisticRegression(max_iter=2000).fit(digits.train, digits.train_labels)
    assert found.scores["top1"] > reference.score(digits.val, digits.val_labels) - 0.02
    assert found.scores["top5"] > 0.99
    assert set(found.details["per_class"]) == set(digits.classes)
    assert found.details["per_class"]["3"]["support"] == int((digits.val_labels == 3).sum())


@pytest.mark.parametrize("standardize", [False, True])
def test_saved_classifier_reads_raw_features_and_scores_the_same(digits, tmp_path, standardize):
    probe = ProbeConfig(epochs=10, rates=5, batch_size=256, standardize=standardize)
    found = evaluate(
        digits,
        EvaluationConfig(probe=probe),
        tmp_path,
        {"student_sha256": "abc", "reads": "backbone"},
    )
    head = load_head(tmp_path / "heads" / "classification.safetensors", "abc")
    right = (head.module(digits.val).argmax(1) == digits.val_labels).double().mean().item()
    assert right == pytest.approx(found.scores["top1"], abs=2e-3)
    assert head.about["classes"] == list(digits.classes)
    with pytest.raises(UserError, match="another student"):
        load_head(tmp_path / "heads" / "classification.safetensors", "def")


def test_rate_is_chosen_without_the_validation_split(digits):
    learn, choose = hold_out(digits.train_labels, 0.1, seed=0)
    assert len(choose) == 120 and not set(learn.tolist()) & set(choose.tolist())
    assert len(learn) + len(choose) == 1200
    # stratified: every digit is among those that choose
    assert set(digits.train_labels[choose].tolist()) == set(range(10))


def test_something_is_always_left_to_learn_from():
    learn, choose = hold_out(torch.tensor([0, 1] * 5), 0.95, seed=0)
    assert len(learn) >= 1 and len(choose) >= 1


def test_a_diverged_rate_is_never_chosen(digits):
    config = ProbeConfig(rates=3, lowest=0.01, highest=1.0, epochs=2, batch_size=256)
    sweep = train_sweep(digits.train, digits.train_labels, 10, config, seed=0)
    sweep.weight[2] = float("nan")
    assert choose(sweep, digits.train, digits.train_labels).rate in sweep.rates[:2].tolist()


def test_several_runs_report_their_mean_and_spread(digits, tmp_path):
    probe = ProbeConfig(rates=3, epochs=5, batch_size=256, runs=3)
    found = evaluate(digits, EvaluationConfig(probe=probe), tmp_path, {})
    runs = [run["top1"] for run in found.details["runs"]]
    assert len(runs) == 3
    assert found.scores["top1"] == pytest.approx(sum(runs) / 3)
    assert found.details["top1_std"] >= 0


def test_accuracy_by_hand_and_with_nan():
    scores = torch.tensor([[9, 8, 7, 6, 5, 4, 3], [1, 9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4, 3.0]])
    names = tuple("abcdefg")
    found, report = accuracy(scores, torch.tensor([0, 2, 6]), names)
    assert found == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}
    assert report["a"]["recall"] == 1.0 and report["c"]["recall"] == 0.0
    with pytest.raises(UserError, match="NaN"):
        accuracy(scores * float("nan"), torch.tensor([0, 2, 6]), names)
