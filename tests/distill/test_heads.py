"""Task heads: their arithmetic against direct formulas, their files."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from contract.errors import UserError
from distill.features import scaled
from distill.heads import (
    DECODER,
    KINDS,
    Classifier,
    DPTDepth,
    LinearDepth,
    LinearSegmenter,
    load_head,
    save_head,
)
from distill.upernet import UPerNet


def test_every_kind_round_trips_through_its_file(tmp_path):
    made = {
        "classifier": Classifier(6, 3),
        "linear-segmentation": LinearSegmenter(6, 4),
        "upernet-segmentation": UPerNet([6] * 2, 8, 4),
        "linear-depth": LinearDepth(6, 16, 0.1, 10.0),
        "dpt-depth": DPTDepth([6] * 4, [4, 2, 1, 0.5], 8, 0.1, 10.0),
    }
    assert set(made) | {DECODER} == set(KINDS)  # decoders: test_attach.py
    patches, summary = torch.randn(2, 4, 4, 6), torch.randn(2, 6)
    inputs = {"classifier": summary, "dpt-depth": [(summary, patches)] * 4}
    inputs["upernet-segmentation"] = [patches, patches[:, ::2, ::2]]
    for kind, head in made.items():
        head.eval()
        path = save_head(tmp_path / "heads", kind, head, {"student_sha256": "x", "classes": ["a"]})
        found = load_head(path, "x")
        assert (found.kind, found.task, found.about["classes"]) == (kind, kind, ["a"])
        given = inputs.get(kind, patches)
        torch.testing.assert_close(found.module(given), head(given), rtol=0, atol=0)
        assert not any(p.requires_grad for p in found.module.parameters())


def test_linear_segmenter_is_batch_norm_and_one_matrix():
    head = LinearSegmenter(5, 3).eval()
    nn.init.normal_(head.norm.running_mean)
    patches = torch.randn(2, 3, 4, 5)
    direct = (patches - head.norm.running_mean) / (head.norm.running_var + head.norm.eps).sqrt()
    direct = direct @ head.linear.weight[:, :, 0, 0].T + head.linear.bias
    torch.testing.assert_close(head(patches), direct.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-4)


def test_binned_depth_is_the_expectation_over_the_bins():
    head = LinearDepth(5, 8, 1.0, 8.0).eval()
    nn.init.normal_(head.linear.weight)
    patches = torch.randn(1, 2, 2, 5)
    logits = F.linear(
        patches / (1 + head.norm.eps) ** 0.5, head.linear.weight[:, :, 0, 0], head.linear.bias
    )
    direct = (logits.softmax(-1) * torch.arange(1.0, 9.0)).sum(-1)
    torch.testing.assert_close(head(patches), direct, atol=1e-5, rtol=1e-5)
    assert (head(100 * patches) >= 1).all() and (head(100 * patches) <= 8).all()


@pytest.mark.parametrize("scales", [[4, 2, 1, 0.5], [1, 1, 1, 1]])
def test_dpt_gives_a_map_of_the_finest_layer_within_the_range(scales):
    # a ViT's equal grids, and a CNN's halving ones: both fused at a quarter of the picture
    grids = [(6, 4)] * 4 if scales[0] == 4 else [(24, 16), (12, 8), (6, 4), (3, 2)]
    layers = [(torch.randn(2, 6), torch.randn(2, h, w, 6)) for h, w in grids]
    head = DPTDepth([6] * 4, scales, 8, 0.5, 4.0)
    depth = head(layers)
    assert depth.shape == (2, 24, 16)
    assert (depth > 0.5).all() and (depth < 4.0).all()
    depth.sum().backward()
    lacking = [
        name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert lacking == [], "every layer and its summary reach the depth"


@pytest.mark.parametrize("scale", [4, 3.5, 2, 1.75, 1, 0.875, 0.5, 0.4375, 16 / 17])
def test_scaled_sides_are_rounded_halves_up(scale):
    for side in range(1, 200):
        assert scaled(side, scale) == max(1, int(side * scale + 0.5))


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "changed":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    elif how == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "damaged"),
        ("changed", "sha256"),
        ("foreign", "not a head"),
        ("missing", "no such head"),
    ],
)
def test_broken_files_are_refused(tmp_path, how, words):
    path = save_head(tmp_path, "segmentation", LinearSegmenter(4, 2), {})
    damage(path, how)
    with pytest.raises(UserError, match=words):
        load_head(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # more than any memory holds, so that a try to make it is another error
        ({"width": 10**12, "classes": 2}, "'linear.weight' has shape .* expects"),
        ({"width": 4, "classes": 3}, "'linear.bias' has shape .2., but the network expects .3."),
        ({"size": 4}, "unexpected keyword argument 'size'"),
    ],
)
def test_settings_that_the_weights_do_not_fit_are_refused(tmp_path, settings, words):
    head = LinearSegmenter(4, 2)
    head.settings = settings
    path = save_head(tmp_path, "segmentation", head, {})
    with pytest.raises(UserError, match=f"does not fit its own settings .*{words}.*: train the"):
        load_head(path)


def test_files_are_as_readable_as_the_users_mask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        path = save_head(tmp_path, "depth", LinearDepth(4, 8, 0.1, 1.0), {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_head_fits_no_other_student(tmp_path):
    path = save_head(tmp_path, "depth", LinearDepth(4, 8, 0.1, 1.0), {"student_sha256": "mine"})
    assert load_head(path, "mine").kind == "linear-depth"
    with pytest.raises(UserError, match="another student"):
        load_head(path, "yours")


def test_metadata_are_json_that_other_languages_read(tmp_path):
    path = save_head(
        tmp_path, "segmentation", LinearSegmenter(4, 2), {"classes": ["wall", "floor"]}
    )
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert json.loads(header["__metadata__"]["settings"]) == {"width": 4, "classes": 2}
    assert set(load_file(path)) >= {"linear.weight", "norm.running_mean"}


def test_a_head_that_does_not_record_its_hash_is_refused(tmp_path):
    path = save_head(tmp_path, "segmentation", LinearSegmenter(8, 3), {"reads": "backbone"})
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    del metadata["sha256"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="does not record its sha256"):
        load_head(path)
