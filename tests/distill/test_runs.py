"""What a run ships: equal bytes for equal weights, files of earlier versions, damaged files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from contract.errors import UserError
from distill.features import FeatureDims
from distill.methods import METHODS, build_method
from distill.models.student import _probe
from distill.models.weights import save_tensors, tensors_sha256
from distill.recipe_io import make_recipe
from distill.runs import STUDENT, load_run, save_student
from tests.conftest import small_recipe

OLD = Path(__file__).parents[1] / "data" / "run_format_1"
"""A run of two steps, written when recipes had the sections of every method."""


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_run_of_format_1_is_rebuilt_with_the_section_of_its_own_method():
    before = metadata_of(OLD / STUDENT)
    assert (
        before["format"] == "1" and "\numt:" in before["recipe"] and "\nplain:" in before["recipe"]
    )
    run = load_run(OLD)
    assert run.step == 2 and run.dims == {"mae": (8, 8, ())}
    assert set(METHODS) & set(type(run.recipe).model_fields) == {"plain"}
    assert run.sha256 == before["sha256"]
    state = run.method.state_dict()
    added = {name: state.pop(name) for name in list(state) if ".lengths." in name}
    assert tensors_sha256(state) == run.sha256
    assert {name.rpartition(".")[2]: float(value) for name, value in added.items()} == {
        "token": 1,
        "token_fitted": 0,
        "patches": 1,
        "patches_fitted": 0,
    }
    with torch.inference_mode():
        predictions = run.method.deploy()(torch.rand(1, 3, 32, 32))
    assert predictions["mae"].token.shape == (1, 8) and predictions["mae"].patches.shape[-1] == 8


def test_a_student_file_is_the_same_to_the_byte_each_time_it_is_written(tmp_path):
    run = load_run(OLD)
    files = []
    for number in range(4):  # the library draws the order of metadata anew for every file
        folder = tmp_path / str(number)
        folder.mkdir()
        save_student(folder, run.method.state_dict(), run.method, run.recipe, run.dims, 2)
        files.append((folder / STUDENT).read_bytes())
    assert len(set(files)) == 1
    about = metadata_of(tmp_path / "0" / STUDENT)
    assert about["format"] == "3" and "\numt:" not in about["recipe"]
    again = load_run(tmp_path / "0")
    assert again.recipe == run.recipe and again.dims == run.dims


def test_spaces_of_format_2_are_as_wide_as_the_widest_teacher(tmp_path, photo_folder):
    recipe = make_recipe(small_recipe(photo_folder, umt={"space_dim": 24, "token_dim": 8}))
    dims = {"cls": FeatureDims(8, 8), "mae": FeatureDims(8, 24), "dino": FeatureDims(8, 16)}
    method = build_method(recipe, dims)
    save_student(tmp_path, method.state_dict(), method, recipe, dims, 2)
    with safe_open(tmp_path / STUDENT, framework="pt") as file:
        names = [name for name in file.keys() if ".lengths." not in name]
        tensors = {name: file.get_tensor(name) for name in names}
    about = metadata_of(tmp_path / STUDENT) | {"format": "2", "sha256": tensors_sha256(tensors)}
    about["recipe"] = about["recipe"].replace("space_dim: 24", "space_dim: auto")
    save_tensors(tmp_path / STUDENT, tensors, about)
    assert load_run(tmp_path).recipe.umt.space_dim == 24


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_run_is_rebuilt_whatever_the_callers_mode(mode):
    _probe.cache_clear()
    with mode():
        assert load_run(OLD).step == 2


def test_a_file_of_a_later_version_is_refused_with_its_number(tmp_path):
    with safe_open(OLD / STUDENT, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_tensors(tmp_path / STUDENT, tensors, metadata_of(OLD / STUDENT) | {"format": "9"})
    with pytest.raises(UserError, match="has format 9, but this version reads 1 to 3: update"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # more than any memory holds, so that a try to make it is another error
        ("embed_dim: 8", "embed_dim: 8000000", "has shape .* expects .*8000000"),
        ("embed_dim: 8", "embed_dim: 8000000000", "overflowed"),
        ("depth: 1", "depth: 2", "'student.net.blocks.1.attn.proj.bias' is missing"),
    ],
)
def test_weights_that_do_not_fit_the_recipe_are_refused(tmp_path, old, new, words):
    with safe_open(OLD / STUDENT, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    about = metadata_of(OLD / STUDENT)
    assert old in about["recipe"]
    about["recipe"] = about["recipe"].replace(old, new)
    save_tensors(tmp_path / STUDENT, tensors, about)
    with pytest.raises(UserError, match=f"does not fit its own recipe: .*{words}"):
        load_run(tmp_path)


def test_metadata_are_kept_and_sorted(tmp_path):
    words = {"zeta": json.dumps({"ü": '\n\t"\\'}), "alpha": "\x01 and / and 日本"}
    save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3.0)}, words)
    assert metadata_of(tmp_path / "a.safetensors") == words
    data = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["alpha", "zeta"]


def test_a_run_without_a_momentum_network_has_no_ema_weights():
    with pytest.raises(UserError, match="has no ema.safetensors: its method trains no momentum"):
        load_run(OLD, "ema")
