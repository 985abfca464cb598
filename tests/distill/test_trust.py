"""A run that somebody else made runs no code that its recipe names, until the user trusts it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from yaml import safe_dump, safe_load

from distill.attach import main as attach
from distill.evaluate.__main__ import main as evaluate
from distill.models.weights import save_tensors
from distill.similarity import main as similarity
from distill.visualize import main as visualize
from export.text.__main__ import main as text
from tests.conftest import run_here


@pytest.fixture
def run_of(plain_run, tmp_path) -> Callable[..., Path]:
    """A function that copies a run whose recipe has another teacher 'mae'."""

    def copy(**changes: object) -> Path:
        run = shutil.copytree(plain_run, tmp_path / "theirs")
        file = run / "student.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        recipe = safe_load(metadata["recipe"])
        recipe["teachers"][0] |= changes
        save_tensors(file, load_file(file), metadata | {"recipe": safe_dump(recipe)})
        return run

    return copy


TEACHERS = {
    "python:os:mkdir": "whose code is python:os:mkdir: add --trust-code",
    "hf:owner/name": "whose code is that of hf:owner/name (trust_remote_code: true): add --trust",
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_of_a_run_are_code_only_where_it_is_trusted(
    run_of, photo_folder, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    evil = tmp_path / "evil"
    kwargs = {"path": str(evil)} if name.startswith("python:") else {"trust_remote_code": True}
    run = run_of(name=name, kwargs=kwargs)
    decoder = ("--decoder", "python:tests.decoder_parts:segmenter", "--kwargs", "width=32")
    decoder += ("--grid", "teacher")
    photo = next(photo_folder.rglob("*.jpg"))
    out = ("--output", tmp_path / "out")
    commands = [
        (evaluate, run, "--data", photo_folder, "--tasks", "knn", "--with-teachers", *out),
        (visualize, run, photo, "--kind", "attention", "--with-teachers", *out),
        (similarity, "--run", run, *out),
        (attach, run, "--teacher", "mae", "--task", "segmentation", *decoder),
    ]
    for command, *words in commands:
        done = run_here(*words, command=command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{run} has a teacher 'mae' {TEACHERS[name]}" in done.stderr
        assert not evil.exists()
    for command, *words in commands:
        done = run_here(*words, "--trust-code", command=command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "--trust-code" not in done.stderr and "teachers.0.name" in done.stderr
        if name.startswith("python:"):
            evil.rmdir()


def test_a_run_s_classifier_is_timm_s_and_needs_no_code(run_of, tmp_path):
    run = run_of(name="python:os:mkdir", kwargs={"path": str(tmp_path / "evil")})
    (tmp_path / "labels.txt").write_text("tabby cat\n")
    words = ("--teacher", "mae", "--task", "classification", "--decoder", "classifier")
    done = run_here(run, *words, command=attach)
    assert "python:os:mkdir is no network of timm's" in done.stderr
    words = ("--labels", tmp_path / "labels.txt", "--classifier", "mae", "--run", run)
    done = run_here(*words, "--output", tmp_path / "text", command=text)
    assert "python:os:mkdir is no network of timm's" in done.stderr
    assert not (tmp_path / "evil").exists()
