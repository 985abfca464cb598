"""Recipes that start from another: what is merged, what of a base is left out, and every mistake in
one line.
"""

from pathlib import Path

import pytest
import yaml

from contract.errors import UserError
from distill.recipe_io import dump_recipe, load_recipe, parse_recipe, recipe_fields

GROUND = """\
method: sefa
student:
  name: vit_tiny_patch16_224
  kwargs: {embed_dim: 192, depth: 6}
teachers:
  - {name: resnet10t, role: classification}
  - {name: vit_tiny_patch16_224, role: mae}
sefa: {hidden: 32, ssl_weight: 0.25}
ssl: {prototypes: 64, locals: 2}
data: {kind: packaged-photos, crop_scale: [0.3, 1.0]}
train: {steps: 300, lr: 1.0e-3}
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A function that writes recipe files, and loads the first with overrides."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # bases are found from the file, not from here

    def load(texts: dict[str, str], *overrides: str):
        for name, text in ({"ground.yaml": GROUND} | texts).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return load_recipe(f"../{next(iter(texts))}", list(overrides))

    return load


def error_of(files, texts: dict[str, str]) -> str:
    """What a mistake in these files is answered with."""
    with pytest.raises(UserError) as raised:
        files(texts)
    message = str(raised.value)
    assert len(message.splitlines()) == 1 and message.startswith("../")
    return message


def test_a_file_changes_what_it_sets_and_no_more(files):
    text = "base: ground.yaml\nstudent: {kwargs: {depth: 3}}\nssl: {kind: ibot}\n"
    recipe = files({"mine.yaml": text})
    ground = parse_recipe(GROUND, "ground.yaml")
    assert recipe.student.kwargs == {"embed_dim": 192, "depth": 3}
    assert (recipe.ssl.kind, recipe.ssl.prototypes, recipe.ssl.locals) == ("ibot", 64, 2)
    for section in ("teachers", "sefa", "data", "train", "targets"):
        assert getattr(recipe, section) == getattr(ground, section)


def test_lists_are_replaced_as_a_whole(files):
    text = "base: ground.yaml\nteachers:\n  - {name: resnet18, role: dino}\n"
    recipe = files({"mine.yaml": text + "data: {crop_scale: [0.5, 1.0]}\n"})
    assert [teacher.name for teacher in recipe.teachers] == ["resnet18"]
    assert recipe.data.crop_scale == (0.5, 1.0)


def test_a_base_may_have_a_base_in_another_folder(files):
    middle = "base: ../ground.yaml\ntrain: {lr: 2.0e-3, steps: 7}\n"
    recipe = files(
        {"mine.yaml": "base: deep/middle.yaml\ntrain: {steps: 8}\n", "deep/middle.yaml": middle}
    )
    assert (recipe.train.lr, recipe.train.steps) == (2e-3, 8)


def test_a_base_may_be_a_shipped_recipe():
    recipe = parse_recipe("base: umt_vit_base\ntrain: {lr: 1.0e-3}\n", "mine.yaml")
    assert recipe.train.lr == 1e-3 and recipe.train.epochs == 300
    assert recipe.teachers == load_recipe("umt_vit_base", []).teachers


def test_overrides_work_on_the_merged_values(files):
    text = "base: ground.yaml\ntrain: {lr: 2.0e-3}\n"
    recipe = files({"mine.yaml": text}, "teachers.1.alias=mine", "train.lr=5e-3", "train.epochs=40")
    assert recipe.teachers[1].label == "mine" and recipe.train.lr == 5e-3
    assert (recipe.train.epochs, recipe.train.steps) == (40, None)


def test_steps_and_epochs_of_a_file_replace_the_bases(files):
    first = files({"mine.yaml": "base: ground.yaml\ntrain: {epochs: 40}\n"})
    assert (first.train.epochs, first.train.steps) == (40, None)
    second = files(
        {
            "other.yaml": "base: mine.yaml\ntrain: {steps: 9}\n",
            "mine.yaml": "base: ground.yaml\ntrain: {epochs: 40}\n",
        }
    )
    assert (second.train.epochs, second.train.steps) == (None, 9)
    both = {"mine.yaml": "base: ground.yaml\ntrain: {epochs: 40, steps: 9}\n"}
    assert "exactly one of train.steps and train.epochs" in error_of(files, both)


def test_another_method_leaves_the_sections_of_the_bases_behind(files):
    text = "base: ground.yaml\nmethod: unic\nunic: {hidden: 8}\n"
    unic = files({"mine.yaml": text})
    assert not {"sefa", "ssl"} & set(type(unic).model_fields) and unic.unic.hidden == 8
    # and does not bring them back
    back = files({"back.yaml": "base: mine.yaml\nmethod: sefa\n", "mine.yaml": text})
    assert (back.sefa.hidden, back.ssl.prototypes) == (2048, 65536)
    # as for the base's mistakes there
    wrong = GROUND.replace("hidden: 32", "hiden: 32")
    assert files({"mine.yaml": text, "ground.yaml": wrong}).method == "unic"


def test_a_dump_is_complete_and_has_no_base(files):
    recipe = files({"mine.yaml": "base: ground.yaml\nstudent: {drop_path: 0.1}\n"})
    text = dump_recipe(recipe)
    assert "base" not in yaml.safe_load(text) and parse_recipe(text, "dump") == recipe
    assert "base" not in {key for key, *_ in recipe_fields()}


def test_a_circle_of_bases_is_named(files):
    mine = {"mine.yaml": "base: other.yaml\n", "other.yaml": "base: deep/../mine.yaml\n"}
    message = error_of(files, mine | {"deep/x.yaml": GROUND})
    assert "mine.yaml is based on ../other.yaml is based on " in message
    assert "a circle: remove one of these bases" in message
    assert "circle" in error_of(files, {"mine.yaml": "base: mine.yaml\n"})


MISTAKES = [
    ("base: sefa_vit_smal\n", "mine.yaml: base: recipe 'sefa_vit_smal' is not shipped: did you"),
    ("base: none.yaml\n", "mine.yaml: base: recipe ../none.yaml: no such file"),
    ("base: [a, b]\n", 'mine.yaml: base = ["a", "b"]: name a shipped recipe or a .yaml file'),
    ("base: null\n", "mine.yaml: base = null: name a shipped recipe or a .yaml file"),
    ("base: list.yaml\n", 'list.yaml: a recipe is a mapping of keys, got ["a"]'),
    ("base: broken.yaml\n", "broken.yaml:2: not valid YAML"),
    (
        "base: ground.yaml\ntrain: {step: 1}\n",
        "mine.yaml, based on ../ground.yaml: unknown key 'train.step': did you mean 'train.steps'?",
    ),
    ("base: ground.yaml\nmethod: umx\n", 'method = "umx" is not known: did you mean '),
    ("base: ground.yaml\nmethod: [a]\n", 'method = ["a"] is not known: '),
    ("base: ground.yaml\ntrain: 3\n", "train = 3: Input should be a mapping of keys"),
    ("base: ground.yaml\ntrain.steps: 3\n", "unknown key 'train.steps'"),
]


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_wrong_base_or_file_is_one_line(files, text, expected):
    others = {"list.yaml": "- a\n", "broken.yaml": "train: {steps: 1\n"}
    assert expected in error_of(files, {"mine.yaml": text} | others)


def test_a_base_is_not_an_override():
    with pytest.raises(UserError, match="base is for recipe files: name the recipe to start from"):
        load_recipe("quickstart", ["base=umt_vit_base"])


def test_a_relative_base_needs_no_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ground.yaml").write_text(GROUND)
    assert parse_recipe("base: ground.yaml\n", "mine.yaml").method == "sefa"
