"""Where a decoder comes from: the user's code, a transformers model in a folder, the classifier of
a timm teacher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from contract.errors import UserError, suggest
from distill.config import TeacherConfig
from distill.decoders.decoder import TRANSFORMERS
from distill.heads import Classifier
from distill.models.hugging_face import (
    WEIGHTS_ONLY,
    attempt,
    import_transformers,
    model_class,
    refuse_kernels,
)
from distill.models.user_code import PYTHON, REMOTE, call_for_module
from distill.models.weight_files import read_state_dict
from distill.models.weights import misfit
from distill.teachers.classifier import read_classifier
from distill.typed_values import read_typed


class Source(NamedTuple):
    """A decoder as it was given: how it is built again, and what was built."""

    reference: str
    kwargs: dict[str, Any]
    module: nn.Module


def open_source(decoder: str, kwargs: Sequence[str], weights: Path | None) -> Source:
    """Build the decoder of --decoder with its weights; raises UserError where it cannot be."""
    if decoder.startswith(PYTHON):
        given = dict(_read_argument(entry) for entry in kwargs)
        source = Source(decoder, given, call_for_module(decoder, given))
        if weights:
            _load_weights(source, weights)
        return source
    if kwargs or weights:
        option = "--kwargs" if kwargs else "--weights"
        raise UserError(f"{option} is for python: decoders: leave it out")
    if decoder.startswith("hf:"):
        return _open_transformers(decoder)
    raise UserError(
        f"--decoder {decoder}: use python:PACKAGE.MODULE:FUNCTION, hf:FOLDER:PART or classifier"
    )


def _read_argument(entry: str) -> tuple[str, Any]:
    key, equals, text = entry.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--kwargs {entry}: write key=value")
    return key, read_typed(f"--kwargs {key}", text, Any)


def _load_weights(source: Source, path: Path) -> None:
    state = read_state_dict(path)
    wrong = misfit(source.module, state)
    if wrong:
        raise UserError(f"--weights {path} does not fit {source.reference}: {wrong}")
    source.module.load_state_dict(state)


def _open_transformers(decoder: str) -> Source:
    """A part of a transformers model in a folder, with its weights."""
    folder, _, part = decoder.partition(":")[2].rpartition(":")
    if not folder or not part:
        raise UserError(
            f"--decoder {decoder}: write hf:FOLDER:PART, as in hf:weights/deeplab:segmentation_head"
        )
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"--decoder {decoder}: {folder} has no config.json: give a folder of transformers' "
            "save_pretrained"
        )
    whose = f"--decoder {decoder}"
    transformers = import_transformers(whose)
    remedies = (
        "save the model again with transformers' save_pretrained (config.json, model.safetensors)",
        "its code is not run: give the decoder as python:PACKAGE.MODULE:FUNCTION",
    )
    local = {"local_files_only": True, REMOTE: False}
    config = attempt(
        whose, lambda: transformers.AutoConfig.from_pretrained(folder, **local), *remedies
    )
    refuse_kernels(config, whose, "set attn_implementation there to sdpa")
    name = next(iter(config.architectures or ()), "none")
    made = model_class(transformers, name, whose)
    model, info = attempt(
        whose,
        lambda: made.from_pretrained(
            folder, config=config, output_loading_info=True, **WEIGHTS_ONLY, **local
        ),
        *remedies,
    )
    try:
        module = model.get_submodule(part)
    except AttributeError as error:
        known = [name for name, _ in model.named_children()]
        raise UserError(
            f"--decoder {decoder}: {name} has no part '{part}': {suggest(part, known)}"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{part}."))
    if missing:
        raise UserError(f"--decoder {decoder}: the folder has no weights of '{missing[0]}'")
    return Source(f"{TRANSFORMERS}{name}:{part}", {"config": config.to_dict()}, module)


def open_classifier(
    teacher: TeacherConfig, index: int, names: list[str] | None
) -> tuple[Classifier, list[str]]:
    """The linear classifier of a timm teacher, number `index` of its recipe, and the names of its
    classes: `names`, or those of an ImageNet with so many.
    """
    weight, bias = read_classifier(teacher, index, "--decoder classifier")
    count = len(weight)
    names = names or _imagenet_names(count) or [f"class {number}" for number in range(count)]
    if len(names) != count:
        raise UserError(f"--classes has {len(names)} names, but the classifier has {count} classes")
    module = Classifier(weight.shape[1], count)
    module.load_state_dict({"linear.weight": weight.float(), "linear.bias": bias.float()})
    return module.eval().requires_grad_(False), names


def _imagenet_names(count: int) -> list[str] | None:
    """The first name of every class of the ImageNet that has so many; its WordNet id behind a name
    that another class has too. None where there is none.
    """
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    first = [info.index_to_description(number).split(",")[0] for number in range(count)]
    return [
        name if first.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(first, info.label_names(), strict=True)
    ]
