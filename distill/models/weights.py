"""Weights: hashed, written, and those of files renamed to timm's layout and loaded strictly."""

import contextlib
import hashlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from contract.errors import UserError, raise_trouble
from contract.files import sort_safetensors_metadata, write_atomically
from distill.models.copies import best_prefix, foreign_names, select

log = logging.getLogger(__name__)

_SPECIAL = {
    "cls_token": "a class token",
    "dist_token": "a distillation token",
    "reg_token": "some register tokens",
    "pos_embed": "a position embedding",
    "norm_pre": "a norm before the blocks",
    "norm": "a final norm",
    "fc_norm": "a norm after average pooling",
}
"""timm's names of what a ViT has or lacks as a whole."""

_PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight", "patch_embed.projection.weight")
"""Ends of the names of a patch embedding in the layouts that timm converts."""

_LAYOUTS = (
    (r"encoder_layer_\d+\.|^conv_proj\.", "torchvision's ViT"),
    (r"embeddings\.patch_embeddings|encoder\.layers?\.\d+\.|^layer\.\d+\.", "transformers"),
    (r"encoder\.stages\.\d+\.layers|embedder\.embedder", "transformers"),
    (r"vision_model\.", "transformers' CLIP or SigLIP"),
    (r"layers\.\d+\.ln1\.|ffn\.layers\.", "OpenMMLab"),
    (r"bottom_up|fpn_", "Detectron2"),
    (r"image_encoder\.neck|prompt_encoder\.", "Segment Anything"),
    (r"^features\.\d+\.", "torchvision"),
    (r"transformer\.resblocks", "OpenCLIP or OpenAI"),
)
"""Names in files of other libraries, and whose they are."""

_POOLED_NORM = "head.norm."
"""timm's norm between a CNN's pooling and its classifier; SparK trains and publishes its ConvNeXts
without it.
"""


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Hex sha256 over the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=dict(metadata))
    sort_safetensors_metadata(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], remedy: str
) -> Path:
    """Write a safetensors file by rename, in a folder that is made where it is missing, with its
    hash as `sha256` in the metadata; raises UserError that ends with the `remedy`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path.parent}: {error.strerror} ({remedy})") from error
    signed = {**metadata, "sha256": tensors_sha256(dict(tensors))}
    write_atomically(path, lambda temporary: save_tensors(temporary, tensors, signed))
    return path


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `save_tensors` that records the `sha256` of its tensors.

    Raises UserError, ending with the `remedy`, for one that is damaged or does not match it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise_trouble(path, error)
        raise UserError(f"{path} is damaged or half-written ({error}): {remedy}") from error
    if "sha256" in metadata and tensors_sha256(tensors) != metadata["sha256"]:
        raise UserError(f"{path} does not match its recorded sha256: it is damaged; {remedy}")
    return tensors, metadata


def misfit(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor of a network, which may be on the meta device, that others do not fit, in
    words; None where all do.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            return f"'{name}' is missing"
        if name not in expected:
            return f"'{name}' has no place in the network"
        if tensors[name].shape != expected[name].shape:
            shapes = list(tensors[name].shape), list(expected[name].shape)
            return f"'{name}' has shape {shapes[0]}, but the network expects {shapes[1]}"
    return None


def load_into(
    model: nn.Module, state: dict[str, Tensor], source: str, needs_head: bool = False
) -> None:
    """Load the tensors of a file into a timm model, strictly, except for the classifier (unless
    `needs_head`).

    The weights are found below whatever prefix they have (`best_prefix`). Official layouts that
    timm supports (ConvNeXt's, CLIP's, DINOv2's) are renamed by timm's own converters, which also
    resample position embeddings to the model's grid. A file without the norm of pooled features
    (SparK's ConvNeXts) removes it from the model: the summary is then the pooled map itself. What
    is chosen, renamed, resampled or left out is logged. Raises UserError naming the first tensor
    that is missing or of another shape.
    """
    names = tuple(state)
    original, outside = _select(model, state, source)
    state, said = _convert(model, original)
    _refuse_other_patches(model, original, source)
    for line in said:
        log.info("weights   %s: %s", source, line)
    expected = model.state_dict()
    classifier = _classifier_names(model)
    optional = () if needs_head else classifier
    missing = [
        n
        for n in expected
        if n not in state and not n.startswith(optional) and "num_batches" not in n
    ]
    layout = _layout_of(names) if len(missing) > len(expected) / 2 else None
    if layout:
        raise UserError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing, the first is "
            f"'{missing[0]}': it has the names of {layout}; use the same weights by timm's name, "
            "or convert"
        )
    _refuse_other_tokens(state, expected, source)
    _refuse_lost_biases(original, state, source)
    unused = []
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            if name.startswith(optional):
                del state[name]
                unused.append(name)
                continue
            raise UserError(
                f"{source}: '{name}' has shape {list(state[name].shape)}, but the model expects "
                f"{list(tensor.shape)}: the file belongs to another architecture or size (check "
                "teachers' name and kwargs)"
            )
        if name in state and tensor.is_floating_point() and not state[name].is_floating_point():
            raise UserError(
                f"{source}: '{name}' is {state[name].dtype}, a quantised file: use the original "
                "weights"
            )
    if missing and not needs_head and all(name.startswith(_POOLED_NORM) for name in missing):
        log.info(
            "weights   %s has no norm after pooling: its pooled features stay as they are", source
        )
        model.head.norm, missing = nn.Identity(), []
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(expected)} tensors are missing, the first is "
            f"'{missing[0]}': the file belongs to another architecture (check the teacher's name)"
        )
    extra = [name for name in state if name not in expected]
    heads = {name.split(".")[0] for name in classifier}
    foreign = [n for n in foreign_names(extra, expected) if n.split(".")[0] not in heads]
    if foreign:
        raise UserError(
            f"{source}: '{foreign[0]}' has no place in the model ({len(foreign)} such tensors): "
            "the file belongs to a larger architecture (check the teacher's name and kwargs)"
        )
    unused += [*extra, *outside]
    if unused:
        log.info(
            "weights   %s: not part of the network and not used: %d (%s%s)",
            source,
            len(unused),
            ", ".join(unused[:3]),
            ", …" if len(unused) > 3 else "",
        )
    renamed = sorted(name for name in state if name in expected and name not in original)
    if renamed:
        log.info("weights   %s: the authors' names, %d renamed by timm", source, len(renamed))
    if (
        classifier
        and not any(name.startswith(classifier) for name in state)
        and any(name.startswith(classifier) for name in expected)
    ):
        log.info("weights   %s: no classifier in it, and none is needed", source)
    kinds = {state[name].dtype for name, t in expected.items() if name in state} - {torch.float32}
    halves = sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point)
    if halves:
        log.info("weights   %s: stored as %s, used as float32", source, " and ".join(halves))
    model.load_state_dict(
        {name: state[name].to(expected[name].dtype) for name in expected if name in state}, False
    )
    # tasks that read classes must not use a classifier without trained weights
    model.classifier_loaded = any(name in state for name in expected if name.startswith(classifier))


def _select(
    model: nn.Module, state: dict[str, Tensor], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file that are the model's, and the names of the others."""
    optional = _classifier_names(model)
    expected = {n: t.shape for n, t in model.state_dict().items() if not n.startswith(optional)}

    def convert(part: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(part) < len(expected) // 4:
            return {}
        return {n: t for n, t in _convert(model, part)[0].items() if not n.startswith(optional)}

    prefix = best_prefix(state, convert, expected, source)
    return select(state, prefix), [name for name in state if not name.startswith(prefix)]


def _convert(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under timm's names by its own converter, as they are where it fails, and what it says
    it resampled.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not convert:
        return dict(state), []
    with _listening() as said, contextlib.redirect_stdout(io.StringIO()):  # one of them prints
        try:
            converted = dict(convert(dict(state), model))
            said += [
                f"'{name}' resampled from {list(state[name].shape)} to {list(tensor.shape)}"
                for name, tensor in converted.items()
                if name in state and tensor.shape != state[name].shape and tensor.ndim == 2
            ]
            return converted, said
        except (
            KeyError,
            RuntimeError,
            ValueError,
            AttributeError,
            AssertionError,
            TypeError,
            IndexError,
            NotImplementedError,
        ) as error:
            # a converter fails on foreign names or shapes; the comparison afterwards names them
            log.debug("timm's converter for %s failed (%s)", type(model).__name__, error)
    return dict(state), []


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what timm's layers log while they resample, each line once."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in said:
                said.append(record.getMessage())

    logger, listener = logging.getLogger("timm.layers"), Listener()
    before, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)
        logger.propagate = propagate


def _refuse_other_patches(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raise UserError for patches of another size, which timm would resample: that is another
    network than the one that was trained.
    """
    patch = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(patch, nn.Conv2d):
        return
    for name, tensor in state.items():
        if (
            name.endswith(_PATCHES)
            and tensor.ndim == 4
            and tensor.shape[2:] != patch.weight.shape[2:]
        ):
            raise UserError(
                f"{source}: its patches are {tensor.shape[-1]} pixels wide ('{name}'), the model's "
                f"{patch.weight.shape[-1]}: name the architecture it was trained as"
            )


def _refuse_lost_biases(original: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Raise UserError for attention biases that timm's converter left out of a network without
    them, unless they are zero, as those of DINOv3's smaller networks.
    """
    for name, tensor in original.items():
        start = name.removesuffix("qkv.bias")
        kept = any(f"{start}{part}" in state for part in ("qkv.bias", "q_bias"))
        if name.endswith("blocks.0.attn.qkv.bias") and not kept and tensor.any():
            raise UserError(
                f"{source}: '{name}' has no place in the model: name the architecture with biases "
                "(…_qkvb)"
            )


def _refuse_other_tokens(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> None:
    """Raise UserError where file and model differ in a special token, the position embedding or a
    final norm, none of which may be left out.
    """
    for name, meaning in _SPECIAL.items():
        held = any(n == name or n.startswith(f"{name}.") for n in state)
        wanted = any(n == name or n.startswith(f"{name}.") for n in expected)
        if held and not wanted:
            raise UserError(
                f"{source}: it has {meaning} ('{name}'), which the model lacks: name the "
                "architecture it was trained as (check the teacher's name and kwargs)"
            )
        # the message on missing tensors says what a file of another kind is
        if wanted and not held and sum(n in state for n in expected) > len(expected) / 2:
            raise UserError(
                f"{source}: it has no {meaning.split(' ', 1)[1]}, the model's '{name}' is missing: "
                "name the architecture it was trained as (check the teacher's name and kwargs)"
            )


def _layout_of(names: Sequence[str]) -> str | None:
    """Whose the names in a file are, where another library's are known."""
    for pattern, library in _LAYOUTS:
        if any(re.search(pattern, name) for name in names):
            return library
    return None


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
