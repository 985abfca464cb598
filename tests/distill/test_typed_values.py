"""`key=value` is what was typed, by the field's type; in files, words of two readings are refused
where no type decides.
"""

import pytest

from contract.errors import UserError
from distill.evaluate.settings import load_settings
from distill.recipe_io import dump_recipe, parse_recipe, values_taken

TEXT = """\
student:
  name: vit_tiny_patch16_224
teachers:
  - {name: mobilenetv2_100, role: classification, alias: cls}
data: {kind: packaged-photos}
train: {steps: 300}
"""

TAKEN = [
    # text: what YAML would drop, convert or refuse
    ("data.path=/a b #2", "/a b #2"),
    ("data.path=/a: b", "/a: b"),
    ("data.path= /x ", " /x "),
    ("data.path=no", "no"),
    ("data.path=123", "123"),
    ("data.path={a}", "{a}"),
    ("data.path=/it's", "/it's"),
    ("student.checkpoint=012", "012"),
    ("student.checkpoint=2024-01-01", "2024-01-01"),
    ("student.checkpoint=*x", "*x"),
    ("student.checkpoint=null", None),
    ("student.name=1e5", "1e5"),
    ("teachers.0.alias=on", "on"),
    # switches and numbers
    ("train.tensorboard=yes", True),
    ("train.tensorboard=Off", False),
    ("train.channels_last=no", False),
    ("train.channels_last=auto", "auto"),
    ("umt.cross_space=off", False),
    ("train.steps=012", 12),
    ("train.steps=1_000", 1000),
    ("train.steps=1e3", 1000),
    ("train.seed= 5 ", 5),
    ("train.lr=1e-3", 1e-3),
    ("train.lr=012.5", 12.5),
    # lists and mappings
    ("data.crop_scale=[.5,1]", [0.5, 1.0]),
    ("data.path=[a b, no, 2024-01-01]", ["a b", "no", "2024-01-01"]),
    ('data.path=["a #2", b#c]', ["a #2", "b#c"]),
    ("student.kwargs={a: 1, b: [x, true], c: 'no'}", {"a": 1, "b": ["x", True], "c": "no"}),
    # a value without a type
    ("student.kwargs.a=x #2", "x #2"),
    ("student.kwargs.a='012'", "012"),
    ("student.kwargs.a=1e-3", 1e-3),
]


@pytest.mark.parametrize(("override", "value"), TAKEN, ids=[override for override, _ in TAKEN])
def test_a_value_is_what_was_typed(override, value):
    recipe = parse_recipe(TEXT, "mine.yaml", [override])
    assert values_taken(recipe, [override]) == [(override.partition("=")[0], value)]
    assert parse_recipe(dump_recipe(recipe), "dump") == recipe


REFUSED = [
    ("train.steps=12:30:00", "valid integer"),
    ("train.steps=2024-01-01", "valid integer"),
    ("train.steps=true", "true is a switch"),
    ("train.betas=[0.9, true]", "true is a switch"),
    ("train.lr=nan", "finite number"),
    ("data.path=", "is empty"),
    ("train.steps= ", "is empty"),
    ("data.path='x y'", "in quotes twice"),
    ("teacher_cache.path=~/cache", "write $HOME/cache"),
    ("student.kwargs.a=no", "write false, or 'no' in quotes"),
    ("student.kwargs.a=012", "write 10, or '012' in quotes"),
    ("student.kwargs={a: 12:30}", "write 750, or '12:30' in quotes"),
    ("student.kwargs={a: [1_0]}", "student.kwargs.a.0 = 1_0"),
    ("student.kwargs={a:1}", "'a:1' has no value"),
    ("student.kwargs={a: 1, a: 2}", "'a' is given twice"),
    ("student.kwargs={a: !!str 1}", "refers to something in YAML"),
    ("student.kwargs={a: 1} # b", "would be a comment"),
    ("data.path=[a, b #2]", "not valid YAML"),
    ("data.path=[a, # b\nc]", "would be a comment"),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[override for override, _ in REFUSED])
def test_what_can_be_read_in_two_ways_is_refused_in_one_line(override, words):
    with pytest.raises(UserError) as raised:
        parse_recipe(TEXT, "mine.yaml", [override])
    message = str(raised.value)
    assert words in message and override.partition("=")[0] in message


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("alias: no", {"alias": "no"}),
        ("pretrained: no", {"pretrained": False}),
        ("image_size: 012", {"image_size": 12}),
        ("alias: null", {}),
        ("kwargs: {a: 'no', b: true, c: 1e-3}", {"kwargs": {"a": "no", "b": True, "c": 1e-3}}),
        ("kwargs: {a: no}", "teachers.0.kwargs.a = no is false to some readers"),
        ("kwargs: {a: 1:30}", "teachers.0.kwargs.a = 1:30 is 90 to some readers"),
        ("weight: true", "teachers.0.weight: true is a switch"),
        ("alias: a, alias: b", "'alias' is given twice"),
    ],
)
def test_a_recipe_files_plain_words_are_read_by_the_fields_type(field, expected):
    text = TEXT.replace("alias: cls", field)
    if isinstance(expected, str):
        with pytest.raises(UserError, match="mine.yaml") as raised:
            parse_recipe(text, "mine.yaml")
        assert expected in str(raised.value)
        return
    teacher = parse_recipe(text, "mine.yaml").teachers[0].model_dump(exclude_defaults=True)
    assert teacher == {"name": "mobilenetv2_100", "role": "classification", **expected}


def test_settings_of_the_evaluation_are_read_in_the_same_way():
    settings = load_settings(
        ["zero_shot.embeddings=/a #2", "probe.standardize=yes", "dense.lr=1e-3"]
    )
    assert settings.zero_shot.embeddings == "/a #2"
    assert settings.probe.standardize is True and settings.dense.lr == 1e-3
    with pytest.raises(UserError, match=r"probe.epochs: true is a switch"):
        load_settings(["probe.epochs=true"])
