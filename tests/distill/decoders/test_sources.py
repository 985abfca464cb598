"""A part of a transformers model as a decoder: what its folder may say, and what it may not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from contract.errors import UserError
from distill.decoders.decoder import build_decoder
from distill.decoders.sources import open_source

SMALL = {"depth_multiplier": 0.1, "min_depth": 8, "finegrained_output": False, "num_labels": 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A DeepLab of random weights, as `save_pretrained` writes it."""
    config = transformers.MobileNetV2Config(**SMALL, image_size=64)
    transformers.MobileNetV2ForSemanticSegmentation(config).save_pretrained(tmp_path / "deeplab")
    return tmp_path / "deeplab"


def changed(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def opened(folder: Path):
    return open_source(f"hf:{folder}:segmentation_head", (), None)


def test_weights_of_half_precision_are_read_as_float32(folder):
    file = folder / "model.safetensors"
    state = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    changed(folder, dtype="float16")
    source = opened(folder)
    rebuilt = build_decoder(source.reference, json.loads(json.dumps(source.kwargs)))
    for module in (source.module, rebuilt):
        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
    for name, tensor in source.module.state_dict().items():
        assert torch.equal(tensor, state[f"segmentation_head.{name}"].to(tensor.dtype))


def remote(folder: Path) -> None:
    (folder / "theirs.py").write_text("raise SystemExit('their code runs')")
    changed(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.Theirs"})


def pickled(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "kernels": (
        lambda folder: changed(folder, attn_implementation="someone/kernels"),
        "its config.json asks for attention code of a hub (someone/kernels): set",
    ),
    "remote": (remote, "its code is not run: give the decoder as python:"),
    "pickled": (pickled, "save the model again with transformers' save_pretrained"),
    "damaged": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"),
        "cannot be loaded (",
    ),
    "function": (lambda folder: changed(folder, architectures=["pipeline"]), "no model 'pipeline'"),
    "tokenizer": (lambda folder: changed(folder, architectures=["BertTokenizer"]), "has no model "),
    "number": (lambda folder: changed(folder, architectures=[3]), "has no model '3'"),
    "none": (lambda folder: changed(folder, architectures=None), "has no model 'none'"),
    "width": (lambda folder: changed(folder, depth_multiplier="wide"), "cannot be loaded ("),
    "other": (lambda folder: changed(folder, architectures=["ViTModel"]), "cannot be loaded ("),
    "json": (lambda folder: (folder / "config.json").write_text("[1]"), "cannot be loaded ("),
}


@pytest.mark.parametrize("name", WRONG)
def test_folders_that_are_wrong_or_name_code_are_one_line(folder, name):
    change, words = WRONG[name]
    change(folder)
    with pytest.raises(UserError) as error:
        opened(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"--decoder hf:{folder}:segmentation_head")


@pytest.mark.parametrize(
    ("reference", "changes", "words"),
    [
        ("MobileNetV2ForSemanticSegmentation:segmentation_head", {"model_type": 3}, "cannot be lo"),
        ("MobileNetV2ForSemanticSegmentation:nothing", {}, "cannot be loaded ("),
        ("pipeline:head", {}, "has no model 'pipeline'"),
        ("ViTModel:layers", {"attn_implementation": "someone/kernels"}, "code of a hub"),
        ("ViTModel:layers", {"experts_implementation": "someone/kernels"}, "experts code of a hub"),
    ],
)
def test_what_a_head_s_file_says_is_one_line_too(reference, changes, words):
    config = {"model_type": "mobilenet_v2", **SMALL} | changes
    with pytest.raises(UserError) as error:
        build_decoder(f"transformers:{reference}", {"config": config})
    assert words in str(error.value) and "\n" not in str(error.value)
