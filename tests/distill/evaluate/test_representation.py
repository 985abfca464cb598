"""Clusters, t-SNE, spreads and attention maps, on data whose answers are known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from contract.errors import UserError
from distill.evaluate.attention import (
    attention_figure,
    attention_maps,
    attention_rows,
    last_attention,
    last_block,
    token_clusters,
)
from distill.evaluate.encoder import parse_model, teacher_encoder
from distill.evaluate.representation import (
    Spread,
    cluster_scores,
    shared_spaces,
    spread,
    teacher_variance,
    tsne_figure,
    tsne_picture,
    tsne_points,
)
from distill.features import FeatureDims
from distill.methods import build_method
from distill.recipe_io import make_recipe


def clusters(n: int, classes: int, noise: float, d: int = 16) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return 5 * np.eye(d)[labels] + noise * random.normal(size=(n, d)), labels


def test_separate_clusters_score_high_and_noise_low():
    found = cluster_scores(*clusters(300, 5, 0.05), classes=5, seed=0)
    assert found["NMI"] == pytest.approx(1) and found["silhouette"] > 0.95
    noise = cluster_scores(*clusters(300, 5, 100), classes=5, seed=0)
    assert noise["NMI"] < 0.15 and noise["silhouette"] < 0.1
    assert cluster_scores(*clusters(300, 5, 100), classes=5, seed=0) == noise


def test_nmi_is_that_of_the_table_of_classes_and_clusters():
    """Three separate clusters, but two pictures of each class lie in the next one."""
    features, clusters_of = clusters(30, 3, 0.01)
    labels = clusters_of.copy()
    labels[:6] = (labels[:6] + 1) % 3
    table = np.zeros((3, 3))
    for label, cluster in zip(labels, clusters_of, strict=True):
        table[label, cluster] += 1
    joint = table / 30
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * math.log(joint[i, j] / (rows[i] * columns[j]))
        for i in range(3)
        for j in range(3)
        if joint[i, j]
    )
    entropy = [-sum(p * math.log(p) for p in part) for part in (rows, columns)]
    found = cluster_scores(features, labels, classes=3, seed=0)["NMI"]
    assert found == pytest.approx(information / (sum(entropy) / 2)) and 0.2 < found < 0.8


def test_silhouette_is_that_of_a_loop_over_pictures():
    features, labels = clusters(24, 3, 3.0)
    unit = [row / math.sqrt(sum(x * x for x in row)) for row in features]
    values = []
    for i, row in enumerate(unit):
        means = {}
        for label in set(labels.tolist()):
            others = [j for j in range(24) if labels[j] == label and j != i]
            means[label] = sum(1 - float(row @ unit[j]) for j in others) / len(others)
        own = means.pop(int(labels[i]))
        nearest = min(means.values())
        values.append((nearest - own) / max(nearest, own))
    found = cluster_scores(features, labels, classes=3, seed=0)["silhouette"]
    assert found == pytest.approx(sum(values) / 24)


def test_length_of_features_does_not_matter():
    features, labels = clusters(200, 4, 0.05)
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(200, 1))
    assert cluster_scores(features * lengths, labels, 4, 0)["NMI"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y * 0, 4), "the 40 pictures looked at are of one class"),
        (
            lambda x, y: (x, y, 41),
            "40 pictures cannot make 41 clusters: raise representation.images",
        ),
        (lambda x, y: (x, np.arange(40), 4), "40 pictures of 40 classes have no silhouette"),
        (lambda x, y: (np.where(x > 4, np.nan, x), y, 4), "features are not finite"),
        (lambda x, y: (x * 0 + 1, y, 4), "features of all 40 pictures are alike"),
        (lambda x, y: (x, y[1:], 4), r"features \[40, 16\] do not go with 39 labels"),
    ],
)
def test_what_clusters_refuse(change, message):
    with pytest.raises(UserError, match=message):
        cluster_scores(*change(*clusters(40, 4, 0.1)), seed=0)


@pytest.mark.parametrize(("n", "classes"), [(12, 3), (60, 25), (4, 2)])
def test_tsne_picture_is_written_whatever_the_perplexity(tmp_path, n, classes):
    features, labels = clusters(n, classes, 0.1, d=32)
    names = [f"class {index}" for index in range(classes)]
    path = tsne_picture(features, labels, names, tmp_path / "a" / "tsne.png", perplexity=30, seed=0)
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").resize((80, 65)).getcolors(5200)) > 3


def test_what_tsne_refuses(tmp_path):
    features, labels = clusters(3, 2, 0.1)
    with pytest.raises(UserError, match="t-SNE of 3 pictures shows nothing"):
        tsne_picture(features, labels, ["a", "b"], tmp_path / "x.png", 30, 0)
    with pytest.raises(UserError, match="not finite"):
        tsne_picture(features * np.nan, labels, ["a", "b"], tmp_path / "x.png", 30, 0)


def test_spread_by_hand():
    # deviations 1 and 3 about means that do not matter
    features = np.array([[[99.0, 3.0], [101.0, -3.0]], [[99.0, 3.0], [101.0, -3.0]]])
    assert spread(features) == pytest.approx(math.sqrt((1 + 9) / 2))
    assert spread(torch.from_numpy(features).half()) == pytest.approx(math.sqrt(5))


def test_teacher_variance_by_hand():
    rows = teacher_variance(
        {"teachers, raw": {"dino": 2.0, "clip": 0.5}, "shared space": {"dino": 1.5, "clip": 1.0}}
    )
    assert rows == [
        {"space": "teachers, raw", "dino": 2.0, "clip": 0.5, "max/min": 4.0},
        {"space": "shared space", "dino": 1.5, "clip": 1.0, "max/min": 1.5},
    ]
    for value in (0.0, math.nan, math.inf):
        with pytest.raises(UserError, match="'raw': features of 'clip' have spread"):
            teacher_variance({"raw": {"dino": 1.0, "clip": value}})
    with pytest.raises(UserError, match="'raw' has no teachers"):
        teacher_variance({"raw": {}})


def deployment(method: str, student: str):
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 2} if student.startswith("vit") else {}
    recipe = make_recipe(
        {
            "method": method,
            "student": {"name": student, "image_size": 64, "kwargs": kwargs},
            "teachers": [{"name": "vit", "role": "mae"}, {"name": "vit", "role": "dino"}],
            "umt": {"space_dim": 32, "groups": 8, "depth": 1},
            "data": {"kind": "packaged-photos"},
            "train": {"steps": 1},
        }
    )
    torch.manual_seed(0)
    return build_method(recipe, {"mae": FeatureDims(48, 48), "dino": FeatureDims(24, 24)}).deploy()


@pytest.mark.parametrize("student", ["vit_tiny_patch16_224", "resnet10t"])
def test_shared_spaces_are_each_teachers_feature_channels(student):
    whole = deployment("umt", student)
    images = torch.randint(
        0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = {label: spread(space) for label, space in shared_spaces(whole, images).items()}
    assert list(found) == ["mae", "dino"]
    features = whole.student(whole.preprocess.normalize(images.float() / 255))
    spaces = whole.coupling(features)
    prefix = spaces.shape[1] - features.patches.shape[1] * features.patches.shape[2]
    assert prefix == (1 if student.startswith("vit") else 0)
    for index, label in enumerate(found):
        rows = spaces[:, prefix:, index, :32].reshape(-1, 32)
        assert found[label] == pytest.approx(
            rows.std(dim=0, correction=0).square().mean().sqrt().item(), rel=1e-5
        )
    assert found["mae"] != found["dino"]
    # one head alone, as an encoder reads it, keeps its own space
    del whole.heads["mae"]
    assert {label: spread(space) for label, space in shared_spaces(whole, images).items()} == {
        "dino": found["dino"]
    }


def test_streamed_spread_is_that_of_all_vectors_together():
    values = torch.randn(50, 3, 7) * torch.arange(1, 8) + torch.randn(50, 1, 7) * 3
    streamed = Spread()
    for part in values.split([1, 30, 19]):
        streamed.add(part)
    assert streamed.value() == pytest.approx(spread(values), rel=1e-6)


def test_plain_heads_share_no_space():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert shared_spaces(deployment("plain", "vit_tiny_patch16_224"), images) is None


def by_hand(encoder, images):
    """Attention of the last block from its own weights."""
    net, seen = encoder.net, {}
    block = net.blocks[-1]
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    with torch.no_grad():
        net.forward_features(encoder.normalize(images))
        hook.remove()
        tokens = block.norm1(seen["tokens"])
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        queries, keys, _ = (tokens @ weight.T + bias).chunk(3, dim=-1)
        split = [
            part.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
            for part in (queries, keys)
        ]
        return (split[0] @ split[1].mT / split[0].shape[-1] ** 0.5).softmax(dim=-1)


def test_attention_is_that_of_the_weights(tiny_vit):
    images = torch.randint(
        0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    fused = tiny_vit.net.blocks[-1].attn.fused_attn
    before = tiny_vit(images).patches
    attention, expected = last_attention(tiny_vit, images), by_hand(tiny_vit, images)
    assert attention.shape == (2, 2, 1 + 4 * 6, 1 + 4 * 6)
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 25))
    maps = attention_maps(tiny_vit, images)
    assert maps.shape == (2, 2, 4, 6)
    torch.testing.assert_close(maps.flatten(2), expected[:, :, 0, 1:])
    assert tiny_vit.net.blocks[-1].attn.fused_attn == fused
    assert not tiny_vit.net.blocks[-1].attn.attn_drop._forward_hooks
    torch.testing.assert_close(tiny_vit(images).patches, before)


def test_without_class_token_all_patches_look():
    config = parse_model("vit_tiny_patch16_224@random")
    kwargs = {
        "embed_dim": 48,
        "depth": 1,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
    }
    encoder = teacher_encoder(config.model_copy(update={"kwargs": kwargs}), size=64)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    expected = by_hand(encoder, images).mean(dim=2).unflatten(-1, (4, 4))
    torch.testing.assert_close(attention_maps(encoder, images), expected)


def test_what_attention_refuses(tiny_vit, tiny_cnn):
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match="tiny-cnn has no global attention"):
        attention_maps(tiny_cnn, images)
    with pytest.raises(
        UserError, match="images of 64x50 pixels do not fit tiny-vit: use multiples of 16"
    ):
        attention_maps(tiny_vit, images[..., :50])


def test_attention_figure(tmp_path, tiny_vit):
    images = torch.randint(0, 256, (2, 64, 80, 3), dtype=torch.uint8).numpy()
    photos = [Image.fromarray(image) for image in images]
    rows = attention_rows(tiny_vit, photos, "student", seed=0)
    views = torch.stack([torch.from_numpy(row.photo) for row in rows]).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        torch.from_numpy(np.stack([row.maps for row in rows])), attention_maps(tiny_vit, views)
    )
    assert all(row.clusters.shape == (4, 4) for row in rows)
    path = attention_figure(tmp_path / "plots" / "attention.png", rows)
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300


def test_clusters_are_of_like_tokens_and_the_most_looked_at_comes_first():
    random = np.random.default_rng(0)
    groups = np.array([2, 0, 1, 0, 2, 1, 1, 0])
    # lengths do not matter
    lengths = random.uniform(0.5, 3, size=(8, 1))
    tokens = lengths * (np.eye(3)[groups] + 0.01 * random.normal(size=(8, 3)))
    attention = np.array([0.3, 0.1, 0.2, 0.1, 0.3, 0.2, 0.2, 0.1])
    found = token_clusters(tokens, attention, count=3, seed=0)
    assert found.tolist() == [0, 2, 1, 2, 0, 1, 1, 2]
    assert token_clusters(np.ones((4, 3)), np.ones(4), count=3, seed=0).tolist() == [0] * 4


def test_the_tokens_are_those_of_the_last_block(tiny_vit):
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    attention, tokens = last_block(tiny_vit, images)
    assert attention.shape == (2, 2, 25, 25)
    features = tiny_vit(images)
    torch.testing.assert_close(tokens[:, 0], features.summary)
    torch.testing.assert_close(tokens[:, 1:], features.patches.flatten(1, 2))


def test_tsne_of_several_networks_is_the_same_every_time(tmp_path):
    features, labels = clusters(40, 4, 0.1, d=32)
    other = features @ np.random.default_rng(2).normal(size=(32, 8))
    names = [f"class {index}" for index in range(4)]
    networks = {"student": features, "teacher": other}
    made = [
        tsne_figure(tmp_path / f"{place}.png", networks, labels, names, 30, 0) for place in "ab"
    ]
    assert made[0].read_bytes() == made[1].read_bytes()
    with Image.open(made[0]) as picture:
        assert picture.width > 2 * picture.height
    points = tsne_points(features, labels, 30, 0)
    # separate clusters stay separate
    middles = np.stack([points[labels == label].mean(0) for label in range(4)])
    nearest = np.linalg.norm(points[:, None] - middles, axis=-1).argmin(1)
    assert (nearest == labels).all()
