"""Folders that hold more than a repository's own: what --force replaces, what a start serves of
them, and what it leaves alone in the temporary folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contract.errors import UserError
from serve.bundle import read_bundle
from serve.repository.__main__ import main as render
from serve.repository.build import make_repository
from serve.repository.contents import MADE_WITH, STAGED, foreign_file, rollout_lock, set_aside
from serve.repository.settings import Settings
from serve.repository.state import STATE, read_state
from serve.repository.versions import Repository, settle
from serve.rollout import main as roll_out
from serve.server.workspace import WORKSPACE, make_workspace
from tests.conftest import need_tritonserver
from tests.serve.made_bundle import make_bundle
from tests.serve.running import Run, processes, until

PRIVATE = (
    "thesis.txt",
    ".ssh/id",
    ".git/config",
    "photos/1.jpg",
    "lost+found/",
    "backbone/notes.txt",
    "backbone/1/notes.txt",
    "backbone/1/more/notes.txt",
    "backbone/old/model.onnx",
    "staged_backbone/1/notes.txt",
    "staged_photos/1.jpg",
    ".set_aside/photos/1.jpg",
)
"""Files and folders that a user may have put into a repository's folder."""


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def repository(bundle, tmp_path) -> Path:
    settings = Settings(parts="apart")
    make_repository(read_bundle(bundle), tmp_path / "repository", settings, durable=False)
    return tmp_path / "repository"


@pytest.mark.parametrize("name", PRIVATE)
def test_force_keeps_a_folder_with_anything_of_the_users(bundle, repository, capsys, name):
    put(repository, name)
    kept = sorted(repository.rglob("*"))
    assert render([str(bundle), "--output", str(repository), "--force"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and name.split("/")[0] in message
    assert sorted(repository.rglob("*")) == kept


def test_force_replaces_what_servers_and_rollouts_leave(bundle, repository):
    shutil.copytree(repository / "backbone", repository / f"{STAGED}backbone")
    shutil.copytree(repository / "backbone" / "1", repository / "backbone" / "2")
    for name in (STATE, ".rollout.lock", f".{STATE}.123.tmp", "backbone/1/__pycache__/model.pyc"):
        put(repository, name)
    assert foreign_file(repository) == ""
    assert render([str(bundle), "--output", str(repository), "--force"]) == 0
    assert not (repository / "backbone" / "2").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"bundle": "x"}', "pipe", "link"])
def test_force_keeps_a_folder_whose_mark_is_not_ours(bundle, repository, capsys, content):
    (repository / MADE_WITH).rename(repository.parent / "kept")
    if content == "pipe":
        os.mkfifo(repository / MADE_WITH)
    elif content == "link":
        (repository / MADE_WITH).symlink_to(repository.parent / "kept")
    else:
        (repository / MADE_WITH).write_text(content)
    assert render([str(bundle), "--output", str(repository), "--force"]) == 2
    assert "not part of a repository" in capsys.readouterr().err
    assert (repository / "backbone" / "config.pbtxt").is_file()


def test_the_current_and_the_home_folder_are_not_replaced(bundle, repository, capsys, monkeypatch):
    monkeypatch.chdir(repository / "backbone")
    for words in ((), ("--force",)):
        assert render([str(bundle), "--output", str(repository), *words]) == 2
        assert "is or holds the current folder" in capsys.readouterr().err
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", str(repository))
    assert render([str(bundle), "--output", str(repository), "--force"]) == 2
    assert "is or holds the home folder" in capsys.readouterr().err
    assert render([str(bundle), "--output", "/", "--force"]) == 2
    assert "is where a file system is mounted" in capsys.readouterr().err


# --- what a start and a rollout find


def test_what_a_killed_rollout_left_is_set_aside_and_named(repository):
    shutil.copytree(repository / "backbone", repository / f"{STAGED}backbone")
    for name in ("lost+found/", "staged_photos/1.jpg"):
        put(repository, name)
    lines: list[str] = []
    set_aside(repository, lines.append)
    assert not (repository / f"{STAGED}backbone").exists()
    assert "lost+found, staged_photos" in lines[0] and "set aside: staged_backbone" in lines[1]
    assert (repository / "staged_photos" / "1.jpg").read_text() == "mine"
    assert "staged_backbone" not in Repository(repository).models
    set_aside(repository, lines.append)
    assert len(lines) == 3, "what is aside is not named again"
    Repository(repository).unstage()
    assert not (repository / ".set_aside").exists()


def test_a_missing_model_is_named(repository):
    shutil.rmtree(repository / "decode")
    with pytest.raises(UserError, match="lacks its model 'decode': render it again"):
        set_aside(repository, print)


def test_a_rollout_deletes_nothing_of_the_users(repository):
    put(repository, "staged_backbone/1/notes.txt")
    with pytest.raises(UserError, match="is not of a rollout, and in the way of one"):
        Repository(repository).unstage()
    assert (repository / "staged_backbone" / "1" / "notes.txt").read_text() == "mine"


def test_a_rollout_whose_bundle_changes_while_it_copies_leaves_nothing(
    bundle, repository, tmp_path
):
    copy = Path(shutil.copytree(bundle, tmp_path / "second"))
    rollout = Repository(repository)
    models = rollout.render(read_bundle(copy), 2)
    (copy / "fused.onnx").write_bytes(b"another graph")
    with pytest.raises(UserError, match="fused.onnx does not match its sha256"):
        rollout.stage(models)
    assert not list(repository.glob(f"{STAGED}*"))


def test_a_start_waits_for_no_rollout(repository, capsys):
    """One that a killed server began with, and that goes on."""
    shutil.copytree(repository / "backbone", repository / f"{STAGED}backbone")
    with rollout_lock(repository):
        set_aside(repository, print)
        settle(repository, print)
    assert "staged_backbone, of a rollout that is under way" in capsys.readouterr().out
    assert (repository / f"{STAGED}backbone").exists()


def test_a_rollout_killed_while_it_switches_is_undone(repository, bundle):
    made, lines = Repository(repository), []
    models = made.render(read_bundle(bundle), 2)
    list(made.add(models, 2))
    switched = next(made.point(2))
    assert made.config(switched).version_policy.specific.versions[:] == [2] and made.serving == 1
    settle(repository, lines.append)
    assert "undone: a killed rollout's changes of " in lines[0] and switched in lines[0]
    assert made.versions == [1] and not list(repository.glob("*/2"))
    for name in made.pinned():
        assert made.config(name).version_policy.specific.versions[:] == [1]
    settle(repository, lines.append)
    assert len(lines) == 1, "there is nothing more to undo"


def test_a_rollout_killed_once_the_student_is_switched_is_finished(bundle, tmp_path):
    """Where one model holds its graphs, that is switched first."""
    repository, lines = tmp_path / "repository", []
    make_repository(read_bundle(bundle), repository, Settings(), durable=False)
    made = Repository(repository)
    models = made.render(read_bundle(bundle), 2)
    list(made.add(models, 2))
    assert made.serving == 1 and next(made.point(2)) == "features" and made.serving == 2
    settle(repository, lines.append)
    for name in made.pinned():
        assert made.config(name).version_policy.specific.versions[:] == [2]
    assert made.versions == [1, 2] and "features_encoded" in lines[0]
    list(made.forget(1))
    assert made.versions == [2] and not list(repository.glob("*/1"))


def test_what_a_killed_rollout_added_or_deleted_in_part_is_deleted(repository, bundle):
    made = Repository(repository)
    adding = made.add(made.render(read_bundle(bundle), 2), 2)
    next(adding)
    adding.close()
    assert made.versions == [1, 2] and list(made.settle()) and made.versions == [1]
    (repository / "features" / "7").mkdir()  # older ones go from the backbone first
    settle(repository, print)
    assert not (repository / "features" / "7").exists()


def test_pipes_in_a_repository_are_not_waited_for(repository, capsys):
    os.mkfifo(repository / STATE)
    assert read_state(repository) is None
    os.mkfifo(repository / ".rollout.lock")
    assert roll_out([str(repository), "--finish"]) == 2
    assert ".rollout.lock is not a regular file" in capsys.readouterr().err


# --- the temporary folder


def test_strange_things_in_the_temporary_folder_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    put(mine, "lock")
    strange = {name: tmp_path / f"{WORKSPACE}{name}" for name in ("pipe", "open", "link", "file")}
    strange["pipe"].mkdir(0o700)
    os.mkfifo(strange["pipe"] / "lock")
    strange["open"].mkdir(0o755)
    put(strange["open"], "lock")
    strange["link"].symlink_to(mine)
    strange["file"].write_text("mine")
    os.mkfifo(tmp_path / f"{WORKSPACE}fifo")
    abandoned = tmp_path / f"{WORKSPACE}abandoned"
    abandoned.mkdir(0o700)
    put(abandoned, "lock")
    with make_workspace(print) as one, make_workspace(print) as other:
        assert one.is_dir() and other.is_dir() and one.stat().st_mode & 0o777 == 0o700
    assert not one.exists() and not abandoned.exists()
    assert all(os.path.lexists(path) for path in strange.values())
    assert (mine / "lock").read_text() == "mine"


# --- all of it, at a real server


@pytest.mark.slow
def test_a_server_starts_after_a_rollout_was_killed_while_it_copied(small_bundle, tmp_path):
    need_tritonserver()
    repository, temporary = tmp_path / "repository", tmp_path / "tmp"
    settings = Settings(fused=False, encoded=False)
    make_repository(read_bundle(small_bundle), repository, settings, durable=False)
    (repository / "lost+found").mkdir(0o700)
    temporary.mkdir()
    strange = temporary / f"{WORKSPACE}pipe"
    strange.mkdir(0o700)
    os.mkfifo(strange / "lock")
    with Run("--repository", repository, temporary=temporary) as run:
        run.ready()
        command = [sys.executable, "-m", "serve.rollout", repository, "--bundle", small_bundle]
        rollout = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        # its front door is staged last: others are there already
        assert until(lambda: list(repository.glob(f"{STAGED}*")), 60)
        rollout.kill()
        rollout.wait()
        assert run.end(signal.SIGTERM) == 0, run.text
    assert list(repository.glob(f"{STAGED}*"))
    with Run("--repository", repository, temporary=temporary) as run:
        run.ready()
        assert "not served: lost+found" in run.text and "set aside: staged_" in run.text
        assert not list(repository.glob(f"{STAGED}*"))
        assert roll_out([str(repository), "--bundle", str(small_bundle)]) == 0
        assert not (repository / ".set_aside").exists()
        assert run.end(signal.SIGTERM) == 0, run.text
    assert not processes(repository) and strange.exists()
