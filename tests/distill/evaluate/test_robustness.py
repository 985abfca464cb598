"""ImageNet's variants: their arithmetic by hand, and folder trees of plain colours read by a
classifier of colours.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file

from contract.errors import UserError, exit_status
from contract.views import EVALUATED, ViewPolicy
from distill.data.crops import centre_crop
from distill.evaluate.config import EvaluationConfig
from distill.evaluate.encoder import parse_model, teacher_encoder
from distill.evaluate.linear_probe import imagenet_probe
from distill.evaluate.robustness import (
    ALEXNET,
    SEVERITIES,
    Pictures,
    accuracy,
    cached,
    class_index,
    coarse_accuracy,
    evaluate_variants,
    live,
    mean_corruption_error,
    own_classifier,
    subset_indices,
)
from distill.heads import Classifier, save_head

CONFIG = EvaluationConfig.model_validate({"extract": {"workers": 0, "batch_size": 3}})
WNIDS = {index: wnid for wnid, index in class_index().items()}


def paint(path: Path, shown: int, side: int = 20) -> None:
    """A picture in the colour that `classify` reads as class `shown`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side + 6, side), (shown // 32 * 8 + 4, shown % 32 * 8 + 4, 0)).save(path)


def classify(images: torch.Tensor) -> torch.Tensor:
    """Logits 1 for the class whose colour the picture has; every other class falls off with its
    distance from it.
    """
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
    red, green, _ = images.float().mean(dim=(2, 3)).div(8).floor().long().unbind(dim=1)
    return 1 - (torch.arange(1000) - (32 * red + green).unsqueeze(1)).abs() / 1000


def run(data: Path):
    return evaluate_variants(live(classify, CONFIG), 16, data, CONFIG)


def test_accuracy_by_hand():
    logits = torch.tensor([[5.0, 4, 3, 2], [1.0, 4, 3, 2], [0.0, 1, 2, 3], [9.0, 0, 1, 2]])
    labels = torch.tensor([0, 2, 0, 2])
    assert accuracy(logits, labels) == 0.25
    assert accuracy(logits, labels, topk=2) == 0.5
    assert accuracy(logits, labels, topk=3) == 0.75
    # of classes 0 and 2 the second row's largest is 2, the third's too, the fourth's is 0
    assert accuracy(logits, labels, among=[0, 2]) == 0.5
    assert accuracy(logits, labels, among=[2, 0]) == 0.5
    with pytest.raises(UserError, match="label 2 is not among the 2 classes"):
        accuracy(logits, labels, among=[0, 1])
    with pytest.raises(UserError, match="not finite"):
        accuracy(logits / 0, labels)


def test_coarse_accuracy_counts_classes_of_no_group_as_wrong():
    coarse = torch.tensor([0, 0, 1, -1])
    logits = torch.eye(4)[[0, 1, 2, 3, 3]]
    assert coarse_accuracy(logits, torch.tensor([0, 0, 0, 0, 1]), coarse) == pytest.approx(2 / 5)


def test_mean_corruption_error_by_hand():
    name, value, relative = mean_corruption_error(
        {"snow": [0.1, 0.2, 0.3, 0.4, 0.5], "fog": [0.9] * 5}
    )
    assert name == "mCE of 2 corruptions"
    assert relative == pytest.approx({"snow": 0.3 / 0.866816, "fog": 0.9 / 0.819324})
    assert value == pytest.approx((0.3 / 0.866816 + 0.9 / 0.819324) / 2)
    name, value, _ = mean_corruption_error(
        {corruption: [error] * 5 for corruption, error in ALEXNET.items()}
    )
    assert name == "mCE" and value == pytest.approx(1)
    assert len(ALEXNET) == 15


def test_class_maps_are_those_of_timm():
    assert (
        len(class_index()) == 1000
        and class_index()["n01440764"] == 0
        and class_index()["n02123045"] == 281
    )
    assert all(len(set(subset_indices(name))) == 200 for name in ("imagenet_a", "imagenet_r"))
    assert subset_indices("imagenet_a")[:3] == (6, 11, 13)


def test_subset_is_read_among_its_classes(tmp_path):
    first, second = subset_indices("imagenet_a")[:2]  # 6 and 11
    paint(tmp_path / "imagenet-a" / WNIDS[first] / "right.png", first)
    # class 7 is none of the 200: among them the nearest to it is 6, though 7 has the largest logit
    paint(tmp_path / "imagenet-a" / WNIDS[first] / "outside.JPEG", first + 1)
    paint(tmp_path / "imagenet-a" / WNIDS[second] / "wrong.png", first)
    paint(tmp_path / "imagenet-a" / WNIDS[second] / "right.png", second)
    (tmp_path / "imagenet-a" / "README.txt").write_text("about")
    found = run(tmp_path)
    assert found.scores == {"imagenet-a top1": 0.75}
    assert found.details == {"imagenet-a": {"images": 4, "classes": 2}}
    stranger = next(index for index in range(1000) if index not in subset_indices("imagenet_a"))
    paint(tmp_path / "imagenet-a" / WNIDS[stranger] / "a.png", 0)
    with pytest.raises(
        UserError,
        match=f"'{WNIDS[stranger]}' is not a class: name the folder by one of its 200 classes",
    ):
        run(tmp_path)


def test_v2_folders_are_numbers_or_wordnet_ids(tmp_path):
    for folder, shown in (("2", 2), ("10", 10), ("999", 999), (WNIDS[500], 500), ("11", 12)):
        paint(tmp_path / "imagenet-v2" / folder / "a.png", shown)
    assert run(tmp_path).scores == {"imagenet-v2 top1": pytest.approx(0.8)}
    paint(tmp_path / "imagenet-v2" / "1000" / "a.png", 0)
    with pytest.raises(
        UserError, match="'1000' is not a class: name the folder by a class number from 0 to 999"
    ):
        run(tmp_path)


def test_decoding_processes_give_the_same_and_name_the_torn_picture(tmp_path, capsys):
    for index in range(7):
        paint(tmp_path / "imagenet-v2" / str(index) / "a.png", index % 5)
    workers = CONFIG.model_copy(
        update={"extract": CONFIG.extract.model_copy(update={"workers": 1})}
    )
    assert evaluate_variants(live(classify, workers), 16, tmp_path, workers) == run(tmp_path)
    (tmp_path / "imagenet-v2" / "3" / "torn.jpg").write_bytes(b"")
    assert (
        exit_status(lambda: evaluate_variants(live(classify, workers), 16, tmp_path, workers)) == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "3/torn.jpg cannot be read (empty or not an image)" in said


def paint_corruption(folder: Path, errors: list[int], classes: int = 4) -> None:
    """Of four pictures a severity, as many wrong as `errors` says."""
    for severity, wrong in zip(SEVERITIES, errors, strict=True):
        for index in range(classes):
            paint(folder / severity / WNIDS[index] / "a.png", 700 if index < wrong else index)


def test_corruptions_direct_or_in_groups(tmp_path):
    folder = tmp_path / "imagenet-c"
    paint_corruption(folder / "fog", [0, 1, 2, 3, 4])
    paint_corruption(folder / "blur" / "zoom_blur", [1, 1, 1, 1, 1])
    paint_corruption(folder / "extra" / "saturate", [4, 4, 4, 4, 4])
    found = run(tmp_path)
    expected = (0.5 / 0.819324 + 0.25 / 0.798360) / 2
    assert found.scores == {"imagenet-c mCE of 2 corruptions": pytest.approx(expected)}
    details = found.details["imagenet-c"]
    assert details["errors"] == {"zoom_blur": [0.25] * 5, "fog": [0, 0.25, 0.5, 0.75, 1]}
    assert details["corruption_errors"]["fog"] == pytest.approx(0.5 / 0.819324)
    assert len(details["missing"]) == 13 and "snow" in details["missing"]


def test_all_corruptions_make_mce(tmp_path):
    for name in ALEXNET:
        paint_corruption(tmp_path / "imagenet-c" / name, [1] * 5, classes=1)
    assert run(tmp_path).scores == {
        "imagenet-c mCE": pytest.approx(np.mean([1 / error for error in ALEXNET.values()]))
    }


def test_corruptions_that_lack_something(tmp_path):
    folder = tmp_path / "imagenet-c"
    (folder / "noise").mkdir(parents=True)
    with pytest.raises(UserError, match="has no corruption: add any of gaussian_noise"):
        run(tmp_path)
    for severity in "123":
        paint(folder / "fog" / severity / WNIDS[0] / "a.png", 0)
    with pytest.raises(
        UserError, match="fog lacks severity 4, 5: download it, as mCE needs the folders 1 to 5"
    ):
        run(tmp_path)
    (folder / "gausian_noise").mkdir()
    with pytest.raises(
        UserError, match="'gausian_noise' is not a corruption .* did you mean 'gaussian_noise'"
    ):
        run(tmp_path)


def coarse_map(folder: Path) -> None:
    """Classes 0-99 are dogs (0), 100-199 birds (1), the others nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {str(index): index // 100 if index < 200 else -1 for index in range(1000)}
    (folder / "in_to_in9.json").write_text(json.dumps(table))


def test_backgrounds_and_their_gap(tmp_path):
    folder = tmp_path / "imagenet-9"
    coarse_map(folder)
    shown = {
        "original": (5, 99, 100, 199),
        "mixed_same": (5, 99, 100, 500),
        "mixed_rand": (150, 99, 5, 500),
    }
    for name, classes in shown.items():
        for index, (coarse, value) in enumerate(
            zip(("00_dog", "00_dog", "01_bird", "01_bird"), classes, strict=True)
        ):
            paint(folder / name / "val" / coarse / f"{index}.png", value)
    found = run(tmp_path)
    assert found.scores == {
        "imagenet-9 original": 1.0,
        "imagenet-9 mixed_same": 0.75,
        "imagenet-9 mixed_rand": 0.25,
        "imagenet-9 BG-gap": 0.5,
    }
    assert found.details["imagenet-9"]["images"] == {
        "original": 4,
        "mixed_same": 4,
        "mixed_rand": 4,
    }
    paint(folder / "original" / "val" / "dog" / "a.png", 0)
    with pytest.raises(
        UserError, match="'dog' is not a class: name the folder by a coarse class like 00_dog"
    ):
        run(tmp_path)


def test_all_sets_of_backgrounds_come_in_the_order_of_table_21(tmp_path):
    folder = tmp_path / "imagenet-9"
    coarse_map(folder)
    names = "original mixed_same only_fg mixed_rand mixed_next no_fg only_bg_b only_bg_t".split()
    for wrong, name in enumerate(names):
        for index in range(10):
            shown = 150 if index < wrong else index
            paint(folder / name / "val" / "00_dog" / f"{index}.png", shown)
    found = run(tmp_path)
    expected = {name: 1 - wrong / 10 for wrong, name in enumerate(names)}
    expected["BG-gap"] = expected["mixed_same"] - expected["mixed_rand"]
    assert list(found.scores) == [f"imagenet-9 {name}" for name in expected]
    assert list(found.scores.values()) == pytest.approx(list(expected.values()))
    assert found.details["imagenet-9"]["missing"] == []


def test_backgrounds_need_the_authors_map(tmp_path):
    folder = tmp_path / "imagenet-9"
    paint(folder / "only_fg" / "val" / "00_dog" / "a.png", 0)
    with pytest.raises(
        UserError, match="in_to_in9.json is missing: .* MadryLab/backgrounds_challenge"
    ):
        run(tmp_path)
    (folder / "in_to_in9.json").write_text('{"0": 1}')
    with pytest.raises(UserError, match="does not give each of 1000 classes a number"):
        run(tmp_path)
    coarse_map(folder)
    assert run(tmp_path).scores == {"imagenet-9 only_fg": 1.0}


def test_centre_crop_keeps_the_share_of_the_shorter_side(tmp_path):
    picture = np.zeros((64, 100, 3), dtype=np.uint8)
    picture[16:48, 34:66] = (4, 5 * 8 + 4, 0)  # class 5 within the central half, nothing around
    (tmp_path / "imagenet-v2" / "5").mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / "imagenet-v2" / "5" / "a.png")
    half = ViewPolicy("centre-crop", 0.5)
    assert evaluate_variants(live(classify, CONFIG), 16, tmp_path, CONFIG, half).scores == {
        "imagenet-v2 top1": 1.0
    }
    assert run(tmp_path).scores == {"imagenet-v2 top1": 0.0}


def test_what_variants_refuse(tmp_path):
    with pytest.raises(
        UserError,
        match="has no variant of ImageNet: use a folder with any of imagenet-a, imagenet-r",
    ):
        run(tmp_path)
    place = tmp_path / "imagenet-v2" / "3"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="imagenet-v2 has no pictures"):
        run(tmp_path)
    (place / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match="torn.jpg cannot be read"):
        run(tmp_path)
    (place / "torn.jpg").unlink()
    paint(place / "a.png", 3)
    with pytest.raises(UserError, match=r"returns \[10\] logits a picture, expected \[1000\]"):
        evaluate_variants(
            live(lambda images: torch.zeros(len(images), 10), CONFIG), 16, tmp_path, CONFIG
        )


def test_cached_features_give_what_a_live_network_gives(tiny_vit, tmp_path):
    for index in range(7):
        paint(tmp_path / "imagenet-v2" / str(index) / "a.png", 40 * index, side=80)
        paint(
            tmp_path / "imagenet-a" / WNIDS[subset_indices("imagenet_a")[index]] / "a.png",
            90 * index,
            side=80,
        )
    head = torch.nn.Linear(48, 1000)
    pictures = Pictures(
        tmp_path, sorted((tmp_path / "imagenet-v2").rglob("*.png")), 64, EVALUATED, "imagenet-v2"
    )
    classify = torch.inference_mode()(lambda images: head(tiny_vit(images).summary))
    from_cache = cached(head, tiny_vit, tmp_path / "cache", CONFIG)
    torch.testing.assert_close(from_cache(pictures), live(classify, CONFIG)(pictures))
    found = evaluate_variants(from_cache, 64, tmp_path, CONFIG)
    assert found == evaluate_variants(live(classify, CONFIG), 64, tmp_path, CONFIG)
    assert set(found.scores) == {"imagenet-a top1", "imagenet-v2 top1"}


def test_a_second_pass_does_not_run_the_encoder(tiny_vit, tmp_path):
    path = tmp_path / "imagenet-v2" / "3" / "a.png"
    paint(path, 3)
    paint(tmp_path / "imagenet-v2" / "4" / "a.png", 4)
    seen = []
    hook = tiny_vit.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    logits_of = cached(torch.nn.Linear(48, 1000), tiny_vit, tmp_path / "cache", CONFIG)
    first = evaluate_variants(logits_of, 64, tmp_path, CONFIG)
    assert evaluate_variants(logits_of, 64, tmp_path, CONFIG) == first and sum(seen) == 2
    paint(path, 700, side=30)  # a rewritten picture, or another crop, is another set
    evaluate_variants(logits_of, 64, tmp_path, CONFIG)
    assert sum(seen) == 4
    evaluate_variants(logits_of, 64, tmp_path, CONFIG, ViewPolicy("centre-crop", 0.5))
    assert sum(seen) == 6
    hook.remove()


def test_cached_logits_are_checked_like_live_ones(tiny_vit, tmp_path):
    paint(tmp_path / "imagenet-v2" / "3" / "a.png", 3)
    head = torch.nn.Linear(48, 10)
    with pytest.raises(UserError, match=r"returns \[10\] logits a picture, expected \[1000\]"):
        evaluate_variants(cached(head, tiny_vit, tmp_path / "cache", CONFIG), 64, tmp_path, CONFIG)
    head = torch.nn.Linear(48, 1000)
    torch.nn.init.constant_(head.bias, torch.inf)
    with pytest.raises(UserError, match="logits that are not finite"):
        evaluate_variants(cached(head, tiny_vit, tmp_path / "cache", CONFIG), 64, tmp_path, CONFIG)


def test_a_probe_is_read_on_the_view_it_learnt_from(tiny_vit, tmp_path):
    about = {
        "student_sha256": tiny_vit.weights_sha256,
        "reads": tiny_vit.read_out,
        "image_size": tiny_vit.image_size,
        "classes": [WNIDS[index] for index in range(1000)],
        "view": str(EVALUATED),
    }
    path = save_head(tmp_path, "classification", Classifier(48, 1000), about)
    assert imagenet_probe(tiny_vit, path, EVALUATED)
    with pytest.raises(UserError, match="set extract.view=centre-crop:0.875, or run --tasks"):
        imagenet_probe(tiny_vit, path, ViewPolicy())


def test_own_head_of_mobilenet_sees_a_cat():
    encoder = teacher_encoder(parse_model("mobilenetv2_100@package:mobilenet-v2"), size=224)
    image = centre_crop(Image.fromarray(skimage.data.chelsea()), 224)
    logits = own_classifier(encoder)(image.unsqueeze(0))
    assert logits.shape == (1, 1000)
    assert set(logits[0].topk(5).indices.tolist()) & set(range(281, 286))


def test_own_head_must_be_imagenets():
    config = parse_model("resnet10t@random").model_copy(update={"kwargs": {"num_classes": 0}})
    with pytest.raises(
        UserError,
        match="headless has a head of 0 classes, not ImageNet's 1000: set robustness.class",
    ):
        own_classifier(teacher_encoder(config, size=64, name="headless"))


def test_own_head_must_be_trained(tiny_vit, tiny_cnn, tmp_path):
    untrained = r"{} has no trained classifier \(its weights do not include one\): set "
    untrained += "robustness.classifier=probe"
    with pytest.raises(UserError, match=untrained.format("tiny-vit")):
        own_classifier(tiny_vit)
    state = {name: tensor.contiguous() for name, tensor in tiny_cnn.net.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    save_file(
        {k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "bare.safetensors"
    )
    whole, bare = (
        teacher_encoder(parse_model(f"resnet10t@{tmp_path / name}.safetensors"), size=64, name=name)
        for name in ("whole", "bare")
    )
    assert own_classifier(whole)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 1000)
    with pytest.raises(UserError, match=untrained.format("bare")):
        own_classifier(bare)
