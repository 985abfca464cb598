"""`python -m distill.similarity --run` of KPU: deviations before and after unification, against
NumPy.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.special import erf

from contract.errors import UserError
from contract.files import file_sha256
from distill.data.crops import centre_crop
from distill.evaluate.encoder import teacher_encoder
from distill.evaluate.representation import Spread
from distill.methods.alignment import maps_of
from distill.runs import load_run
from distill.similarity import main as similarity
from distill.unification import load_unifiers
from tests.conftest import run_here
from tests.distill.methods.test_kpu import kpu_recipe

pytestmark = pytest.mark.slow

UNIFIED = "student's space, by t2s (KPU Eq 2)"


@pytest.fixture(scope="module")
def kpu_run(photo_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kpu")
    recipe = kpu_recipe(photo_folder, train={"steps": 2})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def deviation(maps: list[np.ndarray]) -> float:
    """Of maps [N, d_l]: the root of the mean over all channels of the variance."""
    return float(np.sqrt(np.concatenate([rows.var(axis=0) for rows in maps]).mean()))


def test_deviations_and_their_ratio_are_numpys(kpu_run, photo_folder, tmp_path):
    words = ("--run", kpu_run, "--data", photo_folder, "--on", "patches", "--output", tmp_path)
    done = run_here(*words, command=similarity)
    assert done.returncode == 0, done.stderr
    rows = {
        row["space"]: row
        for row in json.loads((tmp_path / "similarity.json").read_text())["spread"]
    }
    (checkpoint,) = (kpu_run / "checkpoint").glob("step_00000002.pt")
    weights = {k: v.double().numpy() for k, v in torch.load(checkpoint)["model"].items()}
    photos = [Image.open(path) for path in sorted(photo_folder.rglob("*.jpg"))]
    for index, config in enumerate(load_run(kpu_run).recipe.teachers):
        encoder = teacher_encoder(config, config.image_size, index)
        views = torch.stack([centre_crop(photo, encoder.image_size) for photo in photos])
        with torch.no_grad():
            maps = [map_.double().flatten(0, 2).numpy() for map_ in maps_of(encoder(views))]
        unified = []
        for number, own in enumerate(maps):
            first, second = (f"t2s.{config.label}.maps.{number}.{layer}." for layer in (0, 2))
            hidden = own @ weights[f"{first}weight"].T + weights[f"{first}bias"]
            hidden *= 0.5 * (1 + erf(hidden / np.sqrt(2)))  # GELU
            unified.append(hidden @ weights[f"{second}weight"].T + weights[f"{second}bias"])
        assert rows["teachers, raw"][config.label] == pytest.approx(deviation(maps), rel=1e-4)
        assert rows[UNIFIED][config.label] == pytest.approx(deviation(unified), rel=1e-4)
    for row in rows.values():
        values = [row["clip"], row["detector"]]
        assert row["max/min"] == pytest.approx(max(values) / min(values))
    ratio = rows[UNIFIED]["max/min"]
    assert f"spread    {UNIFIED}: clip" in done.stdout
    assert f"largest over smallest {ratio:.2f}" in done.stdout


def test_a_deviation_is_of_all_channels_of_all_maps():
    maps = [torch.randn(4, side, side, dim) * dim for side, dim in ((6, 3), (2, 5))]
    found = Spread()
    for half in (slice(0, 2), slice(2, 4)):
        found.add(*(map_[half] for map_ in maps))
    variances = [map_.flatten(0, 2).double().numpy().var(axis=0) for map_ in maps]
    assert found.value() == pytest.approx(np.sqrt(np.concatenate(variances).mean()))


def test_a_run_without_translations_says_why_in_a_line(kpu_run, tmp_path):
    run = Path(shutil.copytree(kpu_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoint")
    words = ("--on", "patches", "--images", 4, "--output", tmp_path / "out")
    done = run_here("--run", run, *words, command=similarity)
    assert done.returncode == 0 and "has no checkpoint, which alone holds" in done.stdout
    assert UNIFIED not in done.stdout
    loaded = load_run(kpu_run)
    loaded.method.config = loaded.method.config.model_copy(update={"unify": False})
    unifiers, why = load_unifiers(loaded)
    assert not unifiers and why.startswith("kpu.unify = false")


def test_a_checkpoint_of_another_run_is_refused(kpu_run, tmp_path):
    run = Path(shutil.copytree(kpu_run, tmp_path / "run"))
    (path,) = (run / "checkpoint").glob("step_00000002.pt")
    saved = torch.load(path)
    del saved["model"]["t2s.clip.maps.0.0.weight"]
    torch.save(saved, path)
    path.with_suffix(".json").write_text(json.dumps({"step": 2, "sha256": file_sha256(path)}))
    with pytest.raises(UserError, match="does not fit the run"):
        load_unifiers(load_run(run))
