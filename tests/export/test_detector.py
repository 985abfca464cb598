"""A detector in a bundle: graphs of gathers that agree with torch, what is recorded of it, and what
is refused.
"""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from contract.detection import WINDOW, read_tokenizer, text_inputs
from contract.errors import UserError
from contract.manifest import read_manifest
from contract.signature import Port, Signature
from distill.features import FeatureDims
from distill.models.grounding_dino import load_detector
from export.check import check
from export.detector import gathering, make_parts, open_detector
from export.detector_parity import judge
from export.modules import Part
from export.run import main as export
from serve.bundle import read_bundle
from tests.conftest import run_here

pytest.importorskip("transformers", reason="the optional extra [detection] is not installed")


def graph_of(bundle, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle / f"{name}.onnx", providers=["CPUExecutionProvider"])


def test_the_manifest_says_what_the_detector_reads(detection_bundle, tiny_detector):
    manifest = read_manifest(detection_bundle)
    detector = manifest.detector
    assert detector.teacher == "detector" and detector.source == tiny_detector.name
    assert detector.maps == ("detector_patches", "detector_s16", "detector_s32")
    assert {detector.vocabulary, detector.text.file, detector.boxes.file} <= set(manifest.files)
    shapes = {tensor.name: tensor.shape for tensor in detector.boxes.inputs}
    assert shapes["detector_patches"] == ("batch", 9 * 13, 32)
    assert shapes["detector_s32"] == ("batch", 3 * 4, 128)
    assert shapes["self_mask"] == ("batch", "text_tokens", "text_tokens")
    assert [tensor.shape[1:] for tensor in detector.boxes.outputs] == [(20, WINDOW), (20, 4)]
    assert detector.text.precision == detector.boxes.precision == "fp32"
    # clients of features do not see it
    assert not {"logits", "boxes", "text"} & {
        tensor.name for tensor in read_bundle(detection_bundle).outputs
    }


def test_both_graphs_agree_with_torch_and_hold_no_grid_sample(detection_bundle):
    manifest = read_manifest(detection_bundle)
    rows = [row for row in manifest.parity if row.graph in ("detector", "text_detector")]
    assert {(row.output, row.batch) for row in rows} == {
        (name, batch) for name in ("text", "logits", "boxes") for batch in (1, 2)
    }
    assert all(row.passed and row.max_abs < 1e-3 for row in rows), rows
    operators = Counter(
        node.op_type for node in onnx.load(detection_bundle / "detector.onnx").graph.node
    )
    # one for each of four levels in a layer of the encoder and two of the decoder
    assert operators["GridSample"] == 0 and operators["Gather"] >= 4 * 3


@pytest.mark.parametrize(
    ("distance", "noise", "fits"),
    [
        (0.9e-3, 0.0, True),
        (1.1e-3, 0.0, False),
        (2.9e-3, 1e-3, True),  # twice as far as torch is, and the tolerance
        (3.1e-3, 1e-3, False),
        (0.9e-2, 1.0, True),
        (1.2e-2, 1.0, False),  # where torch itself is useless
        (float("inf"), 1e-3, False),
        (float("nan"), 0.0, False),
        (float("inf"), float("inf"), False),
        (0.0, float("inf"), False),
        (0.0, float("nan"), False),
    ],
)
def test_a_graph_may_be_off_by_what_torch_is_up_to_a_limit(distance, noise, fits):
    assert (judge(distance, noise) == "") is fits


def test_what_is_traced_of_deformable_attention_is_what_transformers_computes():
    from transformers.models.grounding_dino import modeling_grounding_dino as modeling

    attention = modeling.MultiScaleDeformableAttention()
    grids = [(5, 7), (3, 4), (1, 1)]
    value = torch.randn(2, sum(rows * columns for rows, columns in grids), 4, 8)
    places = 1.6 * torch.rand(2, 11, 4, 3, 5, 2) - 0.3  # some outside
    inputs = (value, torch.tensor(grids), grids, None, places, torch.rand(2, 11, 4, 3, 5), 64)
    wanted = attention(*inputs)
    with gathering():
        assert (attention(*inputs) - wanted).abs().max() < 1e-5
    assert torch.equal(attention(*inputs), wanted), "and it is as before afterwards"


def test_scores_are_padded_as_transformers_pads_them():
    from transformers.models.grounding_dino import modeling_grounding_dino as modeling

    scoring = modeling.GroundingDinoContrastiveEmbedding(SimpleNamespace(max_text_len=WINDOW))
    for length in (5, WINDOW):
        text_mask = torch.rand(2, length) < 0.8
        inputs = torch.randn(2, 3, 8), torch.randn(2, length, 8), text_mask
        wanted = scoring(*inputs)
        with gathering():
            assert torch.equal(scoring(*inputs), wanted)


@torch.inference_mode()
def test_graphs_fed_the_detectors_own_maps_detect_as_it_does(detection_bundle, tiny_detector):
    """The whole of transformers' model, from pixels, against the two graphs on its maps."""
    model = load_detector(str(tiny_detector), "--detector")
    pixels = torch.randn(2, 3, 72, 104)  # whose maps are as large as the student's
    tokenizer = read_tokenizer(detection_bundle / "vocab.txt")
    prompt = text_inputs(["cat", "a traffic light"], tokenizer)
    masks = {
        name: np.repeat(value, 2, axis=0)
        for name, value in prompt._asdict().items()
        if name != "label_map"
    }
    wanted = model(pixel_values=pixels, input_ids=torch.from_numpy(masks["ids"]))
    (text,) = graph_of(detection_bundle, "text_detector").run(None, masks)
    maps = model.model.backbone.conv_encoder.model(pixels).feature_maps
    names = read_manifest(detection_bundle).detector.maps
    feeds = {
        name: level.flatten(2).transpose(1, 2).contiguous().numpy()
        for name, level in zip(names, maps, strict=True)
    }
    text_mask = np.ones_like(masks["ids"], dtype=bool)
    del masks["ids"]
    feeds |= masks | {"text": text, "text_mask": text_mask}
    logits, boxes = graph_of(detection_bundle, "detector").run(None, feeds)
    np.testing.assert_allclose(boxes, wanted.pred_boxes.numpy(), atol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-3)  # -inf where it has -inf


def test_check_knows_the_detector(detection_bundle, tmp_path, capsys):
    assert check(detection_bundle) == 0
    assert "text_detector" in (said := capsys.readouterr().out) and "vocab.txt" in said
    broken = shutil.copytree(detection_bundle, tmp_path / "bundle")
    (broken / "vocab.txt").write_text("cat\n")
    assert check(broken) == 1
    assert "isnotavocabularyofBERT's" in "".join(capsys.readouterr().out.split())  # folded


def test_a_manifest_whose_detector_is_something_else_is_refused(detection_bundle, tmp_path):
    manifest = read_manifest(detection_bundle)
    for change in ({"maps": ("image",)}, {"boxes": manifest.detector.text}):
        detector = manifest.detector.model_copy(update=change)
        other = manifest.model_copy(update={"detector": detector}).sealed()
        (tmp_path / "manifest.json").write_bytes(other.to_bytes())
        with pytest.raises(UserError, match="is not the detector that it should be"):
            read_manifest(tmp_path)


def student_of(dims: FeatureDims, strides=(8, 16, 32), role="detector") -> SimpleNamespace:
    """As much of a student as is looked at before anything is traced."""
    teacher = SimpleNamespace(label="gd", role=role, checkpoint="elsewhere")
    run = SimpleNamespace(recipe=SimpleNamespace(teachers=[teacher]), dims={"gd": dims})
    head = SimpleNamespace(strides=strides)
    return SimpleNamespace(run=run, deployment=SimpleNamespace(shipped={"gd": head}))


TINY = FeatureDims(None, 32, (64, 128))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (student_of(TINY, role="clip"), "no teacher of role detector .it has gd."),
        (student_of(FeatureDims(None, 192, (384, 768))), "have 32, 64, 128 channels, those of"),
        (student_of(TINY, strides=()), "on one grid, the detector needs three"),
    ],
)
def test_a_student_that_a_detector_does_not_fit_is_refused(tiny_detector, student, message):
    with pytest.raises(UserError, match=message) as error:
        open_detector(str(tiny_detector), student)
    assert "\n" not in str(error.value) and str(tiny_detector) in str(error.value)


def test_another_detector_than_the_teacher_is_warned_of(tiny_detector, tmp_path, caplog):
    student = student_of(TINY)
    assert open_detector(str(tiny_detector), student).teacher == "gd"
    assert "teacher 'gd' was elsewhere" in caplog.text
    caplog.clear()
    student.run.recipe.teachers[0].checkpoint = f"{tiny_detector}/"
    open_detector(str(tiny_detector), student)
    assert not caplog.text


@pytest.mark.parametrize(
    ("teacher", "crops", "size", "side"),
    [
        ({}, "auto", (784, 798), 798),
        ({}, "auto", (798, 798), None),
        ({"image_size": 400}, "auto", (224, 224), 406),
        ({}, 448, (224, 224), 448),
        ({"student_size": 560}, 448, (224, 560), 560),
        ({"batch_size": None}, "auto", (196, 224), 224),  # of all teachers' pictures
        ({"batch_size": None}, "auto", (224, 224), None),
    ],
)
def test_smaller_pictures_than_in_training_are_warned_of(
    tiny_detector, caplog, teacher, crops, size, side
):
    student = student_of(TINY)
    detector = open_detector(str(tiny_detector), student)
    known = {"student_size": "auto", "image_size": None, "batch_size": 32} | teacher
    student.run.recipe.teachers[0].__dict__.update(known)
    student.run.recipe.student = SimpleNamespace(image_size=224)
    student.run.recipe.data = SimpleNamespace(image_size=crops)
    student.stride = 14
    head = Signature("head_gd", (), (Port("gd_patches", "float32", ("batch", 1, 32), ""),) * 3)
    caplog.clear()
    make_parts(detector, student, [Part(None, head)], size)
    assert (f"add --resolutions {side}" in caplog.text) if side else not caplog.text


def spoil(folder, kind: str) -> None:
    vocabulary, config = folder / "vocab.txt", folder / "config.json"
    match kind:
        case "no vocabulary":
            vocabulary.unlink()
        case "other vocabulary":
            vocabulary.write_text("cat\ndog\n")
        case "longer vocabulary":
            vocabulary.write_text(vocabulary.read_text() + "\n".join(f"w{n}" for n in range(50)))
        case "other window":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"max_text_len": 128}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no vocabulary", "vocab.txt is missing"),
        ("other vocabulary", "not a vocabulary of BERT's"),
        ("longer vocabulary", "give the vocabulary it was trained with"),
        ("other window", "max_text_len = 128 is not supported"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused(tiny_detector, tmp_path, kind, message):
    folder = shutil.copytree(tiny_detector, tmp_path / "detector")
    spoil(folder, kind)
    with pytest.raises(UserError, match=message):
        open_detector(str(folder), student_of(TINY))


@pytest.mark.slow
def test_a_run_without_a_detector_teacher_is_told_in_one_line(plain_run, tiny_detector, tmp_path):
    words = ("--output", tmp_path / "bundle", "--detector", tiny_detector)
    done = run_here(plain_run, *words, command=export)
    assert done.returncode == 2 and not (tmp_path / "bundle").exists()
    (line,) = done.stderr.strip().splitlines()
    assert "the run has no teacher of role detector (it has mae)" in line
    done = run_here(plain_run, *words, "--resolutions", 64, 96, command=export)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "its graphs take pictures of one size" in line


@pytest.mark.long
def test_tensorrt_rtx_builds_the_detector(detection_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")
    from contract.engine_record import EngineOptions, Profile
    from export.tensorrt.build import build_engine

    sizes = {"min": (1, 4), "opt": (2, 16), "max": (3, WINDOW)}
    shapes = {
        tensor.name: {
            which: tuple(
                {"batch": batch, "text_tokens": tokens}.get(axis, axis) for axis in tensor.shape
            )
            for which, (batch, tokens) in sizes.items()
        }
        for tensor in read_manifest(detection_bundle).detector.boxes.inputs
    }
    options = EngineOptions(
        flavour="tensorrt-rtx", compute_capabilities=("8.9",), optimization_level=0, tf32=False
    )
    graph, engine = detection_bundle / "detector.onnx", tmp_path / "detector.engine"
    record = build_engine(graph, engine, [Profile(shapes=shapes)], options)
    assert engine.stat().st_size > 1_000_000 and record.compute_capabilities == ("8.9",)
    assert {tensor.name for tensor in record.inputs} == set(shapes)
