"""Teachers that are timm models: their network, its weights and its data config."""

import logging
from collections.abc import Collection
from pathlib import Path

import timm
import torch
from torch import nn

from contract.errors import UserError, first_line, out_of_memory, suggest
from distill.config import TeacherConfig
from distill.fields import source_of
from distill.models.hub import quiet_hub
from distill.models.meta import building
from distill.models.packaged import PACKAGE, checkpoint_path
from distill.models.published import activation_note, normalization_of
from distill.models.sources import LOCAL, need_weights
from distill.models.student import create_timm, nearest_multiples, patch_size
from distill.models.weight_files import folder_contents, read_state_dict
from distill.models.weights import load_into

log = logging.getLogger(__name__)


def build_timm_teacher(config: TeacherConfig, index: int) -> tuple[nn.Module, tuple, int | None]:
    """A timm network with its weights, the (size, mean, std) of its data config, and its patch
    size.
    """
    kind, _ = source_of(config.name)
    architecture, _, tag = config.name.partition(".")
    if tag and not kind and timm.is_model(architecture):
        known = timm.list_models(f"{architecture}.*", include_tags=True)
        if config.name not in known:
            raise UserError(
                f"teacher '{config.label}': '{config.name}' does not have this tag: "
                f"{suggest(config.name, known)}"
            )
    with building():
        probe = create_timm(config.name, **config.kwargs)
    data = timm.data.resolve_model_data_config(probe)
    patch, size = patch_size(probe), config.image_size or data["input_size"][-1]
    if patch and size % patch:
        raise UserError(
            f"teacher '{config.label}': its patch of {patch} pixels does not divide "
            f"teachers.{index}.image_size = {size} (use {nearest_multiples(size, patch)})"
        )
    blocks = blocks_of(probe)
    if config.block is not None and not -blocks <= config.block < blocks:
        raise UserError(
            f"teacher '{config.label}': teachers.{index}.block = {config.block} does not exist: it "
            f"has blocks 0 to {blocks - 1}"
        )
    arguments = {"img_size": size, **config.kwargs}
    names: Collection[str] = ()
    if config.checkpoint is None and config.pretrained:
        need_weights(config.name)
        net = _fetch_pretrained(config, index, arguments)
    else:
        # Random weights (`pretrained: false`) are the same in every process: a resumed run must use
        # the same teacher.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            net = create_timm(config.name, **arguments)
    if config.checkpoint:
        state = read_state_dict(_checkpoint_path(config, index))
        names = tuple(state)
        load_into(net, state, config.checkpoint, needs_head=config.role == "clip")
    if config.checkpoint or config.pretrained:
        for note in teacher_notes(config, net, index, names):
            log.warning("note      %s", note)
    if kind:  # its config.json says it
        return net, (size, data["mean"], data["std"]), patch
    chosen = normalization_of(config.name, config.checkpoint, config.role, names)
    return net, (size, chosen.mean, chosen.std), patch


def teacher_notes(
    config: TeacherConfig, net: nn.Module, index: int, names: Collection[str] = ()
) -> list[str]:
    """What a user should know of a timm teacher's weights before training from them, a line each.

    `net` may be on the meta device; `names` are those of the tensors in its checkpoint, where it
    has been read.
    """
    notes: list[str] = []
    if source_of(config.name)[0]:  # its architecture is the one it was saved as
        return notes
    activation = activation_note(config.name, net, config.checkpoint, names)
    if activation:
        notes.append(activation)
    if config.role == "clip" and "_ft_" in config.name and config.block is None:
        notes.append(
            f"{config.name} was fine-tuned: its head gives scores of classes, not an image "
            f"embedding (set teachers.{index}.role=classification)"
        )
    file = config.checkpoint and not config.checkpoint.startswith(PACKAGE)
    if file and "." not in config.name and not (config.mean and config.std):
        chosen = normalization_of(config.name, config.checkpoint, config.role, names)
        notes.append(
            f"pictures for {config.checkpoint} are normalised by {chosen.words} "
            f"(teachers.{index}.mean and .std "
            "set others)"
        )
    return [f"teacher '{config.label}': {note}" for note in notes]


def blocks_of(net: nn.Module) -> int:
    """How many blocks, or stages of a CNN, `block` may name."""
    return len(getattr(net, "blocks", None) or getattr(net, "feature_info", None) or ())


def _fetch_pretrained(config: TeacherConfig, index: int, arguments: dict) -> nn.Module:
    """A timm network with the weights of its pretrained tag, from the hub or its local cache."""
    try:
        with quiet_hub():
            return create_timm(config.name, pretrained=True, **arguments)
    except UserError:
        raise
    # hub clients raise their own kinds of connection, repository and file errors
    except Exception as error:
        if out_of_memory(error):
            raise
        if source_of(config.name)[0]:
            raise UserError(
                f"teacher '{config.label}': cannot load the weights of {config.name} "
                f"({first_line(error)}): {LOCAL} as teachers.{index}.checkpoint"
            ) from error
        raise UserError(
            f"teacher '{config.label}': cannot fetch weights of '{config.name}' "
            f"({first_line(error)}): set teachers.{index}.checkpoint to a local file, or "
            f"teachers.{index}.pretrained=false for random weights"
        ) from error


def _checkpoint_path(config: TeacherConfig, index: int) -> Path:
    """The local file behind `checkpoint`, fetched if it is a package; raises UserError for a
    folder.
    """
    path = checkpoint_path(config.checkpoint)
    if path.is_dir():
        known = folder_contents(path)
        raise UserError(
            f"teacher '{config.label}': checkpoint {path} is a folder ("
            + (known or f"use a file; for the student of a run, set teachers.{index}.name=run")
            + ")"
        )
    return path
