"""What everything that is loaded with transformers shares: no pickles, no code of a repository or
of a hub's kernels, one line for whatever fails.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from contract.errors import UserError, first_line, out_of_memory
from distill.models.hub import quiet_hub
from distill.models.user_code import RAISED, REMOTE

WEIGHTS_ONLY = {"use_safetensors": True, "dtype": torch.float32}
"""Arguments of `from_pretrained`: never pickles, whatever precision the file has."""

_KERNELS = ("attn", "experts")
"""Parts of a network that a configuration may have computed by code of a hub, OWNER/NAME."""


def import_transformers(what: str, extra: str = "hf") -> Any:
    """transformers, without its progress bars and warnings; raises UserError, beginning with `what`
    needs it, that names the extra where it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{what} needs transformers: pip install 'vfm-distill[{extra}]'") from error
    transformers.utils.logging.disable_progress_bar()
    # what does not fit or cannot be had is refused in one line, without tables and retries
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return transformers


def attempt(whose: str, load: Callable[[], Any], remedy: str, remedy_for_code: str) -> Any:
    """What `load` returns; raises UserError for whatever transformers or the hub's client does,
    with `remedy_for_code` where it lacks code of the repository.
    """
    try:
        with quiet_hub():
            return load()
    except UserError:
        raise
    except RAISED as error:
        if out_of_memory(error):
            raise
        if REMOTE in str(error):
            remedy = remedy_for_code
        raise UserError(f"{whose} cannot be loaded ({first_line(error)}): {remedy}") from error


def refuse_kernels(described: Any, whose: str, remedy: str) -> None:
    """Raise UserError for a configuration that has a part of the network, or of one inside it,
    computed by code of a hub.
    """
    for config in _configurations(described):
        for part in _KERNELS:
            value = getattr(config, f"_{part}_implementation", None)
            if "/" in str(value):
                what = {"attn": "attention"}.get(part, part)
                raise UserError(
                    f"{whose}: its config.json asks for {what} code of a hub ({value}): {remedy}"
                )


def _configurations(described: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield described
    for value in vars(described).values():
        if hasattr(value, "model_type") and hasattr(value, "to_diff_dict"):
            yield from _configurations(value)


def model_class(transformers: Any, name: object, whose: str) -> Any:
    """A network of transformers by its class's name; raises UserError for what is none."""
    made = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise UserError(f"{whose}: transformers {transformers.__version__} has no model '{name}'")
    return made
