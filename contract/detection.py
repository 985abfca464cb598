"""Zero-shot detection's first and last step: labels become a detector's text inputs, and its logits
and boxes become detections. numpy and `tokenizers` only.

Used by evaluation, clients and, copied, by the server's `detection`, so it must not import anything
of this package.

The prompt is GroundingDINO's (Liu et al. 2024): lower-case labels, each ended by a full stop. Case
and repeated blanks do not matter, nor do full stops and question marks inside a label, which would
end it: they are left out. Words that the vocabulary lacks are spelt in its pieces, and characters
that it lacks count as unknown.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW = 256
"""Tokens of a prompt, at most."""

_MOST_VOCABULARY = 2**24
"""Bytes: BERT's has 230,000."""
_UNKNOWN, _START, _END, _STOP, _QUESTION = 100, 101, 102, 1012, 1029
_TOKENS = {_UNKNOWN: "[UNK]", _START: "[CLS]", _END: "[SEP]", _STOP: ".", _QUESTION: "?"}
"""Where BERT's vocabulary has the tokens by which GroundingDINO divides a prompt into phrases."""


class TextInputs(NamedTuple):
    """A prompt of T tokens as a detector takes it, and which of them stand for each of C labels.

    `ids` int64 [1, T]; `self_mask` bool [1, T, T], true where a token sees another, those of its
    own phrase; `position_ids` int64 [1, T], which count from the beginning of a phrase; `label_map`
    float32 [C, T], whose rows sum to 1.
    """

    ids: np.ndarray
    self_mask: np.ndarray
    position_ids: np.ndarray
    label_map: np.ndarray


class Detections(NamedTuple):
    """What was found in an image, best first: `scores` float32 [N] in [0, 1], `labels` int64 [N],
    which are rows of the label map, and `boxes` float32 [N, 4]: left, upper, right and lower edge
    as shares of the image's width and height.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def prompt(labels: Sequence[str]) -> str:
    """The sentence that asks for labels: `cat. dog.`"""
    return " ".join(f"{_plain(label)}." for label in labels)


def read_tokenizer(vocabulary: Path | str) -> "Tokenizer":
    """BERT's lower-casing WordPiece tokenizer from a `vocab.txt`, which has a token per line.

    Raises ValueError for a file that cannot be read or whose special tokens are not where
    GroundingDINO expects them.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    try:
        with open(vocabulary, "rb") as file:
            data = file.read(_MOST_VOCABULARY + 1)
        if len(data) > _MOST_VOCABULARY:
            raise ValueError(f"{vocabulary} has more than {_MOST_VOCABULARY:,} bytes")
        # lines as text files have them on every system
        tokens = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{vocabulary} cannot be read: {reason}") from error
    for number, token in _TOKENS.items():
        if len(tokens) <= number or tokens[number] != token:
            raise ValueError(
                f"{vocabulary} is not a vocabulary of BERT's: its line {number + 1} must be {token}"
            )
    numbers = {token: number for number, token in enumerate(tokens) if token.strip()}
    result = Tokenizer(models.WordPiece(numbers, unk_token=_TOKENS[_UNKNOWN]))
    result.normalizer = normalizers.BertNormalizer(lowercase=True)
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return result


def text_inputs(labels: Sequence[str], tokenizer: "Tokenizer") -> TextInputs:
    """The inputs of a prompt of `labels`, in their order.

    Raises ValueError for no labels, for one that is empty, unknown altogether or like another, and
    for more than WINDOW tokens.
    """
    if not labels:
        raise ValueError("no labels: give at least one")
    ids, spans, known = [_START], [], {}
    for number, label in enumerate(labels):
        # one by one, so that it is known which tokens are whose
        pieces = tokenizer.encode(_plain(label), add_special_tokens=False).ids
        shown = " ".join(label.split())  # a message has one line
        shown = shown if len(shown) <= 80 else shown[:79] + "…"
        if not pieces:
            raise ValueError(f"label {number} is empty: give a word")
        if set(pieces) == {_UNKNOWN}:
            raise ValueError(
                f"label '{shown}' is unknown to the detector's vocabulary: use other words"
            )
        if tuple(pieces) in known:
            raise ValueError(
                f"label '{shown}' reads like '{known[tuple(pieces)]}': give each label once"
            )
        known[tuple(pieces)] = shown
        spans.append((len(ids), len(ids) + len(pieces)))
        ids += [*pieces, _STOP]
        if len(ids) >= WINDOW:  # before more are read, however many there are
            raise ValueError(
                f"the {len(labels)} labels make more than {WINDOW} tokens, which are not "
                "accepted: give fewer or shorter ones"
            )
    ids.append(_END)
    label_map = np.zeros((len(labels), len(ids)), np.float32)
    for row, (start, end) in zip(label_map, spans, strict=True):
        row[start:end] = 1 / (end - start)
    tokens = np.array([ids], np.int64)
    return TextInputs(tokens, *phrases(tokens), label_map)


def phrases(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`self_mask` [B, T, T] and `position_ids` [B, T] of tokens [B, T].

    A phrase reaches from one special token to the next, which belongs to it. The first and the last
    token, and what no special token ends, see themselves alone.
    """
    length = ids.shape[1]
    places = np.arange(length)
    special = np.isin(ids, (_START, _END, _STOP, _QUESTION))
    until = np.where(special, places, -1)
    before = np.concatenate(
        [np.full((len(ids), 1), -1), np.maximum.accumulate(until, axis=1)[:, :-1]], axis=1
    )
    ends = np.where(special, places, length)
    end = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    inside = (end > 0) & (end < length - 1)
    mask = (end[:, :, None] == end[:, None, :]) & inside[:, None, :]
    mask |= np.eye(length, dtype=bool)
    return mask, np.where(inside, places - before - 1, 0).astype(np.int64)


def detections(
    logits: np.ndarray,
    boxes: np.ndarray,
    label_map: np.ndarray,
    top: int = 300,
    threshold: float = 0.0,
) -> Detections:
    """The `top` best pairs of a box and a label whose score exceeds `threshold`.

    `logits` [Q, K] of each box's tokens, of which the first T are the prompt's; `boxes` [Q, 4]:
    centre x and y, width and height as shares of the image; `label_map` [C, T]. A label's score is
    the mean probability of its tokens, as GroundingDINO is evaluated on COCO.
    """
    scores = (
        (probabilities(logits[:, : label_map.shape[1]]) @ label_map.T.astype(np.float64))
        .ravel()
        .astype(np.float32)
    )
    order = np.argsort(-scores, kind="stable")[:top]
    order = order[scores[order] > np.float32(threshold)]
    rows, labels = np.divmod(order, len(label_map))
    centres, sides = boxes[rows, :2].astype(np.float64), boxes[rows, 2:].astype(np.float64)
    edges = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return Detections(
        scores[order],
        labels.astype(np.int64),
        np.clip(edges, 0, 1).astype(np.float32),
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Of tokens, float64; 0 for those beyond the text, whose logits are -inf."""
    # 1 / (1 + exp(-x)) without overflow
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def _plain(label: str) -> str:
    """A label as a prompt has it."""
    return " ".join(re.sub(r"[.?]", " ", label).lower().split())
