"""A run that learns from a network of own code, one of transformers and one of a timm folder:
planned, trained with a cache, resumed, compared and scored.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from timm.models import save_for_hf

from distill.evaluate.__main__ import main as evaluate
from distill.runs import load_run
from distill.similarity import main as similarity
from tests.conftest import run_here, small_recipe

CODE = "from tests.distill.teachers.own_networks import grid as net\n"
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8}
TIMM = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}


@pytest.fixture(scope="module")
def trained(expensive, made_once, photo_folder) -> Path:
    """A folder with the teachers' places, the recipe and its run of three steps."""

    def make(root: Path) -> None:
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained(root / "hf")
        state = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (root / "hf" / "preprocessor_config.json").write_text(json.dumps(state))
        net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TIMM)
        save_for_hf(net, root / "timm", model_args=TIMM, safe_serialization=True)
        (root / "their_teacher.py").write_text(CODE)
        teachers = [
            {"name": "python:their_teacher:net", "role": "dino", "licence": "mit"},
            {"name": f"hf:{root / 'hf'}", "role": "classification", "alias": "cls"},
            {"name": f"local-dir:{root / 'timm'}", "role": "mae", "image_size": 32},
        ]
        recipe = small_recipe(
            photo_folder,
            method="plain",
            teachers=teachers,
            student={"kwargs": {}, "drop_path": 0.0, "name": f"local-dir:{root / 'timm'}"},
            teacher_cache={"views": 1},
            train={"steps": 3},
        )
        recipe["student"]["pretrained"] = True
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        sys.path.insert(0, str(root))
        try:
            done = run_here(root / "recipe.yaml", "--output", root / "run")
        finally:
            sys.path.remove(str(root))
        assert done.returncode == 0, done.stderr
        (root / "output").write_text(done.stdout)

    return made_once("foreign", make)


@pytest.fixture(autouse=True)
def importable(trained, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(trained))
    monkeypatch.delitem(sys.modules, "their_teacher", raising=False)


def test_the_run_says_what_it_inherits_and_is_rebuilt_without_its_teachers(trained):
    said = (trained / "output").read_text()
    assert "inherits  dino: mit, python:their_teacher:net (licence stated in the recipe)" in said
    assert f"inherits  cls: unknown, folder {trained / 'hf'}" in said
    run = load_run(trained / "run")
    assert {label: tuple(dims[:2]) for label, dims in run.dims.items()} == {
        "dino": (12, 12),
        "cls": (16, 16),
        "mae": (32, 32),
    }
    assert run.recipe.student.name == "vit_tiny_patch16_224"
    # the folder's architecture is in the recipe
    assert run.recipe.student.kwargs["embed_dim"] == 32
    assert [record.label for record in run.licences] == ["student", "dino", "cls", "mae"]


def test_the_plan_has_their_widths_and_costs(trained):
    done = run_here(trained / "recipe.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4x4x12" in done.stdout and "4x4x16" in done.stdout and "2x2x32" in done.stdout


def test_a_run_goes_on_and_is_refused_where_the_code_has_changed(trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    done = run_here("--output", run, "--resume", "train.steps=4")
    assert done.returncode == 0, done.stderr
    (tmp_path / "their_teacher.py").write_text(f"{CODE}# other\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_teacher", raising=False)
    done = run_here("--output", run, "--resume", "train.steps=5")
    assert done.returncode == 2 and "teacher 'dino' has other weights" in done.stderr
    cache = f"teacher_cache.path={trained / 'run' / 'teacher_cache'}"
    done = run_here(trained / "recipe.yaml", cache, "--output", tmp_path / "new")
    assert done.returncode == 2 and "made with dino.source_sha256 =" in done.stderr


def test_they_are_compared_and_scored(trained, tmp_path, class_folders):
    names = ("python:their_teacher:net", f"hf:{trained / 'hf'}", f"local-dir:{trained / 'timm'}")
    words = ("--teachers", *names, "--data", class_folders / "val", "--on", "patches")
    done = run_here(*words, "--size", 32, "--output", tmp_path / "cka", command=similarity)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "cka" / "similarity.json").read_text())["pairs"]) == 3
    quick = ("--data", class_folders, "--tasks", "knn", "extract.workers=0", "knn.k=1")
    done = run_here(trained / "run", *quick, "--with-teachers", "--trust-code", command=evaluate)
    assert done.returncode == 0, done.stderr
    assert "python:their_teacher:net" in done.stdout
    done = run_here(names[1], *quick, "--output", tmp_path / "scores", command=evaluate)
    assert done.returncode == 0, done.stderr
