"""UMT's interaction as it serves: the same function, with less to compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.features import FeatureDims
from distill.methods import build_method
from distill.methods.deployment import Deployment
from distill.methods.folding import OwnSpaceHead, SharedInteraction
from distill.recipe_io import make_recipe
from tests.conftest import small_recipe

DIMS = {"cls": FeatureDims(24, 24), "mae": FeatureDims(16, 16), "dino": FeatureDims(32, 32)}


def trained(photos, student: str = "vit_tiny_patch16_224", **umt: object) -> Deployment:
    """A deployment whose every weight, norms and biases too, is as if it had learnt."""
    recipe = small_recipe(photos, targets={"normalize": "none"}, umt=umt)
    kwargs = {"embed_dim": 48, "depth": 1, "num_heads": 2} if "vit" in student else {}
    recipe["student"] = {"name": student, "image_size": 64, "kwargs": kwargs}
    method = build_method(make_recipe(recipe), DIMS)
    with torch.no_grad():
        for parameter in (*method.interaction.parameters(), *method.read_out.parameters()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return method.deploy()


CASES = [
    {},
    {"cross_space": "grouped"},
    {"cross_space": "axial"},
    {"cross_space": "token"},
    {"cross_space": False},
    {"model_token": False},
    {"intra_space": False},
    {"depth": 2},
    {"cross_space": "grouped", "depth": 2},
]


@pytest.mark.parametrize("umt", CASES, ids=lambda umt: "-".join(map(str, umt.items())) or "paper")
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["single", "double"])
def test_what_serves_is_the_function_that_was_trained(photo_folder, umt, kind):
    whole = trained(photo_folder, **umt).to(kind)
    close = {"atol": 1e-5, "rtol": 1e-5} if kind == torch.float32 else {"atol": 1e-12, "rtol": 0}
    folded = whole.folded()
    assert isinstance(folded.coupling, SharedInteraction) and folded.folded() is folded
    assert all(isinstance(head.module, OwnSpaceHead) for head in folded.shipped.values())
    pixels = torch.rand(2, 3, 64, 96, dtype=kind)
    with torch.inference_mode():
        wanted, got = whole(pixels), folded(pixels)
        features = whole.student(whole.preprocess.normalize(pixels))
        coupled = []
        whole.coupling.cross[-1].register_forward_hook(lambda *args: coupled.append(args[2]))
        whole.coupling(features)
        torch.testing.assert_close(folded.coupling(features), coupled[0], **close)
    for label, prediction in wanted.items():
        for name in ("token", "patches", "summary"):
            value = getattr(prediction, name)
            if value is not None:
                torch.testing.assert_close(getattr(got[label], name), value, **close)
    assert all(head.normalizer is not None for head in folded.shipped.values())


def test_a_cnns_interaction_serves_as_it_was_trained(photo_folder):
    # its convolutions need the grid, which a head in a graph of its own does not know
    whole = trained(photo_folder, "resnet10t", groups="auto")
    folded = whole.folded()
    assert folded.coupling is whole.coupling and folded.shipped == whole.shipped


def flops(module: torch.nn.Module, *inputs: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def test_the_first_projection_is_as_wide_as_the_student_and_a_head_pays_for_its_own_space(
    photo_folder,
):
    whole = trained(photo_folder, token_dim=48)
    folded = whole.folded()
    features = whole.student(torch.rand(1, 3, 64, 64))
    spaces, width, positions = 3, 2 * 48, 17
    channels = spaces * width
    head = folded.heads["dino"]
    intra = flops(head.intra, torch.rand(1, positions, 1, width), (4, 4))
    saved = 2 * positions * 3 * channels * (channels - 48) + spaces * intra
    assert flops(whole.coupling, features) - flops(folded.coupling, features) == saved
    read_out = flops(whole.heads["dino"], torch.rand(1, positions, spaces, width), (4, 4))
    assert flops(head, torch.rand(1, positions, spaces, width), (4, 4)) == intra + read_out
