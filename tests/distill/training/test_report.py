"""The end of a run: pictures are drawn, and never fail it."""

import shutil

from distill.recipe_io import load_recipe
from distill.training.report import finish, print_losses


def test_losses_have_a_line_a_teacher_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        {"step": 10, "loss": 3.0, "loss.token": 1.0, "loss.clip.token": 0.75, "lr": 1.0},
        {"step": 20, "loss": 1.0, "loss.token": None, "loss.clip.token": 0.25, "lr": 0.5},
        {"step": 1000, "loss": 2.0, "loss.token": 0.5, "loss.clip.token": 0.5, "lr": 0.1},
    ]
    print_losses(rows)
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()] == [
        ["loss", "step", "10", "step", "1,000", "best", "at", "step"],
        ["all", "3.0000", "2.0000", "1.0000", "20"],
        ["clip", "token", "0.7500", "0.5000", "0.2500", "20"],
        ["token", "1.0000", "0.5000", "0.5000", "1,000"],
        [],
    ]
    print_losses([{"step": 1, "loss": None}])  # diverged at once
    assert capsys.readouterr().out.split() == "loss step 1 step 1 best at step".split()


def test_a_finished_run_does_not_fail_where_its_pictures_do(plain_run, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run, ignore=shutil.ignore_patterns("checkpoint", "plots"))
    (run / "plots").write_text("in the way")
    (run / "student.safetensors").write_bytes(b"cannot be read")
    finish(load_recipe(str(run / "recipe.yaml"), []), run, complete=True)
    assert caplog.text.count("could not be drawn") == 2
    out = capsys.readouterr().out
    assert f"run       {run}\n" in out and "losses  " not in out and "features " not in out
