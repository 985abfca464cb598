"""`teacher_runtime.precision: auto`: who runs in bf16, why, and that a run keeps to it."""

import json
import logging

import pytest
import torch

from distill.config import TeacherConfig, TeacherRuntime
from distill.distributed import Ranks
from distill.recipe_io import load_recipe
from distill.teachers import Teacher, build_teacher, precision
from distill.teachers.precision import settle_precisions
from distill.training.checkpoint import load_checkpoint
from tests.conftest import run_here, weights_of

ALONE = Ranks(0, 1, torch.device("cpu"))
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(params=[True, False], ids=["bf16", "no bf16"])
def able(request, monkeypatch) -> bool:
    """Whether the processor is said to have bf16 arithmetic."""
    monkeypatch.setattr(precision, "has_bf16", lambda: request.param)
    return request.param


def said(caplog) -> str:
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("precision ")]
    assert len(lines) == 1
    return " ".join(lines[0].split())


def small(runtime: TeacherRuntime, **settings: object) -> Teacher:
    values = {"name": "vit_tiny_patch16_224", "role": "dino", "pretrained": False}
    config = TeacherConfig(**values | {"image_size": 32, "kwargs": VIT} | settings)
    return build_teacher(config, runtime, 0)


@pytest.mark.slow
def test_packaged_teachers_run_in_bf16_where_it_keeps_their_features(able, caplog):
    recipe = load_recipe("quickstart", [])
    teachers = [build_teacher(t, recipe.teacher_runtime, i) for i, t in enumerate(recipe.teachers)]
    with caplog.at_level(logging.INFO):
        settled = settle_precisions(teachers, None, None, ALONE)
    vits = "bf16" if able else "fp32"
    assert settled == {"cls": "fp32", "focus": vits, "mae": vits}
    assert {t.label: t.identity()["precision"] for t in teachers} == settled
    if not able:
        assert said(caplog).startswith("precision fp32 for the teachers: no bf16 arithmetic here")
        return
    line = said(caplog)
    assert line.startswith("precision bf16 for focus (cosine 0.9999")
    # MobileNetV2's depthwise convolutions
    assert "; fp32 for cls (in bf16 the cosine of its patches is 0.98" in line
    black = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    for teacher, config in zip(teachers, recipe.teachers, strict=True):
        forced = build_teacher(config, TeacherRuntime(precision=settled[teacher.label]), 0)
        assert torch.equal(teacher(black).patches, forced(black).patches)


def test_a_precision_that_is_given_is_taken_without_a_check(able, caplog):
    teacher = small(TeacherRuntime(precision="bf16"))
    with caplog.at_level(logging.INFO):
        assert settle_precisions([teacher], None, None, ALONE) == {"dino": "bf16"}
    assert not caplog.records and teacher.settled is None


def test_a_network_that_fails_in_bf16_runs_in_float32(caplog, monkeypatch):
    def through_numpy(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.numpy()  # which has no bf16, and own code may use it

    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    teacher = small(TeacherRuntime())
    teacher.net.blocks[0].attn.qkv.register_forward_hook(through_numpy)
    with caplog.at_level(logging.INFO):
        assert settle_precisions([teacher], None, None, ALONE) == {"dino": "fp32"}
    assert "fp32 for dino (bf16 fails: Got unsupported ScalarType BFloat16)" in said(caplog)


@pytest.mark.slow
def test_a_run_and_its_cache_keep_the_precision_they_began_with(recipe_file, tmp_path, monkeypatch):
    def able(value: bool) -> None:
        monkeypatch.setattr(precision, "has_bf16", lambda: value)

    out, cache = tmp_path / "run", {"views": 1, "path": str(tmp_path / "features")}
    steps = {"train": {"steps": 4}, "checkpoint": {"every_steps": 2, "keep": 5}}
    able(True)
    plain = recipe_file(**steps)
    done = run_here(plain, "--output", out)
    assert done.returncode == 0, done.stderr
    assert "precision bf16 for cls (cosine 0.9999" in done.stdout
    kept = load_checkpoint(out / "checkpoint")["teacher_precision"]
    assert set(kept.values()) == {"bf16"}
    whole = weights_of(out)
    for path in (out / "checkpoint").glob("step_00000004.*"):
        path.unlink()
    able(False)
    done = run_here("--output", out, "--resume")
    assert done.returncode == 0 and "resumed from step 2 of 4" in done.stdout, done.stderr
    line = " ".join(done.stdout.split())
    assert "as the run began; this processor has no bf16 arithmetic, and emulates it" in line
    again = weights_of(out)
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    # features that were computed stay of use on the other machine, whichever it is
    cached = recipe_file(**steps, teacher_cache=cache)
    assert run_here(cached, "--output", tmp_path / "first").returncode == 0
    able(True)
    done = run_here(cached, "--output", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    line = " ".join(done.stdout.split())
    assert f"precision fp32 for cls, mae, dino, as the features in {cache['path']} were" in line
    key = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert key["cls.precision"] == "fp32"
    # a precision that is asked for is not the cache's
    done = run_here(cached, "teacher_runtime.precision=bf16", "--output", tmp_path / "third")
    assert done.returncode == 2 and "made with cls.precision = fp32" in done.stderr


def test_a_checkpoint_without_a_record_goes_on_as_auto_was_then(able, caplog):
    teacher = small(TeacherRuntime())
    with caplog.at_level(logging.INFO):
        settle_precisions([teacher], {"step": 1}, None, ALONE)
    assert said(caplog) == "precision fp32 for dino, as the run began"
