"""A teacher's own decoder on what a student predicts of that teacher, from its training on the
teacher's features alone to the server's answer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from yaml import safe_dump

from contract.dense import class_map
from contract.manifest import read_manifest
from distill.attach import main as attach
from distill.data.pictures import PackagedPhotos
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.datasets import open_pairs, read_mask, read_matched
from distill.evaluate.encoder import RunEncoder, teacher_encoder
from distill.evaluate.report import read_scores
from distill.heads import load_head
from distill.methods.losses import Prediction
from distill.runs import load_run
from distill.scenes import MASK_NAMES
from export.run import main as export
from tests.conftest import need_tritonserver, run_here, small_recipe
from tests.decoder_parts import segmenter

pytestmark = pytest.mark.slow

AGREEMENT = 0.85
"""Least share of pixels, of scenes that neither has seen, to which the decoder gives one class
whether it reads the teacher's features or those that a trained student predicts.
"""

SIZE = 64


def pictures(scenes: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes [n, 3, 64, 64] and their labels [n, 64, 64]."""
    pairs = open_pairs(scenes, split, "masks")
    images = [np.asarray(read_matched(pairs, n).convert("RGB")) for n in range(len(pairs))]
    masks = [read_mask(pairs, n, False, len(MASK_NAMES), 255) for n in range(len(pairs))]
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack(masks)).long(),
    )


@pytest.fixture(scope="module")
def folder(expensive, scenes, made_once) -> Path:
    """A student of one teacher, trained on scenes, and that teacher's decoder, attached."""

    def make(folder: Path) -> None:
        recipe = small_recipe(
            scenes / "dense" / "train" / "images",
            method="plain",
            student={"drop_path": 0.0},
            train={"steps": 250, "batch_size": 16, "lr": 3e-3, "log_every": 50},
        )
        recipe["teachers"] = recipe["teachers"][1:2]
        (folder / "recipe.yaml").write_text(safe_dump(recipe))
        done = run_here(folder / "recipe.yaml", "--output", folder / "run")
        assert done.returncode == 0, done.stderr
        run = load_run(folder / "run")
        teacher = teacher_encoder(run.recipe.teachers[0], SIZE)
        decoder = train_decoder(teacher, *pictures(scenes, "train"))
        save_file(decoder.state_dict(), folder / "decoder.safetensors")
        done = run_here(*attach_words(folder), command=attach)
        assert done.returncode == 0, done.stderr

    return made_once("attached", make)


def attach_words(folder: Path) -> tuple[object, ...]:
    words = ("--teacher", "mae", "--task", "segmentation", "--classes", ",".join(MASK_NAMES))
    words += ("--decoder", "python:tests.decoder_parts:segmenter", "--kwargs", "width=32")
    return (folder / "run", *words, "--weights", folder / "decoder.safetensors")


def train_decoder(teacher, images, masks) -> torch.nn.Module:
    """A decoder that has seen nothing but the teacher's features."""
    torch.manual_seed(0)
    decoder = segmenter(32, len(MASK_NAMES))
    with torch.no_grad():
        features = teacher(images).patches.permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(150):
        logits = F.interpolate(decoder(features), size=SIZE, mode="bilinear")
        loss = F.cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def opened(folder: Path):
    """The run, its decoder, and the encoders of its teacher and of what the student predicts."""
    run = load_run(folder / "run")
    decoder = load_head(folder / "run" / "heads" / "segmentation.safetensors", run.sha256, True)
    return run, decoder, teacher_encoder(run.recipe.teachers[0], SIZE), RunEncoder(run, "mae")


@torch.no_grad()
def test_a_trained_student_gives_the_map_of_the_teacher(folder, scenes):
    _, decoder, teacher, student = opened(folder)
    images, _ = pictures(scenes, "val")
    taught, predicted = (
        F.interpolate(decoder.module(net(images).patches), size=SIZE, mode="bilinear").argmax(1)
        for net in (teacher, student)
    )
    commonest = taught.flatten().bincount().max() / taught.numel()
    assert (taught == predicted).float().mean() >= AGREEMENT > commonest + 0.2


@torch.no_grad()
def test_a_student_that_is_right_gives_exactly_the_map_of_the_teacher(folder, scenes):
    """By way of the normalised features that it would predict, and of the fitted length."""
    run, decoder, teacher, _ = opened(folder)
    normalizer = run.method.deploy().shipped["mae"].normalizer
    features = teacher(pictures(scenes, "val")[0])
    for length in (1.0, 0.25):
        normalizer.lengths.patches.fill_(length)
        right = normalizer(features)
        restored = normalizer.restore(Prediction(None, right.patches / length, None))
        torch.testing.assert_close(
            decoder.module(restored.patches), decoder.module(features.patches), atol=1e-4, rtol=1e-4
        )
    built = segmenter(32, len(MASK_NAMES))
    built.load_state_dict(load_file(folder / "decoder.safetensors"))
    whole = built.eval()(features.patches.permute(0, 3, 1, 2))
    assert torch.equal(decoder.module(features.patches), whole)


def test_evaluation_scores_it_beside_the_teacher_s_own_features(folder, scenes, tmp_path):
    words = ("--features", "mae", "--with-teachers", "--tasks", "segmentation", "dense.size=64")
    words += ("segmentation.head=decoder", "--data", scenes, "--output", tmp_path)
    refused = run_here(folder / "run", *words, command=evaluate)
    assert refused.returncode == 2 and "add --trust-code" in refused.stderr
    done = run_here(folder / "run", *words, "--trust-code", command=evaluate)
    assert done.returncode == 0, done.stderr
    rows = read_scores(tmp_path / "evaluation.json")
    scores = {name: row["segmentation"]["scores"] for name, row in rows.items()}
    student, teacher = scores["student mae"], scores["teacher mae (vit_tiny_patch16_224)"]
    assert teacher["pixel_accuracy"] > 0.6
    assert student["pixel_accuracy"] >= teacher["pixel_accuracy"] - (1 - AGREEMENT)
    # the same by hand
    _, decoder, _, net = opened(folder)
    images, masks = pictures(scenes, "val")
    with torch.no_grad():
        logits = decoder.module(net(images).patches)
    right = F.interpolate(logits, size=SIZE, mode="bilinear").argmax(1) == masks
    assert student["pixel_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    # training a head would replace it
    words = ("--tasks", "segmentation", "--data", scenes, "--output", tmp_path)
    refused = run_here(folder / "run", *words, command=evaluate)
    assert refused.returncode == 2 and "which --tasks segmentation would replace" in refused.stderr


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("decoder") / "bundle"
    words = ("--output", output, "--max-batch", 4)
    refused = run_here(folder / "run", *words, command=export)
    assert refused.returncode == 2 and "add --trust-code" in refused.stderr
    done = run_here(folder / "run", *words, "--trust-code", command=export)
    assert done.returncode == 0, done.stderr
    return output


def test_its_bundle_agrees_with_torch_and_has_no_code(bundle):
    manifest = read_manifest(bundle)
    graph = manifest.graph("segmentation")
    assert graph.about == {
        "reads": "mae",
        "size": SIZE,
        "classes": list(MASK_NAMES),
        "stride": 8,
        "grid": [8, 8],
    }
    (port,) = graph.outputs
    assert (port.shape, port.meaning) == (
        ("batch", 64, 7),
        "a score per cell of 8 pixels and class, row-major",
    )
    rows = [row for row in manifest.parity if row.output == "segmentation_logits"]
    assert {row.graph for row in rows} == {"segmentation", "fused"}
    assert all(row.passed and row.position_cosine > 0.999 for row in rows)
    names = b"".join(path.read_bytes() for path in bundle.rglob("*") if path.is_file())
    assert b"decoder_parts" not in names


def test_triton_answers_as_torch_does(folder, bundle, tmp_path):
    need_tritonserver()
    from serve.bundle import read_bundle
    from serve.client import FeatureClient
    from serve.client.tasks.maps import predict_map
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    photos = PackagedPhotos()
    images = [np.asarray(photos.load(n).convert("RGB").resize((SIZE, SIZE))) for n in range(3)]
    _, decoder, _, student = opened(folder)
    with torch.no_grad():
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        logits = decoder.module(student(pixels).patches)
    make_repository(read_bundle(bundle), tmp_path / "models", Settings(fused=False, encoded=False))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    server = Server(
        find_tritonserver(None, tmp_path), tmp_path / "models", options, lambda line: None
    )
    with server, FeatureClient(server.grpc) as client:
        answer = client.features(images, outputs=["segmentation_logits"])
        there = predict_map(client, "segmentation", images)
    flat = logits.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(answer["segmentation_logits"], flat, atol=1e-3, rtol=1e-3)
    here = class_map(flat, SIZE, SIZE, 8)
    assert (there.values == here).mean() > 0.999 and there.classes == tuple(MASK_NAMES)
