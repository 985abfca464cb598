"""A detector's backbone as a teacher: its three maps, its plan, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from contract.errors import UserError
from distill.config import TeacherConfig, TeacherRuntime
from distill.features import FeatureDims
from distill.methods import METHODS
from distill.models.grounding_dino import image_maps, load_detector
from distill.recipe_io import load_recipe
from distill.teachers import build_teacher, weights_source
from distill.tiny import SWIN
from distill.training.plan import meta_teacher, teacher_gflop

pytestmark = pytest.mark.slow  # importing transformers takes seconds


def detector(**changes) -> TeacherConfig:
    return TeacherConfig(**{"name": "grounding_dino", "role": "detector", **changes})


def build(**changes):
    return build_teacher(detector(**changes), TeacherRuntime(), 0)


@torch.no_grad()
def test_a_teacher_is_the_detectors_backbone_and_nothing_more(tiny_detector):
    teacher = build(checkpoint=str(tiny_detector), image_size=96)
    assert teacher.dims == FeatureDims(None, 32, (64, 128)) and teacher.grid == (12, 12)
    whole = load_detector(str(tiny_detector), "checkpoint")
    images = torch.randint(256, (2, 3, 100, 100), dtype=torch.uint8)
    features, maps = teacher(images), image_maps(whole, teacher.preprocess(images))
    assert features.summary is None
    for mine, other in zip((features.patches, *features.maps), maps, strict=True):
        torch.testing.assert_close(mine, other.permute(0, 2, 3, 1))
    backbone = whole.model.backbone.conv_encoder.model.state_dict()
    assert {f"net.swin.{name}" for name in backbone} == set(teacher.state_dict())
    assert teacher.fingerprint() == build(checkpoint=str(tiny_detector)).fingerprint()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_random_detectors_are_the_same_in_every_process():
    torch.manual_seed(1)
    one = build(pretrained=False, kwargs=SWIN, image_size=64)
    torch.manual_seed(2)
    assert build(pretrained=False, kwargs=SWIN, image_size=64).fingerprint() == one.fingerprint()
    assert one.dims == FeatureDims(None, 32, (64, 128))


def test_the_recipe_is_planned_at_full_size_without_weights_or_hub(tiny_detector):
    recipe = load_recipe("kpu_vit_base", [])
    config = recipe.teachers[1]
    teacher = meta_teacher(config, recipe, 1)
    assert teacher.shapes == {
        "patches": (100, 100, 192),
        "maps.0": (50, 50, 384),
        "maps.1": (25, 25, 768),
    }
    assert next(teacher.parameters()).is_meta
    assert teacher_gflop(teacher) == pytest.approx(121.8, abs=0.1)
    assert weights_source(config) == "Hugging Face hub, IDEA-Research/grounding-dino-tiny"
    base = config.model_copy(update={"checkpoint": "IDEA-Research/grounding-dino-base"})
    assert meta_teacher(base, recipe, 1).dims == FeatureDims(None, 256, (512, 1024))
    local = config.model_copy(update={"checkpoint": str(tiny_detector), "image_size": 64})
    assert meta_teacher(local, recipe, 1).dims == FeatureDims(None, 32, (64, 128))
    assert weights_source(local) == f"folder {tiny_detector}"
    random = detector(pretrained=False)
    assert weights_source(random) == "random weights"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "teachers.0.checkpoint is missing: name a folder"),
        ({"checkpoint": "x/y/z"}, "teachers.0.checkpoint = x/y/z: no such folder"),
        ({"checkpoint": "x", "kwargs": SWIN}, "its checkpoint's config.json says what it is"),
        ({"pretrained": False, "block": 2}, "teachers.0.block is for timm models"),
        ({"pretrained": False, "kwargs": {"embed": 3}}, "kwargs.embed is not a setting"),
        ({"pretrained": False, "kwargs": {"embed_dim": "many"}}, "field 'embed_dim'"),
        ({"pretrained": False, "kwargs": {**SWIN, "num_heads": [3] * 4}}, "3 heads do not divide"),
        ({"pretrained": False, "kwargs": SWIN, "dim": 5}, "has 32-d features, but the recipe"),
    ],
)
def test_wrong_keys_are_one_line(changes, words):
    with pytest.raises(UserError) as raised:
        build(**changes)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_role_is_that_of_detectors_alone():
    for name, role in (("resnet10t", "detector"), ("grounding_dino", "dino")):
        with pytest.raises(ValidationError, match=f"name = {name} with role = {role}"):
            TeacherConfig(name=name, role=role)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"kpu"}))
def test_methods_of_one_map_a_teacher_refuse_a_detector(method):
    teacher = "{name: grounding_dino, role: detector, pretrained: false}"
    with pytest.raises(UserError, match=r"teachers.0.role = detector: .* set method=kpu"):
        overrides = [f"method={method}", f"teachers=[{teacher}]", "targets.normalize=none"]
        load_recipe("quickstart", overrides)
