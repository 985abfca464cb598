"""Every shipped recipe, shrunk to seconds, goes through the whole command."""

import pytest

from distill.recipe_io import dump_recipe, load_recipe, shipped_recipes
from distill.runs import load_run
from distill.tiny import tiny
from tests.conftest import metrics_of, run_here


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_trains_two_steps_when_shrunk(name, tmp_path):
    recipe = tiny(load_recipe(name, []))
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    done = run_here(tmp_path / "tiny.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["skipped_steps"] == 0
    names = load_run(tmp_path / "run").method.describe()["losses"]
    assert names and set(names) <= set(rows[0])
