"""Transfer: the linear probe on several data sets, and the mean of its accuracies (SeFA Table 2 and
appendix B.2: CIFAR-10, CIFAR-100, Flowers-102, Oxford-IIIT Pets).
"""

from pathlib import Path

from contract.errors import UserError
from contract.picture_files import subfolders
from distill.evaluate.archives import ARCHIVES, archive_of
from distill.evaluate.classification import freeze, open_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import split_folder
from distill.evaluate.encoder import Encoder
from distill.evaluate.linear_probe import train_probe
from distill.evaluate.outcome import Outcome


def evaluate(encoder: Encoder, root: Path, config: EvaluationConfig, cache: Path) -> Outcome:
    """Top-1 of a linear probe on every data set in `root`, a folder each, and their plain mean.

    A data set is an archive of `ARCHIVES` or has class folders. Its learning rate is chosen on a
    held-out part of its own training split, as `linear` does. The mean is "mean top1" for the
    paper's four archives, and "mean top1 of n" for any others: that compares with no published one.

    Raises UserError for a folder without data sets, one that is itself a data set, a set in no
    known layout, and damaged files; all sets are opened before the first is scored.
    """
    if archive_of(root) is not None or split_folder(root, "train") is not None:
        raise UserError(
            f"--data {root} is one data set, but transfer averages several: give the folder above "
            "it, or use --tasks linear"
        )
    folders = subfolders(root)
    usual = ", ".join(archive.folder for archive in ARCHIVES.values())
    if not folders:
        raise UserError(
            f"--data {root} has no data set: put {usual}, or NAME/{{train,val}}/CLASS/*.jpg into it"
        )
    for folder in folders:
        if archive_of(folder) is None and split_folder(folder, "train") is None:
            raise UserError(
                f"{folder} is no data set: it has neither train/CLASS/*.jpg nor the files of "
                f"{usual} (complete it, or move it away)"
            )
    opened = {folder: open_splits(folder) for folder in folders}
    scores, details = {}, {}
    for folder, (train, val) in opened.items():
        probe = train_probe(freeze(encoder, train, val, config, cache), config, encoder.ranks)
        scores[f"{folder.name} top1"] = probe.scores["top1"]
        details[folder.name] = {
            "layout": archive_of(folder) or "class folders",
            "train": len(train),
            "val": len(val),
            "scores": probe.scores,
            **probe.details,
        }
    kinds = sorted(entry["layout"] for entry in details.values())
    name = "mean top1" if kinds == sorted(ARCHIVES) else f"mean top1 of {len(scores)}"
    return Outcome({**scores, name: sum(scores.values()) / len(scores)}, details)
