"""Every mistake a user can make at the command line: one line with thing, value and remedy, status
2, nothing written.
"""

import contextlib
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from distill import distributed
from distill.distributed import Ranks
from distill.run import main
from tests.conftest import long_case, small_recipe


def fails(capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    """Run the command in this process; assert status 2, one line and no run folder; return the
    line.
    """
    before = sorted(out.parent.rglob("*"))
    status = main([*map(str, arguments), "--output", str(out)])
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
    assert not out.exists() and sorted(out.parent.rglob("*")) == before
    return error


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder / "run"


OVERRIDES = [
    ("train.lr=-1", "train.lr"),
    ("train.step=5", "did you mean 'train.steps'"),
    ("teachers.7.weight=1", "3 teachers"),
    ("teachers=[]", "no teachers"),
    ("teachers.0.name=resnet10x", "did you mean 'resnet10t'"),
    ("teachers.1.role=mea", "mae"),
    ("teachers.2.alias=mae", "two teachers are called 'mae'"),
    ("teachers.2.image_size=60", "56 or 70"),
    ("teachers.1.dim=512", "512"),
    ("student.name=vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
    ("student.image_size=70", "64 or 80"),
    ("umt.heads=7", "umt.token_dim="),
    ("umt.cross_space=sideways", "umt.cross_space"),
    ("data.path=/nowhere/at/all", "/nowhere/at/all"),
    ("data.kind=zip", "data.kind"),
    ("train.batch_size=4000", "data.repeats"),
    ("train.accumulate=3", "train.batch_size"),
    ("train.device=cuda", "train.device=cpu"),
]


@pytest.mark.parametrize(
    ("override", "expected"), OVERRIDES, ids=[override for override, _ in OVERRIDES]
)
def test_a_wrong_setting_is_one_line_and_status_two(capsys, recipe_file, out, override, expected):
    if override == "train.device=cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here, so asking for it is no mistake")
    assert expected in fails(capsys, out, recipe_file(), override)


def test_an_unknown_recipe_suggests_a_shipped_one(capsys, out):
    assert "umt_vit_base" in fails(capsys, out, "umt_vit_bas")


def test_an_empty_folder_is_refused(capsys, recipe_file, out, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in fails(
        capsys, out, recipe_file(data={"path": str(tmp_path / "empty")})
    )


def teacher_file(recipe_file, path: Path) -> Path:
    teacher = {
        "name": "vit_tiny_patch16_224",
        "role": "mae",
        "image_size": 64,
        "checkpoint": str(path),
        "kwargs": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    }
    return recipe_file(teachers=[teacher])


def test_a_checkpoint_of_wrong_shapes_names_the_first_tensor(capsys, recipe_file, out, tmp_path):
    path = tmp_path / "wrong.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 33), "norm.weight": torch.zeros(33)}, path)
    assert "cls_token" in fails(capsys, out, teacher_file(recipe_file, path))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/distill-payload-ran"),))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(capsys, recipe_file, out, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"cls_token": Payload()}))
    assert str(path) in fails(capsys, out, teacher_file(recipe_file, path))
    torch.save({"cls_token": Payload()}, path)
    assert str(path) in fails(capsys, out, teacher_file(recipe_file, path))
    assert not Path("/tmp/distill-payload-ran").exists()


def test_a_missing_checkpoint_is_named(capsys, recipe_file, out, tmp_path):
    assert "gone.pth" in fails(capsys, out, teacher_file(recipe_file, tmp_path / "gone.pth"))


def test_an_output_folder_that_holds_another_run_is_left_alone(capsys, recipe_file, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "recipe.yaml").write_text("precious")
    assert main([str(recipe_file()), "--output", str(taken)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["recipe.yaml"]
    assert (taken / "recipe.yaml").read_text() == "precious"


def test_resume_of_an_empty_folder_is_refused(capsys, tmp_path):
    assert main(["--output", str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path} has no run to resume" in capsys.readouterr().err


def test_resume_with_a_changed_recipe_names_the_field(capsys, photo_folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(photo_folder)))
    assert main(["--output", str(out), "--resume", "train.lr=0.5"]) == 2
    assert "train.lr is 0.001 in" in capsys.readouterr().err


def test_fewer_pictures_a_batch_than_ranks_is_refused(capsys, recipe_file, out, monkeypatch):
    # one process that takes itself for two: the refusal comes before they talk to each other
    two = contextlib.nullcontext(Ranks(0, 2, torch.device("cpu")))
    monkeypatch.setattr(distributed, "join_ranks", lambda device: two)
    assert "train.batch_size" in fails(capsys, out, recipe_file(), "train.batch_size=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dryrun"], "did you mean '--dry-run'"),
        (["quickstart", "--output"], "--output: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_two(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and words in error
    )


def test_help_shows_examples_and_list_shows_every_key(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "python -m distill.run umt_vit_base --dry-run" in capsys.readouterr().out
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "umt_resnet50" in listed and "train.batch_size" in listed and "umt.cross_space" in listed


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, recipe_file, out):
    assert main([str(recipe_file()), "--dry-run", "--output", str(out)]) == 0
    plan = capsys.readouterr().out
    for expected in ("interaction", "teacher cls", "GFLOP", "images", "steps", "memory", "grouped"):
        assert expected in plan
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        long_case("umt_resnet50"),
        long_case("umt_convnext_base_cnn"),
        long_case("umt_convnext_base_vit"),
        long_case("umt_convnext_base_dinov3"),
        long_case("umt_vit_base"),
        long_case("umt_vit_large"),
        "quickstart",
        "kpu_vit_tiny",
        # of SeFA's rows, one of each student, method and objective
        "sefa_vit_tiny",
        long_case("sefa_vit_small"),
        long_case("sefa_vit_small_udi"),
        long_case("sefa_vit_small_ibot_loss"),
        long_case("sefa_vit_base_from_large"),  # and a teacher whose file is not here
        "unic_vit_tiny",
        "unic_vit_small_ibot_augreg",
        long_case("unic_vit_base"),
    ],
)
def test_shipped_recipes_plan_at_full_size_offline(capsys, name):
    assert main([name, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "1,281,167" in plan or name in ("quickstart", "kpu_vit_tiny")
    if name.startswith("sefa"):
        assert all(part in plan for part in ("\nheads ", "\nssl ", "local:", "global:"))
