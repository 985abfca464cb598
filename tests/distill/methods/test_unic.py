"""UNIC's losses, dropping and standardisation against the reference implementation's numbers and
against loops.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from contract.errors import UserError
from distill.config import TrainConfig
from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.losses import Prediction, similarity, similarity_losses
from distill.methods.method import Progress
from distill.methods.standardize import FeatureStandardizer, RunningStandardizer
from distill.methods.unic import keep_teachers, kept_mean, standardize_momentum
from distill.recipe_io import parse_recipe
from distill.tiny import tiny
from distill.training.schedule import learning_rate

REFERENCE = Path(__file__).parents[2] / "data" / "reference"
LOSSES = json.loads((REFERENCE / "unic_loss.json").read_text())
STANDARDIZE = json.loads((REFERENCE / "unic_standardize.json").read_text())

RECIPE = """
method: unic
student: {name: vit_small_patch16_224}
teachers:
  - {name: vit_small_patch16_224.dino, role: dino}
  - {name: vit_small_patch16_224.augreg_in21k_ft_in1k, role: classification, alias: augreg}
data: {kind: packaged-photos}
train: {steps: 8}
"""


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniforms_of(case: dict) -> torch.Tensor:
    """The recorded numbers; those of the worst teacher were not drawn."""
    return double([[0.0 if u is None else u for u in row] for row in case["uniforms_TB"]])


@pytest.mark.parametrize("case", LOSSES["teacher_drop"], ids=lambda c: f"drop {c['drop_prob']}")
def test_dropping_keeps_the_reference_s_teachers(case):
    losses = double(case["losses_TB"])
    keep = keep_teachers(losses, uniforms_of(case), case["drop_prob"])
    assert keep.int().tolist() == case["keep_TB"]
    assert kept_mean(losses, keep).item() == pytest.approx(case["loss"], abs=1e-10)


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_dropping_equals_a_loop_over_images(drop):
    torch.manual_seed(0)
    losses = torch.rand(4, 50, dtype=torch.float64, requires_grad=True)
    uniforms = torch.rand(4, 50, dtype=torch.float64)
    total = count = 0.0
    for image in range(50):
        worst = max(range(4), key=lambda t, n=image: losses[t, n].item())
        for teacher in range(4):
            if teacher == worst or uniforms[teacher, image] >= drop:
                total, count = total + losses[teacher, image], count + 1
    keep = keep_teachers(losses.detach(), uniforms, drop)
    loss = kept_mean(losses, keep)
    assert loss.item() == pytest.approx((total / count).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, losses)
    assert torch.allclose(gradient, keep.double() / keep.sum())  # none through the coefficients


def test_other_teachers_are_kept_as_often_as_asked():
    torch.manual_seed(0)
    losses = torch.rand(3, 100_000)
    keep = keep_teachers(losses, torch.rand_like(losses), 0.3)
    worst = losses.argmax(0, keepdim=True)
    assert keep.gather(0, worst).all()
    others = keep.scatter(0, worst, False).sum().item() / 200_000
    assert abs(others - 0.7) < 3 * math.sqrt(0.7 * 0.3 / 200_000)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_losses_of_every_image_are_the_reference_s(alpha):
    case = LOSSES["loss_per_teacher"]

    def features(side: str) -> dict[str, Features]:
        return {
            label: Features(double(values["cls"]), double(values["patch"]).unsqueeze(1))
            for label, values in case[side].items()
        }

    predictions = {
        label: Prediction(f.summary, f.patches, None) for label, f in features("student").items()
    }
    rows, parts = similarity_losses(predictions, features("teacher"), alpha, "teacher")
    expected = case["per_image" if alpha == 0.5 else "per_image_alpha_0.8"]
    # the public function computes in float32, as under autocast
    assert torch.allclose(rows.double(), double(list(expected.values())), atol=1e-5)
    for label, teacher in features("teacher").items():
        prediction = predictions[label]
        pairs = {"cls": (prediction.token, teacher.summary)}
        pairs["patch"] = (prediction.patches, teacher.patches)
        both = []
        for kind, pair in pairs.items():
            value = similarity(*pair)
            if alpha == 0.5:
                for part, name in ((value.cosine, "cos"), (value.smooth_l1, "sl1")):
                    reference = case["parts"][f"loss/dist_{kind}_{name}_{label}"]
                    assert part.mean().item() == pytest.approx(reference, abs=1e-10)
            both.append(value.weighted(alpha))
        each = torch.stack(both).mean(0)
        assert torch.allclose(each, double(expected[label]), atol=1e-10, rtol=0)


def test_running_statistics_are_the_reference_s():
    for kind in ("cls", "patch"):
        steps = [step for step in STANDARDIZE["steps"] if step["kind"].startswith(kind[:3])]
        assert len(steps) == 3
        normalizer = RunningStandardizer(len(steps[0]["mean_after"])).double()
        for step in steps:
            x = double(step["x"])
            assert torch.allclose(normalizer(x), double(step["y"]), atol=1e-10, rtol=1e-10)
            normalizer.update(x, step["momentum"])
            assert torch.allclose(normalizer.mean, double(step["mean_after"]).flatten())
            assert torch.allclose(normalizer.deviation, double(step["std_after"]).flatten())


def test_momentum_of_the_statistics_is_the_reference_s():
    expected = STANDARDIZE["momentum_schedule_8"]
    mine = [standardize_momentum(step, 8, 1.0, 0.001) for step in range(8)]
    assert mine == pytest.approx(expected, abs=1e-12)


def test_the_learning_rate_is_the_reference_s():
    case = STANDARDIZE["lr_schedule"]
    settings = TrainConfig(
        epochs=case["epochs"],
        lr=case["base"],
        min_lr=case["final"],
        warmup_epochs=case["warmup_epochs"],
        schedule="dino",
    )
    steps = case["epochs"] * case["per_epoch"]
    mine = [learning_rate(step, steps, case["per_epoch"], settings) for step in range(steps)]
    assert mine == pytest.approx(case["values"], abs=1e-12)


def test_the_first_batch_is_seen_raw_and_the_second_with_its_statistics():
    torch.manual_seed(0)
    normalizer = RunningStandardizer(5).double()
    first, second = torch.randn(6, 3, 3, 5).double() + 4, torch.randn(6, 3, 3, 5).double()
    assert torch.allclose(normalizer(first), first, atol=1e-4)
    normalizer.update(first, 1.0)
    rows = first.flatten(0, -2)
    expected = (second - rows.mean(0)) / (rows.std(0) + 2e-6)
    assert torch.allclose(normalizer(second), expected)


def test_a_channel_that_was_silent_does_not_outweigh_the_others():
    torch.manual_seed(0)
    normalizer = RunningStandardizer(20)
    first, second = torch.rand(8, 20), torch.rand(8, 20)
    first[:, 7] = 0
    normalizer.update(first, 1.0)
    out = normalizer(second)
    assert out[:, 7].abs().max() < 80 and torch.allclose(normalizer.inverse(out), second, atol=1e-5)


def test_restoring_a_standardised_feature_gives_it_back():
    torch.manual_seed(0)
    standardizer = FeatureStandardizer(FeatureDims(4, 6))
    features = Features(torch.randn(5, 4) * 3 + 1, torch.randn(5, 2, 2, 6) * 2 - 1)
    standardizer.update(features, 1.0)
    out = standardizer(features)
    restored = standardizer.restore(Prediction(out.summary, out.patches, None))
    assert torch.allclose(restored.token, features.summary, atol=1e-5)
    assert torch.allclose(restored.patches, features.patches, atol=1e-5)


def method_and_batch(*overrides: str):
    recipe = tiny(parse_recipe(RECIPE, "recipe", overrides))
    dims = {teacher.label: FeatureDims(64, 64) for teacher in recipe.teachers}
    torch.manual_seed(0)
    method = build_method(recipe, dims).train()
    views = {"image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)}
    targets = {label: Features(torch.randn(4, 64), torch.randn(4, 4, 4, 64)) for label in dims}
    return method, views, targets


def test_a_ladder_reads_every_layer_and_ships_the_backbone_alone():
    method, views, targets = method_and_batch()
    method.before_step(Progress(0, 8, 4))
    method(views, targets)["loss"].backward()
    assert len(method.heads["dino"].patches) == len(method.student.net.blocks)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in method.named_parameters() if p.grad is not None}
    assert not any(name.startswith("student.net.norm.") for name in trained)  # 1 and 0 for good
    assert method.deploy().shipped == {} and method.describe()["heads"] == []


@pytest.mark.parametrize("student", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_ladder_trains_every_parameter_it_leaves_unfrozen(student):
    method, views, targets = method_and_batch(f"student.name={student}", "student.kwargs={}")
    method.before_step(Progress(0, 8, 4))
    method(views, targets)["loss"].backward()
    idle = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_a_ladder_may_have_the_last_layers_alone_and_none_that_is_not_there():
    method, views, targets = method_and_batch("unic.layers=1")
    method.before_step(Progress(0, 8, 4))
    assert method(views, targets)["loss"].isfinite() and len(method.heads["dino"].patches) == 1
    with pytest.raises(UserError, match=r"unic.layers = 3: student 'vit_small.* has 2 layers"):
        method_and_batch("unic.layers=3")


def test_drops_are_a_function_of_seed_and_step():
    method, views, targets = method_and_batch()
    draws = []
    for step in (3, 3, 4):
        method.before_step(Progress(step, 8, 4))
        draws.append(method._draw(torch.zeros(2, 4)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropping_by_batch_draws_one_coin_a_teacher():
    method, views, targets = method_and_batch("unic.scope=batch", "unic.drop=1")
    method.before_step(Progress(0, 8, 4))
    losses = method(views, targets)
    kept = {label: losses[f"keep.{label}"].item() for label in targets}
    assert sorted(kept.values()) == [0.0, 1.0]
    worst = max(kept, key=kept.get)
    mean = (losses[f"loss.{worst}.token"] + losses[f"loss.{worst}.patches"]) / 2
    assert losses["loss"].item() == pytest.approx(mean.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("targets.normalize=standardize", ["targets.normalize", "standardises", "remove"]),
        ("unic.drop=1.5", ["unic.drop", "1.5", "1"]),
        ("unic.heads=none", ["unic.heads", "none", "ladder"]),
        ("sefa.ssl_weight=0.5", ["sefa.ssl_weight", "method=sefa"]),
        ("ssl.kind=dino", ["ssl.kind", "method=sefa"]),
    ],
)
def test_wrong_settings_are_named(override, words):
    with pytest.raises(UserError) as error:
        parse_recipe(RECIPE, "recipe", [override])
    assert all(word in str(error.value) for word in words)


def test_a_single_teacher_cannot_be_dropped_always():
    with pytest.raises(UserError, match=r"unic.drop = 1: there is a single teacher"):
        parse_recipe(
            RECIPE.replace("  - {name: vit_small_patch16_224.dino, role: dino}\n", ""),
            "recipe",
            ["unic.drop=1"],
        )


@pytest.mark.parametrize("method", ["unic", "sefa", "umt"])
def test_a_teacher_listed_twice_is_refused(method):
    twice = "teachers=[{name: resnet18, role: mae}, {name: resnet18, role: mae, alias: again}]"
    with pytest.raises(UserError, match=r"teachers 0 and 1 are the same network, resnet18"):
        parse_recipe(RECIPE, "recipe", [f"method={method}", twice])
    roles = "teachers=[{name: resnet18, role: mae}, {name: resnet18, role: dino}]"
    if method == "umt":  # two losses on one teacher
        assert len(parse_recipe(RECIPE, "recipe", ["method=umt", roles]).teachers) == 2
        return
    with pytest.raises(UserError, match=r"teachers 0 and 1 are the same network, resnet18"):
        parse_recipe(RECIPE, "recipe", [f"method={method}", roles])


@pytest.mark.parametrize("seed", [2**31, 20261128, 0])
def test_any_seed_draws_drops(seed):
    method, _, _ = method_and_batch(f"train.seed={seed}")
    method.before_step(Progress(10**6, 2 * 10**6, 4))
    assert method._draw(torch.zeros(2, 4)).shape == (2, 4)


def test_a_cnn_s_ladder_works_under_autocast():
    method, views, targets = method_and_batch("student.name=resnet10t", "student.kwargs={}")
    method.before_step(Progress(0, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(views, targets)["loss"]
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32


def test_a_batch_that_is_not_finite_leaves_the_statistics_alone():
    normalizer = RunningStandardizer(3)
    normalizer.update(torch.randn(8, 3), 1.0)
    before = normalizer.mean.clone(), normalizer.deviation.clone()
    bad = torch.randn(8, 3)
    bad[2, 1] = torch.nan
    normalizer.update(bad, 0.5)
    assert normalizer.mean.isfinite().all() and normalizer.deviation.isfinite().all()
    assert normalizer.mean[1] == before[0][1] and normalizer.mean[0] != before[0][0]
