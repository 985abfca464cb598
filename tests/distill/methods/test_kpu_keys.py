"""Keys of KPU beside the defaults of the paper: levels left out, FAMO on the next batch, the size
and memory of a stream.
"""

import copy
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.methods import build_method
from distill.methods.alignment import choose_levels
from distill.methods.method import Progress
from distill.models.packaged import packaged_checkpoint
from distill.models.vit_adapter import ViTAdapter
from distill.recipe_io import load_recipe, make_recipe
from distill.training.plan import print_plan
from tests.conftest import run_here
from tests.distill.methods.test_kpu import DIMS, draw, kpu_recipe, pyramid, small_method


def test_pick_leaves_levels_out_that_no_map_is_closest_to():
    students = {"clip": pyramid(224), "detector": pyramid(798)}
    teachers = {"clip": [(14, 14)], "detector": [(100, 100), (50, 50), (25, 25)]}
    pairs = choose_levels(students, teachers, "pick")
    assert pairs == {"clip": [(2, 0)], "detector": [(1, 0), (2, 1), (3, 2)]}


def test_levels_left_out_have_gradients_of_zero_and_are_named_once(caplog):
    method = small_method({"clip": DIMS["clip"]}, levels="pick")
    for _ in range(2):
        method(*draw(method))["loss"].backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    norms = {f"student.norms.{level}.{kind}" for level in (0, 1, 3) for kind in ("weight", "bias")}
    assert norms | {"student.up.weight", "student.up.bias"} <= idle
    assert not {"student.norms.2.weight", "student.prior.stem.0.weight"} & idle
    lines = [record.message for record in caplog.records if "kpu.levels" in record.message]
    assert len(lines) == 1 and "1/4, 1/8, 1/32" in lines[0] and "pick_and_fill" in lines[0]


def test_famo_compares_with_the_next_batch_and_its_state_is_saved():
    method = small_method(weighting="famo", famo_update="next_batch")
    optimizer = torch.optim.SGD(method.parameters(), 0.1)

    def step(method, number: int) -> None:
        method.before_step(Progress(number, 4, 2))
        method(*draw(method, number))["loss"].backward()
        method.after_step(Progress(number, 4, 2))

    step(method, 0)
    optimizer.step()
    before, resumed = method.famo.before.clone(), copy.deepcopy(method)
    assert not method.famo.logits.any()
    losses = method.losses(*draw(method, 1))[0].detach()
    step(method, 1)
    fell = (before.log() - losses.log()).tolist()
    order = 1 if fell[0] > fell[1] else -1
    expected = torch.tensor([-order, order]) * 0.025
    torch.testing.assert_close(method.famo.logits, expected, rtol=1e-3, atol=0)

    fresh = small_method(weighting="famo", famo_update="next_batch")
    fresh.load_state_dict(resumed.state_dict())
    step(fresh, 1)
    assert torch.equal(fresh.famo.logits, method.famo.logits)
    assert torch.equal(fresh.famo.before, method.famo.before)


def test_the_student_sees_a_stream_at_its_own_size(photo_folder):
    recipe = kpu_recipe(photo_folder)
    recipe["teachers"][1]["student_size"] = 112  # of crops of 112 for a teacher of 96
    method = build_method(make_recipe(recipe), DIMS)
    seen = []
    method.student.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    for view, side in zip(method.views, (64, 112), strict=True):
        method._encode(view, torch.zeros(1, 3, side, side, dtype=torch.uint8))
    assert seen == [70, 112]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student_size": 60}, "teachers.1.student_size = 60: .* 56 or 70"),
        ({"student_size": 70, "batch_size": None}, "teachers.1.student_size = 70: .* batch_size"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(change, words, tmp_path, photo_folder):
    recipe = kpu_recipe(photo_folder)
    recipe["teachers"][1] |= change
    recipe["teachers"][0]["batch_size"] = change.get("batch_size", 4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(words, done.stderr), done.stderr


def test_the_plan_adds_up_what_streams_keep_and_what_recomputing_saves(photo_folder, capsys):
    recipe = kpu_recipe(photo_folder)
    recipe["teachers"][1]["student_size"] = 448  # less is nothing in GB
    print_plan(make_recipe(recipe))
    plan = " ".join(capsys.readouterr().out.split())
    assert "clip_image: 1 of 64 px" in plan and "detector_image: 1 of 448 px" in plan
    line = re.search(
        r"activations ([\d.]+) of 4 in stream clip \+ ([\d.]+) of 2 in stream detector = ([\d.]+)",
        plan,
    )
    clip, detector, both = map(float, line.groups())
    assert both == pytest.approx(clip + detector, abs=0.011)
    other = re.search(
        r"with kpu.adapter.grad_checkpointing=true: ([\d.]+) GB in place of ([\d.]+)", plan
    )
    assert float(other[1]) < float(other[2]) == both


def test_a_sentinels_weights_come_out_of_a_package():
    recipe = load_recipe("kpu_vit_tiny", [])
    student = ViTAdapter(recipe.student, recipe.kpu.adapter)
    file = load_file(packaged_checkpoint("photo-mae"))
    for name in ("blocks.5.mlp.fc1.weight", "norm.bias", "cls_token"):
        assert torch.equal(student.net.state_dict()[name], file[name])
    assert not any(p.requires_grad for p in student.net.parameters())


@pytest.mark.slow
def test_a_step_is_one_graph_to_torch_compile_and_changes_nothing():
    """What torch captures, run without its compiler, which takes minutes."""
    adapter = {"blocks": 1, "extra": 0, "heads": 2, "points": 1, "width": 32}
    method = small_method({"clip": DIMS["clip"]}, unify=False, reconstruct=False, adapter=adapter)
    batch, results = draw(method), []
    for model in (method, torch.compile(method, backend="eager", fullgraph=True)):
        method.zero_grad(set_to_none=True)
        loss = model(*batch)["loss"]
        loss.backward()
        gradients = [p.grad for p in method.parameters() if p.requires_grad]
        results.append([loss.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
