"""A teacher that is the image backbone of a GroundingDINO detector: three maps, no global
feature.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import DETECTOR, TeacherConfig
from distill.features import Features
from distill.models.grounding_dino import EXTRA, load_detector, read_config
from distill.models.hugging_face import import_transformers

MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 800
"""Of its image processor, whose 800 is the shorter side."""

_SHAPE = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "patch_size")
"""Settings of a Swin Transformer that its weights depend on."""

_HUB = {
    "IDEA-Research/grounding-dino-base": {
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
    }
}
"""Published detectors that differ from transformers' defaults, which are Swin-T's."""


class DetectorBackbone(nn.Module):
    """The Swin Transformer of a detector, whose maps C3 to C5 stand before its own projection."""

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin = swin

    def forward(self, pixels: Tensor) -> Features:
        """Features of normalised images [B, 3, H, W]: C3 as `patches`, C4 and C5 as `maps`."""
        maps = self.swin(pixels).feature_maps
        patches, *further = (level.permute(0, 2, 3, 1).contiguous() for level in maps)
        return Features(None, patches, tuple(further))


def build_detector_backbone(config: TeacherConfig, index: int) -> DetectorBackbone:
    """Build the backbone of teacher number `index` from its `checkpoint`, or random with `kwargs`
    of a Swin Transformer.

    Raises UserError as `load_detector`, and for keys that it does not take.
    """
    field = f"teachers.{index}.checkpoint"
    if config.block is not None:
        raise UserError(
            f"teacher '{config.label}': teachers.{index}.block is for timm models: remove it, as a "
            "detector is read at three stages"
        )
    if config.checkpoint:
        if config.kwargs:
            raise UserError(
                f"teacher '{config.label}': teachers.{index}.kwargs: its checkpoint's config.json "
                "says what it is: remove them"
            )
        # The rest of the detector goes: a teacher is its backbone alone.
        return DetectorBackbone(
            load_detector(config.checkpoint, field).model.backbone.conv_encoder.model
        )
    if config.pretrained:
        raise UserError(
            f"teacher '{config.label}': {field} is missing: name a folder with config.json and "
            f"model.safetensors, or a detector of the Hugging Face hub (random weights: "
            f"teachers.{index}.pretrained=false)"
        )
    transformers = import_transformers(f"teachers.{index}.name = {DETECTOR}", EXTRA)
    unknown = sorted(config.kwargs.keys() - transformers.SwinConfig().to_dict().keys())
    if unknown:
        raise UserError(
            f"teachers.{index}.kwargs.{unknown[0]} is not a setting of transformers' SwinConfig: "
            f"use {', '.join(_SHAPE)}"
        )
    try:
        swin = transformers.SwinConfig(**{**config.kwargs, "out_indices": [2, 3, 4]})
        for stage, heads in enumerate(swin.num_heads):
            if swin.embed_dim * 2**stage % heads:
                raise ValueError(
                    f"{heads} heads do not divide {swin.embed_dim * 2**stage} channels"
                )
        # Random weights are the same in every process, as of timm's networks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return DetectorBackbone(transformers.SwinBackbone(swin))
    except Exception as error:  # of a validator's many kinds
        reason = " ".join(str(error).split())
        raise UserError(f"teachers.{index}.kwargs = {config.kwargs}: {reason}") from error


def architecture(config: TeacherConfig, index: int) -> dict[str, Any]:
    """`kwargs` that build the backbone of a checkpoint without its weights. A hub is not asked:
    what is not known here counts as Swin-T, which most are.
    """
    if config.checkpoint is None:
        return config.kwargs
    if not Path(config.checkpoint).is_dir():
        return _HUB.get(config.checkpoint, {})
    swin = read_config(config.checkpoint, f"teachers.{index}.checkpoint").backbone_config
    return {name: getattr(swin, name) for name in _SHAPE}
