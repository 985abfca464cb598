"""Teachers of transformers: `hf:OWNER/NAME` or `hf:FOLDER`, whatever `AutoModel` makes of it.

What is read follows the table in `reading.py`: the summary is what its authors use, and the patches
have been through the final norm.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract.errors import UserError
from distill.config import TeacherConfig
from distill.features import Features
from distill.fields import source_of
from distill.models.hub import quiet_hub
from distill.models.hugging_face import (
    WEIGHTS_ONLY,
    attempt,
    import_transformers,
    refuse_kernels,
)
from distill.models.user_code import REMOTE, network_sha256
from distill.teachers.foreign import ForeignNet, as_features

_LOADING = (REMOTE, "revision", "subfolder")
"""Keys of `kwargs` for the loader; others change the configuration."""

_OUTSIDE = {
    "altclip_vision_model": "post_layernorm",
    "beit": "pooler.layernorm",
    "chinese_clip_vision_model": "post_layernorm",
    "clip_vision_model": "post_layernorm",
    "clipseg_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
    "data2vec-vision": "pooler.layernorm",
    "kosmos_2_vision_model": "model.post_layernorm",
    "metaclip_2_vision_model": "post_layernorm",
    "mlcd_vision_model": "post_layernorm",
}
"""Kinds whose final norm is behind their pooling, and its name: `last_hidden_state` lacks it. BEiT
and data2vec have none there where they do not pool the mean (`use_mean_pooling: false`).
"""

_POOLERS = {"data2vec-vision": {"add_pooling_layer": True}}
"""What `AutoModel` is told of kinds that it builds without their pooler, whose norm that is."""

_OWN = {"transformers_version", "dtype", "architectures"}
"""Keys of a configuration that features do not depend on."""


class TransformersNet(ForeignNet):
    """A vision network of transformers, or the vision tower of a model of pictures and text.

    `projection` is the one into the space shared with text, for role clip.
    """

    def __init__(self, net: nn.Module, projection: nn.Module | None, whose: str) -> None:
        super().__init__(net, whose)
        self.projection = projection
        config = net.config
        self.patch = _side(getattr(config, "patch_size", None))
        self.size = _side(getattr(config, "image_size", None))
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
        self.registers = getattr(config, "num_register_tokens", 0) or 0
        outside = _OUTSIDE.get(config.model_type)
        self.norm = _part(net, outside) if outside else None
        # a dense layer behind the class token was trained for something else, or not at all
        self.pools = not hasattr(getattr(net, "pooler", None), "dense")

    def forward(self, pixels: Tensor) -> Features:
        """Features of normalised images [B, 3, H, W]; raises UserError where they have no grid."""
        output = self.net(pixel_values=pixels, **self._options(pixels))
        state = getattr(output, "last_hidden_state", None)
        if not isinstance(state, Tensor) or state.ndim not in (3, 4):
            raise UserError(f"{self.whose}: returns no last_hidden_state of tokens or maps")
        if state.ndim == 4:
            prefix, patches = 0, self._channels_last(state, *pixels.shape[-2:])
        else:
            prefix, grid = self._grid(state.shape[1], pixels.shape[-2], pixels.shape[-1])
            patches = state[:, prefix:].unflatten(1, grid)
        pooled = getattr(output, "pooler_output", None)
        if self.projection is not None:
            summary = self.projection(pooled)
        elif self.pools and pooled is not None:
            summary = pooled.flatten(1)
        elif prefix > self.registers:
            summary = state[:, 0]
        else:
            summary = patches.mean(dim=(1, 2))
        if self.norm is not None:
            patches = self.norm(patches)
        return as_features(Features(summary, patches), len(pixels), self.whose)

    def _options(self, pixels: Tensor) -> dict[str, bool]:
        other = self.size is not None and tuple(pixels.shape[-2:]) != (self.size, self.size)
        return {"interpolate_pos_encoding": True} if other and self.interpolates else {}

    def _channels_last(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Maps [B, C, h, w], as nearly all of transformers' are, as [B, h, w, C]; raises UserError
        where the last two sizes are not of a picture's shape (SAM 2's have channels last).
        """
        h, w = maps.shape[2:]
        if abs(w * height / h - width) > height / h:  # more than a cell
            raise UserError(
                f"{self.whose}: gives {list(maps.shape)} for pictures of {height} x {width} px, "
                "not maps [B, C, h, w]: choose another network"
            )
        return maps.permute(0, 2, 3, 1)

    def _grid(self, count: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """Tokens before the patches, and the (h, w) of these; raises UserError where `count` tokens
        are no grid.
        """
        strides = [self.patch] if self.patch else []
        depths = getattr(self.net.config, "depths", None)
        if self.patch and depths:  # stages that halve the grid
            strides.append(self.patch * 2 ** (len(depths) - 1))
        if not self.patch:
            strides = [2**power for power in range(2, 7)]
        for stride in strides:
            grid = -(-height // stride), -(-width // stride)
            prefix = count - grid[0] * grid[1]
            # none, a class token, or that and a distillation token
            if 0 <= prefix - self.registers <= 2:
                return prefix, grid
        raise UserError(
            f"{self.whose}: gives {count} tokens for pictures of {height} x {width} px, which are "
            "no grid behind class and register tokens: choose another network"
        )

    def inside(self) -> dict[str, Any]:
        """Its configuration, and the code of its repository."""
        values = self.net.config.to_diff_dict()
        kept = {k: v for k, v in values.items() if k not in _OWN and not k.startswith("_")}
        own = {"network": _plain(kept), "projected": self.projection is not None}
        return own | super().inside()


def _part(net: nn.Module, path: str) -> nn.Module | None:
    """A part of a network by its dotted name; None where this configuration has none."""
    part: nn.Module | None = net
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _plain(value: Any) -> Any:
    """A configuration's values as JSON has them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _side(size: object) -> int | None:
    """A side in pixels of a configuration's number, pair or mapping; None for what is not
    square.
    """
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if type(size) is int and size > 0 else None


def build_hf_teacher(config: TeacherConfig, index: int) -> tuple[ForeignNet, tuple, int | None]:
    """A network of transformers with its weights, the (size, mean, std) of its image processor,
    None for each that it does not state, and its patch size.

    Raises UserError without transformers, for a folder or repository that is missing or cannot be
    reached, and for weights that do not fit. Pickles are never read, and no code of a repository is
    run unless `kwargs` has `trust_remote_code: true`.
    """
    key = f"teachers.{index}"
    whose = f"teacher '{config.label}': {key}.name = {config.name}"
    transformers = import_transformers(whose)
    if config.checkpoint:
        raise UserError(
            f"teacher '{config.label}': {key}.checkpoint is not for {config.name}, which has its "
            f"weights beside its config.json: remove it, or set {key}.name=hf:FOLDER"
        )
    place, options = _place(config, whose)
    settings = {k: v for k, v in config.kwargs.items() if k not in _LOADING}
    remedies = (
        "give a downloaded copy as hf:FOLDER (config.json, model.safetensors, "
        f"preprocessor_config.json), or timm's architecture and {key}.checkpoint",
        f"it needs code of its repository: read that, and set {key}.kwargs={{{REMOTE}: true}} "
        "if you trust it",
    )
    described = attempt(
        whose, lambda: transformers.AutoConfig.from_pretrained(place, **options), *remedies
    )
    if described.model_type == "timm_wrapper":
        prefix = "local-dir" if Path(place).is_dir() else "hf-hub"
        raise UserError(f"{whose}: its config.json is timm's: set {key}.name={prefix}:{place}")
    _configure(described, settings, whose, key)
    kind = _class_of(transformers, described)
    if config.pretrained:
        net = attempt(whose, lambda: _load(kind, place, described, options, whose), *remedies)
    else:
        with torch.random.fork_rng(devices=[]):  # the same in every process
            torch.manual_seed(index)
            net = attempt(whose, lambda: _build(kind, described, options), *remedies)
    projection = getattr(net, "visual_projection", None)
    tower = getattr(net, "vision_model", net)
    if not hasattr(tower, "config") or getattr(tower, "main_input_name", "") != "pixel_values":
        raise UserError(f"{whose}: {type(net).__name__} does not read pictures alone")
    if config.role == "clip" and projection is None and "siglip" not in tower.config.model_type:
        raise UserError(
            f"{whose}: {type(net).__name__} has no projection into the space shared with text: set "
            f"{key}.role=classification, or give the whole CLIP"
        )
    network = TransformersNet(tower, projection if config.role == "clip" else None, whose)
    if options[REMOTE]:
        network.source_sha256 = network_sha256(tower)
    data = _processor(transformers, place, options, whose)
    return (
        network,
        (data[0] or network.size, *data[1:]),
        None if hasattr(tower.config, "depths") else network.patch,
    )


def _place(config: TeacherConfig, whose: str) -> tuple[str, dict[str, Any]]:
    """The folder, or the hub's repository, and how it is loaded."""
    place = source_of(config.name)[1]
    # never asked for, as transformers would ask the terminal
    options: dict[str, Any] = {REMOTE: False}
    options |= {k: v for k, v in config.kwargs.items() if k in _LOADING}
    if Path(place).is_dir():
        return place, options | {"local_files_only": True}
    repository, _, revision = place.partition("@")
    if repository.count("/") > 1 or repository[:1] in "./~":
        raise UserError(f"{whose}: no such folder")
    return repository, options | ({"revision": revision} if revision else {})


def _configure(described: Any, settings: dict[str, Any], whose: str, key: str) -> None:
    """Set keys of a configuration as the recipe has them."""
    known = described.to_dict()
    for name, value in settings.items():
        if name == "attn_implementation" and "/" not in str(value):
            described._attn_implementation = value
        elif name in known:
            setattr(described, name, value)
        else:
            raise UserError(
                f"{whose}: {key}.kwargs.{name} is not a key of its config.json, nor one of "
                f"{', '.join(_LOADING)}"
            )
    refuse_kernels(described, whose, f"set {key}.kwargs={{attn_implementation: sdpa}}")


def _class_of(transformers: Any, described: Any) -> Any:
    """`AutoModel`, or the class with its projection that a vision tower was saved as."""
    for name in getattr(described, "architectures", None) or ():
        if name.endswith("VisionModelWithProjection") and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _build(kind: Any, described: Any, options: dict[str, Any]) -> nn.Module:
    """A network of random weights."""
    pooler = _POOLERS.get(described.model_type, {})
    if hasattr(kind, "_from_config"):
        return kind._from_config(described, **pooler)
    return kind.from_config(described, trust_remote_code=options[REMOTE], **pooler)


def _load(kind: Any, place: str, described: Any, options: dict[str, Any], whose: str) -> nn.Module:
    net, report = kind.from_pretrained(
        place,
        config=described,
        output_loading_info=True,
        **WEIGHTS_ONLY,
        **options,
        **_POOLERS.get(described.model_type, {}),
    )
    # a pooler of that name is not read
    missing = sorted(n for n in report["missing_keys"] if not n.startswith("pooler.dense"))
    if missing:
        raise UserError(
            f"{whose}: {len(missing)} tensors are missing from its weights, the first is "
            f"'{missing[0]}': they belong to another config.json"
        )
    return net


def _processor(transformers: Any, place: str, options: dict[str, Any], whose: str) -> tuple:
    """(size, mean, std) of an image processor, None for what it does not state."""
    kept = {k: v for k, v in options.items() if k != REMOTE}
    try:
        with quiet_hub():
            values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(place, **kept)
    except (OSError, ValueError):  # missing; the recipe may state them
        return None, None, None
    factor = values.get("rescale_factor", 1 / 255)
    if values.get("do_rescale", True) and abs(factor * 255 - 1) > 1e-3:
        raise UserError(
            f"{whose}: its preprocessor_config.json scales by {factor}, not by 1/255: such "
            "networks are not supported"
        )
    if values.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = (_three(values.get(f"image_{name}")) for name in ("mean", "std"))
    crop = values.get("crop_size") if values.get("do_center_crop") else None
    size = crop or values.get("size")
    if isinstance(size, dict):
        sides = {size.get(name) for name in ("height", "width") if name in size}
        size = sides.pop() if len(sides) == 1 else size.get("shortest_edge")
    return _side(size), mean, std


def _three(value: object) -> tuple[float, ...] | None:
    """Three numbers of a list, or of one number."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = all(isinstance(v, int | float) for v in values)
    return tuple(map(float, values)) if len(values) == 3 and numbers else None
