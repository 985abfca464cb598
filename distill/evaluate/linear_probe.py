"""Linear probe with every learning rate of the sweep at once (SeFA: 45 values in [1e-4, 10]).

The classifiers of all rates are one weight [R, C, d]: a step reads the features once, for all of
them. With SGD and no weight decay, scaling a classifier's loss by its rate is the same as stepping
it at that rate, momentum included; so one ordinary optimizer trains 45 at 45 rates, exactly
(`tests/distill/evaluate/test_linear_probe.py` compares with 45 optimizers).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedShuffleSplit
from timm.data import ImageNetInfo
from torch import Tensor

from contract.errors import UserError
from contract.views import ViewPolicy
from distill.distributed import ALONE, Ranks
from distill.evaluate.classification import FrozenSplits, accuracy
from distill.evaluate.config import EvaluationConfig, ProbeConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.outcome import Outcome, first_alone
from distill.evaluate.shared_files import first_sees
from distill.heads import Classifier, Head, load_head, save_head


@dataclass(frozen=True)
class Sweep:
    """Trained classifiers: `weight` [R, C, d], `bias` [R, C], for the learning rates [R]."""

    weight: Tensor
    bias: Tensor
    rates: Tensor

    def logits(self, features: Tensor, rate: int) -> Tensor:
        """Scores [n, C] by the classifier of one rate."""
        return features @ self.weight[rate].T + self.bias[rate]


class Probe(NamedTuple):
    """A trained probe: `scores` on the validation split (means over runs), `details`, and the
    `head` of the first run, which reads raw features.
    """

    scores: dict[str, float]
    details: dict
    head: Classifier


def evaluate(
    splits: FrozenSplits,
    config: EvaluationConfig,
    folder: Path,
    binding: dict,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Top-1 and top-5 of `train_probe`'s classifier.

    Writes `heads/classification.safetensors` (of the first run). `binding` names the network and
    the output it reads.
    """
    probe = train_probe(splits, config, ranks)
    first_alone(ranks)
    first = probe.details.get("runs", [probe.scores])[0]
    path = save_head(
        folder / "heads",
        "classification",
        probe.head,
        {**binding, "classes": splits.classes, "scores": first},
    )
    return Outcome(probe.scores, probe.details, (path,))


class Chosen(NamedTuple):
    """The classifier of the best rate: `weight` [C, d], `bias` [C]."""

    weight: Tensor
    bias: Tensor
    rate: float


def train_probe(splits: FrozenSplits, config: EvaluationConfig, ranks: Ranks = ALONE) -> Probe:
    """The classifier whose rate did best on a held-out part of the *training* split; rates are
    dealt out to `ranks`.
    """
    probe = config.probe
    shift, scale = _channel_statistics(splits.train, probe.standardize)
    train, val = splits.train, splits.val
    if probe.standardize:  # otherwise nothing is copied: ImageNet's features are gigabytes
        train, val = (train - shift) / scale, (val - shift) / scale
    results = []
    for run in range(probe.runs):
        seed = config.seed + run
        # The papers choose the rate on the validation split, which is also the one they report.
        # Here the scored pictures choose nothing.
        learn, held = hold_out(splits.train_labels, probe.held_out, seed)
        sweep = train_sweep(
            train, splits.train_labels, len(splits.classes), probe, seed, learn, ranks
        )
        chosen = choose(sweep, train[held], splits.train_labels[held], ranks)
        logits = val @ chosen.weight.T + chosen.bias
        results.append((*accuracy(logits, splits.val_labels, splits.classes), chosen))
    scores, report, chosen = results[0]
    head = Classifier(splits.train.shape[1], len(splits.classes))
    with (
        torch.no_grad()
    ):  # the statistics fold into the classifier, so that what ships reads raw features
        head.linear.weight.copy_(chosen.weight / scale)
        head.linear.bias.copy_(chosen.bias - chosen.weight @ (shift / scale))
    mean = {name: sum(r[0][name] for r in results) / len(results) for name in scores}
    details = {
        "per_class": report,
        "rate": chosen.rate,
        "standardize": probe.standardize,
    }
    if probe.runs > 1:
        details["runs"] = [r[0] for r in results]
        details["top1_std"] = float(torch.tensor([r[0]["top1"] for r in results]).std())
    if chosen.rate in sweep_rates(probe)[[0, -1]].tolist() and probe.rates > 1:
        details["note"] = (
            "the best rate is at the end of the sweep: widen probe.lowest or probe.highest"
        )
    return Probe(mean, details, head)


def trained_probe(encoder: Encoder, path: Path, what: str) -> Head:
    """The probe of an encoder that `--tasks linear` has written to `path`, for the task `what`.

    Raises UserError if there is none, or it was trained on other features.
    """
    if not first_sees(path, encoder.ranks):
        raise UserError(f"{path}: no such head; {what} needs it: run --tasks linear first")
    head = load_head(path, encoder.weights_sha256)
    for key, here in (("reads", encoder.read_out), ("image_size", encoder.image_size)):
        if head.about.get(key) != here:
            raise UserError(
                f"{path} was trained with {key} = {head.about.get(key)}, but it is now {here}: run "
                "--tasks linear again"
            )
    return head


def imagenet_probe(encoder: Encoder, path: Path, view: ViewPolicy) -> Classifier:
    """The trained probe of an encoder: summaries [B, d] to ImageNet logits [B, 1000].

    Raises UserError if there is no probe, it was trained on other features, on what another `view`
    shows, or not on ImageNet's 1000 classes.
    """
    head = trained_probe(encoder, path, "robustness")
    check_imagenet(head.about["classes"], path)
    learnt = head.about.get("view", str(view))  # heads of earlier versions do not say
    if learnt != str(view):
        raise UserError(
            f"{path} was trained with view {learnt}, but robustness would show view {view}: set "
            f"extract.view={learnt}, or run --tasks linear again with extract.view={view}"
        )
    return head.module.to(encoder.device)


def check_imagenet(names: Sequence[str], path: Path) -> None:
    """Raise UserError unless the classes of the file `path` are ImageNet's 1000."""
    if list(names) != ImageNetInfo().label_names():
        raise UserError(
            f"{path} has {len(names)} classes, not ImageNet's 1000 WordNet ids in order: train it "
            "on ImageNet"
        )


def _channel_statistics(features: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation [d] of every channel, or zeros and ones; constant channels are left
    unchanged.
    """
    if not standardize:
        return torch.zeros_like(features[0]), torch.ones_like(features[0])
    deviation = features.std(0)
    return features.mean(0), torch.where(
        deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation)
    )


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to learn from and to choose by, stratified by class where every class has two
    pictures or more.
    """
    n, classes = len(labels), len(labels.unique())
    held = min(n - 1, max(1, math.ceil(share * n)))
    counts = torch.bincount(labels.cpu())
    if counts[counts > 0].min() >= 2 and held >= classes and n - held >= classes:
        splitter = StratifiedShuffleSplit(1, test_size=held, random_state=seed)
        learn, choose = next(splitter.split(labels.cpu().numpy(), labels.cpu().numpy()))
        learn, choose = torch.from_numpy(learn), torch.from_numpy(choose)
    else:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        learn, choose = order[held:], order[:held]
    return learn.to(labels.device), choose.to(labels.device)


def sweep_rates(config: ProbeConfig) -> Tensor:
    """Learning rates, evenly spaced on a log scale; only the highest if there is one."""
    if config.rates == 1:
        return torch.tensor([config.highest])
    return torch.logspace(math.log10(config.lowest), math.log10(config.highest), config.rates)


def train_sweep(
    features: Tensor,
    labels: Tensor,
    classes: int,
    config: ProbeConfig,
    seed: int,
    rows: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Sweep:
    """Train one linear classifier a rate on `rows` (default: all) of features [n, d]; of several
    processes each trains its own rates, which may be none.

    SGD with momentum and a cosine to zero, from zeros.
    """
    rows = torch.arange(len(features), device=features.device) if rows is None else rows
    rates = ranks.deal(sweep_rates(config)).to(features.device)
    r, n, d = len(rates), len(rows), features.shape[1]
    weight = torch.zeros(r * classes, d, device=features.device, requires_grad=True)
    bias = torch.zeros(r * classes, device=features.device, requires_grad=True)
    batch = min(config.batch_size, n)
    steps = config.epochs * (n // batch)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs if r else 0):
        order = rows[
            torch.randperm(n, generator=generator)[: n // batch * batch].to(features.device)
        ]
        for chosen in order.split(batch):
            logits = F.linear(features[chosen], weight, bias).view(batch, r, classes)
            target = labels[chosen].unsqueeze(1).expand(batch, r)
            losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(
                0
            )  # [R]
            optimizer.zero_grad(set_to_none=True)
            (losses * rates).sum().backward()
            optimizer.step()
            schedule.step()
    return Sweep(weight.detach().view(r, classes, d), bias.detach().view(r, classes), rates)


def choose(sweep: Sweep, features: Tensor, labels: Tensor, ranks: Ranks = ALONE) -> Chosen:
    """The classifier with the highest accuracy on held-out features, among those that all
    processes trained; of equals, the one with the lowest cross-entropy.

    A classifier that diverged counts as the worst.
    """
    scores = ranks.collect(_held_out_scores(sweep, features, labels))
    place, holder = divmod(max(range(len(scores)), key=scores.__getitem__), ranks.world)
    own = None
    if holder == ranks.rank:
        parts = (sweep.weight[place].cpu(), sweep.bias[place].cpu())
        own = Chosen(*parts, float(sweep.rates[place]))
    best = ranks.gather(own)[holder]
    return best._replace(weight=best.weight.to(features), bias=best.bias.to(features))


def _held_out_scores(sweep: Sweep, features: Tensor, labels: Tensor) -> list[tuple[int, float]]:
    """How many held-out features each rate's classifier gets right, and minus its
    cross-entropy.
    """
    keys = []
    for rate in range(len(sweep.rates)):
        logits = sweep.logits(features, rate)
        if torch.isfinite(logits).all():
            keys.append(
                ((logits.argmax(1) == labels).sum().item(), -F.cross_entropy(logits, labels).item())
            )
        else:
            keys.append((-1, 0.0))
    return keys
