"""GroundingDINO (ECCV 2024) as transformers has it, in the parts that a distilled student meets:
the maps of its image backbone, its text tower, and the rest, from maps and text to boxes.

KPU's student predicts the maps, so that the rest detects objects by their names in a student's
features as it does in its own.
"""

import copy
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from contract.detection import WINDOW, read_tokenizer
from contract.errors import UserError, first_line, raise_trouble
from distill.models.hugging_face import WEIGHTS_ONLY, import_transformers
from distill.models.meta import building

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

EXTRA = "detection"
"""Of pyproject.toml, that has transformers for detectors."""

VOCABULARY = "vocab.txt"
"""Of the detector's text tower, in its folder and in a bundle."""

STRIDES = (8, 16, 32)
"""Of the maps C3 to C5 of its Swin Transformer, in pixels."""

_KIND = "grounding-dino"

_IGNORED = {"attn_implementation", "_attn_implementation", "auto_map", "quantization_config"}
_IGNORED |= {"backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"}
"""Keys of a `config.json` that say which code to run, or which network is within, either of which
may be fetched from the hub."""

_WEIGHTS = "model.safetensors"

_MOST_LAYERS = 100
"""Of a stack in a plausible configuration; building a million would take hours."""

_SPARE = 2**20
"""Numbers that a network may have beyond twice those of its file, which lacks what is tied or
computed."""


def load_detector(source: str, field: str) -> "GroundingDinoForObjectDetection":
    """Load a detector in eval mode from a folder (`config.json` and `model.safetensors`) or by its
    name on the Hugging Face hub.

    Raises UserError, naming the recipe's or command's `field`, without transformers, and for files
    that are missing, damaged or of another architecture. Pickles are never read.
    """
    transformers = import_transformers(field, EXTRA)
    config = read_config(source, field)
    folder = Path(source)
    if folder.is_dir() and not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"{field} = {source}: {_WEIGHTS} is missing (save the detector with transformers' "
            "save_pretrained)"
        )
    # custom kernels would be fetched from the hub
    config.disable_custom_kernels = True
    try:
        cached = transformers.utils.cached_file
        file = folder / _WEIGHTS if folder.is_dir() else cached(source, _WEIGHTS)
        mismatched, needed, held = _compare(config, file)
    except Exception as error:  # the hub, safetensors and transformers raise errors of many kinds
        raise UserError(
            f"{field} = {source}: its weights cannot be loaded ({first_line(error)})"
        ) from error
    # before memory is taken for what config.json describes
    _refuse("mismatched keys", mismatched, f"{field} = {source}")
    if needed > 2 * held + _SPARE:
        raise UserError(
            f"{field} = {source}: its config.json describes {needed:,} numbers, its weights have "
            f"{held:,}: save the detector with transformers' save_pretrained"
        )
    try:
        model, loaded = transformers.GroundingDinoForObjectDetection.from_pretrained(
            source,
            config=config,
            local_files_only=folder.is_dir(),
            ignore_mismatched_sizes=True,  # refused below, with their names
            output_loading_info=True,
            **WEIGHTS_ONLY,
        )
    except Exception as error:  # the hub, safetensors and transformers raise errors of many kinds
        raise UserError(
            f"{field} = {source}: its weights cannot be loaded ({first_line(error)})"
        ) from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = [name[0] if kind == "mismatched_keys" else name for name in loaded[kind]]
        # files of old releases have that buffer
        names = [name for name in names if not name.endswith("position_ids")]
        _refuse(kind.replace("_", " "), names, f"{field} = {source}")
    return model.eval().requires_grad_(False)


def _compare(config: "GroundingDinoConfig", file: Path | str) -> tuple[list[str], int, int]:
    """Of the detector that `config` describes, without taking memory for it, and a file of weights:
    the tensors whose shapes differ, how many numbers the detector has, and how many the file.

    Tensors that transformers renames as it loads them only count.
    """
    from transformers import GroundingDinoForObjectDetection

    with building():
        model = GroundingDinoForObjectDetection(config)
    with safe_open(file, "pt") as tensors:
        held = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = [n for n in held.keys() & needed.keys() if held[n] != needed[n]]
    parts = itertools.chain(model.parameters(), model.buffers())
    return mismatched, sum(part.numel() for part in parts), sum(map(math.prod, held.values()))


def _refuse(kind: str, names: Sequence[str], name: str) -> None:
    """Raise UserError where there are names of keys that do not fit."""
    if names:
        raise UserError(
            f"{name}: its weights do not fit its config.json ({len(names)} {kind}, the first is "
            f"{min(names)}): save the detector with transformers' save_pretrained"
        )


def is_same_checkpoint(checkpoint: str | None, source: str) -> bool:
    """Whether two names are of one folder, or of one model on the hub; None is random weights."""
    if checkpoint is None:
        return False
    return checkpoint == source or Path(checkpoint).resolve() == Path(source).resolve()


def open_vocabulary(
    source: str, field: str, config: "GroundingDinoConfig"
) -> tuple[Path, "Tokenizer"]:
    """The vocabulary of a detector, from its folder or the hub: its file and its tokenizer.

    Raises UserError, naming the recipe's or command's `field`, for a file that is missing or none
    of BERT's, and for one with tokens beyond those that the text tower has.
    """
    path = Path(source) / VOCABULARY
    if not Path(source).is_dir():
        try:
            path = Path(import_transformers(field, EXTRA).utils.cached_file(source, VOCABULARY))
        except Exception as error:  # the hub's clients raise errors of many kinds
            raise UserError(
                f"{field} = {source}: cannot fetch {VOCABULARY} ({first_line(error)}): name a "
                "local folder"
            ) from error
    elif not path.is_file():
        raise UserError(
            f"{field} = {source}: its {VOCABULARY} is missing: save the detector's tokenizer there"
        )
    try:
        tokenizer = read_tokenizer(path)
    except ValueError as error:
        raise UserError(f"{field} = {source}: {error}") from error
    # not the number of tokens: lines that are blank or occur twice count
    most = max(tokenizer.get_vocab().values()) + 1
    if most > config.text_config.vocab_size:
        raise UserError(
            f"{field} = {source}: {VOCABULARY} has {most:,} tokens, its text tower "
            f"{config.text_config.vocab_size:,}: give the vocabulary it was trained with"
        )
    return path, tokenizer


def read_config(source: str, field: str) -> "GroundingDinoConfig":
    """A detector's configuration, from a folder or the hub; raises UserError as `load_detector`."""
    transformers = import_transformers(field, EXTRA)
    path = Path(source) / "config.json"
    if Path(source).is_dir():
        if not path.is_file():
            raise UserError(
                f"{field} = {source}: config.json is missing (name a folder with a GroundingDINO "
                "checkpoint)"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise_trouble(path, error)
            raise UserError(f"{field} = {source}: config.json is damaged: {error}") from error
    elif Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"{field} = {source}: no such folder (name one with config.json and "
            "model.safetensors, or a model of the Hugging Face hub)"
        )
    else:
        try:
            values, _ = transformers.PreTrainedConfig.get_config_dict(source)
        except Exception as error:  # the hub's clients raise errors of many kinds
            raise UserError(
                f"{field} = {source}: its config.json is not here, nor to be had from the Hugging "
                f"Face hub ({first_line(error)}): name a local folder with config.json and "
                "model.safetensors"
            ) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != _KIND:
        raise UserError(
            f"{field} = {source}: its model_type is {kind!r}, but a GroundingDINO is needed "
            f"({_KIND!r})"
        )
    try:
        config = transformers.GroundingDinoConfig.from_dict(_plain(values))
    except Exception as error:  # of a validator's many kinds
        raise UserError(
            f"{field} = {source}: its config.json is not valid ({first_line(error)})"
        ) from error
    _check_config(config, f"{field} = {source}")
    return config


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, without the keys that are ignored."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _IGNORED
    }


def _check_config(config: "GroundingDinoConfig", name: str) -> None:
    """Raise UserError for a GroundingDINO without the parts that are used here."""
    parts = {
        "backbone_config.model_type": (config.backbone_config.model_type, "swin"),
        "text_config.model_type": (config.text_config.model_type, "bert"),
        "two_stage": (config.two_stage, True),
        "embedding_init_target": (config.embedding_init_target, True),
        "max_text_len": (config.max_text_len, WINDOW),
    }
    for key, (value, needed) in parts.items():
        if value != needed:
            raise UserError(f"{name}: {key} = {value!r} is not supported, only {needed!r}")
    for key, least in {"max_position_embeddings": WINDOW, "type_vocab_size": 1}.items():
        value = getattr(config.text_config, key)
        if value < least:
            raise UserError(f"{name}: text_config.{key} = {value} is too few (at least {least})")
    swin = config.backbone_config
    layers = max(
        *swin.depths,
        config.text_config.num_hidden_layers,
        config.encoder_layers,
        config.decoder_layers,
        config.num_feature_levels,
    )
    if layers > _MOST_LAYERS:
        raise UserError(f"{name}: {layers} layers are not plausible (at most {_MOST_LAYERS})")
    stages = [f"stage{number}" for number in (2, 3, 4)]
    if list(swin.out_features) != stages:
        raise UserError(
            f"{name}: its backbone gives {swin.out_features}, but the maps of {', '.join(stages)} "
            "are needed"
        )


def positions(grids: Sequence[tuple[int, int]], levels: int) -> int:
    """How many positions a detector of `levels` maps looks at, of which the coarser ones are made
    of the last of `grids`.
    """
    grids = [tuple(grid) for grid in grids]
    while len(grids) < levels:
        grids.append(tuple(-(-side // 2) for side in grids[-1]))
    return sum(rows * columns for rows, columns in grids)


def image_maps(model: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Maps C3, C4 and C5 [B, C_l, h_l, w_l] of normalised images [B, 3, H, W], before the detector
    projects them to one width.
    """
    return tuple(model.model.backbone.conv_encoder.model(pixels).feature_maps)


class TextSide(nn.Module):
    """The detector's text tower: tokens to features."""

    def __init__(self, model: "GroundingDinoForObjectDetection") -> None:
        super().__init__()
        self.tower, self.projection = model.model.text_backbone, model.model.text_projection

    def forward(self, ids: Tensor, self_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Features [B, T, d] of tokens `ids` [B, T] of int64; `self_mask` [B, T, T] is true where a
        token sees another, `position_ids` [B, T] count within a phrase.
        """
        output = self.tower(
            input_ids=ids,
            attention_mask=self_mask[:, None],
            token_type_ids=torch.zeros_like(ids),
            position_ids=position_ids,
        )
        return self.projection(output.last_hidden_state)


class DetectorRest(nn.Module):
    """A detector without its backbones: from maps and text features to boxes.

    The masks of the text come from outside, as the operations that make them (cumulative maxima)
    have no ONNX form. Images are looked at whole, without padding.
    """

    def __init__(self, model: "GroundingDinoForObjectDetection") -> None:
        super().__init__()
        core = model.model
        self.position_embedding = core.backbone.position_embedding
        self.core = _without(core, "backbone", "text_backbone", "text_projection")
        # of the last layer; the decoder has its own for the layers before
        self.class_embed, self.bbox_embed = model.class_embed[-1], model.bbox_embed[-1]

    def forward(
        self,
        maps: Sequence[Tensor],
        text: Tensor,
        text_mask: Tensor,
        self_mask: Tensor,
        position_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Detect in `maps`, C3 to C5 as [B, h_l, w_l, C_l], what `text` [B, T, d] names.

        `text_mask` [B, T] is true for tokens and false for padding; `self_mask` and `position_ids`
        are those of `TextSide`. Returns logits [B, queries, 256], -inf beyond the text, and boxes
        [B, queries, 4]: centre x, centre y, width and height, as shares of the image.
        """
        levels = self._project([level.permute(0, 3, 1, 2) for level in maps])
        shapes = [tuple(level.shape[-2:]) for level in levels]
        valid = [torch.ones_like(level[:, 0], dtype=torch.bool) for level in levels]
        places = [
            self.position_embedding(level, mask).to(level.dtype).flatten(2).transpose(1, 2) + embed
            for level, mask, embed in zip(levels, valid, self.core.level_embed, strict=True)
        ]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        padded = torch.zeros_like(tokens[..., 0], dtype=torch.bool)
        sizes = torch.tensor(shapes, device=tokens.device)
        geometry = {
            "spatial_shapes": sizes,
            "spatial_shapes_list": shapes,
            "level_start_index": sizes.prod(1).cumsum(0) - sizes.prod(1),
            # not len, which would fix the batch of exported graphs
            "valid_ratios": tokens.new_ones(tokens.shape[0], len(levels), 2),
        }
        encoded = self.core.encoder(
            vision_features=tokens,
            vision_attention_mask=padded,
            vision_position_embedding=torch.cat(places, 1),
            text_features=text,
            text_attention_mask=~text_mask,
            text_self_attention_masks=~self_mask,
            text_position_ids=position_ids,
            **geometry,
        )
        vision, text = encoded.last_hidden_state_vision, encoded.last_hidden_state_text
        reference = self._propose(vision, text, text_mask, padded, shapes)
        decoded = self.core.decoder(
            inputs_embeds=self.core.query_position_embeddings.weight.expand(
                vision.shape[0], -1, -1
            ),
            vision_encoder_hidden_states=vision,
            vision_encoder_attention_mask=~padded,
            text_encoder_hidden_states=text,
            text_encoder_attention_mask=~text_mask,
            reference_points=reference,
            **geometry,
        )
        hidden = decoded.intermediate_hidden_states[:, -1]
        if decoded.intermediate_hidden_states.shape[1] > 1:
            reference = decoded.intermediate_reference_points[:, -2]
        boxes = self.bbox_embed(hidden) + torch.special.logit(reference, eps=1e-5)
        return self.class_embed(hidden, text, text_mask), boxes.sigmoid()

    def _project(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, d, h_l, w_l] of one width, with coarser ones made of the last."""
        project = self.core.input_proj_vision
        levels = [layer(map_) for layer, map_ in zip(project, maps, strict=False)]
        for number in range(len(maps), len(project)):
            levels.append(project[number](maps[-1] if number == len(maps) else levels[-1]))
        return levels

    def _propose(
        self,
        vision: Tensor,
        text: Tensor,
        text_mask: Tensor,
        padded: Tensor,
        shapes: list[tuple[int, int]],
    ) -> Tensor:
        """Boxes [B, queries, 4] that the decoder starts from: those of the positions that agree
        most with any word.
        """
        core = self.core
        embedded, proposals = core.generate_encoder_output_proposals(vision, padded, shapes)
        scores = core.encoder_output_class_embed(embedded, text, text_mask).amax(-1)
        best = scores.topk(core.config.num_queries, dim=1).indices.unsqueeze(-1)
        boxes = core.encoder_output_bbox_embed(embedded) + proposals
        return boxes.gather(1, best.expand(-1, -1, 4)).sigmoid()


def _without(module: nn.Module, *names: str) -> nn.Module:
    """A copy of a module that shares its weights, without some of its children."""
    short = copy.copy(module)
    short._modules = {name: child for name, child in module.named_children() if name not in names}
    return short
