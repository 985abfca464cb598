"""Files of weights: what they are, and all their tensors by dotted name, read without running
anything.

Files are told apart by their content, as names lie. What is not weights is refused in one line
that says what it is.
"""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from contract.errors import UserError, first_line, raise_trouble

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What torch.compile, FSDP and activation checkpointing put into names, at any depth."""

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")

_DEEPEST = 6
"""Mappings inside one another; published files have up to three."""

_FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run git lfs pull beside it"),
    (b"<", "a web page, not weights: download the file itself"),
    (b"\x93NUMPY", "a NumPy array, not a state dict: use the weights of timm's tag"),
    (b"\x89HDF", "an HDF5 file (Keras'): save its weights from PyTorch"),
    (b"GGUF", "a GGUF file (quantised): use the original weights"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"BZh", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ", "compressed by xz: unpack it"),
)
"""First bytes of files that people have in the place of weights, and what to do."""

_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN = [
    # DINO, MAE and DeiT store their command line with the weights: it is plain data, and not used
    argparse.Namespace,
    # numpy 1 and 2 have it in different modules
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")),
]
"""Plain data that training loops keep beside the weights (the best score, say)."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file on the CPU, by dotted name: those of a mapping inside a mapping
    have its key in front (`state_dict.norm.weight`).

    Takes .safetensors, pickles of tensors and plain data alone, and the index of either in shards.
    Raises UserError for a missing or damaged file, for a pickle that holds code, which loading
    would run, and for anything else, saying what it is.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file (download it, or correct the path)")
    if path.name.endswith(".json"):
        named = _read_shards(path)
    else:
        _refuse_one_shard(path)
        named = dict(_flatten(_load(path)))
    if not named:
        raise UserError(f"checkpoint {path} has no state dict: no tensors in it have names")
    plain: dict[str, Tensor] = {}
    for name, tensor in named.items():
        short = _WRAPPERS.sub("", name)
        if short in plain and not torch.equal(plain[short], tensor):
            wrapped = next(n for n in named if n != short and _WRAPPERS.sub("", n) == short)
            raise UserError(
                f"checkpoint {path} holds two networks that differ, '{short}' is in it as "
                f"'{wrapped}' too: save the one to use as a file of its own"
            )
        plain[short] = tensor
    return plain


def tensor_names(path: str | Path) -> tuple[str, ...]:
    """Names as `read_state_dict` has them, in moments, as no tensors are read; none for what it
    would refuse.
    """
    path = Path(path)
    try:
        if path.name.endswith(".json"):
            names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        elif _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        else:
            names = [name for name, _ in _flatten(_load_meta(path))]
    except (UserError, OSError, SafetensorError, ValueError, KeyError, TypeError):
        return ()
    return tuple(dict.fromkeys(_WRAPPERS.sub("", name) for name in names))


def folder_contents(folder: Path) -> str:
    """What a folder given in the place of a weights file is, and which file of it to give, in
    words that end a message; empty where nothing is known.
    """
    if (folder / ".metadata").is_file():
        return (
            "a checkpoint of torch.distributed: convert it by python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch"
        )
    for name in (
        "model.safetensors.index.json",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
    ):
        if (folder / name).is_file():
            return f"give {folder / name}"
    return ""


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return path.suffix == ".safetensors" or (0 < length < 10**8 and head[8:9] == b"{")


def _load_meta(path: Path) -> object:
    """A pickle with its tensors on the meta device; empty where it cannot be read."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")
            # a pickle from before torch 1.6 cannot be mapped, and is read whole
            return torch.load(
                path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, IndexError):
        return {}


def _load(path: Path) -> object:
    """The content of one file."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise_trouble(path, error)
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    for start, meaning in _FOREIGN:
        if head.lstrip().startswith(start) if start == b"<" else head.startswith(start):
            raise UserError(f"checkpoint {path} is {meaning}")
    if head[257:262] == b"ustar":
        raise UserError(f"checkpoint {path} is a tar archive: unpack it and give the file in it")
    if path.suffix == ".onnx":
        raise UserError(f"checkpoint {path} is an ONNX graph: give the weights it was made from")
    _refuse_other_archives(path)
    try:
        if _is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            # foreign pickles make torch warn on standard error, but only a refusal matters
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} is refused: its pickle is damaged or contains code{_code_in(path)}"
            ", not only tensors (if you trust the file, save its state dict as .safetensors)"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise_trouble(path, error)
        raise UserError(
            f"checkpoint {path} is damaged or half-written ({first_line(error)}): download it again"
        ) from error


def _code_in(path: Path) -> str:
    """What a refused pickle asks for, in brackets, where torch can tell."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # of a damaged file anything
        return ""
    foreign = [name for name in names if not name.startswith("torch.")] or names
    return f" ({foreign[0]})" if foreign else ""


def _refuse_other_archives(path: Path) -> None:
    """Raise UserError for a zip archive that is not torch.save's."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # torch's reader says what is wrong
        return
    # torch.export keeps `archive_format`, TorchScript its constants
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"checkpoint {path} is a TorchScript archive, as OpenAI's own .pt are: loading it "
            "could run its code (if you trust it, save torch.jit.load(FILE).state_dict() as "
            ".safetensors)"
        )
    if any(name.endswith(".npy") for name in names):
        raise UserError(
            f"checkpoint {path} is an archive of NumPy arrays (JAX weights): use timm's tag of the "
            "same weights"
        )
    if not any(name.endswith("data.pkl") for name in names):
        first = names[0] if names else "nothing"
        raise UserError(
            f"checkpoint {path} is a zip archive ({first} …), not one of torch.save: unpack it and "
            "give the file in it"
        )


def _flatten(value: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of nested mappings; lists, and mappings by number (an optimizer's state),
    hold no weights by name.
    """
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        for key, part in value.items():
            if isinstance(key, str):
                yield from _flatten(part, f"{prefix}.{key}" if prefix else key, depth + 1)


def _refuse_one_shard(path: Path) -> None:
    shard = _SHARD.search(path.name)
    if not shard or int(shard[2]) < 2:
        return
    start, ending = path.name[: shard.start()], path.suffix
    index = path.with_name(f"{start}{ending}.index.json")
    found = "" if index.is_file() else " (not found here)"
    raise UserError(
        f"checkpoint {path} is shard {int(shard[1])} of {int(shard[2])}: give {index}{found}"
    )


def _read_shards(path: Path) -> dict[str, Tensor]:
    """Tensors of all shards that an index names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        places = content["weight_map"]
        shards = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_trouble(path, error)
        raise UserError(
            f"checkpoint {path} is JSON, but not the index of a sharded file: give the weights"
        ) from error
    named: dict[str, Tensor] = {}
    for shard in shards:
        file = path.parent / str(shard)
        # an index comes with the weights, from anybody
        if file.parent != path.parent or not file.is_file():
            raise UserError(
                f"checkpoint {path}: its shard {shard} is missing: download it into the same folder"
            )
        named |= _flatten(_load(file))
    missing = sorted(places.keys() - named.keys())
    if missing:
        raise UserError(
            f"checkpoint {path}: '{missing[0]}' is not in {places[missing[0]]}: download the "
            "shards again"
        )
    return named
