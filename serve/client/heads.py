"""Request several heads at once when one of them may be failing: breakers first, then partial
answers.
"""

import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from serve.client.breaker import Breakers, head_of
from serve.client.steps import Steps, Together
from serve.errors import ClientError, DeadlineExceeded, ServerFailed, Unavailable, WrongAnswer

Ask = Callable[[Sequence[str], float], Steps[dict[str, np.ndarray]]]
"""Asks for outputs until a time.monotonic."""

Found = tuple[dict[str, np.ndarray], dict[str, ClientError]]
"""Arrays, and why those that are not there are missing."""

_FAILURES = (Unavailable, ServerFailed, DeadlineExceeded, WrongAnswer)
"""Failures that count against a head; a bad request or a missing model does not."""


def ask_heads(
    ask: Ask,
    names: Sequence[str],
    breakers: Breakers,
    deadline: float,
    partial: bool,
    request_id: str,
) -> Steps[Found]:
    """Outputs of healthy heads, in one request if all goes well.

    Without `partial` the first failure is raised, and a head whose breaker is open fails the whole
    at once. With it, a head that fails goes missing: Triton fails an ensemble's whole request for
    one failing head, so the others are requested again without it (each alone, if the failure does
    not say whose it was). Raises if nothing at all could be answered.
    """
    heads: dict[str, list[str]] = {}
    for name in names:
        heads.setdefault(head_of(name), []).append(name)
    allowed, missing = [], {}
    for head, outputs in heads.items():
        if breakers[head].allows():
            allowed.append(head)
        else:
            message = (
                f"head '{head}' failed repeatedly and is left alone for {breakers[head].left:.0f} "
                "s more"
            )
            missing |= {name: Unavailable(message, request_id) for name in outputs}
    if missing and not (partial and allowed):
        for head in allowed:
            breakers[head].undecided()
        raise next(iter(missing.values()))
    undecided, left = set(allowed), allowed
    result: dict[str, np.ndarray] = {}
    try:
        while left:
            now = time.monotonic()
            # a head that hangs must leave time to request the others without it
            until = now + (deadline - now) / 2 if partial and len(left) > 1 else deadline
            try:
                result = yield from ask([name for name in names if head_of(name) in left], until)
                failed: dict[str, ClientError] = {}
            except _FAILURES as error:
                failed = dict.fromkeys(_blame(error, {head: heads[head] for head in left}), error)
                for head in failed:
                    breakers[head].failed()
                undecided -= set(failed)
                if not partial or len(left) == 1 or (everywhere(error) and not failed):
                    raise
                if not failed:  # it may be any of them
                    result, failed = yield from _ask_each(
                        ask, {head: heads[head] for head in left}, deadline
                    )
                    for head in failed:
                        breakers[head].failed()
                    undecided -= set(failed)
            missing |= {name: error for head, error in failed.items() for name in heads[head]}
            if result:
                for head in left:
                    if head not in failed:
                        breakers[head].succeeded()
                break
            left = [head for head in left if head not in failed]
    finally:
        for head in undecided:
            breakers[head].undecided()
    if not result:
        raise next(iter(missing.values()))
    return {name: result[name] for name in names if name in result}, missing


def _ask_each(
    ask: Ask, heads: dict[str, list[str]], deadline: float
) -> Steps[tuple[dict[str, np.ndarray], dict[str, ClientError]]]:
    """Every head by itself, all at once; arrays, and the failures by head. Raises if none answers:
    then it is not a head.
    """

    def alone(outputs: Sequence[str]) -> Steps[dict[str, np.ndarray] | ClientError]:
        try:
            return (yield from ask(outputs, deadline))
        except _FAILURES as error:
            return error

    answers = yield Together([alone(outputs) for outputs in heads.values()], at_once=True)
    failed = {
        head: answer
        for head, answer in zip(heads, answers, strict=True)
        if isinstance(answer, ClientError)
    }
    if len(failed) == len(heads):
        raise next(iter(failed.values()))
    return {
        name: value
        for answer in answers
        if isinstance(answer, dict)
        for name, value in answer.items()
    }, failed


def _blame(error: ClientError, heads: dict[str, list[str]]) -> list[str]:
    """Heads whose failure this is, as far as its text says: it quotes a model, one of its
    processes, or an output.
    """
    quoted = {re.sub(r"(_\d+){1,2}$", "", name) for name in re.findall(r"'(\w+)'", error.message)}
    return [
        head
        for head, outputs in heads.items()
        if quoted & {head, f"head_{head}", f"{head}_head", *outputs}
    ]


def everywhere(error: ClientError) -> bool:
    """Whether the server as a whole does not answer, so that requesting less would not help."""
    return isinstance(error, Unavailable) and "in ensemble" not in error.message
