"""Segmentation and depth end to end on drawn scenes, their numbers against scikit-learn and
NumPy.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from contract.errors import Failure, UserError
from distill.evaluate import depth, segmentation
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.datasets import label_names, open_pairs, read_depth, read_mask
from distill.evaluate.dense import draw_batches, rate_at
from distill.evaluate.depth import depth_errors, eigen_crop, silog
from distill.evaluate.extract import extract
from distill.evaluate.windows import WindowViews, merge_windows
from distill.heads import load_head
from distill.scenes import MASK_NAMES


def settings(**sections) -> EvaluationConfig:
    quick = {
        "dense": {"size": 64, "steps": 150, "batch_size": 8, "lr": 1e-2},
        "extract": {"workers": 0},
    }
    return EvaluationConfig.model_validate(quick | sections)


def test_segmentation_head_learns_and_its_iou_is_scikit_learns(tiny_vit, scenes, tmp_path):
    config = settings()
    found = segmentation.evaluate(
        tiny_vit, scenes, config, tmp_path / "cache", tmp_path, {"student_sha256": "s"}
    )
    head = load_head(tmp_path / "heads" / "segmentation.safetensors", "s")
    val = open_pairs(scenes, "val", "masks")
    views = WindowViews(val, 64)
    features = extract(tiny_vit, views, tmp_path / "cache", config.extract, patches=True)
    truth, predicted = [], []
    for number in range(len(val)):
        truth.append(read_mask(val, number, False, 7, 255).ravel())
        logits = head.module(features.patches([number]))
        predicted.append(merge_windows(logits, [views.windows[number]], 64, 64).argmax(0).ravel())
    truth, predicted = np.concatenate(truth), np.concatenate(predicted)
    present = np.union1d(truth, predicted)
    iou = jaccard_score(truth, predicted, labels=present, average=None)
    assert found.scores["mIoU"] == pytest.approx(iou.mean(), abs=1e-5)
    assert found.scores["pixel_accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-6)
    # better than calling every pixel by the commonest label
    commonest = np.bincount(truth).max() / len(truth)
    assert found.scores["pixel_accuracy"] > commonest + 0.1
    assert head.about["classes"] == list(MASK_NAMES) and head.about["size"] == 64
    assert all(file.is_file() for file in found.files)


def test_ade20k_layout_ignores_label_zero(tmp_path, tiny_vit):
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            labels = np.zeros((64, 64), np.uint8)
            labels[:32], labels[32:, :48] = 1, 2  # the last corner stays unlabelled
            picture = np.where(labels[..., None] == 1, 200, 40) + rng.integers(0, 20, (64, 64, 3))
            for kind, values in (("images", picture.astype(np.uint8)), ("annotations", labels)):
                path = tmp_path / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    rows = ["Idx\tName", *(f"{number}\tclass {number}" for number in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    config = settings()
    found = segmentation.evaluate(
        tiny_vit, tmp_path, config, tmp_path / "cache", tmp_path / "out", {}
    )
    assert found.scores["pixel_accuracy"] > 0.9
    ious = list(found.details["iou"].values())
    assert len(ious) == 150 and ious[0] is not None and ious[2:] == [None] * 148
    assert (
        load_head(tmp_path / "out" / "heads" / "segmentation.safetensors").about["zero_is_ignored"]
        is True
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_depth_head_beats_the_mean_and_its_errors_are_numpys(
    tiny_vit, tiny_cnn, scenes, tmp_path, head
):
    steps, lr = (300, 1e-2) if head == "linear" else (40, 3e-3)
    config = settings(
        depth={"head": head, "width": 16},
        dense={"size": 64, "steps": steps, "batch_size": 8, "lr": lr},
    )
    encoder = tiny_vit if head == "linear" else tiny_cnn
    found = depth.evaluate(
        encoder, scenes, config, tmp_path / "cache", tmp_path, {"student_sha256": "s"}
    )
    module = load_head(tmp_path / "heads" / "depth.safetensors", "s").module
    train, val = open_pairs(scenes, "train", "depth"), open_pairs(scenes, "val", "depth")
    views = WindowViews(val, 64)
    rmse, delta1, constant = [], [], []
    mean = np.mean([read_depth(train, n, 1000, 10).mean() for n in range(len(train))])
    with torch.inference_mode():
        for number in range(len(val)):
            images = views[number].unsqueeze(0)
            seen = (
                encoder(images).patches.half().float()
                if head == "linear"
                else encoder.layers(images)
            )
            metres = merge_windows(module(seen).unsqueeze(1), [views.windows[number]], 64, 64)[
                0
            ].numpy()
            truth = read_depth(val, number, 1000, 10)
            rmse.append(np.sqrt(((metres - truth) ** 2).mean()))
            delta1.append((np.maximum(metres / truth, truth / metres) < 1.25).mean())
            constant.append(np.sqrt(((mean - truth) ** 2).mean()))
    assert found.scores["rmse"] == pytest.approx(np.mean(rmse), rel=1e-3)
    assert found.scores["delta1"] == pytest.approx(np.mean(delta1), abs=2e-3)
    assert found.scores["rmse"] < 0.97 * np.mean(constant)


def test_depth_errors_by_hand():
    config = EvaluationConfig().depth
    truth = torch.tensor([[2.0, 4.0], [0.0, 12.0]])  # the second row is unknown and out of range
    errors = depth_errors(torch.tensor([[2.0, 5.5], [3.0, 3.0]]), truth, config, "x")
    assert errors["rmse"] == pytest.approx((1.5**2 / 2) ** 0.5)
    assert errors["delta1"] == 0.5
    assert errors["abs_rel"] == pytest.approx(1.5 / 4 / 2)


def test_eigen_crop_is_nyus_rectangle():
    inside = eigen_crop(480, 640)
    rows, columns = inside.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)


def test_silog_by_its_formula_and_blind_to_invalid_pixels():
    metres, truth = torch.rand(2, 4, 4) * 5 + 0.5, torch.rand(2, 4, 4) * 5 + 0.5
    valid = torch.rand(2, 4, 4) > 0.3
    g = (metres.log() - truth.log())[valid]
    expected = 10 * (g.square().mean() - 0.85 * g.mean().square()).sqrt()
    torch.testing.assert_close(silog(metres, truth, valid, 0.85), expected)
    truth[~valid] = float("nan")
    torch.testing.assert_close(silog(metres, truth.nan_to_num(0.0), valid, 0.85), expected)
    metres.requires_grad_(True)
    silog(metres, torch.zeros_like(truth), torch.zeros_like(valid), 0.85).backward()
    assert torch.isfinite(metres.grad).all(), (
        "a batch without one valid pixel teaches nothing and breaks nothing"
    )


def test_dpt_reads_the_papers_blocks():
    from distill.models.student import dpt_blocks

    assert dpt_blocks(12) == [3, 5, 7, 11]
    assert dpt_blocks(24) == [7, 11, 15, 23]
    assert dpt_blocks(6) == [1, 2, 3, 5]


def test_dpt_layers_are_the_networks_own(tiny_vit, tiny_cnn):
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    layers = tiny_vit.layers(images)
    final = tiny_vit(images)
    torch.testing.assert_close(layers[-1][1], final.patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layers[-1][0], final.summary, atol=1e-5, rtol=1e-4)
    stages = tiny_cnn.layers(images)
    assert [tuple(m.shape[1:3]) for _, m in stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    torch.testing.assert_close(stages[1][0], stages[1][1].mean((1, 2)))


def test_backbone_trains_along_in_a_copy_and_then_no_head_is_saved(
    tiny_cnn, scenes, tmp_path, monkeypatch
):
    seen = []
    original = depth.open_backbone
    monkeypatch.setattr(
        depth, "open_backbone", lambda encoder: seen.append(encoder) or original(encoder)
    )
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    config = settings(
        depth={"head": "dpt", "width": 8, "backbone_lr": 0.1}, dense={"size": 64, "steps": 3}
    )
    depth.evaluate(tiny_cnn, scenes, config, tmp_path / "cache", tmp_path, {})
    after = seen[0].state_dict()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert any("layer1" in name and "weight" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())
    assert not (tmp_path / "heads").exists()


def test_a_head_does_not_depend_on_what_ran_before(tiny_vit, scenes, tmp_path):
    config = settings(dense={"size": 64, "steps": 3})
    scores = []
    for draws in (0, 5):
        torch.rand(draws)
        found = segmentation.evaluate(
            tiny_vit, scenes, config, tmp_path / "cache", tmp_path / str(draws), {}
        )
        scores.append(found.scores)
    assert scores[0] == scores[1]


def test_learning_rate_warms_up_and_falls():
    for schedule, last in (("polynomial", 0.02), ("cosine", 0.001)):
        dense = settings(dense={"steps": 100, "warmup": 0.1, "schedule": schedule}).dense
        rates = [rate_at(step, dense) for step in range(100)]
        assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
        assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
        assert rates[-1] < last
    dense = settings(dense={"steps": 100, "warmup": 0.1, "power": 1.0}).dense
    assert rate_at(55, dense) == 0.5


def test_batches_cover_an_epoch_before_repeating():
    drawn = list(draw_batches(10, 5, 4, torch.Generator().manual_seed(0)))
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(10))
    assert all(len(set(batch)) == 3 for batch in draw_batches(3, 16, 5, torch.Generator()))


def test_a_loss_that_explodes_is_named(tiny_vit, scenes, tmp_path):
    config = settings(dense={"size": 64, "steps": 60, "lr": 1e30})
    with pytest.raises(Failure, match="lower dense.lr"):
        segmentation.evaluate(tiny_vit, scenes, config, tmp_path / "cache", tmp_path, {})
    assert not (tmp_path / "heads").exists()


def test_ade20k_names_come_from_its_own_table(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / kind / split / "a.png")
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.15\t11664\t1172\t1\twall",
        "2\t0.1\t6046\t612\t1\tbuilding, edifice",
    ]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    pairs = open_pairs(tmp_path, "train", "masks")
    assert pairs.ade
    assert label_names(pairs, 2) == ["wall", "building"]
    with pytest.raises(UserError, match="names 2 classes, but the masks have 3"):
        label_names(pairs, 3)


def test_the_ignored_value_never_hides_another_label(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.fromarray(np.array([[0, 1, 2], [3, 1, 0]], np.uint8)).save(
                tmp_path / kind / split / "a.png"
            )
    pairs = open_pairs(tmp_path, "train", "masks")
    assert read_mask(pairs, 0, True, 3, 0).tolist() == [[-1, 0, 1], [2, 0, -1]]
    assert read_mask(pairs, 0, True, 3, 2).tolist() == [[-1, 0, -1], [2, 0, -1]]
    assert read_mask(pairs, 0, False, 4, 1).tolist() == [[0, -1, 2], [3, -1, 0]]
    with pytest.raises(UserError, match="has label 3"):
        read_mask(pairs, 0, True, 2, 255)


def test_pictures_called_rgb_need_no_nyu_layout(tmp_path):
    for kind in ("images", "depth"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "train" / kind / "rgb_0.png")
    assert open_pairs(tmp_path, "train", "depth").maps[0].parent.name == "depth"


def broken_masks(folder, how):
    """Two small splits of masks, one of them with a fault."""
    for split in ("train", "val"):
        for kind in ("images", "masks", "depth"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(2):
            picture = np.full((32, 32, 3), 90, np.uint8)
            labels = np.zeros((32, 32), np.uint8)
            labels[16:] = 1
            if how == "size" and number:
                labels = labels[:20]
            if how == "one class":
                labels[:] = 3
            if how == "too large" and number:
                labels[0, 0] = 9
            if how == "colour":
                labels = np.stack([labels] * 3, axis=-1)
            name = f"{number}.png"
            Image.fromarray(picture).save(folder / split / "images" / name)
            if not (how == "missing mask" and number):
                Image.fromarray(labels).save(folder / split / "masks" / name)
    if how == "empty":
        for path in (folder / "val" / "images").iterdir():
            path.unlink()
    if how == "no split":
        (folder / "val").rename(folder / "other")
    if how == "nothing counts":
        for path in (folder / "val" / "masks").iterdir():
            Image.fromarray(np.full((32, 32), 255, np.uint8)).save(path)
    if how in ("truncated mask", "empty mask"):
        path = folder / "train" / "masks" / "1.png"
        path.write_bytes(
            path.read_bytes()[: len(path.read_bytes()) // 2 if how == "truncated mask" else 0]
        )
    if how == "truncated":
        path = folder / "train" / "images" / "1.png"
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("size", "is 32x20, but its picture is 32x32"),
        ("one class", "only 1 class"),
        ("too large", "has label 9"),
        ("colour", "has 3 channels"),
        ("missing mask", "1 of 2 are missing"),
        ("empty", "is empty"),
        ("no split", "has no val split"),
        ("truncated", "cannot be read"),
        ("truncated mask", "masks/1.png cannot be read"),
        ("empty mask", "masks/1.png cannot be read"),
        ("nothing counts", "every pixel of the validation masks is ignored"),
    ],
)
def test_broken_masks_are_one_line(tiny_vit, tmp_path, how, words):
    broken_masks(tmp_path / "data", how)
    config = settings(segmentation={"classes": 4 if how == "one class" else 2})
    with pytest.raises(UserError, match=words) as caught:
        segmentation.evaluate(
            tiny_vit, tmp_path / "data", config, tmp_path / "cache", tmp_path / "out", {}
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((32, 32), np.uint16), "is all zeros"),
        (np.full((32, 32), 60_000, np.uint16), r"no depth in \(0, 10\] m"),
        (np.full((32, 32), np.nan, np.float32), "is all zeros"),
        (np.ones((32, 30), np.float32), "is 30x32"),
        (np.ones((32, 32, 2), np.float32), "two dimensions"),
    ],
)
def test_useless_depth_maps_are_one_line(tiny_vit, tmp_path, values, words):
    for split in ("train", "val"):
        for kind in ("images", "depth"):
            (tmp_path / split / kind).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(
            tmp_path / split / "images" / "a.png"
        )
        if values.dtype == np.uint16:
            Image.fromarray(values).save(tmp_path / split / "depth" / "a.png")
        else:
            np.save(tmp_path / split / "depth" / "a.npy", values)
    with pytest.raises(UserError, match=words) as caught:
        depth.evaluate(tiny_vit, tmp_path, settings(), tmp_path / "cache", tmp_path / "out", {})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_nyu_official_splits_are_read(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split / "kitchen_0001"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(
                folder / f"rgb_{number:05d}.jpg"
            )
            Image.fromarray(np.full((48, 64), 2500, np.uint16)).save(
                folder / f"sync_depth_{number:05d}.png"
            )
    pairs = open_pairs(tmp_path, "val", "depth")
    assert len(pairs) == 2
    metres = read_depth(pairs, 0, 1000.0, 10.0)
    assert metres.shape == (48, 64) and (metres == 2.5).all()
    (tmp_path / "test" / "kitchen_0001" / "sync_depth_00001.png").unlink()
    with pytest.raises(UserError, match="sync_depth_00001.png is missing"):
        open_pairs(tmp_path, "val", "depth")
