"""Options of exports, benchmarks and class embeddings: a Python caller gets the command line's
defaults and one-line errors.
"""

from pathlib import Path

import pytest

from contract.engine_record import EngineOptions
from contract.errors import UserError
from export.bench.options import BenchOptions
from export.bundle import export_bundle
from export.options import PACKAGED, ExportOptions
from export.text.options import TextOptions


def options(**values: object) -> ExportOptions:
    return ExportOptions(**{"run": "runs/a", "output": "bundles/a"} | values)


def refused(call, *arguments: object, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_batch": 0}, "--max-batch 0: give 1 or more"),
        ({"max_batch": "many"}, "--max-batch: Input should be a valid integer"),
        ({"precision": "fp61"}, "--precision: Input should be 'fp32', 'fp16', 'bf16' or 'int8'"),
        ({"formats": "onnx,tensort"}, "--formats tensort: known are onnx, tensorrt, tensorrt-rtx"),
        ({"precision": "int8"}, "--precision int8 needs pictures to calibrate on"),
        ({"calibration_images": 64}, "--calibration-images is for --precision int8"),
        ({"workspace": 1.0}, "--workspace is for TensorRT"),
        ({"images": "nowhere"}, "--images nowhere: no such folder"),
        ({"images": __file__}, "is a file: give the folder it is in"),
        ({"presicion": "fp16"}, "--presicion: Extra inputs are not permitted"),
        ({"view": "crop"}, "--view: view 'crop': choose squash, centre-crop"),
        ({"run": None}, "--run: Input is not a valid path"),
    ],
    ids=str,
)
def test_wrong_values_are_one_line_in_the_words_of_the_command_line(values, message):
    assert message in refused(options, **values)


def test_values_are_taken_as_a_python_caller_writes_them(tmp_path):
    chosen = options(resolutions=[224, "448x336"], formats="onnx, tensorrt-rtx,onnx")
    assert chosen.resolutions == ("224", "448x336")
    assert chosen.formats == ("onnx", "tensorrt-rtx")
    assert options(formats=["onnx"]) == options()
    int8 = options(precision="int8", calibration=PACKAGED)
    assert int8.calibration_folder is None and int8.calibration_images == 64
    folder = options(precision="int8", calibration=tmp_path, images=str(tmp_path))
    assert folder.calibration_folder == folder.images == tmp_path
    assert set(folder.inputs) == {"RUN", "--images", "--calibration"}
    assert folder.inputs["RUN"] == Path("runs/a")


def test_every_tensorrt_flavour_has_the_builders_options():
    gpus = {"compute_capability": ("8.6", "8.9"), "workspace": 2.0, "refit": True}
    full, rtx = options(formats="onnx,tensorrt,tensorrt-rtx", **gpus).engines()
    common = {"workspace_gib": 2, "refit": True, "tf32": False}
    assert full == EngineOptions(flavour="tensorrt", **common)
    assert rtx == EngineOptions(
        flavour="tensorrt-rtx", compute_capabilities=("8.6", "8.9"), **common
    )
    assert options(formats="tensorrt", precision="fp16").engines()[0].tf32, "float32 alone is exact"
    assert options().engines() == []


def test_a_bundle_that_must_stay_is_refused_before_any_work(small_bundle):
    run = small_bundle.parent / "run"
    message = refused(export_bundle, ExportOptions(run=run, output=small_bundle))
    assert "already holds files: add --force to replace it" in message
    message = refused(export_bundle, ExportOptions(run=run, output=run, force=True))
    assert "which is read" in message


def test_options_of_benchmarks_and_texts_are_one_line_too():
    assert refused(BenchOptions, bundles=["b"], batches=[4, 0]) == "--batches 0: give 1 or more"
    assert "--devices.0: Input should be 'cpu' or 'cuda'" in refused(
        BenchOptions, bundles=["b"], devices=["tpu"]
    )
    assert "--bundles" in refused(BenchOptions, bundles=[])
    clip = {"output": "b", "labels": "l.txt", "model": "ViT-B-16", "pretrained": "random"}
    assert refused(TextOptions, **clip | {"labels": None}).startswith("--labels is required")
    assert refused(TextOptions, **clip | {"run": "r"}).startswith("--classifier is required")
    assert "--batch-size 0" in refused(TextOptions, **clip, batch_size=0)
    assert "--templates is for a CLIP" in refused(
        TextOptions, output="b", labels="l", classifier="cls", run="r", templates="t"
    )
