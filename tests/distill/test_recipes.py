"""Shipped recipes, shrunk to seconds, go through the whole command."""

import pytest

from distill.recipe_files import shipped_recipes
from distill.recipe_io import dump_recipe, load_recipe
from distill.runs import load_run
from distill.tiny import tiny
from tests.conftest import metrics_of, run_here

OF_A_KIND = [
    "sefa_vit_small",
    "sefa_vit_small_udi",
    "sefa_vit_small_ibot_loss",
    "sefa_vit_base_siglip",  # a teacher without a class token
    "sefa_vit_tiny sefa.ssl_weight=1",  # no teachers
    "unic_vit_small",
]
"""Of SeFA's rows, one of each kind: shrunk, the others differ in names (all of them take two steps
in test_config.py)."""

ALL_OTHERS = sorted(name for name in shipped_recipes() if not name.startswith(("sefa_", "unic_")))


@pytest.mark.parametrize("given", [*ALL_OTHERS, *OF_A_KIND])
def test_a_shipped_recipe_trains_two_steps_when_shrunk(given, tmp_path):
    name, *overrides = given.split()
    recipe = tiny(load_recipe(name, overrides))
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe))
    done = run_here(tmp_path / "tiny.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["skipped_steps"] == 0
    names = load_run(tmp_path / "run").method.describe()["losses"]
    assert names and set(names) <= set(rows[0])
