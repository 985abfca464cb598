"""What is decided about a student before it trains: stride, batch norms, memory format, cost."""

import logging

import pytest
import torch

from distill.config import TrainConfig
from distill.methods import build_method
from distill.recipe_io import make_recipe
from distill.training.memory_format import _writes_out_of_bounds, set_memory_format
from export.graph import build_parts, open_student
from tests.conftest import run_here, small_recipe
from tests.distill.two_ranks import DIMS

CNN = {"name": "test_resnet", "kwargs": {}, "drop_path": 0.0}
TEACHER = {"name": "test_vit", "role": "dino", "pretrained": False, "image_size": 32}


@pytest.fixture
def small(recipe_file):
    """A recipe of a small CNN and one teacher."""

    def write(size: int, **train: object):
        return recipe_file(
            student=CNN | {"image_size": size},
            teachers=[TEACHER],
            umt={"space_dim": 16, "token_dim": 16},
            train={"steps": 1} | train,
        )

    return write


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_side_that_the_stride_does_not_divide_is_refused(small, tmp_path, arguments):
    done = run_here(small(80), *arguments, "--output", tmp_path / "run")
    assert done.returncode == 2
    assert "stride of 32 pixels does not divide student.image_size = 80" in done.stderr
    assert done.stderr.endswith("(use 64 or 96)\n") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_batch_norms_over_one_value_are_refused(small, tmp_path):
    for arguments in (["--dry-run"], []):
        done = run_here(small(32, batch_size=1), *arguments, "--output", tmp_path / "run")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "needs two values a channel, and one picture of 32 px gives one" in done.stderr
    assert not (tmp_path / "run").exists()
    # two pictures, two parts
    done = run_here(small(32, batch_size=2, accumulate=2), "--dry-run")
    assert done.returncode == 2 and "use 4 or more" in done.stderr
    # costs are counted with one picture, but trained are four
    assert run_here(small(32, batch_size=4), "--dry-run").returncode == 0
    assert run_here(small(64, batch_size=1), "--dry-run").returncode == 0


def test_an_interaction_larger_than_the_student_is_pointed_out(small):
    done = run_here(small(32), "--dry-run", "umt.space_dim=512", "umt.groups=1")
    assert done.returncode == 0
    caution = next(line for line in done.stdout.splitlines() if line.startswith("caution"))
    assert "M parameters and the student 0." in caution
    assert "caution" not in run_here(small(32), "--dry-run").stdout


def method_of(name: str, photos):
    student = {"name": name, "image_size": 64, "kwargs": {}, "drop_path": 0.0}
    recipe = small_recipe(photos, targets={"normalize": "none"}) | {"student": student}
    return build_method(make_recipe(recipe), DIMS)


def test_channels_last_is_for_cuda(photo_folder, caplog):
    method = method_of("test_resnet", photo_folder)
    weight = method.student.net.layer1[0].conv1.weight

    def last() -> bool:
        return weight.is_contiguous(memory_format=torch.channels_last)

    cpu, settings = torch.device("cpu"), TrainConfig(steps=1)
    with caplog.at_level(logging.WARNING):
        set_memory_format(method, settings, cpu)
        assert not last() and not caplog.messages
        set_memory_format(method, settings.model_copy(update={"channels_last": True}), cpu)
        assert last() and "train.channels_last = true on a CPU" in caplog.messages[0]
    method.student.net.to(memory_format=torch.contiguous_format)
    set_memory_format(method, settings, torch.device("cuda"))
    assert last()


@pytest.mark.parametrize(("channels", "broken"), [(4, True), (7, True), (8, False)])
def test_convolutions_of_few_channels_are_those_that_crash(channels, broken):
    """As measured in fresh processes; with torch's own repair the list goes."""
    assert _writes_out_of_bounds(torch.nn.Conv2d(channels, 48, 1, stride=2)) is broken


def test_channels_last_is_left_out_where_it_corrupts_memory(photo_folder, caplog):
    """torch's backward pass of a 1x1 convolution of pictures with a stride, on a CPU."""
    method = method_of("mobileone_s0", photo_folder)
    settings = TrainConfig(steps=1, channels_last=True)
    with caplog.at_level(logging.WARNING):
        set_memory_format(method, settings, torch.device("cpu"))
    assert "not done" in caplog.messages[0]
    weights = [part.weight for part in method.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(weight.is_contiguous() for weight in weights)
    images = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)}
    features = method.student(method.preprocess(images["image"]))
    features.patches.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in weights if weight.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("output_stride", "rows"), [(8, 7), (16, 4)])
def test_a_cnn_of_another_stride_is_planned_trained_and_exported(
    recipe_file, tmp_path, output_stride, rows
):
    kwargs = {"output_stride": output_stride}
    recipe = recipe_file(
        student={"name": "resnet10t", "kwargs": kwargs, "drop_path": 0.0, "image_size": 56},
        method="plain",
        teachers=[TEACHER],
        train={"steps": 1},
    )
    sizes = [] if output_stride == 8 else ["student.image_size=64"]
    if sizes:
        done = run_here(recipe, "--dry-run")
        assert done.returncode == 2 and "(use 48 or 64)" in done.stderr
    assert run_here(recipe, *sizes, "--dry-run").returncode == 0
    done = run_here(recipe, *sizes, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    student = open_student(tmp_path / "run")
    assert student.stride == output_stride
    parts = {p.signature.graph: p for p in build_parts(student, None, None)}
    side = rows * output_stride
    fixed = build_parts(student, side, side)[0]
    (features,) = (p for p in fixed.signature.outputs if p.name == "features")
    assert features.axes[1:3] == (rows, rows)
    picture = torch.zeros(1, side, 2 * side, 3, dtype=torch.uint8)
    outputs = parts["backbone"].module(picture)
    assert outputs[2].shape[1:3] == (rows, 2 * rows)


@pytest.mark.parametrize("key", ["train.compile", "teacher_runtime.compile"])
def test_compiling_on_a_cpu_without_a_compiler_is_refused(small, tmp_path, monkeypatch, key):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run_here(small(64, device="cpu"), f"{key}=true", "--output", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{key} = true: " in done.stderr and "'no-such-compiler' is not there" in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()
