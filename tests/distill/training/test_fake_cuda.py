"""What a GPU would say of devices and types, without one: fake tensors that claim to be on CUDA run
the code of a training step, an average and an evaluation, and find what mixes devices.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill.config import Recipe
from distill.data.batches import Batch, CorruptLedger, collate
from distill.data.crops import CropDataset
from distill.data.pictures import PackagedPhotos
from distill.evaluate.config import KNNConfig
from distill.evaluate.knn import knn_votes
from distill.evaluate.video import hard_mask, propagate
from distill.methods import build_method
from distill.methods.method import Progress
from distill.recipe_io import load_recipe
from distill.teachers import build_teacher
from distill.tiny import tiny
from distill.training.loop import OptimizerStep, build_optimizer, take_step, teacher_features
from distill.training.schedule import resolve_views

CUDA = torch.device("cuda", 0)
PHOTOS = PackagedPhotos()


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """Replace every parameter and buffer by a fake one on CUDA; what a module keeps as a plain
    attribute stays on the CPU, as it would.
    """
    moved: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in moved:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA
            )
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            moved[id(tensor)] = fake
        return moved[id(tensor)]

    for part in module.modules():
        for place in (part._parameters, part._buffers):
            place |= {name: move(tensor) for name, tensor in place.items() if tensor is not None}
    return module


@contextmanager
def cuda_autocast(kind: torch.dtype | None) -> Iterator[None]:
    """Autocast of CUDA, which torch.autocast leaves off where there is no GPU."""
    if kind:
        torch.set_autocast_dtype("cuda", kind)
    torch.set_autocast_enabled("cuda", kind is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def gradients_without_backward(patch: pytest.MonkeyPatch, module: nn.Module) -> None:
    """Let `backward` give every trained parameter a gradient of its device and type.

    Autograd's engine asks the driver for its devices, so that without a GPU it cannot run; what it
    runs was recorded by the forward pass, whose devices have been checked.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.requires_grad and loss.device == CUDA
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    patch.setattr(torch.Tensor, "backward", backward)


def batch_of(recipe: Recipe, views: tuple) -> Batch:
    """Two photographs in every stream."""
    dataset = CropDataset(PHOTOS, recipe.data, views, 0)
    streams = dict.fromkeys(view.stream for view in views)
    return collate([dataset[stream, number, 0] for stream in streams for number in range(2)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quickstart", torch.bfloat16),
        ("umt_convnext_base_cnn", None),
        ("sefa_vit_tiny", torch.bfloat16),
        ("kpu_vit_tiny", None),
        # not unic: its generator of random numbers is one of the driver's
    ],
)
def test_a_training_step_and_an_average_run_on_one_device(name, kind, monkeypatch):
    recipe = tiny(load_recipe(name, []))
    targets = recipe.targets.model_copy(update={"normalize": "none"})
    train = recipe.train.model_copy(update={"precision": "fp32", "accumulate": 2})
    recipe = recipe.model_copy(update={"targets": targets, "train": train})
    teachers = [
        build_teacher(config, recipe.teacher_runtime, index)
        for index, config in enumerate(recipe.teachers)
    ]
    method = build_method(recipe, {teacher.label: teacher.dims for teacher in teachers}).train()
    batch = batch_of(recipe, resolve_views(recipe, method, teachers))
    average = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    with FakeTensorMode() as mode, cuda_autocast(kind):
        for module in (*teachers, average.module):
            on_fake_cuda(module)
        average.n_averaged = torch.tensor(1)  # torch counts on the CPU
        on_fake_cuda(method)
        gradients_without_backward(monkeypatch, method)
        batch = batch._replace(views={n: mode.from_tensor(v) for n, v in batch.views.items()})
        optimizer = build_optimizer(method, recipe.train, CUDA)
        step = OptimizerStep(
            method,
            method,
            method,
            teacher_features(teachers, method.teacher_views, CUDA),
            optimizer,
            torch.amp.GradScaler("cuda", enabled=False),
            average,
            torch.zeros(3, dtype=torch.int64, device=CUDA),
            recipe.train,
            CorruptLedger(len(PHOTOS), 1.0),
        )
        progress, sums = Progress(0, 2, 2), {}
        method.before_step(progress)
        losses, norm = step(iter([batch, batch]), progress, sums)
    assert norm.device == CUDA and set(sums) == set(losses)
    assert all(value.device == CUDA for value in losses.values())
    stepped = [state for state in optimizer.state.values() if state]
    assert stepped and all(isinstance(s["exp_avg"], FakeTensor) for s in stepped)
    assert {s["step"].device for s in stepped} == {CUDA}  # else every step would wait for the GPU


def test_an_evaluation_runs_on_one_device(tiny_vit, tiny_cnn):
    for source in (tiny_vit, tiny_cnn):
        encoder = copy.deepcopy(source)
        with FakeTensorMode():
            on_fake_cuda(encoder)
            images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=CUDA)
            features = encoder(images)
            layers = encoder.layers(images)
            # the bank of features stays on the CPU, as it may be larger than a GPU's memory
            bank, labels = torch.empty(9, features.summary.shape[1]), torch.zeros(9).long()
            votes = knn_votes(bank, labels, features.summary, 3, KNNConfig(k=5))
            patches = features.patches
            soft = propagate(patches[0], patches, patches[..., :2], 2, 1, 0.1)
            assert hard_mask(soft, (64, 64)).device == CUDA
        tensors = [features.summary, features.patches, votes, soft]
        tensors += [tensor for layer in layers for tensor in layer]
        assert {(tensor.device, tensor.dtype) for tensor in tensors} == {(CUDA, torch.float32)}


def test_a_tensor_left_on_the_cpu_is_found():
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.weight = torch.ones(3), nn.Parameter(torch.ones(3))

    module = Forgetful()
    with FakeTensorMode() as mode:
        on_fake_cuda(module)
        with pytest.raises(Exception, match="FakeTensor"):
            module.weight * module.scale
        with pytest.raises(RuntimeError, match="device"):
            module.weight * mode.from_tensor(torch.ones(3))


def test_fused_adamw_skips_a_bad_step_on_the_cpu_too():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    off = torch.amp.GradScaler("cpu", enabled=False)
    weight.grad = torch.full((3,), float("nan"))
    take_step(optimizer, off, bad=torch.tensor(True))
    assert torch.equal(weight.detach(), torch.ones(3))
    assert not optimizer.state[weight]["exp_avg"].any() and optimizer.state[weight]["step"] == 0
    weight.grad = torch.ones(3)
    take_step(optimizer, off, bad=torch.tensor(False))
    assert not torch.equal(weight.detach(), torch.ones(3)) and optimizer.state[weight]["step"] == 1
