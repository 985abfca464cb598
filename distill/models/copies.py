"""Which of the networks in a file of weights is the one to use: whatever wraps it, and of several
copies the one that its authors use.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from contract.errors import UserError

log = logging.getLogger(__name__)

_AVERAGED = {"ema", "emamodel", "modelema", "averaged", "swa", "shadow"}
"""Words in prefixes, of averaged weights."""

_PREFERRED = ("teacher", "target_encoder", "base_encoder", "encoder_q", "online")
_SECOND = ("student", "momentum", "encoder_k", "context_encoder", "optim")
"""Parts of prefixes, of the copy of a network that its authors use and of the one they do not."""

_MOMENTS = re.compile(
    r"(^|\.)((max_)?exp_avg(_sq|_slow|_diff)?|momentum_buffer|square_avg|acc_delta|grad_avg)\."
)
"""Prefixes of what optimizers keep for each weight, with its name and shape."""

_DEEPEST = 6
"""Parts of a wrapper's prefix."""


def select(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def foreign_names(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """Names that a network lacks, of parts that it has: of a deeper one."""
    parts = {name.split(".")[0] for name in expected}
    return [name for name in names if name not in expected and name.split(".")[0] in parts]


def best_prefix(
    state: dict[str, Tensor],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    expected: Mapping[str, torch.Size | None],
    source: str,
) -> str:
    """The prefix below which a network's weights lie, whatever wrapped them.

    `convert` gives some tensors the network's names, and `expected` has its names, with shapes or
    None for any. Of several complete copies, also of those inside another, averaged weights win
    (timm's and DeiT's EMA), then a teacher or target (DINO, I-JEPA), and a student or momentum copy
    (MoCo) comes last; an optimizer's moments are none. A copy that would win, but lacks some
    tensors, is logged. Raises UserError where nothing says which of several to take.
    """
    # names and shapes suffice, and cost nothing to convert
    bare = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    prefixes = _prefixes(bare)
    counts = {prefix: _count(convert(select(bare, prefix)), expected) for prefix in prefixes}
    most = max(counts.values())
    if not most[1]:
        return ""
    best = [prefix for prefix in counts if counts[prefix] == most]
    best = _without_repeated(best, state, convert, expected)
    highest = max(map(_rank, best))
    first = [prefix for prefix in best if _rank(prefix) == highest]
    chosen = first[0]
    for other in first[1:]:
        if not _equal(select(state, chosen), select(state, other)):
            raise UserError(
                f"{source} holds several networks that fit, '{chosen}' and '{other}': save the "
                "one to use as a file of its own"
            )
    if len(best) > 1:
        others = ", ".join(f"'{prefix}'" for prefix in best if prefix != chosen)
        log.info("weights   %s: from '%s', not from %s", source, chosen, others)
    elif chosen:
        log.info("weights   %s: from '%s'", source, chosen)
    for prefix, count in counts.items():
        # half: an average of the parameters alone lacks a CNN's running statistics
        if _rank(prefix) > highest and most[1] > count[1] >= most[1] / 2:
            held = convert(select(bare, prefix))
            lacking = [name for name in expected if name not in held]
            if not chosen.startswith(prefix) and lacking:
                log.warning(
                    "weights   %s: '%s' is not used: it lacks %d of the network's tensors ('%s')",
                    source,
                    prefix,
                    len(lacking),
                    lacking[0],
                )
    return chosen


def _count(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size | None]
) -> tuple[int, int, bool]:
    """How many of a network's tensors some are: with the right shape, and by name alone; and
    whether they are no deeper network's.
    """
    held = [name for name in expected if name in tensors]
    shaped = sum(expected[name] in (None, tensors[name].shape) for name in held)
    return shaped, len(held), not foreign_names(tensors, expected)


def _without_repeated(
    prefixes: list[str],
    state: dict[str, Tensor],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    expected: Collection[str],
) -> list[str]:
    """Prefixes without those below which a shorter one's network lies: `teacher.` and
    `teacher.backbone.` are one network where a converter strips the latter.
    """

    def network(prefix: str) -> dict[str, Tensor]:
        held = convert(select(state, prefix))
        return {name: held[name] for name in expected if name in held}

    kept: list[str] = []
    for prefix in prefixes:
        around = [shorter for shorter in kept if prefix.startswith(shorter)]
        if not any(_equal(network(prefix), network(shorter)) for shorter in around):
            kept.append(prefix)
    return kept


def _prefixes(state: dict[str, Tensor]) -> list[str]:
    """Dotted beginnings of names that may be wrappers': none, and those without a block's number,
    the shortest first.
    """
    found = {""}
    for name in state:
        parts = name.split(".")[:-1]
        for depth in range(1, min(len(parts), _DEEPEST) + 1):
            if parts[depth - 1].isdecimal():
                break
            found.add(".".join(parts[:depth]) + ".")
    found = {prefix for prefix in found if not _MOMENTS.search(prefix)}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _rank(prefix: str) -> int:
    """How much a prefix says that its copy of the network is the one to use."""
    words = set(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", prefix).split("."))
    words = {part for word in words for part in word.lower().split("_")}
    if _AVERAGED & words:
        return 4
    if any(name in prefix for name in _PREFERRED):
        return 3
    if not prefix:
        return 2
    return 0 if any(name in prefix for name in _SECOND) else 1


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name] is other[name] or torch.equal(one[name], other[name]) for name in one
    )
