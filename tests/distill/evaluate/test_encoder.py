"""Encoders of every kind of network: strides, layers, sizes, and the notation that names them."""

import pytest
import torch

from contract.errors import UserError
from distill.evaluate.encoder import RunEncoder, named_encoder, parse_model, teacher_encoder
from distill.methods.deployment import BACKBONE
from distill.runs import load_run


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224", "mobilenetv2_100"]
)
def test_layers_of_every_kind_of_network_have_their_maps_the_right_way_round(name):
    encoder = teacher_encoder(parse_model(f"{name}@random"), size=224)
    layers = encoder.layers(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    for summary, patches in layers:
        assert patches.shape[1] == patches.shape[2] and summary.shape == (1, patches.shape[3])
    if name.startswith("swin"):
        assert [tuple(p.shape[1:]) for _, p in layers] == [
            (56, 56, 96),
            (28, 28, 192),
            (14, 14, 384),
            (7, 7, 768),
        ]
        block = teacher_encoder(parse_model(f"{name}@random:1"), size=224)
        assert block(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).patches.shape == (
            1,
            28,
            28,
            192,
        )


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [
        ("mobilenetv2_100", 112, 32),  # 4 rows
        ("repvgg_a0", 100, 32),
        ("tf_efficientnet_b0", 112, 32),  # SAME padding
        ("convnext_atto", 112, 32),  # 3 rows: what is left is dropped
        pytest.param("inception_v3", 139, 32, marks=pytest.mark.slow),  # 3 rows: unpadded
        ("convnext_atto:1", 100, 8),  # an earlier stage
    ],
)
def test_stride_is_the_networks_where_the_size_is_no_multiple(name, size, stride):
    name, _, block = name.partition(":")
    encoder = teacher_encoder(parse_model(f"{name}@random" + (block and f":{block}")), size=size)
    assert encoder.stride == stride and encoder.fit(128) == 128
    assert encoder.accepts(size) and encoder.accepts(128)


def test_a_run_takes_whole_positions_alone(plain_run):
    encoder = RunEncoder(load_run(plain_run), BACKBONE)
    assert encoder.accepts(64) and not encoder.accepts(72)


def test_a_network_of_one_size_says_so():
    encoder = teacher_encoder(parse_model("beit_base_patch16_224@random"), size=224)
    assert encoder.fit(224) == 224
    with pytest.raises(UserError, match="takes pictures of 224 px only, not 288"):
        encoder.fit(288)


def test_clip_by_name_gives_its_projected_embedding():
    assert parse_model("vit_base_patch16_clip_224.openai@random").role == "clip"
    assert parse_model("vit_base_patch16_clip_224.openai_ft_in1k@random").role == "classification"


def test_arguments_of_a_network_are_part_of_its_fingerprint():
    plain = teacher_encoder(parse_model("resnet10t@random"), size=64)
    config = parse_model("resnet10t@random").model_copy(update={"kwargs": {"output_stride": 16}})
    wide = teacher_encoder(config, size=64)
    assert plain.weights_sha256 == wide.weights_sha256 and plain.fingerprint() != wide.fingerprint()


def test_a_task_on_image_level_vectors_names_a_network_without(tiny_vit):
    config = tiny_vit.teacher.config.model_copy(update={"summary": False})
    encoder = teacher_encoder(config, size=64, name="map-only")
    assert encoder.dims.summary is None
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).summary is None
    with pytest.raises(UserError, match="map-only: .* no image-level vector, which knn needs"):
        encoder.need_summary("knn")


def test_a_detector_without_weights_is_answered_in_the_words_of_the_command():
    with pytest.raises(UserError) as raised:
        named_encoder("grounding_dino")
    message = str(raised.value)
    assert message.endswith(
        "or a detector of the Hugging Face hub: give grounding_dino@FOLDER, grounding_dino@NAME or "
        "grounding_dino@random"
    )
    assert "pretrained" not in message and "\n" not in message
