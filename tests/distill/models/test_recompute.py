"""Gradient checkpointing changes what is kept, and nothing that is computed."""

import pytest
import torch

from contract.errors import UserError
from distill.data.crops import IMAGE
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.method import Progress
from distill.models.student import Student
from distill.recipe_io import load_recipe, make_recipe, values_taken
from distill.runs import build_shipped
from tests.conftest import run_here, small_recipe

DIMS = {"cls": FeatureDims(24, 24), "mae": FeatureDims(16, 16), "dino": FeatureDims(32, 32)}


def recipe_of(photos, student: str, keys: tuple[str, ...], method: str = "umt"):
    values = small_recipe(photos, method=method, targets={"normalize": "none"})
    if student != "vit":
        values["student"] = {"name": student, "image_size": 64, "drop_path": 0.2}
    for key in keys:
        section, _, name = key.partition(".")
        values[section] = {**values.get(section, {}), name: True}
    return make_recipe(values)


def one_step(recipe) -> tuple[dict, dict, int]:
    """Gradients and buffers after a step on random pictures, and the elements autograd kept."""
    torch.manual_seed(0)
    method = build_method(recipe, DIMS).train()
    method.before_step(Progress(0, 1, 1))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    targets = {
        label: Features(torch.randn(2, dim.summary), torch.randn(2, 4, 4, dim.patches))
        for label, dim in DIMS.items()
    }
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method(dict.fromkeys((IMAGE, f"{IMAGE}.plain"), images), targets)["loss"]
    loss.backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return gradients, dict(method.named_buffers()), sum(kept.values())


@pytest.mark.parametrize(
    ("student", "method", "keys"),
    [
        ("vit", "umt", ("student.grad_checkpointing", "umt.grad_checkpointing")),
        ("vit", "unic", ("student.grad_checkpointing",)),
        # batch normalisation, whose statistics must follow once
        ("test_efficientnet", "umt", ("student.grad_checkpointing", "umt.grad_checkpointing")),
    ],
)
def test_gradients_and_statistics_are_equal_and_less_is_kept(photo_folder, student, method, keys):
    whole = one_step(recipe_of(photo_folder, student, (), method))
    less = one_step(recipe_of(photo_folder, student, keys, method))
    for before, after in zip(whole[:2], less[:2], strict=True):
        assert before.keys() == after.keys() and before
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert less[2] < (0.8 if method == "umt" else 1) * whole[2]


def test_masked_tokens_are_the_same(photo_folder):
    config = recipe_of(photo_folder, "vit", ()).student
    torch.manual_seed(0)
    plain = Student(config)
    again = Student(config.model_copy(update={"grad_checkpointing": True}))
    again.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    plain.eval(), again.eval()
    left, right = plain.tokens(images), again.tokens(images)
    assert torch.equal(left, right)
    left.sum().backward(), right.sum().backward()
    gradients = [net.blocks[0].mlp.fc1.weight.grad for net in (plain.net, again.net)]
    assert torch.equal(*gradients)


def test_what_ships_recomputes_nothing(photo_folder):
    recipe = recipe_of(photo_folder, "vit", ("student.grad_checkpointing",))
    assert not build_shipped(recipe, DIMS).student.net.grad_checkpointing
    assert build_method(recipe, DIMS).student.net.grad_checkpointing


def test_a_network_that_has_none_is_one_line(recipe_file, tmp_path):
    student = {"name": "selecsls42", "kwargs": {}, "drop_path": 0, "grad_checkpointing": True}
    done = run_here(recipe_file(student=student), "--output", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not support gradient checkpointing: set student.grad_ch" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_older_name_of_the_adapters_switch_still_works(tmp_path):
    words = ["kpu.adapter.checkpoint=true"]
    recipe = load_recipe("kpu_vit_tiny", words)
    assert recipe.kpu.adapter.grad_checkpointing
    assert values_taken(recipe, words) == [("kpu.adapter.grad_checkpointing", True)]
    path = tmp_path / "r.yaml"
    path.write_text("base: kpu_vit_tiny\nkpu: {adapter: {checkpoint: true}}\n")
    assert load_recipe(str(path), []).kpu.adapter.grad_checkpointing


def test_a_frozen_sentinel_names_the_adapters_switch():
    with pytest.raises(UserError, match="set kpu.adapter.grad_checkpointing=true"):
        load_recipe("kpu_vit_tiny", ["student.grad_checkpointing=true"])


def test_a_plan_compares_the_memory_with_and_without(recipe_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = run_here(recipe_file(), "--dry-run", "umt.grad_checkpointing=true")
    text = " ".join(done.stdout.split())
    assert "with student.grad_checkpointing=true: " in text
    assert "with umt.grad_checkpointing=false: " in text and "with both" not in text
