"""Revisited Oxford and Paris: average precision, ground-truth files (hostile ones too), a whole
data set, mistakes.
"""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from contract.errors import UserError, exit_status
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import Encoder
from distill.evaluate.plain_pickle import read_pickle
from distill.evaluate.retrieval import average_precision, evaluate

CONFIG = EvaluationConfig.model_validate(
    {"retrieval": {"size": 64}, "extract": {"batch_size": 5, "workers": 0}}
)
PHOTOS = ("chelsea", "astronaut", "coffee", "rocket")
SHIFTS = ((0, 0), (12, 4), (4, 14), (16, 16))


@pytest.mark.parametrize(
    ("positives", "ignored", "expected"),
    [
        ([4, 2], [], 1.0),
        ([4], [], 1.0),
        # rank 1: nothing found before, 1/2 after
        ([2], [], (0 + 1 / 2) / 2),
        # ranks 0 and 2: (1 + 1)/2 and (1/2 + 2/3)/2, averaged
        ([4, 0], [], (1 + (1 / 2 + 2 / 3) / 2) / 2),
        # junk before the second positive moves it up to rank 1
        ([4, 0], [2], 1.0),
        # rank 3 of 5, two junk before it: rank 1
        ([3], [4, 0], (0 + 1 / 2) / 2),
        # junk behind every positive changes nothing
        ([2], [1, 3], (0 + 1 / 2) / 2),
        # last of all: (0 + 1/5)/2
        ([1], [], 1 / 10),
    ],
)
def test_average_precision_by_hand(positives: list[int], ignored: list[int], expected: float):
    ranking = np.array([4, 2, 0, 3, 1])
    assert average_precision(ranking, positives, ignored) == pytest.approx(expected)


def slow_average_precision(ranking: list[int], positives: set[int], ignored: set[int]) -> float:
    """The original Oxford program's way: an area under precision over recall, grown picture by
    picture.
    """
    area, recall, precision, found, seen = 0.0, 0.0, 1.0, 0, 0
    for index in ranking:
        if index in ignored:
            continue
        seen += 1
        found += index in positives
        new_recall, new_precision = found / len(positives), found / seen
        area += (new_recall - recall) * (precision + new_precision) / 2
        recall, precision = new_recall, new_precision
    return area


@pytest.mark.parametrize("seed", range(40))
def test_average_precision_matches_an_independent_implementation(seed: int):
    random = np.random.default_rng(seed)
    size = int(random.integers(3, 60))
    labels = random.permutation(size)
    count, junk = int(random.integers(1, size)), int(random.integers(0, size)) if seed % 2 else 0
    positives, ignored = labels[:count].tolist(), labels[count : count + junk].tolist()
    ranking = random.permutation(size)
    expected = slow_average_precision(ranking.tolist(), set(positives), set(ignored))
    assert average_precision(ranking, positives, ignored) == pytest.approx(expected)


def test_average_precision_needs_a_positive():
    with pytest.raises(ValueError, match="needs a positive"):
        average_precision(np.arange(3), [], [1])


def ground_truth() -> dict:
    """Four photographs in four views each; the query is the first photograph of each, its box the
    first view.
    """
    names = [f"{photo}_{view}" for photo in PHOTOS for view in range(len(SHIFTS))]
    gnd = [
        {
            "bbx": [20.0, 30.0, 244.0, 254.0],
            "easy": [4 * i, 4 * i + 1],
            "hard": [4 * i + 2],
            "junk": [4 * i + 3],
        }
        for i in range(len(PHOTOS))
    ]
    return {"imlist": names, "qimlist": list(PHOTOS), "gnd": gnd}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    data = tmp_path / "photographs"
    (data / "jpg").mkdir(parents=True)
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        photo.save(data / "jpg" / f"{name}.jpg", quality=95)
        for view, (down, right) in enumerate(SHIFTS):
            crop = photo.crop((20 + right, 30 + down, 244 + right, 254 + down))
            crop.save(data / "jpg" / f"{name}_{view}.jpg", quality=95)
    return data


def write(data: Path, truth: dict) -> None:
    (data / "gnd_test.json").write_text(json.dumps(truth))


def test_photographs_end_to_end(tiny_vit, photographs, tmp_path):
    write(photographs, ground_truth())
    outcome = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    random = np.random.default_rng(0)
    chance = np.mean(
        [average_precision(random.permutation(16), [0, 1, 2], [3]) for _ in range(500)]
    )
    assert set(outcome.scores) == {"mAP medium", "mAP hard"}
    assert outcome.scores["mAP medium"] > chance + 0.3
    assert all(0 <= score <= 1 for score in (*outcome.scores.values(), outcome.details["mAP easy"]))
    assert [row["query"] for row in outcome.details["queries"]] == list(PHOTOS)
    medium = [row["medium"] for row in outcome.details["queries"]]
    assert outcome.scores["mAP medium"] == pytest.approx(np.mean(medium))
    assert outcome.files == (tmp_path / "out" / "retrieval.png",)
    with Image.open(outcome.files[0]) as picture:
        assert picture.width > 500


def test_the_box_is_what_is_looked_for(tiny_vit, photographs, tmp_path):
    # The view with no shift is the very crop that the box cuts out: it comes first, up to JPEG.
    truth = ground_truth()
    for i, entry in enumerate(truth["gnd"]):
        entry.update(easy=[4 * i], hard=[4 * i + 1, 4 * i + 2, 4 * i + 3], junk=[])
    write(photographs, truth)
    outcome = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    assert outcome.details["mAP easy"] == 1.0


def test_pictures_may_keep_their_shape_and_queries_be_whole(tiny_vit, photographs, tmp_path):
    write(photographs, ground_truth())
    given = {"size": 64, "shape": "kept", "query": "whole"}
    config = EvaluationConfig.model_validate({"retrieval": given, "extract": {"workers": 0}})
    seen = []
    with tiny_vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:])):
        outcome = evaluate(tiny_vit, photographs, config, tmp_path / "out")
    # two trials, four whole queries (451x300, 512x512, 600x400, 640x427), sixteen square crops
    assert [tuple(shape) for shape in seen[2:6]] == [(48, 64), (64, 64), (48, 64), (48, 64)]
    assert [tuple(shape) for shape in seen[6:]] == 16 * [(64, 64)]
    assert 0 <= outcome.scores["mAP medium"] <= 1


def test_queries_without_positives_are_left_out(tiny_vit, photographs, tmp_path):
    truth = ground_truth()
    write(photographs, truth)
    full = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    truth["gnd"][0].update(easy=[], hard=[])
    for entry in truth["gnd"]:
        entry["hard"] = []
    write(photographs, truth)
    outcome = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    assert set(outcome.scores) == {"mAP medium"}  # nobody has a hard positive
    assert outcome.details["queries"][0] == {
        "query": "chelsea",
        "easy": None,
        "medium": None,
        "hard": None,
    }
    assert len(full.details["queries"]) == len(outcome.details["queries"]) == 4


def as_numpy(truth: dict) -> dict:
    """The ground truth with numpy arrays, as in the official files."""
    gnd = [
        {
            "bbx": [np.float32(v) for v in e["bbx"]],
            **{k: np.array(e[k], np.int64) for k in ("easy", "hard", "junk")},
        }
        for e in truth["gnd"]
    ]
    return {**truth, "gnd": gnd}


@pytest.mark.parametrize("old_numpy", [False, True])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_with_numpy_load_like_json(protocol: int, old_numpy: bool, tmp_path):
    truth = ground_truth()
    truth["gnd"][0]["junk"] = []
    data = pickle.dumps(as_numpy(truth), protocol=protocol)
    if old_numpy:
        # numpy 1 calls the module numpy.core; protocols with length-prefixed names need the length
        # mended too
        if protocol < 4:
            data = data.replace(b"numpy._core.", b"numpy.core.")
        else:
            for part in (b"multiarray", b"numeric"):
                new, old = b"numpy._core." + part, b"numpy.core." + part
                data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)
            data = data[:2] + data[11:]  # the frame's length would be off; frames are optional
        assert b"_core" not in data
    path = tmp_path / "gnd_test.pkl"
    path.write_bytes(data)
    assert read_pickle(path) == truth


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["all_souls", "christ_church"]),
        np.array([True, False]),
        np.array(["a", 3, None], dtype=object),
        np.zeros((0,), np.uint8),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_every_kind_become_lists(array: np.ndarray, protocol: int, tmp_path):
    path = tmp_path / "gnd_test.pkl"
    path.write_bytes(pickle.dumps([array, {1, 2}], protocol=protocol))
    assert read_pickle(path) == [array.tolist(), {1, 2}]


def test_pickle_and_json_score_the_same(tiny_vit, photographs, tmp_path):
    write(photographs, ground_truth())
    from_json = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    (photographs / "gnd_test.json").unlink()
    (photographs / "gnd_test.pkl").write_bytes(pickle.dumps(as_numpy(ground_truth()), protocol=2))
    from_pickle = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    assert from_pickle.scores == from_json.scores and from_pickle.details == from_json.details


class Hostile:
    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, r"(posix|nt)\.system"), (eval, r"builtins\.eval"), (np.load, r"numpy\.load")],
)
def test_a_hostile_pickle_is_refused_and_not_run(call, name: str, photographs, tiny_vit, tmp_path):
    mark = tmp_path / "mark"
    arguments = (f"touch {mark}",) if call is os.system else (f"open({str(mark)!r}, 'w')",)
    truth = {**ground_truth(), "extra": Hostile(call, *arguments)}
    (photographs / "gnd_test.pkl").write_bytes(pickle.dumps(truth))
    with pytest.raises(UserError, match=f"refers to {name}") as error:
        evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    assert not mark.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [b"numpy.core.multiarray\nfromfile", b"numpy.core.builtins\nset", b"numeric\n_frombuffer"],
)
def test_no_other_name_passes(name: bytes, tmp_path):
    path = tmp_path / "gnd_test.pkl"
    path.write_bytes(b"c" + name + b"\n.")
    with pytest.raises(UserError, match="refers to"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(list(range(1000)))[:200]])
def test_a_damaged_pickle_is_named(content: bytes, tmp_path):
    path = tmp_path / "gnd_test.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="gnd_test.pkl is not a readable pickle"):
        read_pickle(path)


def with_entry(**changes):
    def spoil(data: Path, truth: dict) -> None:
        truth["gnd"][1].update(changes)

    return spoil


MISTAKES = {
    "index": (with_entry(easy=[16]), "index 16 under easy of query astronaut is not in 0..15"),
    "negative": (with_entry(junk=[-1]), "index -1 under junk"),
    "fraction": (with_entry(hard=[1.5]), "index 1.5 under hard"),
    "no list": (with_entry(hard=None), "query astronaut has no list hard"),
    "box": (with_entry(bbx=[1, 2, 3]), r"bbx of query astronaut is \[1, 2, 3\]"),
    "box outside": (
        with_entry(bbx=[600, 0, 700, 50]),
        "of query astronaut is outside its 512x512 picture",
    ),
    "missing": (
        lambda d, t: (d / "jpg" / "coffee_2.jpg").unlink(),
        "coffee_2.jpg is missing, one of 1",
    ),
    "damaged": (
        lambda d, t: (d / "jpg" / "coffee_2.jpg").write_bytes(b"\xff\xd8nothing"),
        "coffee_2.jpg cannot be read",
    ),
    "unpaired": (lambda d, t: t["gnd"].pop(), "qimlist has 4 queries, gnd 3 entries"),
    "no positives": (
        lambda d, t: [e.update(easy=[], hard=[]) for e in t["gnd"]],
        "no query of .* has a positive",
    ),
    "no key": (lambda d, t: t.pop("imlist"), "must be a dict with the lists"),
    "absolute": (
        lambda d, t: t["qimlist"].__setitem__(0, "/etc/a"),
        "qimlist must list at least one picture, by name",
    ),
    "empty": (lambda d, t: t["imlist"].clear(), "imlist must list at least one"),
    "two": (
        lambda d, t: (d / "gnd_other.pkl").write_bytes(b""),
        "exactly one .* gnd_other.pkl, gnd_test.json",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, tiny_vit, photographs, tmp_path):
    spoil, words = MISTAKES[mistake]
    truth = ground_truth()
    spoil(photographs, truth)
    write(photographs, truth)
    with pytest.raises(UserError) as error:
        evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_missing_and_broken_ground_truth(tiny_vit, photographs, tmp_path):
    with pytest.raises(UserError, match="exactly one .*; it has none"):
        evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")
    (photographs / "gnd_test.json").write_text("{")
    with pytest.raises(UserError, match="gnd_test.json is not JSON"):
        evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")


def test_features_that_are_not_finite_are_named(
    tiny_vit: Encoder, photographs, tmp_path, monkeypatch
):
    write(photographs, ground_truth())
    bias = tiny_vit.net.norm.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    with pytest.raises(UserError, match="tiny-vit: its summary features contain NaN or infinity"):
        evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out")


def test_features_are_extracted_once(tiny_vit: Encoder, photographs, tmp_path):
    seen = []
    hook = tiny_vit.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    write(photographs, ground_truth())
    first = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out", tmp_path / "kept")
    assert (
        sum(seen) == 16 + 4
        and (tmp_path / "kept").is_dir()
        and not (tmp_path / "out" / "cache").exists()
    )
    again = evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out", tmp_path / "kept")
    assert sum(seen) == 20 and again.scores == first.scores and again.details == first.details
    # another box makes other queries, and leaves the database as it is
    truth = ground_truth()
    truth["gnd"][2]["bbx"][0] += 50
    write(photographs, truth)
    evaluate(tiny_vit, photographs, CONFIG, tmp_path / "out", tmp_path / "kept")
    assert sum(seen) == 20 + 4
    hook.remove()


def test_decoding_processes_name_the_damaged_picture(tiny_vit, photographs, tmp_path, capsys):
    write(photographs, ground_truth())
    workers = CONFIG.model_copy(
        update={"extract": CONFIG.extract.model_copy(update={"workers": 1})}
    )
    (photographs / "jpg" / "coffee_2.jpg").write_bytes(b"\xff\xd8nothing")
    assert exit_status(lambda: evaluate(tiny_vit, photographs, workers, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be read" in said and "coffee_2.jpg" in said
