"""Teachers of own code: what their functions may return, and one line for all else."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from contract.errors import UserError
from distill.config import TeacherConfig, TeacherRuntime
from distill.evaluate.encoder import named_encoder
from distill.features import FeatureDims
from distill.teachers import Teacher, build_teacher, weights_source

HERE = "python:tests.distill.teachers.own_networks"


def build(function: str, **settings: object) -> Teacher:
    config = TeacherConfig(name=f"{HERE}:{function}", role="dino", alias="own", **settings)
    return build_teacher(config, TeacherRuntime(), 0)


@pytest.mark.parametrize(
    ("returns", "dims"),
    [
        ("features", FeatureDims(12, 12)),
        ("tuple", FeatureDims(None, 12)),
        ("dict", FeatureDims(12, 12)),
        ("maps", FeatureDims(None, 12, (12,))),
    ],
)
def test_every_documented_output_becomes_features(returns, dims):
    teacher = build("grid", kwargs={"returns": returns})
    assert (teacher.dims, teacher.grid, teacher.image_size) == (dims, (4, 4), 32)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    expected = teacher.net.net.convolution(teacher.preprocess(images)).permute(0, 2, 3, 1)
    torch.testing.assert_close(teacher(images).patches, expected)
    assert teacher.preprocess.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_recipe_states_what_the_function_does_not():
    data = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "image_size": 40}
    teacher = build("bare", kwargs={"width": 6, "pretrained": False}, **data)
    assert (teacher.dims.patches, teacher.grid) == (6, (5, 5))
    for name in data:
        missing = {key: value for key, value in data.items() if key != name}
        with pytest.raises(UserError, match=rf"state its {name}: set teachers\.0\.{name}$"):
            build("bare", **missing)


def test_random_weights_are_the_same_each_time_and_a_network_may_have_none():
    assert build("grid").fingerprint() == build("grid").fingerprint()
    assert build("edges").dims == FeatureDims(None, 3)


def test_what_changes_the_teacher_changes_its_identity(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "their_network.py"
    source = "from tests.distill.teachers.own_networks import grid\n"
    file.write_text(source)

    def teacher(**settings: object) -> Teacher:
        sys.modules.pop("their_network", None)
        config = TeacherConfig(name="python:their_network:grid", role="dino", **settings)
        return build_teacher(config, TeacherRuntime(), 0)

    first = teacher()
    assert teacher(alias="other", licence="mit").identity() == first.identity()
    assert teacher(kwargs={"width": 12}).identity() != first.identity()
    file.write_text(source + "# scaled by two\n")
    second = teacher()
    other = TeacherConfig(name="python:tests.distill.teachers.own_networks:other", role="dino")
    this = other.model_copy(update={"name": other.name.replace("other", "grid")})
    one, two = (build_teacher(each, TeacherRuntime(), 0) for each in (this, other))
    assert one.fingerprint() == two.fingerprint() and one.identity() != two.identity()
    assert second.identity() != first.identity() and second.fingerprint() != first.fingerprint()
    assert weights_source(second.config) == "own code, their_network:grid"


SIBLING = """
import torch
from torch import nn

class Base(nn.Module):
    def forward(self, pixels):
        return None, self.part(pixels).permute(0, 2, 3, 1)

class Part(nn.Conv2d):
    pass
"""

NETWORK = """
from their_parts.parts import Base, Part

class Network(Base):
    def __init__(self):
        super().__init__()
        self.part = Part(3, 4, 8, 8)

def network():
    return Network(), {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
"""


def test_a_file_beside_the_function_s_changes_the_key_of_a_cache_and_its_place_does_not(
    tmp_path, monkeypatch
):
    keys = []
    for place, sibling in (("a", SIBLING), ("b", SIBLING), ("c", SIBLING + "# other\n")):
        folder = tmp_path / place / "their_parts"
        folder.mkdir(parents=True)
        (folder / "parts.py").write_text(sibling)
        (folder / "network.py").write_text(NETWORK)
        for name in [name for name in sys.modules if name.startswith("their_parts")]:
            del sys.modules[name]
        config = TeacherConfig(name="python:their_parts.network:network", role="dino")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / place))
            teacher = build_teacher(config, TeacherRuntime(), 0)
        keys.append((teacher.fingerprint(), teacher.identity()))
    assert keys[0] == keys[1]
    assert keys[2][0] != keys[0][0] and keys[2][1] != keys[0][1]


@pytest.mark.parametrize(
    ("function", "settings", "words"),
    [
        ("missing", {}, "has no 'missing': "),
        ("DATA", {}, "is not a function but a value of type dict"),
        ("number", {}, "returns int, not a torch.nn.Module"),
        ("failing", {}, "raised FileNotFoundError (weights/mine.pth is missing, "),
        ("ending", {}, "raised SystemExit (0, "),
        ("leaving", {}, "fails on pictures [2, 3, 32, 32] (SystemExit"),
        ("grid", {"kwargs": {"depth": 3}}, "called with (depth=3) raised TypeError ("),
        ("narrow", {}, "fails on pictures [2, 3, 32, 32] (RuntimeError"),
        ("dropping", {}, "differ between two calls"),
        ("grid", {"kwargs": {"returns": "keys"}}, "returns the keys tokens: return Features"),
        ("grid", {"kwargs": {"returns": "none"}}, "returns None: return Features"),
        ("grid", {"kwargs": {"returns": "list"}}, "returns a list of 2: return Features"),
        ("grid", {"kwargs": {"returns": "text"}}, "its summary are a str, not a tensor [B, d]"),
        ("grid", {"kwargs": {"returns": "second"}}, "a second summary"),
        (
            "grid",
            {"kwargs": {"returns": "tokens"}},
            "its patches have the shape [2, 16, 12] for 2 pictures, tokens without a grid: "
            "[B, h, w, d] is needed",
        ),
        ("grid", {"kwargs": {"returns": "wide"}}, "its summary have the shape [1, 12] for 2"),
        ("grid", {"kwargs": {"returns": "numbers"}}, "patches are torch.int64, not floating"),
        ("grid", {"kwargs": {"returns": "nan"}}, "are not finite"),
        ("stating", {"kwargs": {"mena": [1, 2, 3]}}, "states mena: use size, mean, std"),
        ("stating", {"kwargs": {"mean": [1, 2]}}, "states mean = [1, 2]: give three numbers"),
        ("stating", {"kwargs": {"std": [0, 1, 1]}}, "states std = [0, 1, 1]"),
        ("stating", {"kwargs": {"size": "224"}}, "states size = '224'"),
        ("grid", {"checkpoint": "a.pth"}, "teachers.0.checkpoint is not for own code"),
        ("grid", {"block": 2}, "teachers.0.block is for timm models"),
        ("grid", {"dim": 3}, "set teachers.0.dim=12"),
    ],
)
def test_what_is_wrong_is_one_line(function, settings, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        build(function, **settings)
    assert "\n" not in str(error.value) and "teacher 'own'" in str(error.value)


def test_a_module_that_does_not_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "script_network.py").write_text("import sys\nsys.exit(2)\n")
    (tmp_path / "broken_network.py").write_text("import torch\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (
        ("script_network:net", r"ends the program \(SystemExit \(2, .*py:2\)\): put what it does"),
        ("nowhere.to_be_found:net", "there is no module 'nowhere'"),
        (
            "broken_network:net",
            r"raised ZeroDivisionError \(division by zero, .*broken_network\.py:2\)",
        ),
    ):
        config = TeacherConfig(name=f"python:{name}", role="dino")
        with pytest.raises(UserError, match=words):
            build_teacher(config, TeacherRuntime(), 0)
    for name in ("python:", "python:net", "python:a.b", "python:a:b:c", "python:a/b:c"):
        with pytest.raises(ValueError, match="name = python:"):
            TeacherConfig(name=name, role="dino")


def test_own_code_is_evaluated_by_its_name():
    encoder = named_encoder(f"{HERE}:grid")
    assert encoder.stride == 8 and not encoder.is_bare and encoder.takes(64, 48)


def test_the_example_of_the_documentation_is_complete(tmp_path, monkeypatch):
    text = Path("docs/teachers.md").read_text()
    code = re.search(r"```python\n(import torch.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_teachers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    from my_teachers import MedicalViT

    shape = {"width": 16, "depth": 1, "heads": 2}
    weights = str(tmp_path / "medical.safetensors")
    save_file(MedicalViT(**shape).state_dict(), weights)
    entry = re.search(r"```yaml\nteachers:\n(  - name: python:my_teachers.*?)```", text, re.DOTALL)[
        1
    ]
    (values,) = yaml.safe_load(entry)
    values["kwargs"] = {"weights": weights, **shape}
    teacher = build_teacher(TeacherConfig(**values), TeacherRuntime(), 0)
    assert (teacher.dims, teacher.grid) == (FeatureDims(16, 16), (14, 14))
