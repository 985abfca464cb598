"""`python -m distill.attach`: what decoders may be, what is written, every mistake in one line."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contract.errors import UserError
from distill.attach import main
from distill.decoders.decoder import TeacherDecoder
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.datasets import open_pairs, read_depth, read_matched
from distill.evaluate.encoder import RunEncoder, teacher_encoder
from distill.evaluate.report import read_scores
from distill.heads import load_head
from distill.models.weights import write_tensors
from distill.runs import load_run
from export.graph import build_parts, open_student
from export.parity import reference
from export.to_onnx import export_part
from tests import decoder_parts
from tests.conftest import run_here

pytestmark = pytest.mark.slow
PARTS = "python:tests.decoder_parts:"


@pytest.fixture
def run(plain_run, tmp_path) -> Path:
    """A run of one teacher, `mae`, of width 32, to write into."""
    return shutil.copytree(plain_run, tmp_path / "run")


def attach(run: Path, *words: object, task: str = "segmentation", teacher: str = "mae"):
    return run_here(run, "--teacher", teacher, "--task", task, *words, command=main)


def with_decoder(name: str, *kwargs: str) -> tuple[str, ...]:
    return ("--decoder", f"{PARTS}{name}", *(("--kwargs", *kwargs) if kwargs else ()))


def decoded(run: Path, task: str, side: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """What an attached decoder gives of a random picture, and the features that it read."""
    head = load_head(run / "heads" / f"{task}.safetensors", trust_code=True)
    pixels = torch.randint(256, (1, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        features = RunEncoder(load_run(run), head.about["reads"])(pixels)
        return head.module(features.patches, features.summary), features.patches, features.summary


def test_what_is_written_rebuilds_the_decoder_by_name(run):
    done = attach(run, *with_decoder("segmenter", "width=32", "classes=3"), "--classes", "a,b,c")
    assert done.returncode == 0 and done.stderr == ""
    path = run / "heads" / "segmentation.safetensors"
    assert f"wrote     {path}" in done.stdout and "--trust-code" in done.stdout
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings, about = json.loads(metadata["settings"]), json.loads(metadata["about"])
    assert settings["decoder"] == f"{PARTS}segmenter" and settings["scale"] == "2"
    assert settings["kwargs"] == {"width": 32, "classes": 3}
    assert about["classes"] == ["a", "b", "c"] and about["patch_stride"] == 16
    assert about["student_sha256"] == load_run(run).sha256
    # the file's weights, whatever the function starts from
    answer, patches, _ = decoded(run, "segmentation")
    built = decoder_parts.segmenter(32, 3)
    state = load_file(path)
    built.load_state_dict({name.removeprefix("decoder."): t for name, t in state.items()})
    assert torch.equal(answer, built(patches.permute(0, 3, 1, 2)))


def test_a_decoder_of_patches_and_token_gets_both(run):
    done = attach(run, *with_decoder("Metres", "width=32"), "--reads", "both", task="depth")
    assert done.returncode == 0, done.stderr
    answer, patches, token = decoded(run, "depth")
    head = load_head(run / "heads" / "depth.safetensors", trust_code=True)
    assert answer.shape == (1, 4, 4) and head.about["unit"] == "metre"
    with torch.no_grad():
        direct = head.module.decoder(patches.permute(0, 3, 1, 2), token)
    torch.testing.assert_close(answer, direct)


def test_its_graph_is_exported_and_its_depth_scored(run, scenes, tmp_path):
    words = with_decoder("Metres", "width=32")
    assert attach(run, *words, "--reads", "both", task="depth").returncode == 0
    student = open_student(run, trust_code=True)
    parts = build_parts(student, 64, 64)
    part = next(p for p in parts if p.signature.graph == "depth")
    assert part.about == {"reads": "mae", "size": 64, "unit": "metre", "stride": 16, "grid": (4, 4)}
    export_part(part, student.stride, 4, tmp_path / "depth.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "depth.onnx")
    wanted = reference(student, parts, torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8))
    feeds = {port.name: wanted[port.name] for port in part.signature.inputs}
    np.testing.assert_allclose(session.run(None, feeds)[0], wanted["depth"], rtol=1e-4)

    words = ("--tasks", "depth", "depth.head=decoder", "dense.size=64", "--data", scenes)
    words += ("--output", tmp_path / "out")
    done = run_here(run, *words, "--features", "backbone", "--trust-code", command=evaluate)
    assert done.returncode == 2 and "reads 'mae', not 'backbone': use --features" in done.stderr
    words += ("--features", "mae", "--with-teachers", "--trust-code")
    done = run_here(run, *words, command=evaluate)
    assert done.returncode == 0, done.stderr
    rows = read_scores(tmp_path / "out" / "evaluation.json")
    scores = {name: row["depth"]["scores"]["rmse"] for name, row in rows.items()}
    pairs = open_pairs(scenes, "val", "depth")
    for name, encoder in (
        ("student mae", RunEncoder(load_run(run), "mae")),
        ("teacher mae (vit_tiny_patch16_224)", teacher_encoder(student.run.recipe.teachers[0], 64)),
    ):
        decoder, errors = student.heads[0].module, []
        for number in range(len(pairs)):
            image = np.asarray(read_matched(pairs, number).convert("RGB")).transpose(2, 0, 1)
            truth = read_depth(pairs, number, 1000, 10.0)
            with torch.no_grad():
                seen = encoder(torch.from_numpy(image.copy())[None])
                metres = decoder(seen.patches, seen.summary)[:, None]
            metres = F.interpolate(metres, truth.shape, mode="bilinear")[0, 0].numpy()
            valid = (truth > 1e-3) & (truth <= 10)
            difference = np.clip(metres, 1e-3, 10)[valid] - truth[valid]
            errors.append(np.sqrt((difference**2).mean()))
        assert scores[name] == pytest.approx(np.mean(errors), rel=1e-4)


def test_evaluation_needs_a_decoder_that_is_attached(run, scenes, tmp_path):
    words = ("--data", scenes, "--output", tmp_path / "out", "--tasks", "depth")
    words += ("depth.head=decoder", "--features", "mae")
    done = run_here(run, *words, command=evaluate)
    assert done.returncode == 2 and "depth.safetensors is missing: attach one with" in done.stderr
    done = run_here("resnet10t@random", *words[:-2], command=evaluate)
    assert done.returncode == 2 and "depth.head = decoder needs a run folder" in done.stderr


def test_a_decoder_of_one_grid_gets_that_grid(run):
    words = with_decoder("Placed", "width=32", "side=6")
    refused = attach(run, *words)
    assert refused.returncode == 2 and "failed on patches [2, 32, 4, 4]" in refused.stderr
    done = attach(run, *words, "--grid", 6)
    assert done.returncode == 0, done.stderr
    assert "runs on 4 patches a side alone" in done.stdout
    answer, _, _ = decoded(run, "segmentation")
    assert answer.shape == (1, 3, 6, 6)
    student = open_student(run, trust_code=True)
    part = next(p for p in build_parts(student, 64, 64) if p.signature.graph == "segmentation")
    assert part.about["grid"] == (6, 6) and part.about["stride"] == pytest.approx(64 / 6)
    for size in ((None, None), (96, 96)):
        with pytest.raises(UserError, match=r"runs on pictures of 64x64 alone: give --resolutions"):
            build_parts(student, *size)


def test_other_sizes_are_rounded_as_the_server_rounds_them():
    """A grid of 8/7 of the student's and an answer three times as fine."""
    built = nn.Upsample(scale_factor=3)
    settings = {"ratio": "8/7", "scale": "24/7", "resize": True, "side": 7}
    decoder = TeacherDecoder("python:a:b", {}, "patches", 5, None, built=built, **settings)
    for rows in range(3, 20):
        shape = decoder(torch.randn(1, rows, rows + 1, 5)).shape
        pixels = [16 * side for side in (rows, rows + 1)]
        stride = float(16 / Fraction(24, 7))
        assert shape[2:] == tuple(int(side / stride + 0.5) for side in pixels)


def test_the_teacher_s_grid_is_known_without_its_weights(small_bundle, tmp_path):
    run = shutil.copytree(small_bundle.parent / "run", tmp_path / "run")
    words = with_decoder("segmenter", "width=32")
    done = attach(run, *words, "--grid", "teacher", "--replace", teacher="dino")
    assert done.returncode == 0, done.stderr  # 56 pixels of patch 14 are 4 rows, as the student's
    decoder = load_head(run / "heads" / "segmentation.safetensors", trust_code=True).module
    assert decoder.ratio == 1 and decoder.scale == 2


def test_behind_an_interaction_and_at_any_size_it_sees_the_grid(small_bundle, tmp_path):
    """The head's own map has no rows there: convolutions of 3x3 need them back."""
    run = shutil.copytree(small_bundle.parent / "run", tmp_path / "run")
    done = attach(run, *with_decoder("segmenter", "width=32"), "--replace", teacher="dino")
    assert done.returncode == 0, done.stderr
    student = open_student(run, trust_code=True)
    whole = build_parts(student, None, None)
    part = next(p for p in whole if p.signature.graph == "segmentation")
    assert [port.name for port in part.signature.inputs] == ["spaces", "features"]
    assert part.signature.outputs[0].axes == ("batch", "segmentation_positions", 7)
    export_part(part, student.stride, 4, tmp_path / "decoder.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    for height, width in ((64, 64), (96, 48)):
        image = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
        wanted = reference(student, whole, image)
        feeds = {name: wanted[name] for name in ("spaces", "features")}
        (got,) = session.run(None, feeds)
        assert got.shape[1] == height // 8 * (width // 8)
        np.testing.assert_allclose(got, wanted["segmentation_logits"], atol=1e-4, rtol=1e-4)


def test_a_part_of_a_transformers_model_needs_no_folder_afterwards(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.1, min_depth=8, finegrained_output=False, num_labels=4, image_size=64
    )
    model = transformers.MobileNetV2ForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path / "deeplab")
    decoder = ("--decoder", f"hf:{tmp_path / 'deeplab'}:segmentation_head")
    done = attach(run, *decoder)
    assert done.returncode == 0 and "--trust-code" not in done.stdout, done.stderr
    wrong = attach(run, "--decoder", f"hf:{tmp_path / 'deeplab'}:head", "--replace")
    assert wrong.returncode == 2 and "has no part 'head': known: mob" in wrong.stderr
    shutil.rmtree(tmp_path / "deeplab")
    head = load_head(run / "heads" / "segmentation.safetensors")  # none of the user's code
    patches = torch.randn(1, 5, 4, 32)
    with torch.no_grad():
        direct = model.segmentation_head(patches.permute(0, 3, 1, 2))
    torch.testing.assert_close(head.module(patches), direct)


MISTAKES = [
    (("--decoder", f"{PARTS}segmenter"), {"task": "segmentatio"}, "did you mean 'segmentation'?"),
    (with_decoder("segmenter"), {"teacher": "dino"}, "has no such teacher: known: mae"),
    (("--decoder", "mine.pt"), {}, "use python:PACKAGE.MODULE:FUNCTION, hf:FOLDER:PART or"),
    (("--decoder", "python:tests"), {}, "is not of the form python:PACKAGE.MODULE:FUNCTION"),
    (("--decoder", "python:no_such.thing:make"), {}, "there is no module 'no_such' (install it"),
    (("--decoder", f"{PARTS}segmentre"), {}, "has no 'segmentre': did you mean 'segmenter'?"),
    (("--decoder", f"{PARTS}NUMBER"), {}, "is not a function but a value of type int"),
    (("--decoder", f"{PARTS}nothing"), {}, "returned None, not an nn.Module"),
    (("--decoder", f"{PARTS}broken"), {}, "raised FileNotFoundError (weights.pth is missing, "),
    (with_decoder("segmenter"), {}, "called with () raised TypeError"),
    (with_decoder("segmenter", "width"), {}, "--kwargs width: write key=value"),
    (
        with_decoder("segmenter", "width=48"),
        {},
        "failed on patches [2, 32, 4, 4] (the teacher's width is 32): RuntimeError",
    ),
    (
        with_decoder("segmenter", "width=32"),
        {"task": "depth"},
        "gives [2, 7, 8, 8] for a batch of 2; depth needs [B, H, W]",
    ),
    (with_decoder("pooled", "width=32"), {}, "needs [B, classes, H, W]"),
    (with_decoder("scores", "width=32", "classes=1"), {"task": "classification"}, "two or more"),
    (
        (*with_decoder("segmenter", "width=32"), "--reads", "token"),
        {},
        "segmentation needs patches",
    ),
    ((*with_decoder("segmenter", "width=32"), "--classes", "a,b"), {}, "has 2 names, but"),
    ((*with_decoder("segmenter", "width=32"), "--classes", "a,a"), {}, "it has 'a' twice"),
    ((*with_decoder("segmenter", "width=32"), "--unit", "metre"), {}, "segmentation has no unit"),
    ((*with_decoder("Metres", "width=32"), "--classes", "a,b"), {"task": "depth"}, "no classes"),
    ((*with_decoder("segmenter", "width=32"), "--grid", "0"), {}, "give student, teacher or a num"),
    ((*with_decoder("segmenter", "width=32"), "--weights", "no.pth"), {}, "no.pth: no such file"),
    (("--decoder", "classifier"), {}, "is for --task classification, not segmentation"),
    (("--decoder", "classifier", "--kwargs", "a=1"), {"task": "classification"}, "is for python:"),
    (("--decoder", "classifier"), {"task": "classification"}, "has no trained classifier"),
    (("--decoder", "hf:nowhere:head"), {}, "nowhere has no config.json: give a folder of"),
    (("--decoder", "hf:nowhere"), {}, "write hf:FOLDER:PART"),
]


@pytest.mark.parametrize(("words", "options", "message"), MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(run, words, options, message):
    done = attach(run, *words, **options)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (run / "heads").exists()


def test_weights_of_another_decoder_are_refused(run, tmp_path):
    save_file(decoder_parts.segmenter(32, 4).state_dict(), tmp_path / "other.safetensors")
    words = with_decoder("segmenter", "width=32")
    done = attach(run, *words, "--weights", tmp_path / "other.safetensors")
    assert done.returncode == 2 and "'2.bias' has shape [16], but the network" in done.stderr


def test_a_task_has_one_head_which_is_replaced_on_request(run):
    words = with_decoder("segmenter", "width=32")
    assert attach(run, *words).returncode == 0
    before = (run / "heads" / "segmentation.safetensors").read_bytes()
    refused = attach(run, *words)
    assert (
        refused.returncode == 2 and "a task has one head (--replace replaces it" in refused.stderr
    )
    assert (run / "heads" / "segmentation.safetensors").read_bytes() == before
    assert attach(run, *words, "--replace").returncode == 0


def test_code_is_imported_only_when_it_is_trusted(run, tmp_path):
    """What a stranger's run names would be called with what it says."""
    assert attach(run, *with_decoder("segmenter", "width=32")).returncode == 0
    path = run / "heads" / "segmentation.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["settings"])
    settings |= {"decoder": "python:os:mkdir", "kwargs": {"path": str(tmp_path / "evil")}}
    write_tensors(path, load_file(path), metadata | {"settings": json.dumps(settings)}, "")
    with pytest.raises(UserError, match="whose code is python:os:mkdir: add --trust-code"):
        load_head(path)
    assert not (tmp_path / "evil").exists()


def test_code_that_has_changed_is_noticed(run, monkeypatch):
    assert attach(run, *with_decoder("segmenter", "width=32")).returncode == 0
    path, made = run / "heads" / "segmentation.safetensors", decoder_parts.segmenter

    def other(**arguments: int) -> nn.Module:
        decoder = made(**arguments)
        decoder[1] = nn.GELU()
        return decoder

    monkeypatch.setattr(decoder_parts, "segmenter", other)
    with pytest.raises(UserError, match="gives other numbers than when it was attached"):
        load_head(path, trust_code=True)
    monkeypatch.setattr(decoder_parts, "segmenter", lambda **_: made(width=32, classes=5))
    with pytest.raises(UserError, match=r"does not fit its own settings \('decoder.2.bias'"):
        load_head(path, trust_code=True)
    monkeypatch.delattr(decoder_parts, "segmenter")
    with pytest.raises(UserError, match="segmentation.safetensors: python:.* has no 'segmenter'"):
        load_head(path, trust_code=True)
