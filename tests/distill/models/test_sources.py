"""timm networks of a folder: as teachers and as students, whose runs need the folder no longer."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from contract.errors import UserError
from distill.config import StudentConfig, TeacherConfig, TeacherRuntime
from distill.evaluate.encoder import named_encoder, parse_model
from distill.models.meta import building
from distill.models.sources import ADAPTED, settled_student
from distill.models.student import Student
from distill.teachers import Teacher, build_teacher, weights_source

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "img_size": 48}
CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 48, 48]}


@pytest.fixture(scope="module")
def folder(made_once) -> Path:
    """A ViT that timm's own function has saved: without a class token, pooled by the mean, so that
    its last norm is elsewhere than that of the plain architecture.
    """

    def make(root: Path) -> None:
        torch.manual_seed(7)  # others than a teacher's random weights
        arguments = {**VIT, "num_classes": 5, "global_pool": "avg"}
        net = timm.create_model("vit_tiny_patch16_224", **arguments)
        net.pretrained_cfg |= CFG | {"license": "cc-by-nc-4.0"}
        save_for_hf(net, root, model_args=VIT | {"global_pool": "avg"}, safe_serialization=True)

    return made_once("timm_folder", make)


def build(folder: object, **settings: object) -> Teacher:
    config = TeacherConfig(name=f"local-dir:{folder}", role="dino", alias="own", **settings)
    return build_teacher(config, TeacherRuntime(), 0)


def test_a_teacher_of_a_folder_is_timms_own_network(folder):
    teacher = build(folder)
    assert teacher.image_size == 48 and teacher.grid == (3, 3)
    assert teacher.preprocess.mean.flatten().tolist() == pytest.approx(CFG["mean"])
    assert teacher.preprocess.std.flatten().tolist() == pytest.approx(CFG["std"])
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        features = teacher.encode(pixels)
        expected = net.forward_head(net.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(features.summary, expected)
    assert weights_source(teacher.config) == f"folder {folder}"


def test_a_teacher_of_a_folder_is_read_like_any_of_timms(folder, tmp_path):
    assert build(folder, image_size=64).grid == (4, 4)
    assert build(folder, block=0).dims.patches == 32
    with building():
        planned = build(folder, pretrained=False)
    assert planned.dims == build(folder).dims
    assert build(folder, pretrained=False).fingerprint() != build(folder).fingerprint()
    encoder = named_encoder(f"local-dir:{folder}:1")
    assert encoder.is_bare and encoder.stride == 16 and encoder.teacher.config.block == 1
    assert parse_model(f"local-dir:{folder}@random").pretrained is False
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert build(copy).identity() == build(folder).identity()
    checkpoint = str(folder / "model.safetensors")
    assert build(folder, checkpoint=checkpoint).fingerprint() == build(folder).fingerprint()


def test_a_student_of_a_folder_is_settled_so_that_its_run_needs_it_no_longer(folder):
    student = settled_student(
        StudentConfig(name=f"local-dir:{folder}", pretrained=True, image_size=64)
    )
    assert student.name == "vit_tiny_patch16_224" and student.image_size == 64
    assert student.checkpoint == str(folder / "model.safetensors") and not student.pretrained
    assert (list(student.mean), list(student.std)) == (CFG["mean"], CFG["std"])
    assert settled_student(student) == student
    made = Student(student.model_copy(update={"image_size": 48}))
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        patches, expected = made.eval()(pixels).patches, net.forward_features(pixels)
    torch.testing.assert_close(patches.flatten(1, 2), expected)
    # without the folder
    random = Student(student.model_copy(update={"checkpoint": None}))
    assert {n: t.shape for n, t in random.state_dict().items()} == {
        n: t.shape for n, t in made.state_dict().items() if n != "net.pos_embed"
    } | {"net.pos_embed": torch.Size([1, 16, 32])}


def test_a_students_own_keys_win(folder):
    student = settled_student(
        StudentConfig(
            name=f"local-dir:{folder}", mean=(0.1, 0.1, 0.1), pretrained=True, kwargs={"depth": 1}
        )
    )
    assert student.mean == (0.1, 0.1, 0.1) and student.kwargs["depth"] == 1
    random = settled_student(StudentConfig(name=f"local-dir:{folder}"))
    assert random.checkpoint is None and random.kwargs["embed_dim"] == 32


def changed(folder: Path, place: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(folder, place))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_folders_that_are_not_timms_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        build(tmp_path / "nothing")
    with pytest.raises(UserError, match="config.json is missing: give a folder that timm"):
        build(tmp_path)
    other = changed(folder, tmp_path / "other", architecture="vit_tiny_patch16_225")
    with pytest.raises(UserError, match="did you mean 'vit_tiny_patch16_224'"):
        build(other)
    (other / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=f"not timm's .*: for a network of .* write hf:{other}"):
        build(other)
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(f"local-dir:{other}: config.json cannot")):
        build(other)
    bare = changed(folder, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors is missing: save the weights there"):
        build(bare)
    with pytest.raises(UserError, match="model.safetensors is missing"):
        settled_student(StudentConfig(name=f"local-dir:{bare}", pretrained=True))
    odd = changed(folder, tmp_path / "odd", model_args=VIT | {"global_pool": "token"})
    with pytest.raises(UserError, match="timm cannot build what its config.json describes"):
        build(odd)
    arguments = VIT | {"embed_dim": 48, "global_pool": "avg"}
    wide = changed(folder, tmp_path / "wide", model_args=arguments)
    with pytest.raises(UserError, match="cannot load the weights of local-dir") as error:
        build(wide)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_local_ways(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot read hf-hub:owner/net \(.*local-dir:FOLDER"):
        build_teacher(TeacherConfig(name="hf-hub:owner/net", role="dino"), TeacherRuntime(), 0)
    with pytest.raises(UserError, match=r"cannot read hf-hub:owner/net"):
        settled_student(StudentConfig(name="hf-hub:owner/net@v1", pretrained=True))
    for name in ("hf-hub:net", "hf-hub:/a/b", "local-dir:", "hf: "):
        with pytest.raises(ValueError, match="name = "):
            TeacherConfig(name=name, role="dino")


@pytest.mark.parametrize("name", ["hf:some/folder", "python:package.module:function"])
def test_students_of_other_libraries_are_refused_in_a_line(name):
    with pytest.raises(UserError, match="students are timm networks .*; those of transformers and"):
        settled_student(StudentConfig(name=name))


def test_a_student_with_its_adapter_is_refused_with_its_run_as_the_way(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": ADAPTED, "model_args": {}}))
    with pytest.raises(UserError, match="with its adapter, .*: give its run folder"):
        settled_student(StudentConfig(name=f"local-dir:{tmp_path}", pretrained=True))
