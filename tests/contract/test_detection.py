"""Prompts, masks and label maps are those of transformers' GroundingDINO; detections are those of
its protocol on COCO.
"""

import numpy as np
import pytest

from contract.detection import WINDOW, detections, phrases, prompt, read_tokenizer, text_inputs

SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
WORDS = ["st", "bernard", "cat", "tea", "##pot", "a", "##b", "dog", "[", "]", "sep", "cls", "-"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokens = [SPECIAL.get(number, f"[unused{number}]") for number in range(1030)] + WORDS
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return read_tokenizer(path)


@pytest.mark.slow
def test_masks_and_positions_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    import torch

    random = np.random.default_rng(0)
    for _ in range(300):
        ids = random.choice([7, 8, 9, 101, 102, 1012, 1029, 0], size=(2, random.integers(1, 14)))
        mask, places = modeling.generate_masks_with_special_tokens_and_transfer_map(
            torch.from_numpy(ids), torch.tensor(modeling.SPECIAL_TOKENS)
        )
        for own, theirs in zip(phrases(ids), (mask, places), strict=True):
            np.testing.assert_array_equal(own, theirs.numpy())


def test_labels_own_their_pieces(tokenizer):
    inputs = text_inputs(["Cat", "St. Bernard", "teapot", "a b-cat?"], tokenizer)
    tokens = [tokenizer.id_to_token(number) for number in inputs.ids[0]]
    words = ["cat", ".", "st", "bernard", ".", "tea", "##pot", ".", "a", "[UNK]", "-", "cat", "."]
    assert tokens == ["[CLS]", *words, "[SEP]"]
    owned = [[tokens[n] for n in row.nonzero()[0]] for row in inputs.label_map]
    assert owned == [["cat"], ["st", "bernard"], ["tea", "##pot"], ["a", "[UNK]", "-", "cat"]]
    np.testing.assert_allclose(inputs.label_map.sum(1), 1, rtol=1e-6)
    assert inputs.label_map.dtype == np.float32 and inputs.ids.dtype == np.int64


def test_the_prompt_is_tokenised_as_a_whole_too(tokenizer):
    labels = ["Cat", " St. Bernard ", "teapot", "dog?"]
    assert prompt(labels) == "cat. st bernard. teapot. dog."
    whole = tokenizer.encode(prompt(labels)).ids
    assert [101, *whole, 102] == text_inputs(labels, tokenizer).ids[0].tolist()


def test_special_tokens_cannot_be_spelt_in_a_label(tokenizer):
    tokens = [tokenizer.id_to_token(n) for n in text_inputs(["[SEP] cat"], tokenizer).ids[0]]
    assert tokens == ["[CLS]", "[", "sep", "]", "cat", ".", "[SEP]"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels"),
        (["cat", " . "], "label 1 is empty"),
        (["cat", "猫"], "'猫' is unknown to the detector's vocabulary"),
        (["St. Bernard", "dog", "st bernard"], "'st bernard' reads like 'St. Bernard'"),
        (["cat\ncat", "cat \u2028 cat"], "'cat cat' reads like 'cat cat'"),
        (["猫\n" * 99], "label '(猫 ){39}猫…' is unknown"),
        ([" ".join(["cat"] * n) for n in range(1, 23)], "the 22 labels make more than 256 tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(tokenizer, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        text_inputs(labels, tokenizer)
    assert len(str(error.value).splitlines()) == 1


def test_a_prompt_may_fill_the_window(tokenizer):
    assert text_inputs([" ".join(["cat"] * (WINDOW - 3))], tokenizer).ids.shape == (1, WINDOW)


def test_a_vocabulary_of_windows_is_read(tokenizer, tmp_path):
    tokens = [tokenizer.id_to_token(number) or f"[gone{number}]" for number in range(1042)]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(tokens).encode())
    assert read_tokenizer(tmp_path / "vocab.txt").encode("teapot").tokens == ["tea", "##pot"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"cat\ndog\n"])
def test_other_files_are_not_vocabularies(tmp_path, content):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="vocab.txt"):
        read_tokenizer(path)


def test_detections_are_the_best_pairs_of_box_and_label():
    logits = np.full((3, WINDOW), -np.inf, np.float32)
    logits[:, :4] = [[0, 9, 1, 0], [0, -3, 2, 2], [0, -800, 800, 800]]
    boxes = np.array([[0.5, 0.5, 1, 1], [0.1, 0.2, 0.4, 0.2], [0.5, 0.5, 0, 0]], np.float32)
    label_map = np.array([[0, 1, 0, 0], [0, 0, 0.5, 0.5]], np.float32)
    found = detections(logits, boxes, label_map, threshold=0.5)
    np.testing.assert_array_equal(found.labels, [1, 0, 1, 1])
    sigmoid = 1 / (1 + np.exp(-np.array([9.0, 2, 1, 0])))
    scores = [1, sigmoid[0], sigmoid[1], (sigmoid[2] + sigmoid[3]) / 2]
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)
    np.testing.assert_allclose(found.boxes[2], [0, 0.1, 0.3, 0.3], atol=1e-7)
    np.testing.assert_allclose(found.boxes[0], 0.5)
    assert len(detections(logits, boxes, label_map).scores) == 5  # one score is 0
    assert len(detections(logits, boxes, label_map, top=2).scores) == 2
    nothing = detections(logits, boxes, label_map, threshold=1.0)
    assert nothing.boxes.shape == (0, 4) and not len(nothing.scores) and not len(nothing.labels)
