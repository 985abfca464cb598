"""`python -m distill.evaluate` under torchrun: two processes of gloo score what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

from distill.evaluate.__main__ import main
from tests.conftest import environment, run_here

pytestmark = pytest.mark.slow

TASKS = "knn,linear,finetune,segmentation,depth,clusters"
QUICK = (
    # eight views a shard: the first shard is made by both processes
    *(
        "extract.workers=0",
        "extract.batch_size=2",
        "extract.shard_size=1",
        "extract.view=centre-crop:1",
    ),
    *("probe.rates=5", "probe.epochs=20", "representation.perplexity=2"),
    # shares of 3 and 2 pictures
    *("finetune.epochs=2", "finetune.batch_size=5", "finetune.warmup_epochs=0"),
    *("dense.size=64", "dense.steps=6", "dense.batch_size=5", "dense.augment=true"),
    *("dense.test=whole", "dense.mirror=true"),
)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """A random ViT of 64 px, as timm saves them."""
    folder = tmp_path_factory.mktemp("network") / "vit"
    arguments = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **arguments)
    net.pretrained_cfg["input_size"] = (3, 64, 64)
    save_for_hf(net, folder, model_args=arguments, safe_serialization=True)
    return f"local-dir:{folder}"


def evaluate_by_two(*arguments: object) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(
        [sys.executable, *launcher, "-m", "distill.evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
    )


def rows_of(folder: Path) -> dict[str, dict]:
    (row,) = json.loads((folder / "evaluation.json").read_text())["rows"].values()
    return row


def test_two_processes_score_and_train_what_one_does(network, class_folders, scenes, tmp_path):
    words = ("--data", class_folders, "--tasks", TASKS)
    words += ("--data", f"segmentation={scenes}", "--data", f"depth={scenes}", *QUICK)
    done = run_here(network, *words, "--output", tmp_path / "one", command=main)
    assert done.returncode == 0, done.stderr
    both = evaluate_by_two(network, *words, "--output", tmp_path / "two", "finetune.accumulate=2")
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("scores    ") == 1  # the second process says nothing
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert one.keys() == two.keys() == set(TASKS.split(","))

    # features, and what is read off them, to the bit
    caches = [sorted((tmp_path / name / "cache").rglob("*.npy")) for name in ("one", "two")]
    assert len(caches[0]) >= 3
    for path, other in zip(*caches, strict=True):
        assert path.name == other.name and path.read_bytes() == other.read_bytes()
    for task in ("knn", "clusters"):
        assert one[task]["scores"] == two[task]["scores"]
        assert one[task]["details"] == two[task]["details"]
    # trained: sums come out in another order
    assert one["linear"]["details"]["rate"] == two["linear"]["details"]["rate"]
    bounds = {"finetuned": (1e-3, 2e-4)}
    written = sorted(
        path.relative_to(tmp_path / "one") for path in tmp_path.glob("one/**/*.safete*")
    )
    assert {path.stem for path in written} == {
        "classification",
        "segmentation",
        "depth",
        "finetuned",
    }
    for path in written:
        rtol, atol = bounds.get(path.stem, (1e-4, 1e-5))
        alone, together = (load_file(tmp_path / name / path) for name in ("one", "two"))
        for key, tensor in together.items():
            torch.testing.assert_close(tensor, alone[key], rtol=rtol, atol=atol)
    for task in ("linear", "finetune", "segmentation", "depth"):
        for score, value in one[task]["scores"].items():
            assert two[task]["scores"][score] == pytest.approx(value, rel=1e-3), (task, score)
