"""The end of a run: pictures are drawn, and never fail it."""

import shutil

from distill.recipe_io import load_recipe
from distill.training.report import finish


def test_a_finished_run_does_not_fail_where_its_pictures_do(plain_run, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain_run, run, ignore=shutil.ignore_patterns("checkpoint", "plots"))
    (run / "plots").write_text("in the way")
    (run / "student.safetensors").write_bytes(b"cannot be read")
    finish(load_recipe(str(run / "recipe.yaml"), []), run, complete=True)
    assert caplog.text.count("could not be drawn") == 2
    out = capsys.readouterr().out
    assert f"run       {run}\n" in out and "losses  " not in out and "features " not in out
