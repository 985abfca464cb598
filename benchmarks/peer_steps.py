"""A training step of this project, of a plain timm loop or of lightly-train, on request:
`python benchmarks/peer_steps.py SIDE`.

One frozen teacher (DINOv2's ViT-S/14) and one student (ViT-Ti/16) at 224 pixels, random weights,
random pictures in memory, fp32, AdamW, gradients clipped. Prints one line of JSON when it is ready,
and for every line it reads the seconds of --steps steps. benchmarks/peers.py starts it,
lightly-train under a Python of its own: it imports nothing of this project but for the side `ours`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEACHER, STUDENT = "vit_small_patch14_dinov2", "vit_tiny_patch16_224"
SIDE = 224
_LR, _CLIP = 5e-4, 1.0


class Peer:
    """`step()` takes one training step and returns its loss; `what` says what it consists of."""

    def __init__(self, step: Callable[[], Tensor], what: str, packages: tuple[str, ...]) -> None:
        self.step, self.what = step, what
        self.versions = {name: version(name) for name in packages}


def ours(batch: int) -> Peer:
    """Method `plain`, as `distill.training.loop` takes its step."""
    sys.path[0] = str(Path(__file__).resolve().parent)
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
    from steps import Step

    from distill.freed_memory import keep_freed_memory
    from distill.recipe_io import make_recipe

    keep_freed_memory()  # as training does
    teacher = {"name": TEACHER, "role": "dino", "pretrained": False, "image_size": SIDE}
    recipe = make_recipe(
        {
            "method": "plain",
            "student": {"name": STUDENT},
            "teachers": [teacher],
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1, "batch_size": batch, "lr": _LR},
        }
    )
    step = Step(recipe, argparse.Namespace(device="cpu", batch=batch))

    def take() -> Tensor:
        step.whole()
        return torch.zeros(())  # the method's losses are tested elsewhere

    return Peer(take, "token and map, an MLP each", ("torch", "timm"))


def timm_loop(
    batch: int, side: int = SIDE, teacher: dict | None = None, student: dict | None = None
) -> Peer:
    """What one writes by hand: a linear layer each for the class token (cosine) and the map (mean
    squared error, the teacher's resized to the student's grid). `teacher` and `student` are further
    arguments of timm's models.
    """
    import timm

    frozen = timm.create_model(TEACHER, img_size=side, num_classes=0, **(teacher or {}))
    frozen = frozen.eval().requires_grad_(False)
    trained = timm.create_model(STUDENT, img_size=side, num_classes=0, **(student or {})).train()
    token, patch = (nn.Linear(trained.num_features, frozen.num_features) for _ in range(2))
    parameters = [*trained.parameters(), *token.parameters(), *patch.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR)
    pictures = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)

    def parts(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = net.forward_features(images)
        first = net.num_prefix_tokens
        grid = round((tokens.shape[1] - first) ** 0.5)
        return tokens[:, 0], tokens[:, first:].unflatten(1, (grid, grid))

    def step() -> Tensor:
        images = pictures.float().div(255).sub(0.5).div(0.25)
        with torch.no_grad():
            summary, maps = parts(frozen, images)
        own, places = parts(trained, images)
        wanted = F.interpolate(
            maps.permute(0, 3, 1, 2), places.shape[1:3], mode="bilinear", antialias=True
        )
        loss = 1 - F.cosine_similarity(token(own), summary, dim=-1).mean()
        loss = loss + F.mse_loss(patch(places), wanted.permute(0, 2, 3, 1))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Peer(step, "token and map, a linear layer each", ("torch", "timm"))


def lightly(batch: int) -> Peer:
    """lightly-train's own `Distillation.training_step_impl`: mixup, teacher and student pooled, a
    linear layer, soft cross-entropy over a queue. Its Lightning loop is left out.
    """
    from lightly_train._methods.distillation.distillation import (
        Distillation,
        DistillationAdamWArgs,
        DistillationArgs,
    )
    from lightly_train._models import package_helpers
    from lightly_train._models.embedding_model import EmbeddingModel

    student = package_helpers.get_wrapped_model(
        model=f"timm/{STUDENT}", num_input_channels=3, model_args={"pretrained": False}
    )
    method = Distillation(
        method_args=DistillationArgs(queue_size=512, teacher="dinov2/vits14-notpretrained"),
        optimizer_args=DistillationAdamWArgs(),
        embedding_model=EmbeddingModel(wrapped_model=student),
        global_batch_size=batch,
        num_input_channels=3,
    )
    parts = method.trainable_modules().modules
    for part in parts:
        part.train()
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=0.0)
    pictures = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)

    def step() -> Tensor:
        images = pictures.float().div(255).sub(0.5).div(0.25)
        loss = method.training_step_impl({"views": [images]}, 0).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Peer(step, "pooled vector, a linear layer", ("torch", "timm", "lightly-train"))


SIDES = {"ours": ours, "timm": timm_loop, "lightly": lightly}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=list(SIDES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peer = SIDES[args.side](args.batch)
    peer.step()
    print(json.dumps({"what": peer.what, "versions": peer.versions}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.steps):
            peer.step()
        taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({key: value / args.steps for key, value in taken.items()}), flush=True)


if __name__ == "__main__":
    main()
