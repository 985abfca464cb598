"""GroundingDINO in parts: fed its own maps they detect what it does; other checkpoints are
refused.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from contract.errors import UserError
from distill.models.grounding_dino import (
    DetectorRest,
    TextSide,
    image_maps,
    load_detector,
    read_config,
)

pytestmark = pytest.mark.slow  # importing transformers takes seconds


@pytest.fixture(scope="module")
def detector(tiny_detector):
    """The tiny detector, its zero-initialised layers filled."""
    model = load_detector(str(tiny_detector), "checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def test_its_own_maps_and_text_give_what_the_whole_detector_gives(detector):
    from transformers.models.grounding_dino import modeling_grounding_dino as original

    ids = torch.tensor(
        [[101, 1040, 1041, 1012, 1050, 1012, 102], [101, 1040, 1012, 1050, 1012, 102, 0]]
    )
    text_mask = ids != 0
    pixels = torch.randn(2, 3, 224, 160)
    expected = detector(pixels, ids, attention_mask=text_mask.long())
    masks = original.generate_masks_with_special_tokens_and_transfer_map(
        ids, detector.model.special_tokens
    )
    text = TextSide(detector)(ids, *masks)
    maps = [level.permute(0, 2, 3, 1) for level in image_maps(detector, pixels)]
    assert [tuple(level.shape[1:]) for level in maps] == [(28, 20, 32), (14, 10, 64), (7, 5, 128)]
    logits, boxes = DetectorRest(detector)(maps, text, text_mask, *masks)
    assert logits.shape == (2, 20, 256) and (logits[1, :, 6:] == -torch.inf).all()
    assert torch.equal(logits, expected.logits) and torch.equal(boxes, expected.pred_boxes)
    assert boxes.std() > 0.05  # not all alike


def test_the_rest_has_neither_backbone(detector):
    names = {name for name, _ in DetectorRest(detector).named_parameters()}
    assert names and not any("backbone" in name or "text_" in name.split(".")[1] for name in names)
    assert detector.model.backbone is not None and detector.model.text_backbone is not None


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_backbone(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        edit_config(backbone_config=config["backbone_config"] | changes)(folder)

    return edit


def edit_weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


LEVELS = "model.level_embed"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors is missing"]),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["model.safetensors is missing", "save_pretrained"],
    ),
    "another architecture": (edit_config(model_type="bert"), ["model_type is 'bert'"]),
    "not json": (lambda f: (f / "config.json").write_text("{"), ["config.json is damaged"]),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["model_type is None"]),
    "one stage": (edit_config(two_stage=False), ["two_stage = False is not supported"]),
    "another text tower": (
        edit_config(text_config={"model_type": "roberta"}),
        ["text_config.model_type = 'roberta'"],
    ),
    "other maps": (
        edit_config(backbone_config={"model_type": "swin", "out_indices": [1, 2, 3]}),
        ["stage1", "stage2, stage3, stage4 are needed"],
    ),
    "endless layers": (edit_config(encoder_layers=10**9), ["1000000000 layers"]),
    "endless levels": (edit_config(num_feature_levels=10**9), ["1000000000 layers"]),
    "another window": (edit_config(max_text_len=4), ["max_text_len = 4", "only 256"]),
    "a short text tower": (
        edit_config(text_config={"model_type": "bert", "max_position_embeddings": 4}),
        ["text_config.max_position_embeddings = 4", "at least 256"],
    ),
    # of sizes that no memory holds, so that a try to make them is another error
    "endless queries": (
        edit_config(num_queries=10**13),
        ["1 mismatched keys", "query_position_embeddings"],
    ),
    "endless words": (
        edit_config(text_config={"model_type": "bert", "vocab_size": 10**13}),
        ["mismatched keys", "model.text_backbone."],
    ),
    "an endless backbone": (edit_backbone(embed_dim=960_000), ["mismatched", "conv_encoder"]),
    # whose tensors are renamed as they are loaded
    "endless blocks": (
        edit_backbone(mlp_ratio=10.0**9),
        ["config.json describes", "its weights have 484,833"],
    ),
    "deep json": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        ["config.json is damaged"],
    ),
    "a wrong value": (edit_config(num_queries="many"), ["config.json is not valid"]),
    "cut weights": (cut, ["cannot be loaded"]),
    "other shapes": (edit_config(d_model=64), ["mismatched", "bbox_embed.0"]),
    "a tensor too few": (edit_weights(lambda t: t.pop(LEVELS)), ["1 missing", LEVELS]),
    "a tensor too many": (
        edit_weights(lambda t: t.update(spare=torch.zeros(2))),
        ["1 unexpected", "spare"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_another_or_a_broken_checkpoint_is_refused_in_one_line(case, tiny_detector, tmp_path):
    edit, words = BROKEN[case]
    folder = shutil.copytree(tiny_detector, tmp_path / "detector")
    edit(folder)
    with pytest.raises(UserError) as raised:
        load_detector(str(folder), "teachers.1.checkpoint")
    message = str(raised.value)
    assert message.startswith(f"teachers.1.checkpoint = {folder}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_a_checkpoint_cannot_ask_for_code_of_a_hub(tiny_detector, tmp_path):
    folder = shutil.copytree(tiny_detector, tmp_path / "detector")
    code = {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "theirs.Model"}}
    edit_config(
        **code, text_config=load_detector(str(folder), "x").config.text_config.to_dict() | code
    )(folder)
    config = read_config(str(folder), "x")
    for part in (config, config.text_config):
        assert part._attn_implementation is None and not hasattr(part, "auto_map")
    load_detector(str(folder), "x")
    edit_config(backbone="someone/backbone", backbone_config=None)(folder)
    assert read_config(str(folder), "x").backbone_config.model_type == "swin"


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_detector(str(tmp_path / "detector"), "detection.checkpoint")
    with pytest.raises(UserError, match="no such folder"):
        load_detector(__file__, "detection.checkpoint")


def test_without_transformers_the_extra_is_named(monkeypatch, tiny_detector):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'vfm-distill\[detection\]'"):
        load_detector(str(tiny_detector), "teachers.1.checkpoint")
