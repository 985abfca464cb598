"""CLIP's text side without torch: labels become sentences, sentences tokens, their embeddings one
vector a label.

`export.text` does the same in torch when a bundle is made; this is for labels that come later.
Copied next to the model `text_encoder` in a repository, so it must not import anything of this
package.
"""

import html
import string
import zlib
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
import regex
from tokenizers import Tokenizer, models, pre_tokenizers

_PLACE = "{}"
"""Where the label goes in a template."""

BYTES = 512
"""Tokens of single bytes, inside and at the end of a word: they come first in CLIP's vocabulary,
then the merges.
"""

_WORDS = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP cuts text into, beside its special tokens."""

_MOST_VOCABULARY = 32 * 2**20
"""Bytes of a vocabulary, unpacked: CLIP's has 3 MB."""

_PROMPTS = 64
"""Sentences the graph reads at once: more would hold more memory and be no faster."""


class BadLabel(ValueError):
    """A label that no embedding can be made of; the message goes to the sender."""


class ClipTokenizer:
    """CLIP's byte-pair encoding as `text_encoder.json` describes it: the ids of open_clip's
    SimpleTokenizer.
    """

    def __init__(self, about: dict, vocabulary: bytes) -> None:
        """Build it from the sidecar's `tokenizer` and the bytes of `bpe_simple_vocab_16e6.txt.gz`.

        Raises ValueError where the two do not belong together.
        """
        specials = {about[end]["token"]: about[end]["id"] for end in ("start", "end")}
        count = about["vocabulary_size"] - BYTES - len(specials)
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)  # gzip
        try:
            text = unpack.decompress(vocabulary, _MOST_VOCABULARY).decode("utf-8")
        except zlib.error as error:
            raise ValueError(f"the vocabulary cannot be unpacked ({error})") from error
        if unpack.unconsumed_tail:
            raise ValueError(f"the vocabulary is larger than {_MOST_VOCABULARY:,} bytes")
        lines = text.split("\n")
        merges = [
            tuple(line.split()) for line in lines[1 : count + 1]
        ]  # the first line is a comment
        letters = list(_byte_letters().values())
        tokens = [
            *letters,
            *(letter + "</w>" for letter in letters),
            *("".join(pair) for pair in merges),
            *specials,
        ]
        ids = {token: number for number, token in enumerate(tokens)}
        if any(ids[token] != number for token, number in specials.items()):
            raise ValueError("the vocabulary is not the one that text_encoder.json was written for")
        self.specials, self.context, self.pad = specials, about["context_length"], about["pad_id"]
        self.start, self.end = about["start"]["id"], about["end"]["id"]
        self.clean = _CLEAN[about["clean"]]
        # words are cut by `regex`, as in open_clip: the library's own expressions know another
        # Unicode version's letters. The expression is open_clip's, not the file's: one that a
        # stranger wrote could take hours for a sentence
        pattern = "|".join(specials) + _WORDS
        if about["pattern"] != pattern:
            raise ValueError(f"words are cut by another expression than open_clip's {pattern!r}")
        self.pattern = regex.compile(pattern, regex.IGNORECASE)
        self.bpe = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the start and end."""
        result: list[int] = []
        for word in self.pattern.findall(self.clean(text)):
            special = self.specials.get(word)
            result += self.bpe.encode(word).ids if special is None else [special]
        return result

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids int64 [n, context] with start, end and padding; a text that is too long loses
        its end.
        """
        ids = np.full((len(texts), self.context), self.pad, np.int64)
        for row, text in zip(ids, texts, strict=True):
            inside = self.encode(text)[: self.context - 2]
            row[: len(inside) + 2] = [self.start, *inside, self.end]
        return ids


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in CLIP's vocabulary (GPT-2's table), in the
    vocabulary's order.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def fix_text(text: str) -> str:
    """Undo wrong decoding and HTML entities, and make every run of whitespace one space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def canonicalize(text: str) -> str:
    """Lower case without punctuation (CLIPA's way)."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(
        fixed.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower().split()
    )


_CLEAN: dict[str, Callable[[str], str]] = {
    "lower": lambda text: fix_text(text).lower(),
    "whitespace": fix_text,
    "canonicalize": canonicalize,
}
"""open_clip's ways of cleaning a text, by the sidecar's names."""


def prompts(label: str, templates: Sequence[str], tokenizer: ClipTokenizer) -> list[str]:
    """A label in every template; raises BadLabel where a sentence has more tokens than the model
    reads.
    """
    sentences = [template.replace(_PLACE, label) for template in templates]
    longest = max(len(tokenizer.encode(sentence)) for sentence in sentences) + 2
    if longest > tokenizer.context:  # its end would be cut off silently
        raise BadLabel(
            f"label '{label[:40]}…' makes a sentence of {longest} tokens, the model reads "
            f"{tokenizer.context}: use fewer words"
        )
    return sentences


def embed(
    labels: Sequence[str],
    templates: Sequence[str],
    tokenizer: ClipTokenizer,
    encode: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Embeddings float32 [n, d] of labels, normalised: the mean over the templates of the
    sentences' unit vectors.

    `encode` maps token ids int64 [B, context] to unit vectors float32 [B, d]. Raises BadLabel for
    one that is too long.
    """
    tokens = tokenizer(
        [sentence for label in labels for sentence in prompts(label, templates, tokenizer)]
    )
    parts = [encode(tokens[start : start + _PROMPTS]) for start in range(0, len(tokens), _PROMPTS)]
    mean = np.concatenate(parts).reshape(len(labels), len(templates), -1).mean(axis=1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
