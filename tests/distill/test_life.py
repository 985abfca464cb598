"""A run's life around its training: claimed, started and continued by one command, lengthened,
moved, refused on other pictures; and how its processes find one another.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from contract.claim import CLAIM, claimed, is_free
from contract.errors import UserError, exit_status
from distill.data.listing import compare, list_pictures, read_list
from distill.data.pictures import WebDatasetPictures
from distill.evaluate.cast import open_rows
from distill.evaluate.settings import load_settings
from distill.launch import Launch, launched, local_world, planned_world
from distill.recipe_io import load_recipe
from distill.runs import load_run
from distill.teachers import build_teacher
from distill.visualize import main as visualize
from export.graph import open_student
from tests.conftest import metrics_of, run_here, small_recipe, weights_of


def plain_recipe(photos: Path, **changes: object) -> dict:
    """One random teacher and a student of one block, whose weights are averaged."""
    recipe = small_recipe(photos, method="plain", targets={"normalize": "none"}, **changes)
    recipe["train"]["ema_decay"] = 0.9
    recipe["teachers"] = recipe["teachers"][1:2]
    recipe["student"]["kwargs"]["depth"] = 1
    recipe["student"]["image_size"] = recipe["teachers"][0]["image_size"] = 32
    return recipe


def teacher_weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the run's only teacher."""
    recipe = load_recipe(str(run / "recipe.yaml"), [])
    state = build_teacher(recipe.teachers[0], recipe.teacher_runtime, 0).net.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items()}


def drop_last(run: Path, step: int) -> None:
    """Leave a finished run as if it had been killed before its last checkpoint."""
    for path in (run / "checkpoint").glob(f"step_{step:08d}.*"):
        path.unlink()
    (run / "student.safetensors").unlink()


@pytest.mark.slow
def test_a_second_stage_starts_from_a_run_at_another_resolution(photo_folder, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(plain_recipe(photo_folder, train={"steps": 1})))
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert run_here(recipe, "--output", first).returncode == 0
    still = ("train.lr=1e-30", "train.weight_decay=0", "data.image_size=64")
    words = (f"student.checkpoint={first}", "student.image_size=64", *still)
    words += ("student.drop_path=0", "plain.hidden_dim=24")
    done = run_here(recipe, "--output", second, *words)
    assert done.returncode == 0, done.stderr
    assert "at 64 px, after 32: position embeddings are resampled" in done.stdout
    assert "tensors start anew here: heads." in done.stdout  # of another width
    before, after = weights_of(first), weights_of(second)
    positions = "student.net.pos_embed"
    assert after[positions].shape[1] == 17 and before[positions].shape[1] == 5
    assert torch.equal(before[positions][:, 0], after[positions][:, 0])
    same = [n for n in before if n.startswith("student.net.blocks.")]
    assert same and all(torch.equal(before[name], after[name]) for name in same)

    # its file gives the network alone, its folder the heads too
    for place, equal in ((first, True), (first / "student.safetensors", False)):
        shutil.rmtree(third, ignore_errors=True)
        done = run_here(recipe, "--output", third, f"student.checkpoint={place}", *still[:2])
        assert done.returncode == 0, done.stderr
        own, heads = weights_of(third), [name for name in before if name.startswith("heads.")]
        assert all(torch.equal(before[name], own[name]) for name in same)
        assert all(torch.equal(before[name], own[name]) for name in heads) == equal
    missing = run_here(recipe, "--output", tmp_path / "x", f"student.checkpoint={tmp_path}")
    assert missing.returncode == 2 and "has no student.safetensors" in missing.stderr


@pytest.mark.slow
def test_one_command_starts_continues_lengthens_and_moves_a_run(photo_folder, tmp_path):
    photos, out, recipe = tmp_path / "photos", tmp_path / "run", tmp_path / "r.yaml"
    shutil.copytree(photo_folder, photos)
    recipe.write_text(yaml.safe_dump(plain_recipe(photos, checkpoint={"every_steps": 2})))
    command = (recipe, "--output", out, "--resume", "train.steps=4")
    out.mkdir()
    (out / CLAIM).touch()  # of a process that was killed
    first = run_here(*command)
    assert first.returncode == 0, first.stderr
    assert "set       train.steps = 4" in first.stdout and not (out / CLAIM).exists()
    whole = weights_of(out)

    drop_last(out, 4)
    with pytest.raises(UserError, match="has not finished .* --checkpoint latest"):
        load_run(out)
    half = load_run(out, checkpoint="latest")
    assert (half.step, half.finished) == (2, False)
    drawn = run_here(
        out, photos / "odd" / "01.jpg", "--checkpoint", "latest", "--sizes", "32", command=visualize
    )
    assert drawn.returncode == 0 and "of step 2's checkpoint" in drawn.stdout
    (row,) = open_rows(str(out), ["backbone"], False, None, "cpu", tmp_path / "o", None, 2)
    assert (row.name, row.folder) == ("step 2 student backbone", tmp_path / "o" / "step_2")
    assert open_student(out, "latest").run.step == 2
    with pytest.raises(UserError, match=r"no such checkpoint \(3\): it has 2"):
        load_run(out, checkpoint=3)
    again = run_here(*command)
    assert again.returncode == 0 and "resumed from step 2 of 4" in again.stdout, again.stderr
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights_of(out).items())
    # the average of weights ships, from the checkpoint as from the finished run
    last = load_run(out, checkpoint=4).method.state_dict()
    assert all(torch.equal(whole[name], last[name]) for name in whole.keys() | last.keys())

    longer = run_here("--output", out, "--resume", "train.steps=6")
    assert longer.returncode == 0 and "length    changed to 6 steps" in longer.stdout
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5, 6]
    assert "steps: 6" in (out / "recipe.yaml").read_text()
    shorter = run_here(*command)
    assert shorter.returncode == 2 and "has 6 steps behind it" in shorter.stderr

    moved = photos.rename(tmp_path / "elsewhere")
    same = run_here("--output", out, "--resume", f"data.path={moved}")
    assert "moved from" in same.stdout and "resumed from step 6 of 6" in same.stdout
    victim = moved / "odd" / "01.jpg"
    shutil.copy(victim, victim.with_name("new.jpg"))
    victim.write_bytes(victim.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = run_here("--output", out, "--resume")
    assert refused.returncode == 2 and "(13 pictures: 1 added, 0 removed, 1 changed)" in (
        refused.stderr
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    other = tmp_path / "other.safetensors"
    accept = "data.changed=accept"
    weights = teacher_weights(out)
    save_file({n: t + 1 if n == "norm.bias" else t for n, t in weights.items()}, other)
    refused = run_here("--output", out, "--resume", accept, f"teachers.0.checkpoint={other}")
    assert refused.returncode == 2 and "teacher 'mae' has other weights" in refused.stderr
    save_file(weights, other)
    words = (accept, f"teachers.0.checkpoint={other}", "train.steps=7")
    accepted = run_here("--output", out, "--resume", *words)
    assert (
        accepted.returncode == 0 and "1 added, 0 removed, 1 changed): accepted" in accepted.stdout
    )
    assert "changed: refuse" in (out / "recipe.yaml").read_text()


def test_resume_does_not_take_a_folder_of_something_else(recipe_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    done = run_here(recipe_file(), "--output", tmp_path / "out", "--resume")
    assert done.returncode == 2 and "and other files" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


HOLD = """\
import sys
import tarfile
from pathlib import Path
from contract.claim import claimed
with claimed(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_until_its_holder_is_killed(recipe_file, tmp_path, resume):
    out = tmp_path / "deep" / "run"
    words = [sys.executable, "-c", HOLD, out]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        command = (recipe_file(), "--output", out, "train.lr=-1", *["--resume"] * resume)
        refused = run_here(*command)
        assert refused.returncode == 2 and f"process {holder.pid} on " in refused.stderr
        assert "(a test since " in refused.stderr and is_free(out)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (out / CLAIM).exists()
    assert "train.lr = -1" in run_here(*command).stderr  # past the claim
    assert not (out / CLAIM).exists()


def test_a_claim_leaves_nothing_of_what_it_made(tmp_path):
    with claimed(tmp_path / "a" / "b", "a test"):
        assert (tmp_path / "a" / "b" / CLAIM).exists()
    assert list(tmp_path.iterdir()) == []
    with claimed(tmp_path / "a", "a test"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


TORCHRUN = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected", "address", "here"),
    [
        ({}, Launch(0, 0, 1), None, 1),
        ({"WORLD_SIZE": "1"}, Launch(0, 0, 1), None, 1),
        (
            {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", **TORCHRUN},
            Launch(5, 1, 8),
            "a",
            2,
        ),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[03-07,12],cpu1"}, Launch(2, 0, 4), "gpu03", 1),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "one,two", "SLURM_STEP_TASKS_PER_NODE": "1,3(x2)"},
            Launch(2, 0, 4),
            "one",
            3,
        ),
        ({**SRUN, "MASTER_ADDR": "b"}, Launch(2, 0, 4), "b", 1),
        # a batch script's own process
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            Launch(0, 0, 1),
            None,
            1,
        ),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Launch(1, 1, 2), "127.0.0.1", 2),
    ],
)
def test_processes_find_one_another_as_they_were_started(
    monkeypatch, environment, expected, address, here
):
    monkeypatch.setattr(os, "environ", dict(environment))
    assert launched() == expected
    assert os.environ.get("MASTER_ADDR") == address
    assert local_world() == here
    assert launched() == expected  # once more, by what it set


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", **TORCHRUN}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", **TORCHRUN}, "but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", **TORCHRUN}, "RANK = 2, but"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun started 2 processes, but MASTER_ADDR"),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, environment, words):
    monkeypatch.setattr(os, "environ", dict(environment))
    with pytest.raises(UserError, match=words):
        launched()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.seed=-1",), "train.seed = -1: Input should be greater than or equal to 0"),
        (("train.seed=99999999999999999999",), "train.seed"),
        (("student.kwargs.pretrained=true",), "student.kwargs: pretrained is not one of timm's"),
        (("teachers.0.kwargs={checkpoint_path: x}",), "set checkpoint"),
    ],
)
def test_what_only_fails_inside_a_library_is_refused_before(
    recipe_file, tmp_path, arguments, words
):
    done = run_here(recipe_file(), *arguments, "--output", tmp_path / "run")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match="seed"):
        load_settings(["seed=-1"])
    with pytest.raises(SystemExit):
        visualize(["run", "a.jpg", "--seed", "-1"])


def test_weights_that_cannot_be_fetched_are_one_line(recipe_file, tmp_path, monkeypatch, caplog):
    # the hub's client, told that it is offline, fails at once instead of after its retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    student = {"name": "vit_tiny_patch16_224", "pretrained": True, "kwargs": {}}
    done = run_here(recipe_file(student=student), "--output", tmp_path / "run")
    assert done.returncode == 2 and "cannot fetch weights of 'vit_tiny" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
    assert not [record for record in caplog.records if record.name.startswith("huggingface")]


def test_memory_that_runs_out_is_said_as_such(capsys, tiny_cnn, monkeypatch):
    def allocate() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    assert exit_status(allocate) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (") and error.count("\n") == 1

    def full(images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tiny_cnn, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):  # not "takes pictures of 64 px only"
        tiny_cnn.fit(96)


def test_a_plan_takes_the_number_of_processes_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert planned_world() == 8


def test_lists_of_pictures_tell_what_differs(tmp_path):
    before = [("a", 1, 5), ("b", 2, 5), ("c", 3, 5), ("d\udcff", 4, -5)]
    old = list_pictures(before)
    old.save(tmp_path / "list.npz")
    again = read_list(tmp_path / "list.npz")
    assert again.digest() == old.digest() and again.times_digest() == old.times_digest()
    now = list_pictures([("c", 3, 5), ("a", 1, 6), ("b", 7, 5), ("e", 1, 1)])
    assert now.digest() != old.digest()
    assert compare(old, now, times=True) == (1, 1, 2, True)
    assert compare(old, now, times=False)[:3] == (1, 1, 1)
    assert compare(old, old, times=True) == (0, 0, 0, False)
    (tmp_path / "list.npz").write_bytes(b"PK\x03\x04half")
    assert read_list(tmp_path / "list.npz") is None


def test_tar_files_list_their_members_below_their_common_folder(tmp_path, photo_folder):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "0.tar", "w") as tar:
            tar.add(photo_folder / "odd" / "01.jpg", "p.jpg")
    entries = list(WebDatasetPictures(str(tmp_path / "*" / "0.tar")).entries())
    assert [name for name, _, _ in entries] == ["x/0.tar:p.jpg", "y/0.tar:p.jpg"]
    assert len(np.unique(list_pictures(entries).names)) == 2
