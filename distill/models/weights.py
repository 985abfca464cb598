"""Weights from files: read without running anything, renamed to timm's layout, loaded strictly."""

import argparse
import hashlib
import logging
import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from contract.errors import UserError, first_line, raise_trouble
from contract.files import sort_safetensors_metadata, write_atomically

log = logging.getLogger(__name__)

_CONTAINERS = ("teacher", "state_dict", "model", "module", "student")
"""Keys under which published files keep the weights; of DINO's two networks the teacher is the one
to use.
"""

_PREFIXES = (
    "module.",
    "teacher.",
    "backbone.",
    "sparse_encoder.sp_cnn.",
    "sparse_encoder.",
    "encoder.",
    "net.",
)
"""Prefixes of a backbone's names: DDP, DINO's full checkpoints, SparK's masked wrapper.
"""

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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a .safetensors file or a weights-only .pth file on the CPU, without its containers and
    prefixes.

    Raises UserError for a missing or damaged file, and for a pickle that contains anything but
    tensors and plain data: loading that would run its code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file (download it, or correct the path)")
    try:
        if path.suffix == ".safetensors":
            return _strip_prefixes(load_file(path))
        # DINO, MAE and DeiT store their command line with the weights: a Namespace is plain data,
        # and not used.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # foreign pickles make torch warn on standard error, but only a refusal matters
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is refused: its pickle is damaged or contains code, not only "
            "tensors (if you trust the file, save its state dict as .safetensors)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise_trouble(path, error)
        raise UserError(
            f"checkpoint {path} is damaged or half-written ({first_line(error)}): download it again"
        ) from error
    return _strip_prefixes(_unwrap(loaded, path))


def _unwrap(loaded: object, path: Path) -> dict[str, Tensor]:
    for _ in range(len(_CONTAINERS)):
        if not isinstance(loaded, dict):
            break
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        inner = next(
            (loaded[key] for key in _CONTAINERS if isinstance(loaded.get(key), dict)), None
        )
        if inner is None:
            tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
            break
        loaded = inner
    raise UserError(
        f"checkpoint {path} has no state dict (searched under {', '.join(_CONTAINERS)})"
    )


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop wrappers' prefixes; where some keys carry one, the others (decoders, projection heads)
    are dropped.
    """
    for _ in range(len(_PREFIXES)):
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    return state


def load_into(
    model: nn.Module, state: dict[str, Tensor], source: str, needs_head: bool = False
) -> None:
    """Load a state dict into a timm model, strictly, except for the classifier (unless
    `needs_head`).

    Official layouts that timm supports (ConvNeXt's, CLIP's, DINOv2's) are renamed by timm's own
    converters, which also resample position embeddings to the model's grid. A file without the norm
    of pooled features (SparK's ConvNeXts) removes it from the model: the summary is then the pooled
    map itself. Raises UserError naming the first tensor that is missing or of another shape.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert:
        try:
            state = convert(state, model)
        except (
            KeyError,
            RuntimeError,
            ValueError,
            AttributeError,
            AssertionError,
            TypeError,
        ) as error:
            # a converter fails on foreign names or shapes; the comparison below names them
            log.debug(
                "%s: timm's converter for %s failed (%s)", source, type(model).__name__, error
            )
    expected = model.state_dict()
    classifier = _classifier_names(model)
    optional = () if needs_head else classifier
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            if name.startswith(optional):
                del state[name]
                continue
            raise UserError(
                f"{source}: '{name}' has shape {list(state[name].shape)}, but the model expects "
                f"{list(tensor.shape)}: the file belongs to another architecture or size (check "
                "teachers' name and kwargs)"
            )
    missing = [
        n
        for n in expected
        if n not in state and not n.startswith(optional) and "num_batches" not in n
    ]
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
    parts = {name.split(".")[0] for name in expected} - {name.split(".")[0] for name in classifier}
    foreign = [
        name for name in extra if name.split(".")[0] in parts and not name.startswith(classifier)
    ]
    if foreign:
        raise UserError(
            f"{source}: '{foreign[0]}' has no place in the model ({len(foreign)} such tensors): "
            "the file belongs to a larger architecture (check the teacher's name and kwargs)"
        )
    if extra:
        log.debug(
            "%s: %d tensors outside the backbone are not used (%s, …)", source, len(extra), extra[0]
        )
    model.load_state_dict(
        {name: state[name].to(expected[name].dtype) for name in expected if name in state}, False
    )
    # tasks that read classes must not use a classifier without trained weights
    model.classifier_loaded = any(name in state for name in expected if name.startswith(classifier))


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
