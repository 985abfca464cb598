"""Layouts of timm's families as students: learnt, or refused in one line that gives the reason."""

import re

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from contract.errors import UserError
from distill.config import StudentConfig
from distill.models.batch_norm import values_per_channel
from distill.models.layout import Layout, WrongSize, learn_layout, map_stride
from distill.models.meta import building
from distill.models.student import Student, create_timm


def student(name: str, size: int = 224, drop_path: float = 0.0, **kwargs: object) -> Student:
    """On the meta device."""
    config = StudentConfig(name=name, image_size=size, kwargs=kwargs, drop_path=drop_path)
    with building():
        return Student(config)


@pytest.mark.parametrize(
    ("name", "kwargs", "layout"),
    [
        ("hiera_tiny_224", {"stages": [1, 1, 1, 1]}, ("NLC", 768, 32, 0, False)),
        ("mvitv2_tiny", {}, ("NLC", 768, 32, 0, False)),
        ("efficientformer_l1", {}, ("NLC", 448, 32, 0, False)),
        ("twins_svt_small", {"depths": [1, 1, 1, 1]}, ("NLC", 512, 32, 0, False)),
        # a class token that timm's volo does not declare as a prefix
        ("volo_d1_224", {}, ("NLC", 384, 16, 1, True)),
        # a ViT behind a ResNet: patches of 8 of its map
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, ("NLC", 192, 32, 1, True)),
        ("poolformer_s12", {}, ("NCHW", 512, 32, 0, False)),
        ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 4}, ("NLC", 192, 16, 5, True)),
    ],
)
def test_stride_and_tokens_are_learnt_from_a_forward_pass(name, kwargs, layout):
    learnt = student(name, **kwargs)
    assert learnt.layout[:5] == Layout(*layout)[:5]
    with torch.device("meta"):
        features = learnt.eval()(torch.empty(1, 3, 224, 224))
    side = 224 // learnt.stride
    assert features.patches.shape == (1, side, side, learnt.width)
    assert features.summary.shape == (1, learnt.width)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("crossvit_tiny_240", {}, "gives 2 tensors in place of one feature map"),
        ("efficientvim_m1", {}, "gives 4 tensors in place of one feature map"),
        ("pit_ti_224", {}, "gives its class token alone"),
        # two class tokens, not one and a map of one position
        ("pit_s_distilled_224", {}, "gives its class token alone"),
        ("inception_v3", {}, "gives a map of 5 rows for 224 px, although its stride is 32 pixels"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": [16, 8]},
            "has patches of 16 x 8 pixels, not sq",
        ),
        (
            "vit_tiny_patch16_224",
            {"patch_size": [16, 4]},
            "has patches of 16 x 4 pixels, not sq",
        ),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "takes 1 channels, but pictures have 3: remove"),
        ("test_resnet", {"features_only": True}, "remove features_only"),
        ("test_resnet", {"layers": [1, 2]}, r"with kwargs .* does not take pictures of"),
    ],
)
def test_what_cannot_be_a_student_is_refused_with_the_reason(name, kwargs, reason):
    with pytest.raises(UserError, match=reason) as refused:
        student(name, 240 if "240" in name else 224, **kwargs)
    assert "\n" not in str(refused.value)
    assert kwargs or "kwargs" not in str(refused.value)


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "advice"),
    [
        # of tokens whose square hides what is dropped or hangs over
        ("tnt_s_patch16_224", 40, {"depth": 1}, "a stride of 16 .* 40 px (use 32 or 48)"),
        ("tnt_s_patch16_224", 120, {"depth": 1}, "a stride of 16 .* 120 px (use 112 or 128)"),
        slow("volo_d1_224", 40, {}, "a stride of 16 .* (use 32 or 48)"),
        slow("mvitv2_tiny", 112, {}, "a stride of 32 .* 112 px (use 96 or 128)"),
        slow("vitamin_small_224", 120, {"depth": 1}, "a stride of 16 .* (use 112 or 128)"),
        slow("gmlp_ti16_224", 40, {}, "a stride of 16 .* (use 32 or 48)"),
        # convolutions without padding that other sizes suit
        ("test_convnext", 112, {}, "a stride of 32 .* 112 px (use 96 or 128)"),
        slow("convmixer_768_32", 48, {}, "a stride of 7 .* 48 px (use 42 or 49)"),
        # refused from within, by constructors or forward passes
        ("sam2_hiera_tiny", 112, {"stages": [1, 1, 1, 1]}, "not take .* (use 96 or 128)"),
        slow("hrnet_w18_small", 112, {}, "112 px, which its stride of 32 .* (use 96 or 128)"),
        slow("maxvit_tiny_rw_224", 40, {"depths": [1] * 4}, "stride of 32 .* (use 32 or 64)"),
        slow("twins_svt_small", 112, {"depths": [1] * 4}, "cannot be built .* (use 96 or 128)"),
        # its attention is made for one size, whatever its stride
        slow("efficientformer_l1", 160, {}, "does not take pictures of 160 px (use 224)"),
    ],
)
def test_sizes_are_refused_with_the_stride_and_sizes_that_work(name, size, kwargs, advice):
    pattern = ".*".join(map(re.escape, advice.split(".*")))
    with pytest.raises(UserError, match=pattern + "$") as refused:
        student(name, size, **kwargs)
    assert "\n" not in str(refused.value) and "broadcast" not in str(refused.value)


@pytest.mark.slow
def test_a_network_of_one_size_is_covered_by_its_tokens():
    """LeViT's stride of 64 makes 4 positions of 224 px; it takes no other size to be wrong at."""
    assert student("levit_128s", 224).stride == 56
    assert student("levit_128s", 256).stride == 64


class Drops(torch.nn.Module):
    """Tokens of convolutions that drop what their undeclared stride of 16 leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 16, 16)

    def forward_features(self, x):
        return self.stem(x).flatten(2).mT


def test_an_undeclared_stride_has_to_explain_two_sizes():
    with torch.device("meta"):
        net = Drops()
    assert learn_layout(net, 48).stride == 16
    for size in (40, 34):  # at 34 px a stride of 17 explains 68 px too
        with pytest.raises(WrongSize, match=f"a stride of 16 pixels, .* not divide {size} px"):
            learn_layout(net, size)


def test_only_the_user_s_own_arguments_are_refused():
    with pytest.raises(UserError, match="does not have the arguments bogus: remove them"):
        create_timm("test_resnet", img_size=64, bogus=1)
    with pytest.raises(UserError, match="has no stochastic depth: set drop_path to 0"):
        student("vgg11", drop_path=0.1)
    # one class names both of them in one sentence
    assert create_timm("poolformer_s12", img_size=64, dynamic_img_size=True, num_classes=0)


def test_a_stride_is_what_further_pixels_add_and_no_quotient():
    net = student("test_resnet", 96).net
    for size, height in ((112, 4), (112, 3), (299, 8)):
        far = height + 210  # for 6,720 pixels more
        assert map_stride(net, size, height, lambda pixels, far=far: far) == 32
        # of one size only: the stage that comes nearest
        assert map_stride(net, size, height, lambda pixels: None) == 32
    assert map_stride(net, 224, 28, lambda pixels: None) == 8
    assert map_stride(net, 224, 7, lambda pixels: 7) is None  # pooled to one size
    assert map_stride(torch.nn.Identity(), 112, 4, lambda pixels: None) == 28
    assert map_stride(torch.nn.Identity(), 112, 3, lambda pixels: None) is None


@pytest.mark.parametrize(
    ("name", "size", "sizes", "kwargs"),
    [
        ("convnext_atto", 112, "96 or 128", {}),  # drops what is left
        ("selecsls42", 112, None, {}),  # timm counts the stride of what is behind the map
        ("resnet10t", 112, None, {"output_stride": 16}),
        ("resnet10t", 120, None, {"output_stride": 8}),
    ],
)
def test_cnns_have_their_own_stride_at_any_side(name, size, sizes, kwargs):
    if sizes:
        with pytest.raises(UserError, match=f"stride of 32 pixels.*{size} px .use {sizes}"):
            student(name, size, **kwargs)
        size = int(sizes.split()[0])
    made = student(name, size, **kwargs)
    rows = made(torch.zeros(1, 3, size, size, device="meta")).patches.shape[1]
    assert -(-size // made.stride) == rows
    if "output_stride" in kwargs:
        assert made.stride == kwargs["output_stride"]


def test_the_fewest_values_of_a_batch_norm_are_counted():
    assert values_per_channel(student("test_resnet", 96).net, 96) == 9
    assert values_per_channel(student("test_resnet", 32).net, 32) == 1
    assert values_per_channel(student("test_vit", 160).net, 160) is None


def test_what_is_called_as_a_whole_is_known():
    """FSDP2 gathers weights where a module is called."""
    twins = student("twins_svt_small", depths=[1, 1, 1, 1])
    assert "blocks.0" not in twins.layout.called and "blocks.0.0" in twins.layout.called
    resnet = student("test_resnet", 64)
    assert {"layer1", "layer4"} <= resnet.layout.called
    assert any(isinstance(module, _BatchNorm) for module in resnet.net.modules())
