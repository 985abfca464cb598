"""The benchmark that distils a detector on drawn scenes, with a few steps of each part."""

import json

import pytest
import torch

from contract.detection import read_tokenizer, text_inputs
from distill.evaluate.boxes import open_boxes
from distill.scenes import CLASSES, write


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import tiny_detector

    return tiny_detector


@pytest.mark.slow
def test_it_runs_from_scenes_to_a_table_and_a_picture_and_computes_nothing_twice(
    benchmark, tmp_path, capsys
):
    counts = {
        "train": 4,
        "val": 2,
        "backbone-steps": 1,
        "detector-steps": 2,
        "steps": 1,
        "batch": 2,
    }
    options = [text for name, count in counts.items() for text in (f"--{name}", str(count))]
    output = tmp_path / "run"
    benchmark.main(["--output", str(output), *options])
    about = json.loads((output / "detection.json").read_text())
    assert list(about["scores"]) == ["teacher", "untrained", "distilled"]
    assert about["margin"] == benchmark.MARGIN and about["reached"] == (about["gain"] >= 0.2)
    assert (output / "detection.md").read_text().count("\n") == 5
    assert (output / "detection.png").stat().st_size > 10_000
    students = [output / name / "student.safetensors" for name in ("untrained", "distilled")]
    times = [path.stat().st_mtime_ns for path in students]
    capsys.readouterr()
    benchmark.main(["--output", str(output), *options])
    assert [path.stat().st_mtime_ns for path in students] == times
    assert json.loads((output / "detection.json").read_text())["scores"] == about["scores"]
    assert "step" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_loss_teaches_the_encoder_what_to_propose(benchmark, tmp_path):
    write(tmp_path / "scenes", 2, 1, benchmark.SIZE, 0)
    pictures = open_boxes(tmp_path / "scenes", "instances_train2017.json")
    words = benchmark.detector_vocabulary(CLASSES)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokens = text_inputs(CLASSES, read_tokenizer(tmp_path / "vocab.txt"))
    model = benchmark.new_detector(len(words)).train()
    targets = [benchmark._target(pictures, number, number == 1) for number in range(2)]
    pixels = torch.randn(2, 3, benchmark.SIZE, benchmark.SIZE)
    ids = torch.from_numpy(tokens.ids).expand(2, -1)
    head = model.model.encoder_output_bbox_embed.layers[-1].weight
    model(pixel_values=pixels, input_ids=ids, labels=targets).loss.backward()
    assert head.grad is None, "transformers' own loss reaches it: ours may go"
    benchmark._loss(model, pixels, tokens, targets).backward()
    assert head.grad.abs().max() > 0
    plain, mirrored = (benchmark._target(pictures, 1, flip)["boxes"] for flip in (False, True))
    torch.testing.assert_close(plain[:, 0], 1 - mirrored[:, 0])
    torch.testing.assert_close(plain[:, 1:], mirrored[:, 1:])
    assert ((plain >= 0) & (plain <= 1)).all()
