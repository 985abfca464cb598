"""KPU: Eq 1-4 against a slow reference, levels, weightings, streams, what trains and what ships."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from distill.features import FeatureDims, Features
from distill.methods import build_method
from distill.methods.alignment import TeacherHead, Translator, align, choose_levels
from distill.methods.method import Progress
from distill.methods.weighting import Famo
from distill.models.meta import building
from distill.models.vit_adapter import ViTAdapter
from distill.recipe_io import load_recipe, make_recipe
from distill.runs import load_run
from distill.tiny import SWIN, tiny
from distill.training.checkpoint import load_checkpoint
from distill.training.plan import print_plan
from tests.conftest import command, kill_after, metrics_of, run_here, small_recipe

DIMS = {"clip": FeatureDims(6, 10), "detector": FeatureDims(None, 5, (7, 9))}
GRIDS = {"clip": [(4, 4)], "detector": [(9, 9), (5, 5), (3, 3)]}
ADAPTER = {"blocks": 2, "heads": 2, "points": 2, "width": 32}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def kpu_recipe(photos: Path, **changes: object) -> dict:
    """CLIP-like and detector teachers with batches and sizes of their own."""
    teachers = [
        {
            "name": "vit_tiny_patch16_224",
            "role": "clip",
            "pretrained": False,
            "image_size": 64,
            "kwargs": VIT | {"num_classes": 24},
            "batch_size": 4,
        },
        {
            "name": "grounding_dino",
            "role": "detector",
            "pretrained": False,
            "kwargs": SWIN,
            "image_size": 96,
            "batch_size": 2,
        },
    ]
    recipe = small_recipe(photos, method="kpu", teachers=teachers, targets={"normalize": "none"})
    recipe["student"] = {"name": "vit_small_patch14_dinov2", "image_size": 56, "kwargs": VIT}
    recipe["kpu"] = {"adapter": ADAPTER}
    recipe["train"]["steps"] = 4
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


def small_method(dims=None, **kpu: object):
    """A method with open gates for teachers of `dims`, built without their networks."""
    dims = dims or DIMS
    values = kpu_recipe(Path("photos"))
    values["kpu"] |= kpu
    sizes = {"clip": 4, "detector": 2}
    values["teachers"] = [
        {
            "name": "resnet10t",
            "role": "mae",
            "alias": label,
            "pretrained": False,
            "batch_size": sizes[label],
        }
        for label in dims
    ]
    torch.manual_seed(0)
    method = build_method(make_recipe(values), dims).train()
    if method.config.preserve:
        for interaction in method.student.interactions:
            torch.nn.init.normal_(interaction.injector.gate)
    method.before_step(Progress(0, 4, 2))
    return method


def draw(method, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    views, targets = {}, {}
    for label, name in method.teacher_views.items():
        count, size = (4, 64) if label == "clip" else (2, 100)
        views[name] = torch.randint(
            256, (count, 3, size, size), generator=generator, dtype=torch.uint8
        )
        dims = DIMS[label]
        patches, *maps = (
            torch.randn(count, *grid, width, generator=generator) * 2 + 1
            for grid, width in zip(GRIDS[label], (dims.patches, *dims.maps), strict=True)
        )
        summary = None
        if dims.summary is not None:
            summary = torch.randn(count, dims.summary, generator=generator)
        targets[label] = Features(summary, patches, tuple(maps))
    return views, targets


# ---- levels and alignment ------------------------------------------------------------------------


def pyramid(size: int) -> list[tuple[int, int]]:
    return [(-(-size // stride),) * 2 for stride in (4, 8, 16, 32)]


def test_maps_pick_the_closest_level_and_the_finest_is_filled_in():
    students = {"clip": pyramid(224), "detector": pyramid(798)}
    teachers = {"clip": [(14, 14)], "detector": [(100, 100), (50, 50), (25, 25)]}
    pairs = choose_levels(students, teachers, "pick_and_fill")
    assert pairs == {"clip": [(2, 0)], "detector": [(1, 0), (2, 1), (3, 2), (0, 0)]}
    alone = choose_levels({"clip": students["clip"]}, {"clip": [(14, 14)]}, "pick_and_fill")
    assert alone == {"clip": [(2, 0), (0, 0), (1, 0), (3, 0)]}
    every = choose_levels(students, teachers, "every")
    assert every["clip"] == [(2, 0), (0, 0), (1, 0), (3, 0)]
    assert every["detector"] == pairs["detector"]


def test_an_alignment_is_the_sum_of_its_weighted_parts():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64)
    maps = [torch.randn(2, 3, *shape, dtype=torch.float64) for shape in ((4, 4, 6), (2, 2, 7))]
    expected = 0.0
    for v, w in maps:
        cosines = [
            1 - sum(v[n, r, c] * w[n, r, c]) / (v[n, r, c].norm() * w[n, r, c].norm())
            for n in range(3)
            for r in range(v.shape[1])
            for c in range(v.shape[2])
        ]
        d = (v - w).abs()
        smooth = torch.where(d < 1, d**2 / 2, d - 0.5).mean()
        expected += (0.9 * sum(cosines) / len(cosines) + 0.1 * smooth) / 2
    without = align(None, [tuple(pair) for pair in maps], (1.0, 0.9, 0.1))
    assert without.item() == pytest.approx(float(expected), rel=1e-5)
    cosine = sum(1 - x[n] @ y[n] / (x[n].norm() * y[n].norm()) for n in range(3)) / 3
    both = align((x, y), [tuple(pair) for pair in maps], (1.0, 0.9, 0.1))
    assert both.item() == pytest.approx(float(expected + cosine), rel=1e-5)


def resized(map_: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(
        map_.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False, antialias=True
    ).permute(0, 2, 3, 1)


def reference(method, views, targets) -> dict[str, torch.Tensor]:
    """Eq 1-3 a teacher, written out for DIMS and GRIDS on pictures of 64 and 100 pixels."""
    # 70 pixels are what is closest to 64 of the multiples of 14; 98 to 100
    pairs = {
        "clip": [(2, 0)],  # maps of 18, 9, 5, 3 against 4
        "detector": [(2, 0), (3, 1), (3, 2), (0, 0), (1, 0)],  # 25, 13, 7, 4 against 9, 5, 3
    }
    sizes = {"clip": 70, "detector": 98}
    losses = {}
    for label, target in targets.items():
        pixels = views[method.teacher_views[label]].float() / 255
        pixels = F.interpolate(pixels, (sizes[label],) * 2, mode="bilinear", antialias=True)
        student = method.student((pixels - method.preprocess.mean) / method.preprocess.std)
        maps = (target.patches, *target.maps)
        head, into, back = method.heads[label], method.t2s[label], method.rec[label]
        terms = {"s2t": [], "t2s": [], "rec": []}
        for level, number in pairs[label]:
            mine, other = student.maps[level], maps[number]
            terms["s2t"].append((head.maps[number](resized(mine, other.shape[1:3])), other))
            known = into.maps[number](other)
            terms["t2s"].append((mine, resized(known, mine.shape[1:3])))
        for number, other in enumerate(maps):
            terms["rec"].append((back.maps[number](into.maps[number](other)), other))
        for kind, both in terms.items():
            each = [
                0.9 * (1 - F.cosine_similarity(a, b, dim=-1)).mean() + 0.1 * F.smooth_l1_loss(a, b)
                for a, b in both
            ]
            losses[f"loss.{label}.{kind}"] = sum(each) / len(each)
        if target.summary is not None:
            known = into.summary(target.summary)
            for kind, a, b in (
                ("s2t", head.summary(student.summary), target.summary),
                ("t2s", student.summary, known),
                ("rec", back.summary(known), target.summary),
            ):
                losses[f"loss.{label}.{kind}"] += (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    return losses


def test_every_loss_is_what_the_equations_say():
    method = small_method(reconstruct_weight=0.7)
    views, targets = draw(method)
    losses, expected = method(views, targets), reference(method, views, targets)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    total = sum((0.7 if "rec" in name else 1) * value for name, value in expected.items()) / 2
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert set(losses) == {"loss", *method.describe()["losses"]}
    assert method.heads["detector"].shipped().levels == (2, 3, 3)


def test_translators_of_clip_and_a_swin_have_as_many_weights_as_the_paper_leaves_room_for():
    dims = [FeatureDims(512, 768), FeatureDims(None, 192, (384, 768))]
    with building():
        heads = [TeacherHead(dim, 768, 768, 4) for dim in dims]
        into, back = ([Translator(dim, 768, 768, way) for dim in dims] for way in (True, False))
    counts = [
        sum(p.numel() for part in parts for p in part.parameters()) for parts in (heads, into, back)
    ]
    assert counts == [4_970_816, 4_972_032, 4_970_816]


# ---- what learns ---------------------------------------------------------------------------------

SWITCHES = [
    {},
    {"reconstruct": False},
    {"reconstruct": False, "unify": False},
    {"reconstruct": False, "unify": False, "preserve": False},
    {"levels": "every"},
    {"weighting": "famo"},
    {"weighting": "teacher_drop", "drop": 1.0},
]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("teachers", [("clip", "detector"), ("clip",), ("detector",)])
def test_every_weight_but_the_sentinels_gets_a_gradient(switches, teachers):
    if len(teachers) == 1 and "weighting" in switches:
        return
    method = small_method({label: DIMS[label] for label in teachers}, **switches)
    method(*draw(method))["loss"].backward()
    trains = {n for n, p in method.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in method.named_parameters() if p.grad is not None}
    sentinel = {n for n, _ in method.named_parameters() if n.startswith("student.net.")}
    assert (not trains & sentinel) == switches.get("preserve", True)
    grouped = [p for group in method.parameter_groups() for p in group.parameters]
    assert len(grouped) == len(trains)


def test_losses_reach_what_they_should_and_nothing_else():
    method = small_method()
    views, targets = draw(method)
    parts = {"student.", "heads.", "t2s.", "rec."}
    reached = {
        "s2t": {"student.", "heads."},
        "t2s": {"student.", "t2s."},
        "rec": {"t2s.", "rec."},
    }
    whole = method._compare
    for kind, expected in reached.items():
        method._compare = lambda *given, kind=kind: {kind: whole(*given)[kind]}
        method.zero_grad(set_to_none=True)
        method(views, targets)["loss"].backward()
        moved = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
        assert {part for part in parts if any(n.startswith(part) for n in moved)} == expected
    method.config = method.config.model_copy(update={"stop_gradient": True})
    method._compare = lambda *given: {"t2s": whole(*given)["t2s"]}
    method.zero_grad(set_to_none=True)
    method(views, targets)["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in method.student.parameters())


def test_one_backward_is_the_sum_of_a_backward_for_each_teacher():
    method = small_method().double()
    views, targets = draw(method)
    targets = {label: f.map(torch.Tensor.double) for label, f in targets.items()}
    rows, _ = method.losses(views, targets)
    rows.mean().backward()
    whole = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    for row in range(2):
        (method.losses(views, targets)[0][row] / 2).backward()
    for name, parameter in method.named_parameters():
        if name in whole:
            assert torch.allclose(parameter.grad, whole[name], rtol=1e-9, atol=1e-12), name


# ---- weightings ----------------------------------------------------------------------------------


def test_famo_follows_its_authors_code():
    known = json.loads((Path(__file__).parent / "famo.json").read_text())
    famo = Famo(3, known["w_lr"], known["gamma"])
    for step in known["steps"]:
        torch.testing.assert_close(famo.logits, torch.tensor(step["logits_before"]))
        losses = torch.tensor(step["losses"], requires_grad=True)
        loss = famo(losses)
        loss.backward()
        assert loss.item() == pytest.approx(step["weighted"], rel=1e-5)
        torch.testing.assert_close(losses.grad, torch.tensor(step["grad_of_losses"]))
        famo.update(torch.tensor(step["losses_after_step"]))
        torch.testing.assert_close(famo.logits, torch.tensor(step["logits_after"]))


def test_famo_looks_at_the_same_pictures_again():
    method = small_method(weighting="famo")
    views, targets = draw(method)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    losses = method(views, targets)
    losses["loss"].backward()
    optimizer.step()
    before, after = method.famo.before.clone(), method.losses(views, targets)[0].detach()
    method.after_step(Progress(0, 4, 2))
    fell = (before.log() - after.log()).tolist()
    # of two weights the one whose loss fell by less rises, by Adam's first step
    assert fell[0] != fell[1]
    order = 1 if fell[0] > fell[1] else -1
    expected = torch.tensor([-order, order]) * 0.025
    torch.testing.assert_close(method.famo.logits, expected, rtol=1e-3, atol=0)
    assert method._again is None
    assert {"weight.clip", "weight.detector"} <= set(losses)


def test_a_step_that_was_not_taken_leaves_famo_finite():
    famo = Famo(2, 0.025, 0.01)
    famo(torch.tensor([1.0, float("nan")]))
    famo.update(torch.tensor([1.0, float("nan")]))
    assert famo.logits.isfinite().all()


def test_the_worst_teacher_is_never_dropped():
    method = small_method(weighting="teacher_drop", drop=1.0)
    views, targets = draw(method)
    losses, rows = method(views, targets), method.losses(views, targets)[0]
    worst = list(targets)[int(rows.argmax())]
    assert losses[f"weight.{worst}"] == 1 and losses["loss"] == rows.max()
    method = small_method(weighting="teacher_drop", drop=0.5)
    weights = []
    for step in range(8):
        method.before_step(Progress(step, 8, 2))
        _, weight = method._weigh(torch.tensor([1.0, 2.0]))
        weights.append(weight.tolist())
    assert sorted(map(tuple, weights))[0] == (0.0, 1.0)
    assert sorted(map(tuple, weights))[-1] == (0.5, 0.5)
    method.before_step(Progress(0, 8, 2))
    assert method._weigh(torch.tensor([1.0, 2.0]))[1].tolist() == weights[0]


# ---- runs ----------------------------------------------------------------------------------------


def test_teachers_without_a_batch_of_their_own_share_one_view(photo_folder):
    recipe = kpu_recipe(photo_folder)
    for teacher in recipe["teachers"]:
        del teacher["batch_size"]
    method = build_method(make_recipe(recipe), DIMS)
    assert [(view.name, view.stream) for view in method.views] == [("image", "main")]
    own = build_method(make_recipe(kpu_recipe(photo_folder)), DIMS)
    assert {view.stream: view.scale for view in own.views} == {
        "clip": None,
        "detector": (0.5, 1.0),
    }


def with_detector(folder: Path, photos: Path, **changes: object) -> dict:
    """The recipe above with the weights of a detector's checkpoint."""
    recipe = kpu_recipe(photos, kpu={"weighting": "famo"}, **changes)
    del recipe["teachers"][1]["kwargs"], recipe["teachers"][1]["pretrained"]
    recipe["teachers"][1]["checkpoint"] = str(folder)
    return recipe


def train_with_detector(made_once, photos: Path, detector: Path) -> Path:
    """A run of that recipe, once for all tests."""

    def make(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(with_detector(detector, photos)))
        done = run_here(folder / "recipe.yaml", "--output", folder / "run")
        assert done.returncode == 0, done.stderr
        assert "the sentinel's weights are random" in done.stdout + done.stderr

    return made_once("kpu", make) / "run"


@pytest.fixture(scope="module")
def trained(made_once, photo_folder, tiny_detector) -> Path:
    return train_with_detector(made_once, photo_folder, tiny_detector)


def test_a_run_logs_its_losses_and_ships_no_translators_into_the_student(trained):
    run = load_run(trained)
    assert isinstance(run.method.student, ViTAdapter)
    assert set(run.method.describe()["losses"]) <= set(metrics_of(trained)[0])
    names = load_file(trained / "student.safetensors")
    assert not any(name.startswith(("t2s.", "rec.", "famo.")) for name in names)
    deployment = run.method.deploy()
    assert deployment.shipped["clip"].reads == ("maps.16", "summary")
    detector = deployment.shipped["detector"]
    assert detector.reads == ("maps.8", "maps.16", "maps.32") and detector.strides == (8, 16, 32)
    outputs = deployment(torch.rand(1, 3, 56, 70))
    assert [tuple(level.shape[1:3]) for level in outputs["backbone"].maps] == [
        (14, 18),
        (7, 9),
        (4, 5),
        (2, 3),
    ]
    assert outputs["clip"].token.shape == (1, 24) and outputs["clip"].patches.shape[1:3] == (4, 5)
    assert outputs["detector"].token is None
    levels = (outputs["detector"].patches, *outputs["detector"].maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(7, 9, 32), (4, 5, 64), (2, 3, 128)]


def test_the_sentinel_is_as_it_was(trained, photo_folder):
    first = load_checkpoint(trained / "checkpoint")
    assert not any(name.startswith("student.net") for name in first["optimizer"]["state"])
    dims = load_run(trained).dims
    assert dims == {"clip": FeatureDims(24, 32), "detector": FeatureDims(None, 32, (64, 128))}
    recipe = make_recipe(kpu_recipe(photo_folder))
    torch.manual_seed(0)
    fresh = build_method(recipe, dims).state_dict()
    names = [name for name in fresh if name.startswith("student.net.")]
    assert all(torch.equal(fresh[name], first["model"][name]) for name in names)
    assert not torch.equal(fresh["student.up.weight"], first["model"]["student.up.weight"])


def test_a_sentinels_weights_come_from_a_file(tmp_path, photo_folder):
    method = small_method()
    net = {name: tensor + 0.5 for name, tensor in method.student.net.state_dict().items()}
    save_file(net, tmp_path / "sentinel.safetensors")
    recipe = kpu_recipe(photo_folder, train={"steps": 1})
    recipe["student"]["checkpoint"] = str(tmp_path / "sentinel.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0 and "sentinel's weights" not in done.stdout, done.stderr
    (tmp_path / "sentinel.safetensors").unlink()
    shipped = load_run(tmp_path / "run").method.student.net.state_dict()
    assert all(torch.equal(net[name], shipped[name]) for name in net)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "kpu": {"weighting": "famo"},
            "train": {"steps": 2, "precision": "bf16", "ema_decay": 0.9, "accumulate": 2},
        },
        {
            "kpu": {"preserve": False, "unify": False, "reconstruct": False},
            "train": {"steps": 2},
            "teacher_cache": {"views": 2},
        },
    ],
)
def test_other_settings_train_too(changes, tmp_path, photo_folder):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(kpu_recipe(photo_folder, **changes)))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert all(row["skipped_steps"] == 0 for row in metrics_of(tmp_path / "run"))
    reads = [head.reads for head in load_run(tmp_path / "run").method.deploy().shipped.values()]
    whole = [("maps.16", "summary"), ("maps.8", "maps.16", "maps.32")]
    alone = [("patches", "summary"), ("patches",)]
    assert reads == (whole if changes["kpu"].get("preserve", True) else alone)


@pytest.mark.slow
def test_killed_it_resumes_bit_identically(trained, tmp_path, photo_folder, tiny_detector):
    every_step = {"every_steps": 1, "keep": 50}
    recipe = with_detector(tiny_detector, photo_folder, checkpoint=every_step)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    kill_after(2, out, command(tmp_path / "recipe.yaml", "--output", out))
    assert run_here("--output", out, "--resume").returncode == 0
    a, b = (load_checkpoint(folder / "checkpoint") for folder in (trained, out))
    assert a["model"].keys() == b["model"].keys()
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    mine, other = (load_file(folder / "student.safetensors") for folder in (trained, out))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_plan_names_streams_and_parts(photo_folder, capsys):
    print_plan(make_recipe(kpu_recipe(photo_folder)))
    plan = " ".join(capsys.readouterr().out.split())
    assert "clip_image: 1 of 64 px, 4 pictures a step of stream clip, for clip" in plan
    assert "detector_image: 1 of 96 px, 2 pictures a step of stream detector" in plan
    assert "t2s" in plan and "rec" in plan


def test_any_recipe_can_be_trained_by_kpu_when_shrunk(tmp_path):
    recipe = tiny(load_recipe("quickstart", ["method=kpu"]))
    assert recipe.kpu.adapter.blocks == 2 and recipe.method == "kpu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"name": "resnet10t", "kwargs": {}}}, ["student.name", "plain ViT"]),
        ({"student": {"name": "swin_tiny_patch4_window7_224", "kwargs": {}}}, ["plain ViT"]),
        (
            {"student": {"kwargs": VIT | {"class_token": False, "global_pool": "avg"}}},
            ["class token"],
        ),
        ({"kpu": {"adapter": ADAPTER | {"blocks": 3}}}, ["kpu.adapter.blocks = 3", "use 1, 2"]),
        ({"kpu": {"adapter": ADAPTER | {"heads": 3}}}, ["kpu.adapter.heads = 3"]),
        ({"kpu": {"adapter": ADAPTER | {"heads": 5, "value_ratio": 5 / 32}}}, ["width 32"]),
        ({"kpu": {"adapter": ADAPTER | {"width": 24}}}, ["kpu.adapter.width = 24", "norm=batch"]),
        ({"student": {"kwargs": VIT | {"embed_dim": 48}}}, ["= 48", "32 groups"]),
        ({"student": {"image_size": 60}}, ["student.image_size = 60", "56 or 70"]),
        ({"student": {"checkpoint": "package:mobile"}}, ["package:mobile", "mobilenet-v2"]),
        ({"student": {"checkpoint": "nowhere.pth"}}, ["nowhere.pth", "no such file"]),
        ({"student": {"drop_path": 0.1}}, ["student.drop_path", "kpu.adapter.drop_path"]),
        ({"kpu": {"unify": False}}, ["kpu.reconstruct=false"]),
        (
            {"kpu": {"preserve": False, "adapter": ADAPTER | {"heads": 4}}},
            ["kpu.adapter={}", "kpu.preserve=true", "in a file, start from a base without one"],
        ),
        ({"train": {"parallel": "fsdp"}}, ["cannot be sharded", "train.parallel=ddp"]),
        ({"train": {"accumulate": 4}}, ["batch_size of teacher 'detector' = 2", "use 4"]),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(tmp_path, photo_folder, changes, words):
    recipe = kpu_recipe(photo_folder)
    for section, values in changes.items():
        recipe[section] = recipe[section] | values
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists()


def test_all_teachers_have_streams_or_none(tmp_path, photo_folder):
    recipe = kpu_recipe(photo_folder)
    del recipe["teachers"][1]["batch_size"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 2 and "teachers.1.batch_size" in done.stderr


def test_one_teacher_is_not_weighed(tmp_path, photo_folder):
    recipe = kpu_recipe(photo_folder, kpu={"weighting": "famo"})
    recipe["teachers"] = recipe["teachers"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 2 and "kpu.weighting = famo" in done.stderr
