"""deploy/probe.py --golden judges as contract/golden.py does, in plain Python."""

import importlib.util
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from contract import positions
from contract.golden import GOLDEN, Golden, measure
from export.agreement import POSITIONS, RELATIVE, TOLERANCE
from serve.server.golden import DOORS
from tests.serve.running import Saying, answering

PROBE = Path(__file__).parents[2] / "deploy" / "probe.py"


def load_probe():
    spec = importlib.util.spec_from_file_location("vfm_probe", PROBE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


probe = load_probe()


def golden_of(outputs, precision="fp16", **changes):
    """A golden set with the bounds of a precision."""
    count = len(next(iter(outputs.values())))
    settings = {
        "bounds": (TOLERANCE[precision], RELATIVE[precision]),
        "positions": POSITIONS[precision],
        "pictures": tuple(f"{number}.png" for number in range(count)),
    } | changes
    image = np.zeros((count, 4, 4, 3), np.uint8)
    return Golden(image, outputs, precision=precision, **settings)


def said_of(golden, answers):
    """What the probe says of answers, "" if nothing is wrong."""
    data = golden.to_bytes()
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["golden"])
    for name, wanted in golden.outputs.items():
        for got, part in zip(answers[name], wanted, strict=True):
            shape = list(wanted.shape)
            if said := probe._compare(name, got.tobytes(), part.tobytes(), shape, about):
                return said
    return ""


def measured(golden, answers):
    return next((one.problem for one in measure(golden, answers) if one.problem), "")


def normal(*shape, mean=5.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def test_its_tables_are_those_of_the_code():
    assert set(probe._FLAT) == positions._FLAT
    assert probe._GOLDEN_DOORS == DOORS


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_one_wrong_position_of_a_map_is_refused(precision):
    wanted = normal(1, 1369, 768)
    golden = golden_of({"backbone_patches": wanted}, precision)
    assert said_of(golden, {"backbone_patches": wanted}) == ""
    got = wanted.copy()
    got[0, 700] = 0
    said = said_of(golden, {"backbone_patches": got})
    assert said.startswith("off by 0.99") and "at position 700 of 1369, at most 0." in said
    assert said in measured(golden, {"backbone_patches": got})


def test_a_map_with_a_single_number_at_every_position_is_judged_by_positions():
    wanted = normal(2, 4096)
    got = wanted.copy()
    got[1, 9] += 4
    for name, begins in (("depth", "off by "), ("classification_logits", "")):
        golden = golden_of({name: wanted}, "int8")
        said = said_of(golden, {name: got})
        assert said.startswith(begins) and bool(said) == bool(begins)
        assert said in measured(golden, {name: got})


def test_positions_are_not_judged_where_nobody_promised():
    wanted = normal(1, 400, 8)
    got = wanted.copy()
    got[0, 3] = 0
    answers = {"backbone_patches": got}
    for changes in ({"positions": None}, {"allowed": {"backbone_patches": (0.9, 0.5)}}):
        golden = golden_of({"backbone_patches": wanted}, "int8", **changes)
        assert said_of(golden, answers) == measured(golden, answers) == ""


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_it_agrees_with_the_server_on_random_perturbations(precision):
    """Of maps without a shift or a loss of variation, which the probe does not look for."""
    random, seen = np.random.default_rng(3), Counter()
    bounds = POSITIONS[precision]
    for round_ in range(300):
        count, width = int(random.integers(1, 400)), int(random.integers(2, 20))
        wanted = normal(2, count, width, mean=2.0, seed=round_)
        if round_ % 5 == 0:
            wanted[:, : count // 3] *= 1e-3  # judged by the median
        if round_ % 50 == 0:
            wanted[0] = 0  # no length anywhere
        lengths = np.linalg.norm(wanted, axis=-1, keepdims=True)
        noise = random.normal(0, 1, wanted.shape)
        noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
        errors = random.uniform(0, 0.2 * bounds.near, (2, count, 1))
        far = random.permutation(count)[: int(random.choice([0, 1, 2, 0.03 * count + 1]))]
        times = random.choice([0.9, 1.01]) * random.uniform(1, 1.09, (len(far), 1))
        errors[round_ % 2, far] = times * random.choice(bounds[:2])
        scale = np.maximum(lengths, np.median(lengths, axis=1, keepdims=True))
        got = (wanted + errors * scale * noise).astype(np.float32)
        golden = golden_of({"backbone_patches": wanted}, precision)
        said = said_of(golden, {"backbone_patches": got})
        server = measured(golden, {"backbone_patches": got})
        assert bool(said) == bool(server), (said, server)
        kinds = ("cosine", "at position", "positions are", "of its length")
        seen[next((kind for kind in kinds if kind in said), said)] += 1
        if "position" in said:
            assert said in server
    assert min(seen[kind] for kind in ("", "at position", "positions are")) > 10, seen


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
    wanted = normal(1, 50, 8)
    got = wanted.copy()
    got[0, 3, 2] = value
    for changes in ({}, {"allowed": {"backbone_patches": (-1.0, 1e9)}}):
        golden = golden_of({"backbone_patches": wanted}, **changes)
        assert said_of(golden, {"backbone_patches": got})
        assert measured(golden, {"backbone_patches": got})


@contextmanager
def serving(answers):
    """A server that answers picture n with `answers[model]["map"][n]`, because a real one's models
    give the same.
    """
    asked = Counter()

    class Answers(Saying):
        def do_GET(self):
            model = self.path.split("/")[3]
            config = {"version_policy": {"specific": {"versions": [1]}}}
            self.say(200 if model in answers else 400, json.dumps(config).encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            model = self.path.split("/")[3]
            values = answers[model][asked[model]].tobytes()
            asked[model] += 1
            sizes = {"binary_data_size": len(values)}
            head = json.dumps({"outputs": [{"name": "map", "parameters": sizes}]}).encode()
            self.say(200, head + values)

    with answering(Answers) as url:
        yield url, asked


def test_every_door_of_the_repository_is_asked(tmp_path):
    right = normal(3, 200, 8)
    wrong = right.copy()
    wrong[2, 150] = 0
    place = tmp_path / "features" / "1" / GOLDEN
    place.parent.mkdir(parents=True)
    place.write_bytes(golden_of({"map": right}, "int8").to_bytes())
    with serving({"features": right, "fused": wrong}) as (url, asked):
        assert probe.check_golden(url, str(tmp_path), 10) == ""
        assert asked == {"features": 3}, "a repository without `fused`"
    (tmp_path / "fused").mkdir()
    with serving({"features": right, "fused": right}) as (url, asked):
        assert probe.check_golden(url, str(tmp_path), 10) == ""
        assert asked == {"features": 3, "fused": 3}
    with serving({"features": right, "fused": wrong}) as (url, _):
        said = probe.check_golden(url, str(tmp_path), 10)
        assert said.startswith("'fused': output 'map' on 2.png: off by 1 of its length at position")
    with serving({"features": right}) as (url, _):
        assert probe.check_golden(url, str(tmp_path), 10).endswith("'fused' is not ready")
