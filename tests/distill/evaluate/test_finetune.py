"""LP-FT: fine-tuning that starts from the linear probe, and ImageNet's variants on its weights."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from contract.errors import UserError
from distill.data.crops import centre_crop
from distill.distributed import Ranks
from distill.evaluate import finetune, linear_probe
from distill.evaluate.__main__ import main
from distill.evaluate.classification import frozen_splits
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import open_classes
from distill.evaluate.encoder import RunEncoder, parse_model, teacher_encoder
from distill.evaluate.finetune import (
    FINETUNED,
    build_classifier,
    count_parts,
    finetuned_classifier,
    put_probe,
)
from distill.evaluate.robustness import class_index, subset_indices
from distill.features import FeatureDims
from distill.heads import Classifier
from distill.methods import build_method
from distill.recipe_io import make_recipe
from distill.runs import Run
from tests.conftest import run_here


def settings(**sections) -> EvaluationConfig:
    quick = {"extract": {"workers": 0}, "probe": {"rates": 4, "epochs": 20}}
    return EvaluationConfig.model_validate(quick | sections)


def student(name: str, **kwargs) -> RunEncoder:
    """An untrained student, as a run would hold it."""
    recipe = make_recipe(
        {
            "method": "plain",
            "student": {"name": name, "image_size": 64, "kwargs": kwargs},
            "teachers": [{"name": "vit", "role": "mae"}],
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1},
        }
    )
    dims = {"mae": FeatureDims(48, 48)}
    method = build_method(recipe, dims).eval()
    return RunEncoder(Run(Path("run"), recipe, dims, method, None, "0" * 64), "backbone")


def probe_of(encoder, classes: int = 3) -> Classifier:
    head = Classifier(encoder.dims.summary, classes)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    return head.requires_grad_(False)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tiny_vit, class_folders, tmp_path):
    nets = []
    for parts in (1, 3):
        short = {"epochs": 1, "batch_size": 4, "warmup_epochs": 0, "accumulate": parts}
        outcome = finetune.evaluate(
            tiny_vit, class_folders, settings(finetune=short), tmp_path / str(parts)
        )
        nets.append(load_file(outcome.files[0]))
    # AdamW's first steps magnify what sums in another order differ by
    for name, tensor in nets[0].items():
        torch.testing.assert_close(tensor, nets[1][name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("world,accumulate", [(2, 3), (2, 2), (4, 3), (1, 3)])
def test_processes_divide_unequal_shares_into_equally_many_parts(world, accumulate):
    count = count_parts(5, world, accumulate)
    shares = [torch.arange(5)[rank::world].tensor_split(count) for rank in range(world)]
    assert 1 <= count <= accumulate and {len(parts) for parts in shares} == {count}
    assert all(len(part) for parts in shares for part in parts)


def test_augmentation_depends_on_epoch_and_picture_alone(tiny_vit, class_folders):
    split = open_classes(class_folders, "train")
    transform = create_transform((3, 64, 64), is_training=True, color_jitter=None)
    pictures = finetune._AugmentedPictures(split, transform, 0)
    keys = [(0, 3), (0, 4), (1, 3)]
    state = random.getstate(), torch.get_rng_state()
    there = [pictures[key][0] for key in keys]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    back = [pictures[key][0] for key in reversed(keys)]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))
    assert not torch.equal(there[0], there[2])


def test_what_several_processes_refuse(tiny_cnn, tiny_vit, class_folders, tmp_path):
    """Before anything is shared: so it is tried in one of them."""
    both = Ranks(0, 2, torch.device("cpu"))
    for encoder, batch, reason in (
        (tiny_cnn, 4, "tiny-cnn has batch normalisation, and processes on a CPU cannot share"),
        (tiny_vit, 1, "takes batches of 1 pictures here, fewer than the 2 processes: start fewer"),
    ):
        encoder = copy.deepcopy(encoder)
        encoder.ranks = both
        with pytest.raises(UserError, match=reason):
            finetune.evaluate(
                encoder, class_folders, settings(finetune={"batch_size": batch}), tmp_path
            )
    assert not list(tmp_path.iterdir())


def test_statistics_of_parts_of_a_batch_are_warned_of(tiny_cnn, class_folders, tmp_path, caplog):
    short = {"epochs": 1, "batch_size": 4, "warmup_epochs": 0, "accumulate": 2}
    finetune.evaluate(tiny_cnn, class_folders, settings(finetune=short), tmp_path)
    assert "statistics are those of a part of a batch with finetune.accumulate = 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "kwargs", "without"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 2}, []),
        (
            "vit_tiny_patch16_224",
            {"embed_dim": 48, "depth": 2, "num_heads": 2, "reg_tokens": 1},
            [],
        ),
        (
            "vit_tiny_patch16_224",
            {"embed_dim": 48, "depth": 1, "num_heads": 2, "class_token": False}
            | {"global_pool": "avg"},
            ["fc_norm"],
        ),
        ("resnet10t", {}, []),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, ["head.norm"]),
    ],
)
def test_a_student_starts_with_the_probes_logits(name, kwargs, without):
    encoder = student(name, **kwargs)
    probe = probe_of(encoder)
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    net = build_classifier(encoder, 3)
    assert put_probe(net, encoder, probe) == without and net.training == encoder.net.training
    with torch.no_grad():
        found = net.eval()(encoder.normalize(images))
        summaries = encoder(images).summary.tolist()
    for row, summary in zip(found.tolist(), summaries, strict=True):
        for value, weights, bias in zip(
            row, probe.linear.weight.tolist(), probe.linear.bias.tolist(), strict=True
        ):
            expected = sum(w * x for w, x in zip(weights, summary, strict=True)) + bias
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_network_that_classifies_another_vector_is_refused():
    # averages its patches to classify, but is distilled and probed at its class token
    config = parse_model("vit_tiny_patch16_224@random")
    kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
    encoder = teacher_encoder(config.model_copy(update={"kwargs": kwargs}), size=64, name="avg")
    with pytest.raises(UserError, match="avg classifies another vector .* finetune.init=random"):
        put_probe(build_classifier(encoder, 3), encoder, probe_of(encoder))


def test_the_default_epochs_are_the_papers():
    found = [
        settings(finetune=given).finetune.passes
        for given in ({}, {"init": "probe"}, {"init": "probe", "epochs": 3}, {"epochs": 7})
    ]
    assert found == [10, 100, 3, 7]


def linear(encoder, data, config, folder):
    """The linear task, as the command runs it."""
    binding = {
        "network": encoder.name,
        "reads": encoder.read_out,
        "student_sha256": encoder.weights_sha256,
        "image_size": encoder.image_size,
    }
    splits = frozen_splits(encoder, data, config, folder / "cache")
    return linear_probe.evaluate(splits, config, folder, binding)


def test_without_a_step_that_counts_the_score_is_the_probes(tiny_vit, class_folders, tmp_path):
    config = settings(finetune={"init": "probe", "epochs": 1, "batch_size": 6, "lr": 1e-9})
    probed = linear(tiny_vit, class_folders, config, tmp_path)
    found = finetune.evaluate(tiny_vit, class_folders, config, tmp_path)
    assert found.scores == probed.scores and found.files == (tmp_path / FINETUNED,)
    weights = load_file(tmp_path / FINETUNED)
    head = load_file(tmp_path / "heads" / "classification.safetensors")
    torch.testing.assert_close(weights["head.weight"], head["linear.weight"], rtol=1e-3, atol=1e-5)
    random = finetune.evaluate(
        tiny_vit, class_folders, settings(finetune={"epochs": 1, "lr": 1e-9}), tmp_path / "random"
    )
    assert not torch.allclose(
        load_file(random.files[0])["head.weight"], head["linear.weight"], atol=1e-3
    )


def test_what_lp_ft_refuses(tiny_vit, class_folders, tmp_path):
    config = settings(finetune={"init": "probe", "epochs": 1, "batch_size": 6})
    with pytest.raises(
        UserError, match="no such head; finetune.init=probe needs it: run --tasks linear first"
    ):
        finetune.evaluate(tiny_vit, class_folders, config, tmp_path)
    linear(tiny_vit, class_folders, config, tmp_path)
    other = shutil.copytree(class_folders, tmp_path / "other")
    for split in ("train", "val"):
        shutil.copytree(other / split / "coins", other / split / "more")
    with pytest.raises(UserError, match="has 2 classes, but the training split has 3"):
        finetune.evaluate(tiny_vit, other, config, tmp_path)
    assert not (tmp_path / FINETUNED).exists()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    """A folder to each of ImageNet's classes, pictures in sixty of them, ten to score on, and two
    variants.
    """
    root = tmp_path_factory.mktemp("imagenet")
    wnids = list(class_index())
    some = [wnids[index] for index in subset_indices("imagenet_a")[:8]]
    for wnid in wnids:
        (root / "train" / wnid).mkdir(parents=True)
    places = [("train", wnid) for wnid in wnids[:60]] + [("val", wnid) for wnid in wnids[:10]]
    places += [("robustness/imagenet-a", wnid) for wnid in some]
    places += [("robustness/imagenet-v2", wnid) for wnid in wnids[300:306]]
    random = np.random.default_rng(0)
    for split, wnid in places:
        folder = root / split / wnid
        folder.mkdir(parents=True, exist_ok=True)
        colours = random.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((36, 32)).save(folder / "a.png")
    return root


@pytest.mark.slow
def test_variants_are_read_by_the_fine_tuned_network(thousand, tmp_path):
    out, model = tmp_path / "out", "resnet10t@random"
    quick = ("extract.workers=0", "extract.view=centre-crop:1", "probe.rates=2", "probe.epochs=2")
    quick += ("finetune.init=probe", "finetune.epochs=1", "finetune.batch_size=20")
    quick += ("finetune.lr=3e-3", "finetune.warmup_epochs=0")
    common = (model, "--data", thousand, "--size", 32, "--output", out, *quick)
    missing = run_here(
        *common, "--tasks", "robustness", "robustness.classifier=finetuned", command=main
    )
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "finetuned.safetensors: no such file; robustness.classifier=finetuned" in missing.stderr
    tasks = "linear,finetune,robustness"
    done = run_here(*common, "--tasks", tasks, "robustness.classifier=finetuned", command=main)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "evaluation.json").read_text())["rows"][model]
    assert rows["finetune"]["details"]["epochs"] == 1

    encoder = teacher_encoder(parse_model(model), size=32, name="network")
    net = build_classifier(encoder, 1000)
    net.load_state_dict(load_file(out / FINETUNED))
    net.eval()
    among = sorted(subset_indices("imagenet_a"))
    expected = {}
    for variant, allowed in (("imagenet-a", among), ("imagenet-v2", range(1000))):
        files = sorted((thousand / "robustness" / variant).rglob("*.png"))
        right = 0
        for path in files:
            pixels = encoder.normalize(centre_crop(Image.open(path), 32)[None])
            with torch.no_grad():
                logits = net(pixels)[0].tolist()
            best = max(allowed, key=lambda index, values=logits: values[index])
            right += best == class_index()[path.parent.name]
        expected[f"{variant} top1"] = right / len(files)
    assert rows["robustness"]["scores"] == pytest.approx(expected)
    # the probe of the frozen network is another classifier, and still there
    pixels = centre_crop(Image.open(files[0]), 32)[None]
    classify = finetuned_classifier(encoder, out / FINETUNED)
    torch.testing.assert_close(classify(pixels), net(encoder.normalize(pixels)).detach())
    assert (out / "heads" / "classification.safetensors").is_file()


def test_a_fine_tuned_file_is_bound_to_its_student(tiny_vit, class_folders, tmp_path):
    config = settings(finetune={"epochs": 1, "batch_size": 6})
    finetune.evaluate(tiny_vit, class_folders, config, tmp_path)
    path = tmp_path / FINETUNED
    with pytest.raises(UserError, match="has 2 classes, not ImageNet's 1000"):
        finetuned_classifier(tiny_vit, path)
    other = teacher_encoder(tiny_vit.teacher.config, size=64, index=1, name="other")
    with pytest.raises(UserError, match="was fine-tuned with student_sha256 = .* run --tasks fine"):
        finetuned_classifier(other, path)
    larger = teacher_encoder(tiny_vit.teacher.config, size=96, name="larger")
    larger.weights_sha256 = tiny_vit.weights_sha256
    with pytest.raises(UserError, match="image_size = 64, but it is now 96"):
        finetuned_classifier(larger, path)
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its recorded sha256"):
        finetuned_classifier(tiny_vit, path)
