"""Recipes: what ships loads and is the paper's, what a user overrides means what it says, every
mistake is one line.
"""

import pytest
import timm
import torch
import yaml
from pydantic import ValidationError

from contract.errors import UserError
from distill.config import Recipe, TeacherConfig
from distill.data.batches import collate
from distill.data.crops import CropDataset, View
from distill.data.pictures import PackagedPhotos
from distill.methods import METHODS, build_method
from distill.methods.method import Progress
from distill.recipe_files import shipped_recipes
from distill.recipe_io import (
    describe_recipes,
    differing_fields,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_fields,
)
from distill.teachers import build_teacher
from distill.tiny import tiny
from distill.training.loop import build_optimizer
from distill.training.schedule import resolve_views

UMT = [
    "umt_convnext_base_cnn",
    "umt_convnext_base_dinov3",
    "umt_convnext_base_vit",
    "umt_resnet50",
    "umt_vit_base",
    "umt_vit_large",
]
D, A, T = "dino", "augreg", "deit3"
SEFA = {
    "sefa_vit_base": ("base", [D, A], "80.71"),
    "sefa_vit_base_clip_laion": ("base", [D, "clip"], "79.30"),
    "sefa_vit_base_clip_openai": ("base", [D, "clip"], "80.30"),
    "sefa_vit_base_deit3": ("base", [D, T], "81.85"),
    "sefa_vit_base_from_large": ("base", ["ibot", A], "81.68"),
    "sefa_vit_base_siglip": ("base", [D, "siglip"], "80.14"),
    "sefa_vit_small": ("small", [D, A], "77.92"),
    "sefa_vit_small_augreg_deit3": ("small", [A, T], "78.87"),
    "sefa_vit_small_dino_deit3": ("small", [D, T], "79.33"),
    "sefa_vit_small_dino_ibot": ("small", [D, "ibot"], "76.75"),
    "sefa_vit_small_dino_mugs": ("small", [D, "mugs"], "75.93"),
    "sefa_vit_small_from_base": ("small", [D, A], "78.27"),
    "sefa_vit_small_ibot_augreg": ("small", ["ibot", A], "78.34"),
    "sefa_vit_small_ibot_deit3": ("small", ["ibot", T], "79.41"),
    "sefa_vit_small_ibot_loss": ("small", [D, A], "76.90"),
    "sefa_vit_small_ibot_mugs": ("small", ["ibot", "mugs"], "76.72"),
    "sefa_vit_small_mugs_augreg": ("small", ["mugs", A], "77.64"),
    "sefa_vit_small_three": ("small", [D, "ibot", A], "78.1"),
    "sefa_vit_small_udi": ("small", [D, A], "78.30"),
    "sefa_vit_tiny": ("tiny", [D, A], "71.91"),
    "unic_vit_base": ("base", [D, A], "76.32"),
    "unic_vit_small": ("small", [D, A], "71.17"),
    "unic_vit_small_ibot_augreg": ("small", ["ibot", A], "66.12"),
    "unic_vit_tiny": ("tiny", [D, A], "61.89"),
}
"""Student, teachers and the paper's figure of SeFA's rows."""

KPU = ["kpu_vit_base", "kpu_vit_base_clip", "kpu_vit_base_grounding_dino", "kpu_vit_base_plain"]
PAPER = [*SEFA, *UMT, *KPU]
SHIPPED = ["quickstart", "kpu_vit_tiny", *PAPER]

MINE = """\
student:
  name: vit_tiny_patch16_224
  kwargs: {embed_dim: 192, depth: 6}
teachers:
  - {name: mobilenetv2_100, role: classification, alias: cls}
  - {name: vit_small_patch14_dinov2, role: dino, block: 10}
  - {name: vit_tiny_patch16_224, role: mae, kwargs: {embed_dim: 128, depth: 6}}
data: {kind: packaged-photos}
train: {steps: 300, lr: 1.0e-3}
"""
"""What overrides are tried on: shipped recipes are tuned, this one stays."""

SMALLEST = """\
data: {kind: packaged-photos}
train: {steps: 1}
teachers:
  - {name: resnet10t, role: classification}
"""


def mine(*overrides: str) -> Recipe:
    """The recipe above, with overrides."""
    return parse_recipe(MINE, "mine.yaml", overrides)


def one_line(raised: pytest.ExceptionInfo) -> str:
    """The message of an error, which must be one line."""
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


def error_of(*overrides: str) -> str:
    """What an override with a mistake in it is answered with."""
    with pytest.raises(UserError) as raised:
        mine(*overrides)
    return one_line(raised)


def error_loading(name: str) -> str:
    """What a recipe's name or path is answered with."""
    with pytest.raises(UserError) as raised:
        load_recipe(name, [])
    return one_line(raised)


def error_in(text: str) -> str:
    """What a recipe file with a mistake in it is answered with: its name first."""
    with pytest.raises(UserError) as raised:
        parse_recipe(text, "mine.yaml")
    assert str(raised.value).startswith("mine.yaml")
    return one_line(raised)


# ---- what ships -------------------------------------------------------------------------------


def test_the_shipped_recipes_are_the_papers_rows_and_two_that_train_offline():
    assert set(shipped_recipes()) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_dumps_to_yaml_that_reads_back_equal(name):
    recipe = load_recipe(name, [])
    text = dump_recipe(recipe)
    assert parse_recipe(text, "dump") == recipe
    assert dump_recipe(parse_recipe(text, "dump")) == text


def test_a_dump_is_complete():
    dumped = yaml.safe_load(dump_recipe(load_recipe("quickstart", [])))
    sections = {name for name, method in METHODS.items() for name in (name, *method.Sections)}
    others = tuple(f"{name}." for name in sections - {"umt"})
    assert {"umt"} == set(dumped) & sections
    for key, _, _, _ in recipe_fields():
        if key.startswith(others):
            continue
        place = dumped
        for part in key.replace("teachers.N", "teachers.0").split("."):
            place = place[int(part)] if part.isdigit() else place[part]


def test_a_dump_keeps_strings_that_look_like_numbers():
    recipe = mine("teacher_cache.path=1e-4", "student.kwargs={a: '2', b: '1e5', c: 1e5}")
    again = parse_recipe(dump_recipe(recipe), "dump")
    assert again.teacher_cache.path == "1e-4"
    assert again.student.kwargs == {"a": "2", "b": "1e5", "c": 1e5}


@pytest.mark.parametrize("name", UMT)
def test_a_paper_recipe_trains_as_appendix_a1_says(name):
    recipe = load_recipe(name, [])
    train = recipe.train
    batch = 512 if name == "umt_vit_large" else 1024
    assert (train.epochs, train.steps, train.batch_size, train.precision) == (
        300,
        None,
        batch,
        "bf16",
    )
    assert train.lr == pytest.approx(1e-4 * batch / 256)
    assert recipe.student.image_size == 224 and not recipe.student.pretrained
    assert {teacher.image_size for teacher in recipe.teachers} == {224}
    assert (recipe.data.images, recipe.targets.normalize) == (1_281_167, "none")
    assert (recipe.checkpoint.every_steps, recipe.checkpoint.keep) == (1000, 2)


@pytest.mark.parametrize(
    ("name", "student", "labels", "depth", "groups"),
    [
        ("umt_resnet50", "resnet50", ["cls", "mae", "dino"], 2, 128),
        ("umt_convnext_base_cnn", "convnext_base", ["cls", "mae", "dino"], 2, 64),
        ("umt_convnext_base_vit", "convnext_base", ["clip", "mae", "dino"], 2, 64),
        ("umt_convnext_base_dinov3", "convnext_base", ["dino_convnext", "dino_vit"], 2, 64),
        ("umt_vit_base", "vit_base_patch16_224", ["clip", "mae", "dino"], 1, None),
        ("umt_vit_large", "vit_large_patch16_224", ["clip", "mae", "dino"], 1, None),
    ],
)
def test_a_paper_recipe_has_its_rows_cast(name, student, labels, depth, groups):
    recipe = load_recipe(name, [])
    assert (recipe.method, recipe.student.name, recipe.umt.depth) == ("umt", student, depth)
    assert [teacher.label for teacher in recipe.teachers] == labels
    assert groups is None or recipe.umt.groups == groups


@pytest.mark.parametrize("name", SEFA)
def test_a_row_of_sefas_tables_has_its_cast_and_hyper_parameters(name):
    recipe = load_recipe(name, [])
    student, labels, _ = SEFA[name]
    method = name.split("_")[0]
    assert (recipe.method, recipe.student.name) == (method, f"vit_{student}_patch16_224")
    assert [teacher.label for teacher in recipe.teachers] == labels
    roles = {D: "dino", "ibot": "dino", "mugs": "dino", A: "classification", T: "classification"}
    assert [t.role for t in recipe.teachers] == [roles.get(label, "clip") for label in labels]
    assert (recipe.student.drop_path, recipe.student.pretrained) == (0.1, False)
    train = recipe.train.model_dump(exclude_defaults=True)
    expected = {
        "epochs": 200,
        "schedule": "dino",
        "batch_size": 512,
        "lr": 1e-3,
        "warmup_epochs": 10,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip_grad": 3.0,
        "clip_mode": "parameter",
        "precision": "bf16",
    }
    if method == "unic":
        assert recipe.unic.teacher_photometric and recipe.data.crop_scale == (0.08, 1)
        changes = {"lr": 6e-4, "weight_decay": 0.03, "betas": (0.9, 0.99), "clip_grad": 0}
        expected |= changes
        del expected["weight_decay_end"], expected["clip_mode"]
    else:
        kind = recipe.ssl.kind
        assert recipe.sefa.teacher_photometric and recipe.sefa.ssl_weight == 0.5
        assert recipe.ssl.norm_last_layer == (student == "base")
        assert recipe.ssl.locals == {"dino": 8, "ibot": 10, "udi": 6}[kind]
        assert recipe.ssl.prototypes == (8192 if kind == "ibot" else 65536)
        assert kind == {"udi": "udi", "loss": "ibot"}.get(name.split("_")[-1], "dino")
        assert recipe.student.kwargs == ({"reg_tokens": 1} if kind == "udi" else {})
        expected |= {"epochs": 800} if kind == "ibot" else {}
        expected |= {"min_lr": 1e-5, "weight_decay_end": 0.1} if kind == "udi" else {}
    assert train == expected


@pytest.mark.parametrize("name", PAPER)
def test_every_teacher_of_a_paper_recipe_is_known_to_timm_or_a_file(name):
    known = timm.list_pretrained()
    for teacher in load_recipe(name, []).teachers:
        assert teacher.name in known or teacher.checkpoint
        if teacher.label in ("ibot", "mugs"):  # timm's config of the bare name is AugReg's
            assert teacher.mean == (0.485, 0.456, 0.406) and teacher.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_holds_the_command_and_every_line_fits(name):
    text = shipped_recipes()[name]
    assert (
        "python -m distill.run\n" if name == "quickstart" else f"-m distill.run {name} "
    ) in text
    assert max(map(len, text.splitlines())) <= 120
    if name in SEFA:
        figure = SEFA[name][2]
        assert text.splitlines()[0].endswith(f"linear {figure}") and text.count(figure) > 1


def test_the_list_groups_recipes_by_method_and_fits_a_terminal():
    listed = describe_recipes()
    recipes = listed[: listed.index("keys (N is")]
    assert max(map(len, recipes.splitlines())) <= 80
    assert len(recipes.splitlines()) <= 2 * len(SHIPPED) + 10
    order = [recipes.index(f"\n  {name} ") for name in ("umt_vit_large", *SEFA)]
    assert recipes.index("method umt") < order[0] < recipes.index("method sefa")
    assert recipes.index("method unic") < recipes.index("\n  unic_vit_tiny ")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_shrunk_by_tiny_still_trains_every_part(name):
    recipe = tiny(load_recipe(name, []))
    assert [t.role for t in recipe.teachers] == [t.role for t in load_recipe(name, []).teachers]
    # statistics of targets come from the training loop; here a step goes without
    recipe = recipe.model_copy(
        update={"targets": recipe.targets.model_copy(update={"normalize": "none"})}
    )
    teachers = [
        build_teacher(teacher, recipe.teacher_runtime, i)
        for i, teacher in enumerate(recipe.teachers)
    ]
    method = build_method(recipe, {teacher.label: teacher.dims for teacher in teachers}).train()
    views = first_views(recipe, resolve_views(recipe, method, teachers))
    with torch.no_grad():
        targets = {t.label: t(views[method.teacher_views[t.label]]) for t in teachers}
    optimizer = build_optimizer(method, recipe.train, torch.device("cpu"))
    for step in range(2):
        progress = Progress(step, 2, 2)
        method.before_step(progress)
        losses = method(views, targets)
        losses["loss"].backward()
        optimizer.step()
        method.after_step(progress)
    assert torch.isfinite(losses["loss"].detach())
    assert set(method.describe()["losses"]) == set(losses) - {"loss"}
    assert [
        name for name, p in method.named_parameters() if p.requires_grad and p.grad is None
    ] == []
    assert sum(p.numel() for p in method.parameters()) < 1_000_000


PHOTOS = PackagedPhotos()


def first_views(recipe: Recipe, views: tuple[View, ...]) -> dict[str, torch.Tensor]:
    """What the data stage makes of two photographs in every stream."""
    dataset = CropDataset(PHOTOS, recipe.data, views, recipe.train.seed)
    streams = dict.fromkeys(view.stream for view in views)
    samples = [dataset[stream, number, 0] for stream in streams for number in range(2)]
    return collate(samples).views


def test_tiny_refuses_a_teacher_that_is_a_run():
    text = SMALLEST.replace("name: resnet10t", "name: run, checkpoint: runs/first")
    with pytest.raises(UserError, match="run"):
        tiny(parse_recipe(text, "mine.yaml"))


# ---- overrides --------------------------------------------------------------------------------


def test_overrides_set_scalars_lists_nulls_and_teachers_fields():
    recipe = mine(
        "train.steps=50",
        "teachers.0.weight=2",
        "teachers.1.alias=foo",
        "teachers.1.block=null",
        "data.flip=0",
        "data.crop_scale=[0.5, 1]",
        "train.tensorboard=true",
        "teachers.2.kwargs.depth=3",
        "umt.cross_space=false",
    )
    assert recipe.train.steps == 50 and recipe.train.tensorboard is True
    assert (recipe.teachers[0].weight, recipe.teachers[1].label, recipe.teachers[1].block) == (
        2.0,
        "foo",
        None,
    )
    assert recipe.data.crop_scale == (0.5, 1.0) and recipe.data.flip == 0
    assert recipe.teachers[2].kwargs == {"embed_dim": 128, "depth": 3}
    assert recipe.umt.cross_mode is None


def test_an_override_touches_nothing_else():
    before, after = mine(), mine("teachers.1.weight=0.5")
    assert differing_fields(before, after) == [("teachers.1.weight", 1.0, 0.5)]


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3"])
def test_a_float_may_be_written_as_people_write_it(written):
    recipe = mine(f"train.lr={written}", f"student.kwargs.x={written}")
    assert recipe.train.lr == recipe.student.kwargs["x"] == pytest.approx(1e-4)
    inside = parse_recipe(SMALLEST.replace("steps: 1", f"steps: 1, lr: {written}"), "mine.yaml")
    assert inside.train.lr == pytest.approx(1e-4)


def test_steps_and_epochs_replace_each_other():
    assert load_recipe("umt_vit_base", ["train.steps=7"]).train.model_dump()["epochs"] is None
    assert mine("train.epochs=2").train.model_dump()["steps"] is None
    assert mine("train.steps=null", "train.epochs=2").train.epochs == 2


def test_steps_and_epochs_both_asked_for_are_refused():
    assert "exactly one of train.steps and train.epochs" in error_of(
        "train.steps=7", "train.epochs=2"
    )
    assert "exactly one of train.steps and train.epochs" in error_of("train.steps=null")


def test_a_list_of_teachers_can_be_replaced_but_not_emptied():
    replaced = mine("teachers=[{name: resnet18, role: classification}]", "teachers.0.weight=3")
    assert [(t.name, t.weight) for t in replaced.teachers] == [("resnet18", 3.0)]
    assert "no teachers: list at least one" in error_of("teachers=[]")


def test_the_last_of_two_equal_overrides_wins():
    assert mine("train.lr=1", "train.lr=2").train.lr == 2


# ---- mistakes ---------------------------------------------------------------------------------

MISTAKES = [
    ("train.step=50", "unknown key 'train.step': did you mean 'train.steps'?"),
    ("trian.steps=50", "unknown key 'trian.steps': did you mean 'train.steps'?"),
    ("lr=1", "unknown key 'lr': did you mean 'train.lr'?"),
    ("teachers.0.wieght=2", "unknown key 'teachers.0.wieght': did you mean 'teachers.0.weight'?"),
    ("train.steps.x=2", "unknown key 'train.steps.x'"),
    ("zzz=1", "unknown key 'zzz': known: method, student, view, teachers"),
    ("teachers.3.weight=2", "teachers.3.weight: the recipe has 3 teachers, numbered from 0"),
    ("teachers.-1.weight=2", "3 teachers, numbered from 0; '-1' is not one of them"),
    ("teachers.mae.weight=2", "3 teachers, numbered from 0; 'mae' is not one of them"),
    ("train.steps", "'train.steps' is not an override: write key=value"),
    ("=3", "'=3' is not an override: write key=value"),
    ("train.betas=[0.9", "train.betas: '[0.9' is not valid YAML"),
    ("student.kwargs.depth.x=3", "'student.kwargs.depth' is 6, a single value without parts"),
    ("train.lr=-1", "train.lr = -1: Input should be greater than 0"),
    ("train.lr=fast", 'train.lr = "fast": Input should be a valid number'),
    ("train.lr=.nan", "train.lr = NaN: Input should be a finite number"),
    ("train.lr=.inf", "train.lr = Infinity: Input should be a finite number"),
    ("train.batch_size=1.5", "train.batch_size = 1.5: Input should be a valid integer"),
    ("train=null", "train = null: Input should be a mapping of keys"),
    ("student.kwargs=3", "student.kwargs = 3: Input should be a mapping of keys"),
    ("teachers=3", "teachers = 3: Input should be a list"),
    ("teachers.0=mae", 'teachers.0 = "mae": Input should be a mapping of keys'),
    (
        "teachers.1.role=mea",
        "teachers.1.role = \"mea\": Input should be 'classification', 'clip', 'mae', 'dino' or",
    ),
    ("teachers.0.alias=My-Name", 'teachers.0.alias = "My-Name": String should match pattern'),
    ("teachers.0.alias=backbone", "teachers: 'backbone' names the student's own outputs"),
    ("teachers.0.alias=mae", "two teachers are called 'mae': set a different alias for each"),
    ("umt.depth=0", "umt.depth = 0: Input should be greater than 0 or 'auto'"),
    ("umt.intra_space=sideways", 'umt.intra_space = "sideways": Input should be a valid boolean'),
    (
        "umt.cross_space=sideways",
        "umt.cross_space = \"sideways\": Input should be 'channel', 'token', 'axial'",
    ),
    ("data.crop_scale=[0.5]", "data.crop_scale = [0.5]: too few values"),
    ("data.crop_scale=[0.5, 1, 2]", "data.crop_scale = [0.5, 1, 2]: too many values"),
    (
        "data.crop_scale=[1, 0.5]",
        "data.crop_scale: must be two shares of a picture's area, the smaller first",
    ),
    ("data.crop_scale=[0.5, 2]", "data.crop_scale: must be two shares of a picture's area"),
    ("data.crop_ratio=[2, 1]", "data.crop_ratio: must be two positive numbers, the smaller first"),
    ("train.betas=[0.9, 1]", "train.betas.1 = 1: Input should be less than 1"),
    ("student.std=[0, 1, 1]", "student.std.0 = 0: Input should be greater than 0"),
    ("data.path=[a.tar, 3]", "data.path.1 = 3: Input should be a valid string"),
    (
        "data.kind=folder",
        "data.path is empty and data.kind is 'folder': set data.path to your images",
    ),
]


@pytest.mark.parametrize(
    ("override", "expected"), MISTAKES, ids=[override for override, _ in MISTAKES]
)
def test_a_wrong_override_names_the_key_the_value_and_the_remedy(override, expected):
    assert expected in error_of(override)


@pytest.mark.parametrize("value", ["[0.9, 0.5]", "[2, 5]", "[0, 1]"])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kpu_vit_tiny", "kpu.dense_scale"),
        ("sefa_vit_small", "ssl.global_scale"),
        ("sefa_vit_small", "ssl.local_scale"),
    ],
)
def test_a_range_of_areas_is_one(name, key, value):
    with pytest.raises(UserError, match=f"{key}: must be two shares of a picture's area"):
        load_recipe(name, [f"{key}={value}"])


@pytest.mark.parametrize("name", ["sefa_vit_small", "unic_vit_small"])
@pytest.mark.parametrize("key", ["weight", "token_weight", "feature_weight"])
def test_weights_of_teachers_are_refused_where_nothing_uses_them(name, key):
    with pytest.raises(UserError, match=f"teachers.1.{key} = 2: method .* teachers alike: remove"):
        load_recipe(name, [f"teachers.1.{key}=2"])


def test_an_unknown_recipe_names_the_nearest_shipped_one(tmp_path):
    assert "recipe 'umt_vit_bas' is not shipped: did you mean 'umt_vit_base'?" in error_loading(
        "umt_vit_bas"
    )
    assert "no such file" in error_loading(str(tmp_path / "mine.yaml"))


def test_a_shipped_name_means_the_shipped_recipe_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "quickstart").write_text("not a recipe")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart", []).method == "umt"


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    assert f"recipe {path} is not a text file" in error_loading(str(path))
    path.unlink()
    path.mkdir()
    assert f"recipe {path} cannot be read" in error_loading(str(path))


FILES = [
    ("train: {steps: 1\ndata: {", "mine.yaml:2: not valid YAML"),
    ("train:\n\tsteps: 1\n", "mine.yaml:2: not valid YAML"),
    (SMALLEST + "train: {steps: 2}\n", "mine.yaml:5: not valid YAML ('train' is given twice)"),
    (
        SMALLEST + "x: !!python/object/apply:os.getcwd []\n",
        "not valid YAML (could not determine a constructor",
    ),
    ("- a\n- b\n", 'a recipe is a mapping of keys, got ["a", "b"]'),
    ("", "a recipe is a mapping of keys, got null"),
    (SMALLEST.replace("steps", "step"), "unknown key 'train.step': did you mean 'train.steps'?"),
    (
        SMALLEST.replace("name:", "nmae:"),
        "unknown key 'teachers.0.nmae': did you mean 'teachers.0.name'?",
    ),
    (
        SMALLEST.replace(", role: classification", ""),
        "teachers.0.role is missing: every teacher needs it",
    ),
    (SMALLEST.replace("train: {steps: 1}\n", ""), "train is missing: every recipe needs it"),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=[expected for _, expected in FILES])
def test_a_wrong_recipe_file_is_one_line(text, expected):
    assert expected in error_in(text)


# ---- the model --------------------------------------------------------------------------------


def test_a_recipe_is_frozen():
    recipe = mine()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.method = "plain"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.lr = 1.0


def test_a_teacher_is_called_by_its_alias_or_else_its_role():
    assert TeacherConfig(name="resnet18", role="classification").label == "classification"
    assert TeacherConfig(name="resnet18", role="classification", alias="cls").label == "cls"


@pytest.mark.parametrize(
    ("value", "mode"), [(True, "channel"), (False, None), ("grouped", "grouped")]
)
def test_cross_space_may_be_a_switch_or_a_mode(value, mode):
    recipe = mine(f"umt.cross_space={str(value).lower()}")
    assert recipe.umt.cross_mode == mode


def test_differing_fields_names_what_was_added_and_what_went():
    before = mine()
    after = mine("student.kwargs={depth: 6, mlp_ratio: 2}", "data.path=[a, b]", "train.lr=1e-4")
    assert differing_fields(before, before) == []
    assert differing_fields(before, after) == [
        ("student.kwargs.embed_dim", 192, None),
        ("data.path", None, ["a", "b"]),
        ("train.lr", 1e-3, 1e-4),
        ("student.kwargs.mlp_ratio", None, 2),
    ]


def test_every_key_is_listed_with_type_default_and_meaning():
    rows = {key: row for key, *row in recipe_fields()}
    assert rows["train.lr"] == [
        "float",
        "0.0001",
        Recipe.model_fields["train"].annotation.model_fields["lr"].description,
    ]
    assert rows["umt.space_dim"][:2] == ["int | auto | student", "auto"]
    roles = "classification | clip | mae | dino | detector"
    assert rows["teachers.N.role"][:2] == [roles, "required"]
    assert rows["data.crop_scale"][:2] == ["[float, float]", "[0.08, 1.0]"]
    assert rows["train.steps"][:2] == ["int | null", "null"]
    listed = describe_recipes()
    assert all(key in listed for key in rows) and all(name in listed for name in SHIPPED)


@pytest.mark.parametrize("method", ["[umt]", "{a: 1}", "null", "umx"])
def test_a_method_that_is_not_known_is_one_line(method):
    with pytest.raises(UserError, match="quickstart: method = .* is not known: "):
        load_recipe("quickstart", [f"method={method}"])


def test_an_override_of_another_methods_section_is_refused():
    with pytest.raises(UserError, match="plain.hidden_dim is for method plain, .* is umt: add"):
        load_recipe("quickstart", ["plain.hidden_dim=5"])
    both = ["plain.hidden_dim=5", "method=plain"]
    assert load_recipe("quickstart", both).plain.hidden_dim == 5
