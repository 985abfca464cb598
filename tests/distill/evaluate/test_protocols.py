"""The papers' values: what is taken from them, what a user's keys change, what is said of it."""

import pytest

from contract.errors import UserError
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.protocols import SECTIONS, apply_protocol, describe_protocols
from distill.evaluate.settings import load_settings
from distill.evaluate.tasks import TASKS
from distill.recipe_io import recipe_fields

PAPER = load_settings(["protocol=paper"])


def test_every_task_has_a_protocol_and_every_value_is_a_valid_setting():
    assert list(SECTIONS) == list(TASKS)
    keys = {key for key, *_ in recipe_fields(EvaluationConfig)}
    choices = [
        "finetune.init=probe",
        "segmentation.head=upernet",
        "depth.head=linear",
    ]
    for task in TASKS:
        for more in ([], [*choices, "robustness.classifier=finetuned"]):
            applied = apply_protocol(load_settings(["protocol=paper", *more]), task)
            assert {value.key for value in applied.values} <= keys
            EvaluationConfig.model_validate(applied.config.model_dump())
            for value in applied.values:
                assert value.source and load_settings([f"{value.key}={_typed(value.paper)}"])
            assert not applied.differences or more


def _typed(value) -> object:
    """A value as a user types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return list(value) if isinstance(value, tuple) else value


def test_quick_is_the_default_and_changes_nothing():
    for task in TASKS:
        applied = apply_protocol(EvaluationConfig(), task)
        assert applied.name == "quick" and applied.config == EvaluationConfig()
    kept = [task for task in TASKS if not apply_protocol(EvaluationConfig(), task).differences]
    assert set(TASKS) - set(kept) == {"segmentation", "depth", "retrieval", "video", "clusters"}


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("linear", {"probe.rates": 45, "probe.epochs": 100, "probe.lowest": 1e-4}),
        ("finetune", {"finetune.epochs": 10, "finetune.batch_size": 512, "finetune.lr": 1e-4}),
        (
            "segmentation",
            {
                "segmentation.head": "linear",
                "dense.steps": 80_000,
                "dense.batch_size": 16,
                "dense.size": 512,
                "dense.resize": (0.5, 2.0),
                "dense.augment": True,
                "dense.test": "whole",
                "dense.power": 1.0,
                "dense.lr": 1e-3,
            },
        ),
        (
            "depth",
            {
                "depth.head": "dpt",
                "depth.backbone_lr": 0.1,
                "depth.crop": "eigen",
                "dense.steps": 25_000,
                "dense.batch_size": 16,
                "dense.lr": 1e-4,
                "dense.mirror": True,
            },
        ),
        ("clusters", {"representation.tsne_images": 20_000, "representation.images": 50_000}),
    ],
)
def test_the_papers_values(task, values):
    applied = apply_protocol(PAPER, task)
    for key, value in values.items():
        section, name = key.split(".")
        assert getattr(getattr(applied.config, section), name) == value, key
    assert applied.name == "paper" and not applied.differences


@pytest.mark.parametrize(
    "task", ["knn", "linear", "transfer", "finetune", "zero-shot", "robustness", "clusters"]
)
def test_the_papers_see_centre_crops_whatever_the_recipes_view(task):
    paper = apply_protocol(PAPER, task, "squash")
    assert paper.config.extract.view == "centre-crop:0.875" and not paper.differences
    given = apply_protocol(load_settings(["protocol=paper", "extract.view=squash"]), task)
    assert ("extract.view", "given") in {(each.key, each.reason) for each in given.differences}


def test_a_key_of_an_earlier_version_is_explained():
    with pytest.raises(UserError, match="write extract.view=centre-crop:SHARE"):
        load_settings(["extract.crop=0.9"])


def test_a_choice_brings_its_own_values():
    upernet = load_settings(["segmentation.protocol=paper", "segmentation.head=upernet"])
    dense = apply_protocol(upernet, "segmentation").config.dense
    assert (dense.lr, dense.weight_decay, dense.schedule) == (2e-4, 0.05, "cosine")
    assert not apply_protocol(upernet, "segmentation").differences, "KPU's head is a paper's too"
    linear = apply_protocol(load_settings(["protocol=paper", "depth.head=linear"]), "depth")
    assert linear.config.depth.backbone_lr == 0 and linear.config.dense.steps == 25_000
    probe = apply_protocol(load_settings(["protocol=paper", "finetune.init=probe"]), "finetune")
    assert probe.config.finetune.passes == 100


def test_a_given_key_wins_and_is_said_to():
    config = load_settings(["protocol=paper", "dense.steps=7", "dense.augment=false"])
    applied = apply_protocol(config, "segmentation")
    assert applied.config.dense.steps == 7 and not applied.config.dense.augment
    assert applied.config.dense.test == "whole"
    assert {each.key: each.reason for each in applied.differences} == {
        "dense.steps": "given",
        "dense.augment": "given",
    }
    text = " ".join(" ".join(applied.lines()).split())
    assert "segmentation: paper: " in text and "dense.steps=7 (given; paper: 80000)" in text
    assert "dense.power=1.0" in text
    assert apply_protocol(applied.config, "segmentation").config == applied.config
    # even one that is the default
    given = apply_protocol(load_settings(["protocol=paper", "dense.steps=2000"]), "segmentation")
    assert given.config.dense.steps == 2000
    about = applied.about({"size": 504, "test": "windows"})
    assert about["differs"]["dense.steps"] == {"used": 7, "paper": 80_000, "reason": "given"}
    assert about["differs"]["dense.test"]["reason"] == "what the network takes"
    assert about["differs"]["dense.size"]["used"] == 504
    assert "RADIO" in about["paper"]["dense.lr"]["source"]


def test_a_section_may_have_another_protocol_than_the_rest():
    config = load_settings(["protocol=paper", "depth.protocol=quick"])
    assert apply_protocol(config, "depth").name == "quick"
    assert apply_protocol(config, "depth").config.dense.steps == 2000
    assert apply_protocol(config, "segmentation").config.dense.steps == 80_000
    only = load_settings(["segmentation.protocol=paper"])
    assert [apply_protocol(only, task).name for task in ("segmentation", "depth")] == [
        "paper",
        "quick",
    ]


def test_what_is_said_fits_a_terminal_and_names_what_the_papers_do_otherwise():
    text = describe_protocols()
    lines = text.splitlines()
    for name in ("quick", "paper"):
        for task in TASKS:
            lines += apply_protocol(load_settings([f"protocol={name}"]), task).lines()
    assert max(map(len, lines)) <= 80
    said = " ".join(text.split())
    assert "dense.steps=80000 (quick: 2000)" in said
    assert "five pre-trainings" in said and "MaskDINO" in said
