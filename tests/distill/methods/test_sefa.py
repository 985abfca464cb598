"""SeFA: Eq 4 and what it is made of, what trains and what ships, two processes, resuming, collapse,
export and serving.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from distill.distributed import Ranks
from distill.evaluate.cast import open_rows
from distill.features import FeatureDims, features_of
from distill.methods import build_method
from distill.methods.method import Progress
from distill.models.meta import building
from distill.recipe_io import make_recipe
from distill.runs import load_run
from distill.training.checkpoint import load_checkpoint
from distill.training.plan import meta_teacher, method_cost, print_plan
from distill.training.schedule import resolve_views
from export.run import main as export
from tests.conftest import (
    command,
    environment,
    kill_after,
    long_case,
    metrics_of,
    run_here,
    small_recipe,
)
from tests.distill.methods import two_ranks
from tests.distill.methods.two_ranks import BATCH, KINDS, WIDTH, draw, train

ALONE = Ranks(0, 1, torch.device("cpu"))
SSL = {
    "prototypes": 32,
    "head_hidden": 32,
    "bottleneck": 16,
    "locals": 2,
    "local_size": 32,
    "temp_warmup_epochs": 2,
    "student_temp": 0.1,
}


def sefa_recipe(photos: Path, kind: str = "dino", **changes: object) -> dict:
    """Three steps an epoch; the last layer is frozen in the first."""
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    small = {"pretrained": False, "image_size": 64}
    teachers = [
        {"name": "resnet10t", "role": "classification", "alias": "cls", **small},
        {"name": "vit_tiny_patch16_224", "role": "mae", "kwargs": vit, **small},
    ]
    recipe = small_recipe(photos, method="sefa", teachers=teachers, targets={"normalize": "none"})
    if kind == "udi":
        recipe["student"]["kwargs"]["reg_tokens"] = 1
    recipe["train"] |= {"clip_grad": 3.0, "clip_mode": "parameter", "weight_decay_end": 0.4}
    recipe |= {"sefa": {"hidden": 32}, "ssl": {"kind": kind, **SSL}}
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


def small_method(kind: str = "dino", **sefa: object):
    recipe = two_ranks.recipe_of(kind)
    values = recipe.model_dump(mode="json")
    values["sefa"] |= sefa
    recipe = make_recipe(values)
    dims = {teacher.label: FeatureDims(WIDTH, WIDTH) for teacher in recipe.teachers}
    torch.manual_seed(0)
    method = build_method(recipe, dims).train()
    method.before_step(Progress(0, 3, 2))
    return method


def test_the_loss_is_linear_in_lambda():
    losses, weights = {}, small_method().state_dict()
    for weight in (0.0, 0.25, 0.75, 1.0):
        method = small_method(ssl_weight=weight)
        method.load_state_dict({n: weights[n] for n in method.state_dict()})
        views, targets = draw(small_method(), 0)
        losses[weight] = method(views, targets if weight < 1 else {})
    distil, ssl = losses[0.25]["loss.distil"], losses[0.25]["ssl.loss"]
    for weight in (0.25, 0.75):
        expected = weight * ssl + (1 - weight) * distil
        assert losses[weight]["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses[1.0]["loss"].item() == pytest.approx(ssl.item(), rel=1e-5)
    assert losses[0.0]["loss"].item() == pytest.approx(distil.item(), rel=1e-5)


def test_distillation_is_the_sum_over_teachers_or_their_mean():
    views, targets = draw(small_method(), 0)
    total = small_method()(views, targets)
    mean = small_method(teacher_reduction="mean")(views, targets)
    each = [
        (total[f"loss.{label}.token"] + total[f"loss.{label}.patches"]) / 2 for label in targets
    ]
    assert total["loss.distil"].item() == pytest.approx(sum(each).item(), rel=1e-5)
    assert mean["loss.distil"].item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def test_distillation_alone_has_no_self_supervision_and_the_other_way_round():
    alone = small_method(ssl_weight=0.0)
    assert alone.ssl is None and [view.name for view in alone.views] == ["global"]
    ssl = small_method(ssl_weight=1.0)
    assert not ssl.teacher_views and not list(ssl.heads.parameters())
    assert not any(name.startswith("ssl") for name in alone.state_dict())
    assert not ssl.shards  # its momentum network follows whole weights


def test_the_summary_alone_moves_the_student_where_asked():
    method = small_method(tokens="summary", ssl_weight=0.0)
    views, targets = draw(method, 0)
    method(views, targets)["loss"].backward()
    gradients = {
        n: p.grad.clone() for n, p in method.student.named_parameters() if p.grad is not None
    }
    assert method.heads["dino"].patches[0].weight.grad.abs().max() > 0
    again = small_method(tokens="summary", ssl_weight=0.0)
    changed = {
        label: f._replace(patches=torch.randn_like(f.patches)) for label, f in targets.items()
    }
    again(views, changed)["loss"].backward()
    for name, parameter in again.student.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("masked", ["all", "visible", "own"])
def test_masked_positions_are_distilled_as_asked(masked):
    method = small_method("ibot", distil_masked=masked)
    views, targets = draw(method, 0)
    losses = method(views, targets)
    everything = small_method("ibot")(views, targets)
    same = losses["loss.distil"].item() == everything["loss.distil"].item()
    assert same == (masked == "all")
    assert losses["ssl.loss"].item() == pytest.approx(everything["ssl.loss"].item(), rel=1e-5)


def test_an_own_view_for_distillation_is_one_crop_more():
    method = small_method(distil_view="own")
    assert [view.name for view in method.views] == ["image", "global", "local"]
    assert set(method.teacher_views.values()) == {"image.plain"}
    losses = method(*draw(method, 0))
    assert losses["loss"].isfinite()


def test_crops_of_one_size_go_through_the_student_together():
    method = small_method().eval().double()
    images = torch.randn(2 * BATCH, 3, 64, 64, dtype=torch.float64)
    together = method.student(images)
    apart = [method.student(half) for half in images.chunk(2)]
    assert torch.allclose(together.summary, torch.cat([f.summary for f in apart]), atol=1e-12)
    seen = []
    method.student.net.patch_embed.register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    method.float().train()(*draw(method, 0))
    assert seen == [2 * BATCH, 2 * BATCH]  # two global crops in one pass, two local in another


@pytest.mark.parametrize("kind", ["dino", "ibot", "udi"])
def test_momentum_network_heads_and_centres_never_ship(kind):
    method = small_method(kind)
    shipped = build_method(
        two_ranks.recipe_of(kind),
        {label: FeatureDims(WIDTH, WIDTH) for label in method.heads},
        inference=True,
    )
    names = {n for n in method.state_dict() if not f"{n}.".startswith("ssl.")}
    assert names == set(shipped.state_dict())
    assert method.averaged().keys() == {n for n in names if n.startswith("student.")}
    outputs = shipped.eval().deploy()(torch.rand(1, 3, 64, 64))
    assert set(outputs) == {"backbone", "dino", "mae"}
    assert outputs["dino"].token.shape == (1, WIDTH)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("ranks") / "states.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [sys.executable, *launcher, "tests.distill.methods.two_ranks", str(file)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does(two_processes, kind):
    alone, together = train(kind, ALONE), two_processes[kind]
    assert alone.keys() == together.keys()
    for name in alone:
        # what is logged of a rank's own pictures alone: a deviation is no mean
        if name == "losses.ssl.deviation":
            continue
        exact = name.startswith("first.")
        rtol, atol = (1e-4, 2e-6) if exact else (2e-3, 2e-5)
        torch.testing.assert_close(
            together[name], alone[name], rtol=rtol, atol=atol, msg=f"{kind} {name}"
        )


@pytest.fixture(scope="module", params=[long_case("dino"), long_case("ibot"), "udi"])
def trained(request, tmp_path_factory, photo_folder) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sefa_recipe(photo_folder, request.param)))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return request.param, folder / "run"


def test_a_run_logs_what_it_says_and_keeps_both_networks(trained):
    kind, folder = trained
    rows = metrics_of(folder)
    described = build_method(
        make_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())), load_run(folder).dims
    ).describe()
    assert set(described["losses"]) <= set(rows[0])
    assert all(row["ssl.entropy"] > 0 for row in rows)
    student, momentum = (load_file(folder / f"{n}.safetensors") for n in ("student", "ema"))
    assert student.keys() == momentum.keys()
    assert not any(name.startswith("ssl") for name in student)
    differ = {n for n in student if not torch.equal(student[n], momentum[n])}
    assert differ and all(name.startswith("student.") for name in differ)
    assert load_run(folder, "ema").method.heads.keys() == {"cls", "mae"}


@pytest.mark.slow
def test_killed_while_frozen_and_later_it_resumes_bit_identically(trained, tmp_path, photo_folder):
    kind, whole = trained
    recipe = sefa_recipe(photo_folder, kind, checkpoint={"every_steps": 1, "keep": 50})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    kill_after(2, out, command(tmp_path / "recipe.yaml", "--output", out))
    assert run_here("--output", out, "--resume").returncode == 0
    a, b = (load_checkpoint(folder / "checkpoint") for folder in (whole, out))
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for name in ("student", "ema"):
        mine, other = (load_file(f / f"{name}.safetensors") for f in (whole, out))
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    last = b["optimizer"]["state"]["ssl.head.prototypes.direction"]
    assert last["step"] == 5  # of 8; three of them it was frozen


def test_the_momentum_network_ships_where_asked(tmp_path, photo_folder):
    runs = {}
    for ship in ("student", "ema"):
        recipe = sefa_recipe(photo_folder, ssl={"ship": ship}, train={"steps": 2})
        recipe["sefa"] = recipe.get("sefa", {}) | {"cosine_weight": 1.0}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert run_here(tmp_path / "recipe.yaml", "--output", tmp_path / ship).returncode == 0
        runs[ship] = [
            load_file(tmp_path / ship / f"{name}.safetensors") for name in ("student", "ema")
        ]
    (student, momentum), (shipped, other) = runs["student"], runs["ema"]
    assert all(torch.equal(shipped[name], momentum[name]) for name in momentum)
    assert all(torch.equal(other[name], student[name]) for name in student)
    factors = [name for name in student if name.endswith((".lengths.token", ".lengths.patches"))]
    assert any(student[name] != momentum[name] for name in factors)  # fitted to each
    for ship, asked, expected in (
        ("student", None, student),
        ("student", "momentum", momentum),
        ("ema", None, momentum),
        ("ema", "student", student),
    ):
        (row,) = open_rows(str(tmp_path / ship), ["backbone"], False, None, "cpu", tmp_path, asked)
        named = "momentum" if expected is momentum else "student"
        assert row.name == f"{named} backbone"
        weights = row.encoder.state_dict()
        assert any(torch.equal(t, expected["student.net.pos_embed"]) for t in weights.values())


def test_a_collapse_is_told_once(tmp_path, photo_folder):
    """A teacher so warm that every picture has the same distribution."""
    recipe = sefa_recipe(
        photo_folder, ssl={"teacher_temp": [50.0, 50.0]}, train={"steps": 6, "log_every": 1}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("collapse: the momentum teacher tells pictures apart by 0.00") == 1
    assert "lower ssl.teacher_temp" in done.stdout
    assert max(row["ssl.information"] for row in metrics_of(tmp_path / "run")) < 0.01


def test_a_run_that_learns_is_not_called_collapsed(trained):
    _, folder = trained
    rows = metrics_of(folder)
    method = small_method()
    assert method.warnings(rows[-1]) == []
    (constant,) = method.warnings({"ssl.information": 0.0, "ssl.entropy": 0.1})
    assert "raise ssl.teacher_temp" in constant
    assert (
        len(method.warnings({"ssl.information": 0.0, "ssl.entropy": 1.0, "ssl.deviation": 0.0}))
        == 2
    )


def test_self_supervision_alone_needs_no_teachers(tmp_path, photo_folder):
    recipe = sefa_recipe(photo_folder, sefa={"ssl_weight": 1.0}, train={"steps": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    run = load_run(tmp_path / "run")
    assert run.recipe.teachers == () and not run.method.deploy().shipped
    done = run_here(tmp_path / "run", "--output", tmp_path / "bundle", command=export)
    assert done.returncode == 0, done.stderr


def test_the_plan_names_crops_and_the_parts_that_never_ship(photo_folder, capsys):
    print_plan(make_recipe(sefa_recipe(photo_folder, "udi")))
    plan = " ".join(capsys.readouterr().out.split())
    assert "global: 2 of 64 px, 4 pictures a step of stream main, for cls, mae" in plan
    assert "local: 2 of 32 px" in plan and "ssl" in plan


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_every_part_once(kind):
    """Whatever a method calls of a part: the flops of parts are those of the whole step."""
    recipe = two_ranks.recipe_of(kind)
    teachers = [meta_teacher(t, recipe, i) for i, t in enumerate(recipe.teachers)]
    parts = {part.name: part.gflop for part in method_cost(recipe, teachers).parts}
    assert parts["student"] > 0 and parts["heads"] > 0
    with building():
        method = build_method(recipe, {t.label: t.dims for t in teachers}).train()
    method.before_step(Progress(0, 3, 2))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        views = {
            name: torch.empty(shape, dtype=kind)
            for view in resolve_views(recipe, method, teachers)
            for name, (shape, kind) in view.shapes(1).items()
        }
        count = 2 if "ssl" in parts else 1
        targets = {
            t.label: features_of({n: torch.empty(count, *s) for n, s in t.shapes.items()})
            for t in teachers
        }
        method(views, targets)
    # what a loss does by itself belongs to no part
    assert sum(parts.values()) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sefa": {"ssl_weight": 1.5}}, ["sefa.ssl_weight", "1.5"]),
        ({"ssl": {"prototypes": 0}}, ["ssl.prototypes", "0"]),
        ({"ssl": {"kind": "udi", "locals": 0}}, ["ssl.locals", "0", "ssl.locals=6"]),
        ({"ssl": {"kind": "udi"}}, ["ssl.kind = udi", "student.kwargs.reg_tokens=1"]),
        ({"ssl": {"local_size": 30}}, ["ssl.local_size = 30", "16", "32"]),
        ({"ssl": {"local_size": 8}}, ["ssl.local_size = 8", "16"]),
        ({"targets": {"normalize": "layernorm"}}, ["targets.normalize", "sefa.standardize=fit"]),
        ({"ssl": {"ship": "ema"}, "sefa": {"ssl_weight": 0}}, ["ssl.ship", "sefa.ssl_weight"]),
        (
            {"ssl": {"kind": "ibot", "ibot": {"ratio_spread": [0.1]}}},
            ["ssl.ibot.ratio_spread", "ssl.ibot.mask_ratio"],
        ),
        (
            {"train": {"parallel": "fsdp", "clip_mode": "global"}},
            ["train.parallel = fsdp", "cannot be sharded", "train.parallel=ddp"],
        ),
        (
            {"ssl": {"kind": "ibot", "ibot": {"mask_ratio": [], "ratio_spread": []}}},
            ["ssl.ibot.mask_ratio"],
        ),
        (
            {"ssl": {"kind": "ibot", "ibot": {"mask_ratio": [0.1], "ratio_spread": [0.2]}}},
            ["ssl.ibot.ratio_spread", "0.2", "smaller"],
        ),
        (
            {"train": {"steps": None, "epochs": 1}},
            ["ssl.temp_warmup_epochs = 2", "train.epochs = 1"],
        ),
        (
            {"ssl": {"kind": "udi"}, "student": {"name": "deit_tiny_distilled_patch16_224"}},
            ["second class token", "student.kwargs.reg_tokens=1"],
        ),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing(tmp_path, photo_folder, changes, words):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sefa_recipe(photo_folder, **changes)))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["ibot", "udi"])
def test_objectives_that_need_tokens_refuse_a_cnn(tmp_path, photo_folder, kind):
    student = {"name": "resnet10t", "kwargs": {}}
    recipe = sefa_recipe(photo_folder, kind) | {}
    recipe["student"] = {**recipe["student"], **student}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 2 and "need tokens" in done.stderr and "CNN" in done.stderr


def test_distillation_alone_asks_nothing_of_the_objective(photo_folder):
    recipe = sefa_recipe(photo_folder, "udi", sefa={"ssl_weight": 0.0}, ssl={"locals": 0})
    dims = {"cls": FeatureDims(24, 24), "mae": FeatureDims(None, 24)}
    method = build_method(make_recipe(recipe), dims)
    assert [view.name for view in method.views] == ["global"] and not method.views[0].boxes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", ["autocast", "no class token", "registers"])
def test_every_kind_takes_half_precision_and_other_tokens(kind, student):
    values = two_ranks.recipe_of(kind).model_dump(mode="json")
    kwargs = values["student"]["kwargs"]
    if student == "registers":
        kwargs["reg_tokens"] = 4
    elif student == "no class token":
        kwargs |= {"class_token": False, "global_pool": "avg"}
    if kind.startswith(("udi", "kpu")) and student == "no class token":
        return  # refused, above
    recipe = make_recipe(values)
    dims = {"dino": FeatureDims(WIDTH, WIDTH), "mae": FeatureDims(None, WIDTH)}
    method = build_method(recipe, dims).train()
    method.before_step(Progress(0, 3, 2))
    views, targets = draw(method, 0)
    targets["mae"] = targets["mae"]._replace(summary=None)
    with torch.autocast("cpu", torch.bfloat16, enabled=student == "autocast"):
        losses = method(views, targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    idle = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == [] and "loss.mae.token" not in losses


@pytest.mark.parametrize("kind", [long_case("dino"), long_case("ibot"), "udi"])
def test_a_step_is_one_graph_for_the_compiler(kind):
    method = small_method(kind)
    views, targets = draw(method, 0)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(method)(views, targets)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_a_cnn_learns_with_dino(tmp_path, photo_folder):
    recipe = sefa_recipe(photo_folder, train={"steps": 2})
    recipe["student"] |= {"name": "resnet10t", "kwargs": {}, "drop_path": 0.1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
