"""A method from a file of its own goes through training, resuming, export and serving."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from contract.errors import UserError
from distill.methods import build_method
from distill.recipe_io import load_recipe, make_recipe
from distill.runs import load_run
from distill.teachers import build_teacher
from distill.training.checkpoint import load_checkpoint
from distill.training.plan import print_plan
from export.run import main as export
from serve.bundle import read_bundle
from serve.repository.__main__ import main as repository
from tests.conftest import kill_after, metrics_of, run_here, small_recipe
from tests.distill.methods.toy import Toy


def toy_recipe(photos: Path, **changes: object) -> dict:
    """Twelve pictures: three steps an epoch of the main stream, six of the teacher's own."""
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    small = {"pretrained": False, "image_size": 64}
    teachers = [
        {"name": "resnet10t", "role": "classification", "alias": "cls", **small},
        {"name": "vit_tiny_patch16_224", "role": "mae", "kwargs": vit, "summary": False, **small},
    ]
    teachers[1]["batch_size"] = 2
    train = {"steps": 40, "weight_decay_end": 0.4, "clip_mode": "parameter"}
    recipe = small_recipe(photos, method="toy", teachers=teachers, train=train, **changes)
    checkpoint = {"every_steps": 1, "keep": 50}
    return recipe | {"toy": {"hidden": 16}, "checkpoint": checkpoint}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, photo_folder) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(toy_recipe(photo_folder)))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_toy_run_logs_its_losses_and_ships_neither_momentum_nor_projector(toy_run):
    run = load_run(toy_run)
    names = load_file(toy_run / "student.safetensors")
    assert not any(name.startswith(Toy.train_only) for name in names)
    assert set(run.method.describe()["losses"]) <= set(metrics_of(toy_run)[0])
    assert run.recipe.model_fields_set & {"umt", "plain"} == set() and run.recipe.toy.hidden == 16


def test_the_momentum_network_is_a_student_of_its_own(toy_run):
    student, momentum = (
        load_file(toy_run / "student.safetensors"),
        load_file(toy_run / "ema.safetensors"),
    )
    assert student.keys() == momentum.keys()
    differ = {name for name in student if not torch.equal(student[name], momentum[name])}
    assert differ and all(name.startswith("student.") for name in differ)
    weights = load_run(toy_run, "ema").method.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in momentum.items())
    # and so it is of the last checkpoint
    weights = load_run(toy_run, "ema", "latest").method.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in momentum.items())


@pytest.mark.slow
def test_a_toy_run_killed_while_its_layer_is_frozen_and_later_resumes_bit_identically(
    toy_run, tmp_path, photo_folder
):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(toy_recipe(photo_folder)))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "tests.distill.methods.toy", "run", "--output", out]
    for kill_at, words in ((4, [tmp_path / "recipe.yaml"]), (7, ["--resume"])):
        kill_after(kill_at, out, [*command, *words])
    resumed = run_here("--output", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    frozen = load_checkpoint(out / "checkpoint")["optimizer"]["state"]
    assert frozen["projector.weight"]["step"] == 34  # of 40, six of which it was frozen
    for name in ("student.safetensors", "ema.safetensors"):
        assert (out / name).read_bytes() == (toy_run / name).read_bytes()


def test_a_frozen_layer_keeps_its_weights_until_its_epochs_are_over(tmp_path, photo_folder):
    recipe = toy_recipe(photo_folder)
    recipe["train"]["steps"] = 7
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run").returncode == 0
    saved = [
        torch.load(path, weights_only=True)
        for path in sorted((tmp_path / "run" / "checkpoint").glob("*.pt"))
    ]
    layers = [state["model"]["projector.weight"] for state in saved]
    assert all(torch.equal(layers[0], layer) for layer in layers[:6])
    assert not torch.equal(layers[5], layers[6])
    assert not saved[5]["optimizer"]["state"].get("projector.weight")
    heads = [state["model"]["heads.mae.patches.weight"] for state in saved]
    assert not torch.equal(heads[0], heads[1])


def test_a_toy_recipe_is_planned_with_its_views_and_streams(photo_folder, capsys):
    print_plan(make_recipe(toy_recipe(photo_folder)))
    plan = " ".join(capsys.readouterr().out.split())
    assert "global: 2 of 64 px, 4 pictures a step of stream main, for cls" in plan
    assert "local: 1 of 32 px, 4 pictures a step of stream main" in plan
    assert "own: 1 of 64 px, 2 pictures a step of stream mae, for mae" in plan
    assert "momentum" in plan and "projector" in plan


def test_a_cached_toy_run_keeps_both_crops_of_a_view(tmp_path, photo_folder):
    recipe = toy_recipe(photo_folder)
    recipe["teacher_cache"] = {"views": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "'cls' sees 2 fixed photometric augmentations" in done.stdout


def test_a_momentum_network_is_not_sharded(tmp_path, photo_folder):
    recipe = make_recipe(toy_recipe(photo_folder))
    teachers = [build_teacher(t, recipe.teacher_runtime, i) for i, t in enumerate(recipe.teachers)]
    method = build_method(recipe, {teacher.label: teacher.dims for teacher in teachers})
    assert not method.shards and teachers[1].dims.summary is None


def test_a_batch_of_its_own_for_a_teacher_without_a_stream_is_refused(photo_folder):
    from distill.training.schedule import Schedule

    recipe = make_recipe(small_recipe(photo_folder))
    teachers = recipe.teachers[:2] + (recipe.teachers[2].model_copy(update={"batch_size": 2}),)
    recipe = recipe.model_copy(update={"teachers": teachers})
    built = [build_teacher(t, recipe.teacher_runtime, i) for i, t in enumerate(recipe.teachers)]
    method = build_method(recipe, {teacher.label: teacher.dims for teacher in built})
    with pytest.raises(UserError, match="teachers.2.batch_size = 2: method umt .* 'dino'"):
        Schedule(recipe, method, built, 12)


def test_methods_can_be_chosen_over_any_recipe():
    assert load_recipe("umt_vit_base", ["method=toy"]).toy.hidden == 16
    with pytest.raises(UserError, match="method = \"umx\" is not known: did you mean 'umt'"):
        load_recipe("quickstart", ["method=umx"])


@pytest.mark.slow
def test_a_toy_run_is_exported_with_parity_and_rendered(toy_run, tmp_path):
    done = run_here(toy_run, "--output", tmp_path / "bundle", "--max-batch", 2, command=export)
    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "bundle")
    names = {tensor.name for tensor in bundle.outputs}
    heads = {"cls_token", "cls_patches", "mae_patches"}
    assert names == {"backbone_global", "backbone_patches", *heads}
    assert all(row.passed for row in bundle.manifest.parity)
    token_dims = {teacher.label: teacher.token_dim for teacher in bundle.manifest.teachers}
    assert token_dims["mae"] is None and token_dims["cls"] > 0
    words = (tmp_path / "bundle", "--output", tmp_path / "repository")
    assert run_here(*words, command=repository).returncode == 0
    assert (tmp_path / "repository" / "features" / "config.pbtxt").is_file()
    assert (tmp_path / "repository" / "features" / "1" / "head_mae.onnx").is_file()
