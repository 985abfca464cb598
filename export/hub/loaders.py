"""Load a model repository as others do, with timm and transformers alone.

`python loaders.py FOLDER WORK` reads WORK/request.json and the pictures in WORK, and writes what
each loader gives for them to WORK/answers.safetensors. Nothing of this package can be imported
meanwhile.
"""

import importlib.abc
import json
import sys
from pathlib import Path

_OURS = {"contract", "distill", "export", "serve", "triton_models"}


class _Refusing(importlib.abc.MetaPathFinder):
    """Imports nothing of this package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in _OURS:
            raise ModuleNotFoundError(f"the code of the repository imports {name}", name=name)


def main(folder: str, work: Path) -> None:
    """Write the answers of every loader that the request names."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    request = json.loads((work / "request.json").read_text())
    pixels = load_file(work / "pixels.safetensors")["pixels"]
    pictures = [Image.open(work / name) for name in request["pictures"]]
    answers = {}
    with torch.inference_mode():
        if request["timm"]:
            answers |= _timm(folder, pixels, pictures)
            answers |= _transformers(folder, pixels, pictures)
        answers |= _remote(folder, pixels, pictures)
    kept = {name: tensor.contiguous().clone() for name, tensor in answers.items()}
    save_file(kept, work / "answers.safetensors")


def _timm(folder, pixels, pictures) -> dict:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return {
        "timm.pixels": torch.stack([transform(picture) for picture in pictures]),
        "timm.output": model.forward_features(pixels),
        "timm.pooled": model(pixels),
    }


def _transformers(folder, pixels, pictures) -> dict:
    import torch
    from transformers import AutoImageProcessor, AutoModel, pipeline

    processor = AutoImageProcessor.from_pretrained(folder)
    result = AutoModel.from_pretrained(folder).eval()(pixels)
    extract = pipeline("image-feature-extraction", model=folder)
    answers = {
        "transformers.pixels": processor(pictures, return_tensors="pt")["pixel_values"],
        "transformers.output": result.last_hidden_state,
        "pipeline.output": torch.cat(
            [extract(picture, return_tensors=True) for picture in pictures]
        ),
    }
    if result.pooler_output is not None:
        answers["transformers.pooled"] = result.pooler_output
    return answers


def _remote(folder, pixels, pictures) -> dict:
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    result = model(pixels)
    answers = {
        "remote.pixels": processor(pictures, return_tensors="pt")["pixel_values"],
        "remote.backbone.summary": result.pooler_output,
        "remote.backbone.patches": result.patches,
        "remote.backbone.tokens": result.last_hidden_state,
    }
    if result.second is not None:
        answers["remote.backbone.second"] = result.second
    for number, map_ in enumerate(result.maps or ()):
        answers[f"remote.backbone.maps.{number}"] = map_
    for label, prediction in result.teachers.items():
        answers[f"remote.{label}.patches"] = prediction.patches
        if prediction.token is not None:
            answers[f"remote.{label}.token"] = prediction.token
        for number, map_ in enumerate(prediction.maps):
            answers[f"remote.{label}.maps.{number}"] = map_
    return answers


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refusing())
    main(sys.argv[1], Path(sys.argv[2]))
