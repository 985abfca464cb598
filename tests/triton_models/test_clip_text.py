"""Tokens and prompt ensembles without torch: the ids of open_clip's own tokenizer, for whatever
people type.
"""

import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers, ftfy and regex are not installed")
open_clip = pytest.importorskip("open_clip", reason="the optional extra [text] is not installed")

from open_clip.tokenizer import SimpleTokenizer, default_bpe  # noqa: E402

from triton_models.clip_text import BadLabel, ClipTokenizer, embed  # noqa: E402

WORDS = [
    "a photo of a cat.",
    "golden retriever",
    "Mother's day",
    "they'll, we've, I'D, don't",
    "U.S.A. 1,234.56",
    "naïve café",
    "Zürich Straße",
    "日本語のテキスト",
    "안녕하세요 세계",
    "Привет, мир!",
    "مرحبا بالعالم",
    "שלום",
    "नमस्ते दुनिया",
    "ภาษาไทย",
    "👩‍👩‍👧‍👦 family",
    "🇨🇭🚀✨",
    "e\u0301 decomposed",
    "ﬁ ligature",
    "½ ¾ Ⅷ ²",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp;",
    "&eacute;t&eacute; &#128512;",
    "cafÃ© mojibake",
    "â€œquotesâ€\x9d",
    "“curly” ‘quotes’",
    "tab\tand\nnewline\r\nand  spaces",
    "\u00a0nbsp\u2003em\u200bzero",
    "",
    " ",
    "!!!???...",
    "snake_case_name",
    "CamelCase",
    "<start_of_text> a <end_of_text>",
    "<|endoftext|>",
    "a" * 300,
    "supercalifragilisticexpialidocious " * 20,
    "ab" * 200,
    "\ufeffbom",
    "\x00\x07control",
    "ǅ titlecase İstanbul ẞ",
    "ˈaɪpiːeɪ",
    "𝔘𝔫𝔦",
    "{}",
    "x=y+z; f(a)[0]",
    "C++ & C#",
    "100% @home #tag ~/path",
    "\u0345 iota",
    "o\u035do",
    "１２３ ｆｕｌｌ",
    "\u0558 \ua7ce unassigned",
]


def description(tokenizer, clean="lower"):
    """What text_encoder.json says of open_clip's tokenizer."""
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    return {
        "vocabulary_size": tokenizer.vocab_size,
        "context_length": 77,
        "pattern": tokenizer.pat.pattern,
        "clean": clean,
        "pad_id": 0,
        "start": {"token": tokenizer.decoder[start], "id": start},
        "end": {"token": tokenizer.decoder[end], "id": end},
    }


def typed(count):
    """Strings of letters of every script, numbers, symbols, spaces and entities, at random."""
    chosen = random.Random(0)
    planes = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x250, 0x3000),
        (0x3000, 0xD7FF),
        (0xE000, 0x10000),
        (0x10000, 0x20000),
    ]
    for _ in range(count):
        letters = [
            chr(chosen.randrange(*chosen.choice(planes))) for _ in range(chosen.randrange(1, 60))
        ]
        pieces = [
            chosen.choice(["", " ", "'s", "&amp;", "the ", "7"]) + letter for letter in letters
        ]
        yield "".join(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_tokens_are_those_of_open_clip(clean):
    theirs = SimpleTokenizer(clean=clean)
    ours = ClipTokenizer(description(theirs, clean), Path(default_bpe()).read_bytes())
    texts = [*WORDS, *typed(500)]
    assert any(unicodedata.category(letter) == "Cn" for text in texts for letter in text), (
        "unassigned letters too"
    )
    found, wanted = ours(texts), theirs(texts, context_length=77).numpy()
    assert found.dtype == np.int64
    wrong = [
        text for text, a, b in zip(texts, found, wanted, strict=True) if not np.array_equal(a, b)
    ]
    assert wrong == []
    assert (wanted[:, -1] == theirs.eot_token_id).any(), (
        "some are cut off, or the comparison shows nothing of that"
    )


def test_a_vocabulary_of_another_model_is_refused():
    about = description(SimpleTokenizer()) | {"vocabulary_size": 40000}
    with pytest.raises(ValueError, match="not the one"):
        ClipTokenizer(about, Path(default_bpe()).read_bytes())


def test_labels_are_ensembled_over_templates_in_any_number_of_calls():
    tokenizer = ClipTokenizer(description(SimpleTokenizer()), Path(default_bpe()).read_bytes())
    sizes, table = [], np.random.default_rng(0).standard_normal((49408, 8))

    def encode(tokens):
        sizes.append(len(tokens))
        vectors = table[tokens].sum(axis=1)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    labels, templates = [f"thing {n}" for n in range(50)], ["a {}.", "{} {}", "no {nobody} in a {}"]
    found = embed(labels, templates, tokenizer, encode)
    assert sizes == [64, 64, 22]
    one = encode(tokenizer(["a thing 7.", "thing 7 thing 7", "no {nobody} in a thing 7"])).mean(
        axis=0
    )
    np.testing.assert_allclose(found[7], one / np.linalg.norm(one), atol=1e-6)


def test_a_label_whose_end_would_be_cut_off_is_refused():
    tokenizer = ClipTokenizer(description(SimpleTokenizer()), Path(default_bpe()).read_bytes())
    with pytest.raises(BadLabel, match="80 tokens, the model reads 77"):
        embed(["very " * 77], ["a {}"], tokenizer, lambda tokens: tokens)
