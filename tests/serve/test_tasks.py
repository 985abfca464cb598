"""Segmentation, depth and zero-shot: the head in the server and the head here say the same, and
their pictures show it.
"""

import asyncio
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from contract.class_scores import probabilities
from contract.errors import UserError
from contract.manifest import add_files
from distill.data.pictures import PackagedPhotos
from distill.figures import pca_rgb as torch_pca
from serve.bundle import read_bundle
from serve.client import FeatureClient
from serve.client.aio import AsyncFeatureClient
from serve.client.pictures import (
    class_figure,
    class_image,
    features_figure,
    overlay,
    palette,
    pca_rgb,
    save,
    scalar_figure,
    zero_shot_figure,
)
from serve.client.tasks.depth import estimate_depth
from serve.client.tasks.segmentation import segment
from serve.client.tasks.zero_shot import classify
from serve.errors import BadRequest, NotServed
from serve.repository.zero_shot import EMBEDDINGS, read_class_embeddings
from tests.conftest import need_tritonserver

CLASSES = ["cat", "coffee", "rocket", "golden retriever", "coins"]


@pytest.fixture(scope="module")
def client(server):
    with FeatureClient(server.grpc) as found:
        yield found


@pytest.fixture(scope="module")
def photos():
    """Six photographs, more than the bundle's batch."""
    return [PackagedPhotos().load(number).convert("RGB") for number in range(6)]


@pytest.fixture(scope="module")
def zero_shot_bundle(small_bundle, tmp_path_factory):
    """The small bundle with made-up class embeddings in the space of its teacher `mae`."""
    bundle = tmp_path_factory.mktemp("zero_shot") / "bundle"
    shutil.copytree(small_bundle, bundle)
    width = {tensor.name: tensor.dims[-1] for tensor in read_bundle(bundle).outputs}["mae_token"]
    rows = np.random.default_rng(0).normal(size=(len(CLASSES), width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    metadata = {
        "format": "1",
        "teacher": "mae",
        "logit_scale": "20",
        "classes": json.dumps(CLASSES),
        "labels": json.dumps(CLASSES),
        "templates": "[]",
    }
    save_file({"embeddings": rows}, bundle / EMBEDDINGS, metadata)
    add_files(bundle, [EMBEDDINGS])
    return bundle


@pytest.fixture(scope="module")
def zero_shot_client(expensive, zero_shot_bundle, tmp_path_factory):
    """A client of a server on it."""
    need_tritonserver()
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder = tmp_path_factory.mktemp("zero_shot_server")
    make_repository(read_bundle(zero_shot_bundle), folder / "repository", Settings(fused=False))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, lambda line: None
    ) as server:
        with FeatureClient(server.grpc) as found:
            yield found


def classes_of(bundle):
    return tuple(read_bundle(bundle).graphs["segmentation"].about["classes"])


def apart(maps, others) -> float:
    """The share of pixels of another class, in the map where it is largest."""
    return max((one != other).mean() for one, other in zip(maps, others, strict=True))


def test_segmentation_is_the_same_on_both_sides(client, server, photos):
    there, here = segment(client, photos), segment(client, photos, side="client")
    assert there.classes == here.classes == classes_of(server.bundle)
    assert [m.shape for m in there.class_map] == [photo.size[::-1] for photo in photos]
    assert {m.dtype for m in there.class_map} == {np.dtype(np.int32)}
    # where two classes are equally likely to the last digit, batches of other sizes may tip them
    assert apart(there.class_map, here.class_map) < 1e-3
    alone = segment(client, photos[0]).class_map
    assert np.array_equal(alone, segment(client, photos[0], side="client").class_map)


def test_depth_is_the_same_on_both_sides(client, photos):
    there, here = (
        estimate_depth(client, photos),
        estimate_depth(client, photos, side="client", encoded=True),
    )
    assert there.unit == here.unit == "metre"
    assert [m.shape for m in there.depth] == [photo.size[::-1] for photo in photos]
    for one, other in zip(there.depth, here.depth, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    alone = [estimate_depth(client, photos[0], side=side).depth for side in ("server", "client")]
    np.testing.assert_allclose(*alone, rtol=0, atol=1e-5)


def test_zero_shot_is_the_same_on_both_sides(zero_shot_client, zero_shot_bundle, photos):
    file = zero_shot_bundle / EMBEDDINGS
    there = classify(zero_shot_client, photos)
    here = classify(zero_shot_client, photos, side="client", embeddings=file)
    assert there.classes == here.classes == tuple(CLASSES)
    np.testing.assert_allclose(there.probabilities, here.probabilities, rtol=0, atol=1e-5)
    assert there.probabilities.shape == (6, 5) and there.probabilities.std(0).max() > 1e-4
    tokens = zero_shot_client.features(photos, "mae_token")["mae_token"]
    np.testing.assert_allclose(
        probabilities(tokens, read_class_embeddings(file).vectors), here.probabilities, atol=1e-5
    )


def test_a_choice_of_classes_shares_the_probability_among_them(
    zero_shot_client, zero_shot_bundle, photos
):
    file = zero_shot_bundle / EMBEDDINGS
    whole = classify(zero_shot_client, photos, side="client", embeddings=file).probabilities
    some = classify(zero_shot_client, photos, ["coins", "cat"], side="client", embeddings=file)
    assert some.classes == ("coins", "cat")
    chosen = whole[:, [4, 0]]
    np.testing.assert_allclose(some.probabilities, chosen / chosen.sum(1, keepdims=True), atol=1e-5)
    there = classify(zero_shot_client, photos, ["coins", "cat"])
    assert there.classes == some.classes
    np.testing.assert_allclose(there.probabilities, some.probabilities, atol=1e-5)


def test_tasks_take_the_asyncio_client_too(client, server, photos):
    async def ask():
        async with AsyncFeatureClient(server.grpc) as found:
            return await asyncio.gather(
                segment(found, photos), estimate_depth(found, photos, side="client")
            )

    classes, depth = asyncio.run(ask())
    assert apart(classes.class_map, segment(client, photos).class_map) < 1e-3
    for one, other in zip(depth.depth, estimate_depth(client, photos).depth, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_a_task_cannot_do_is_said(
    client, zero_shot_client, zero_shot_bundle, photos, tmp_path
):
    file = zero_shot_bundle / EMBEDDINGS
    for side in ("here", ""):
        with pytest.raises(BadRequest, match="'server' or 'client'"):
            segment(client, photos, side=side)
    with pytest.raises(NotServed, match="export.text"):
        classify(client, photos)
    with pytest.raises(BadRequest, match="no text encoder"):
        classify(zero_shot_client, photos, ["a cat"])
    with pytest.raises(BadRequest, match="did you mean 'rocket'"):
        classify(zero_shot_client, photos, ["rockets"], side="client", embeddings=file)
    with pytest.raises(BadRequest, match="needs embeddings"):
        classify(zero_shot_client, photos, side="client")
    with pytest.raises(BadRequest, match="nothing is missing"):
        classify(zero_shot_client, photos, side="client", embeddings=tmp_path / "nothing")
    for labels, said in (
        ([], "at least one"),
        (["cat", " "], "empty"),
        (["cat", "cat "], "twice"),
        ("cat", "list"),
    ):
        with pytest.raises(BadRequest, match=said):
            classify(zero_shot_client, photos, labels, side="client", embeddings=file)
    save_file(
        {"embeddings": np.ones((1, 7), np.float32)},
        tmp_path / "other",
        {"format": "1", "classes": '["x"]'},
    )
    with pytest.raises(BadRequest, match="7-d vectors of a CLIP teacher"):
        classify(zero_shot_client, photos, side="client", embeddings=tmp_path / "other")


# Pictures


def test_components_are_coloured_as_in_training():
    maps = np.random.default_rng(0).normal(size=(5, 7, 24)).astype(np.float32)
    np.testing.assert_allclose(pca_rgb(maps), torch_pca([torch.from_numpy(maps)])[0], atol=1e-6)
    assert pca_rgb(maps[:1, :2]).shape == (1, 2, 3)  # fewer positions than components


def test_a_class_map_is_kept_exactly_in_its_picture(tmp_path):
    numbers = np.arange(64 * 48).reshape(64, 48) % 150
    opened = Image.open(save(class_image(numbers, 150), tmp_path / "classes.png"))
    assert opened.mode == "P" and np.array_equal(np.asarray(opened), numbers)
    assert np.array_equal(np.asarray(opened.convert("RGB"))[3, 5], palette(150)[numbers[3, 5]])
    many = Image.open(save(class_image(numbers * 7, 1050), tmp_path / "many.png"))
    assert np.array_equal(np.asarray(many), numbers * 7)


def test_colours_of_classes_differ_and_stay():
    assert len(np.unique(palette(200), axis=0)) == 200
    assert np.array_equal(palette(5), palette(200)[:5])


def test_an_overlay_has_the_photographs_shape_and_its_classes_colours(photos):
    photo = photos[0].resize((300, 100))
    numbers = np.zeros((64, 64), np.int32)
    numbers[:, 32:] = 3
    mixed = np.asarray(overlay(photo, numbers, 5, strength=1.0))
    assert mixed.shape == (100, 300, 3)
    assert (mixed[:, :149] == palette(5)[0]).all() and (mixed[:, 152:] == palette(5)[3]).all()


def test_figures_of_every_task_are_written(client, photos, tmp_path):
    photo, row = photos[0], np.array([0.7, 0.2, 0.1], np.float32)
    classes, depth = segment(client, photo), estimate_depth(client, photo)
    patches = client.features(photo, "backbone_patches")["backbone_patches"].reshape(4, 4, -1)
    names = ["a $_$ b"] * len(classes.classes)  # not a formula that matplotlib could set
    figures = {
        "segmentation": class_figure(photo, classes.class_map[0], names),
        "depth": scalar_figure(photo, depth.depth[0], depth.unit),
        "zero_shot": zero_shot_figure(photo, row, ["cat", "a $_$ b", "x" * 90]),
        "features": features_figure(photo.resize((100, 400)), {"backbone": patches}),
    }
    for name, figure in figures.items():
        said = {text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))}
        assert {"depth": "metres", "zero_shot": "70.0%", "features": "backbone, 4x4"}.get(
            name, ""
        ) in said | {""}
        with Image.open(save(figure, tmp_path / "pictures" / f"{name}.png")) as picture:
            assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 10
    with pytest.raises(UserError, match="cannot write"):
        (tmp_path / "file").write_text("")
        save(figures["depth"], tmp_path / "file" / "depth.png")
