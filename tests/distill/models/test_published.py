"""What published weights were trained with: activation, mean and deviation."""

import json
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import save_file

from distill.models.meta import building
from distill.models.published import IMAGENET, activation_note, normalization_of
from distill.models.start import student_note
from distill.models.student import create_timm
from distill.recipe_files import shipped_recipes
from distill.recipe_io import load_recipe, make_recipe, parse_recipe
from distill.runs import dump_recipe
from distill.teachers.timm import build_timm_teacher
from distill.tiny import shrink
from distill.training.start import start_from_run
from tests.conftest import run_here, small_recipe

HALF, CLIP = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
GELU, QUICK = "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"


@cache
def network(name: str) -> torch.nn.Module:
    with building():
        return create_timm(name, **shrink(name, {})["kwargs"])


def note(name: str, checkpoint: object = None, names: tuple[str, ...] = ()) -> str | None:
    return activation_note(name, network(name), checkpoint and str(checkpoint), names)


def test_no_shipped_recipe_has_weights_with_another_activation():
    for recipe in shipped_recipes():
        loaded = load_recipe(recipe, [])
        for part in (loaded.student, *loaded.teachers):
            if timm.is_model(part.name.split(".")[0]):
                assert note(part.name, part.checkpoint) is None, (recipe, part.name)


def test_every_tag_that_timm_notes_is_warned_of_and_its_quickgelu_name_is_known():
    named = timm.list_models("vit_base_patch16_clip*", pretrained=True, include_tags=True)
    noted = [name for name in named if (timm.get_pretrained_cfg(name).notes or ())]
    assert f"{GELU}.openai" in noted and f"{QUICK}.openai" in noted
    for name in noted:
        said = note(name)
        if "quickgelu" in name:
            assert said is None
        else:
            assert "computes GELU, but its weights were trained with QuickGELU: use " in said
            assert said.split("use ")[-1] in named
    assert note(f"{GELU}.laion2b") is None


@pytest.mark.slow
def test_activations_are_those_of_open_clips_table():
    pretrained = pytest.importorskip("open_clip.pretrained")._PRETRAINED
    told = {}
    for entries in pretrained.values():
        for entry in entries.values():
            name = entry.get("hf_hub", "").strip("/").rpartition("/")[-1]
            if name.startswith("vit_") and "_clip_" in name:
                told[name] = told.get(name, False) or bool(entry.get("quick_gelu"))
    assert len(told) > 20
    told["vit_base_patch16_clip_224.dfn2b"] = True  # in a repository of Apple's
    for name, quick in told.items():
        architecture = name.partition(".")[0]
        if not timm.is_model(architecture.replace("_clip_", "_clip_quickgelu_")):
            continue
        if timm.list_models(name, include_tags=True):
            said = activation_note(name, network(GELU), None)
            assert (said is not None) == quick, name
        # and as a file of that name
        said = activation_note(architecture, network(GELU), f"{name}.safetensors")
        assert said is None or ("GELU, but" in said) == quick, name
    assert f"timm has no {QUICK}.dfn2b" in note(f"{GELU}.dfn2b")


@pytest.mark.parametrize(
    ("name", "file", "names", "words"),
    [
        (GELU, "ViT-B-16.pt", (), "trained with QuickGELU"),
        (GELU, "mine/openai_clip.pth", (), "trained with QuickGELU"),
        (GELU, "metaclip_400m.pt", (), "trained with QuickGELU"),
        (
            GELU,
            "x.pth",
            ("state_dict.input_resolution", "state_dict.context_length", "state_dict.vocab_size"),
            "trained with QuickGELU",
        ),
        (GELU, "x.pth", ("visual.proj",), "does not say what it was trained with"),
        (GELU, "openai/models/mine/x.pth", (), "does not say"),  # of anybody's folders
        (
            GELU,
            "models--apple--DFN2B-CLIP-ViT-B-16/snapshots/0/x.bin",
            (),
            "(known by its path)",
        ),
        (QUICK, "laion2b_b16.pt", (), "trained with GELU: use "),
        (QUICK, "DFN2B-CLIP-ViT-L-14-39B/x.pt", (), "trained with GELU: use "),
        (QUICK, "h14_v1.2_altogether_metaclip.pt", (), "trained with GELU"),
        (QUICK, "metaclip-2-worldwide-huge-378/x.pt", (), "trained with GELU"),
        (GELU, "metaclip-2-worldwide-huge-quickgelu/x.pt", (), "trained with QuickGELU"),
        (GELU, "metaclip-2-worldwide-b16/x.pt", (), "does not say"),
        (GELU, "b16_fullcc2.5b_metaclip_2.5b.pt", (), "trained with QuickGELU"),
        (GELU, "vit_b_16-laion400m_e32.pt", (), None),
        (f"{QUICK}.openai", "x.pth", (), None),
        (f"{GELU}.openai", "x.pth", (), "(known by timm's record of the name's tag)"),
        (f"{GELU}.laion2b", "x.pth", (), None),
        (GELU, "vit_base_patch16_clip_224.openai_ft_in1k.pth", (), "does not say"),
        (QUICK, "ViT-B-16.pt", (), None),
        (QUICK, "x.pth", (), None),
        ("vit_base_patch16_siglip_224", "x.pth", (), None),
        ("vit_base_patch16_224", "ViT-B-16.pt", (), None),
    ],
)
def test_a_local_clip_is_known_by_its_numbers_or_its_name(name, file, names, words):
    said = note(name, file, names)
    assert said is None if words is None else words in said


@pytest.mark.parametrize(
    ("file", "content", "quick"),
    [
        ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, True),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, False),
        ("config.json", {"vision_config": {"hidden_act": "quick_gelu"}}, True),
        ("config.json", {"architecture": QUICK}, True),
        ("config.json", {"architecture": GELU, "pretrained_cfg": {"tag": "laion2b"}}, False),
        ("config.json", {"architecture": GELU, "pretrained_cfg": {"tag": "openai"}}, True),
        (
            "config.json",
            {"architecture": GELU, "pretrained_cfg": {"tag": "x", "notes": ["natively QuickGELU"]}},
            True,
        ),
    ],
)
def test_a_hubs_config_beside_the_file_says_the_activation(tmp_path, file, content, quick):
    (tmp_path / file).write_text(json.dumps(content))
    weights = tmp_path / "model.safetensors"
    assert (note(GELU, weights) is None) == (not quick)
    assert (note(QUICK, weights) is None) == quick
    # timm's two architectures of one CLIP share a repository
    (tmp_path / file).write_text(json.dumps({"architecture": GELU}))
    assert "does not say" in note(GELU, weights) and note(QUICK, weights) is None
    # beside a file of another name it may be anything's
    assert "does not say" in note(GELU, tmp_path / "mine.safetensors")


@pytest.mark.parametrize(
    ("name", "role", "names", "mean", "reason"),
    [
        ("vit_small_patch16_224.dino", "dino", (), IMAGENET[0], "timm's record"),
        ("vit_small_patch16_224", "dino", (), IMAGENET[0], "role dino"),
        ("vit_base_patch16_224", "mae", (), IMAGENET[0], "role mae"),
        ("convnext_base", "mae", ("module.sparse_encoder.sp_cnn.x",), IMAGENET[0], "SparK"),
        (
            "vit_base_patch16_224",
            "classification",
            ("teacher.backbone.x", "teacher.head.last_layer.weight_g"),
            IMAGENET[0],
            "DINO",
        ),
        # a teacher, or a mask token, alone may be anybody's
        ("vit_base_patch16_224", "classification", ("teacher.backbone.x",), HALF, "a guess"),
        ("vit_base_patch16_224", "classification", ("encoder.mask_token",), HALF, "a guess"),
        ("vit_base_patch16_224", "classification", ("decoder_embed.weight",), IMAGENET[0], "MAE"),
        ("vit_base_patch16_224.unheard_of", "mae", (), IMAGENET[0], "role mae"),
        ("vit_base_patch16_224.unheard_of", "classification", (), HALF, "a guess"),
        # LAION's ViT-L has another mean, and so has DINOv3 of satellites' pictures
        ("vit_large_patch14_clip_224", "clip", ("visual.class_embedding",), CLIP, "a guess"),
        ("vit_large_patch14_clip_224", "clip", (), CLIP, "a guess"),
        ("vit_large_patch16_dinov3", "dino", (), IMAGENET[0], "a guess"),
        ("vit_base_patch16_224", "classification", ("x.base_encoder.y",), IMAGENET[0], "MoCo"),
        ("vit_base_patch16_224", "classification", (), HALF, "a guess"),
        (
            "vit_base_patch16_224",
            "clip",
            ("visual.class_embedding",),
            CLIP,
            "layout is that of CLIP",
        ),
        ("vit_base_patch16_clip_224", "clip", (), CLIP, "agree"),
        ("vit_base_patch16_siglip_224", "clip", ("visual.trunk.x",), HALF, "agree"),
        ("vit_small_patch14_dinov2", "dino", ("mask_token",), IMAGENET[0], "agree"),
        ("eva02_base_patch14_224", "mae", ("mask_token",), CLIP, "agree"),
    ],
)
def test_mean_and_deviation_are_those_of_the_published_family(name, role, names, mean, reason):
    chosen = normalization_of(name, "file.pth", role, names)
    assert chosen.mean == mean and reason in chosen.reason
    assert chosen.guessed == (reason == "a guess")


def test_a_hubs_config_beside_the_file_says_mean_and_deviation(tmp_path):
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    file = str(tmp_path / "model.safetensors")
    chosen = normalization_of("vit_base_patch16_224", file, "dino")
    assert chosen[:2] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "preprocessor_config.json" in chosen.reason
    for wrong in ({"image_mean": [123.675, 116.28, 103.53]}, {"image_std": [0.4, 0, 0.6]}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | wrong))
        assert normalization_of("vit_base_patch16_224", file, "dino").mean == IMAGENET[0]


@pytest.mark.slow
def test_the_choice_is_in_the_log_and_in_a_dry_run(recipe_file, tmp_path, caplog):
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    name = "vit_small_patch16_224"
    net = timm.create_model(name, img_size=32, **kwargs)
    file = tmp_path / "ViT-B-16.pth"
    torch.save(net.state_dict(), file)
    teacher = {"role": "mae", "checkpoint": str(file), "image_size": 32, "kwargs": kwargs}
    clip = teacher | {"name": GELU, "role": "clip", "pretrained": False}
    student = {"name": name, "checkpoint": str(file), "image_size": 32, "kwargs": kwargs}
    path = recipe_file(teachers=[teacher | {"name": name}, clip], student=student)
    done = run_here(path, "--dry-run")
    assert done.returncode == 0, done.stderr
    plan = " ".join(done.stdout.split())  # lines are as wide as a terminal
    assert "mean 0.485 0.456 0.406" in plan and "role mae have" in plan
    assert f"use {QUICK}" in plan
    assert "student: pictures are normalised by mean 0.485 0.456 0.406" in plan
    config = load_recipe(str(path), []).teachers[0]
    with caplog.at_level("WARNING"):
        _, (_, mean, _), _ = build_timm_teacher(config, 0)
    assert (
        mean == IMAGENET[0] and "role mae have (teachers.0.mean and .std set others)" in caplog.text
    )


def test_a_student_that_starts_from_weights_is_fed_what_they_expect(photo_folder):
    def student(**settings: object) -> tuple:
        values = small_recipe(photo_folder)
        values["student"] = {"name": "vit_base_patch16_siglip_224.webli", **settings}
        return make_recipe(values).student

    random = student()
    assert (random.mean, random.std) == IMAGENET
    started = student(pretrained=True)
    assert started.mean == HALF and started.std == HALF
    assert student(checkpoint="siglip.safetensors").mean == HALF
    own = student(pretrained=True, mean=[0.1, 0.2, 0.3])
    assert own.mean == (0.1, 0.2, 0.3) and own.std == HALF


def test_a_student_and_a_teacher_of_one_file_are_fed_the_same(photo_folder, tmp_path, caplog):
    name, file = "vit_small_patch16_224", tmp_path / "x.safetensors"
    save_file({"visual.class_embedding": torch.zeros(3)}, file)
    values = small_recipe(photo_folder)
    values["student"] = {"name": name, "checkpoint": str(file)}
    recipe = make_recipe(values)
    assert recipe.student.mean == CLIP
    said = student_note(recipe.student, recipe.teachers)
    assert "mean 0.481 0.458 0.408" in said and "layout is that of CLIP" in said
    # its values are those of its file, and a guess is a guess for both
    save_file({"norm.weight": torch.zeros(3)}, file)
    for role, mean in (("dino", IMAGENET[0]), ("classification", HALF)):
        teacher = {"name": name, "role": role, "checkpoint": str(file), "pretrained": False}
        recipe = make_recipe(values | {"teachers": [teacher]})
        assert recipe.student.mean == mean == normalization_of(name, str(file), role).mean
    said = student_note(recipe.student, recipe.teachers)
    assert ": a guess: " in said
    start_from_run(torch.nn.Identity(), recipe)
    assert said in caplog.text
    own = make_recipe(values | {"teachers": [teacher | {"mean": [0.1] * 3, "std": [0.2] * 3}]})
    assert own.student.mean == (0.1,) * 3
    values["student"] |= {"mean": [0.3] * 3}
    recipe = make_recipe(values)
    assert student_note(recipe.student, recipe.teachers) is None


def test_a_student_that_continues_a_run_is_fed_as_that_run_was(photo_folder, tmp_path):
    values = small_recipe(photo_folder)
    values["student"] = {"name": "vit_small_patch16_224", "mean": [0.1, 0.2, 0.3]}
    about = {"recipe": dump_recipe(make_recipe(values)), "teacher_dims": "{}"}
    save_file({"x": torch.zeros(1)}, tmp_path / "student.safetensors", metadata=about)
    for checkpoint in (tmp_path, tmp_path / "student.safetensors"):
        values["student"] = {"name": "vit_small_patch16_224", "checkpoint": str(checkpoint)}
        assert make_recipe(values).student.mean == (0.1, 0.2, 0.3)


def test_the_recipe_of_an_older_run_keeps_its_mean_and_deviation(photo_folder):
    values = small_recipe(photo_folder)
    values["student"] = {"name": "vit_base_patch16_siglip_224.webli", "pretrained": True}
    dumped = dump_recipe(make_recipe(values))
    older = dumped.replace("- 0.5\n", "- 0.4\n")  # written out, whatever they were
    assert parse_recipe(older, "recipe.yaml").student.mean == (0.4, 0.4, 0.4)
