"""A repository that a server runs on, or is about to, is neither replaced nor served twice; what a
dead server left is no obstacle.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from contract.claim import CLAIM, claimed
from contract.errors import UserError
from serve.bundle import read_bundle
from serve.repository.__main__ import main as render
from serve.repository.build import make_repository
from serve.repository.contents import MADE_WITH, foreign_file
from serve.repository.settings import Settings
from serve.repository.state import STATE, State, read_state, write_state
from serve.rollout import main as roll_out
from serve.run import main as serve
from serve.server.rest import Rest
from tests.conftest import need_tritonserver
from tests.serve.made_bundle import make_bundle
from tests.serve.running import Run, few_models

HOLD = """
import sys
from pathlib import Path
from contract.claim import claimed
with claimed(Path(sys.argv[1]), "serve.run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def live(expensive, small_bundle, tmp_path_factory):
    """serve.run on a kept repository, and that repository."""
    need_tritonserver()
    folder = tmp_path_factory.mktemp("live") / "repository"
    settings = Settings(fused=False, threads=1, parts="apart")
    make_repository(read_bundle(small_bundle), folder, settings, durable=False)
    whole = (folder / MADE_WITH).read_bytes()
    with Run("--repository", few_models(folder, "backbone", "decode")) as run:
        run.ready()
        (folder / MADE_WITH).write_bytes(whole)  # which it has read
        yield run, folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """Which nothing runs, but which renders in a moment."""
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture
def repository(bundle, tmp_path) -> Path:
    make_repository(read_bundle(bundle), tmp_path / "repository", Settings(), durable=False)
    return tmp_path / "repository"


@pytest.fixture
def held(repository):
    """The id of a process that holds the repository, as a start does before it has a tritonserver
    to show for it.
    """
    command = [sys.executable, "-c", HOLD, str(repository)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.stdin.close()


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("way", ["itself", "link", "relative", "without --force", "no state file"])
def test_a_served_repository_is_not_replaced(live, bundle, tmp_path, capsys, monkeypatch, way):
    run, repository = live
    before, output, force = contents(repository), repository, ["--force"]
    if way == "link":
        output = tmp_path / "link"
        output.symlink_to(repository)
    elif way == "relative":
        monkeypatch.chdir(repository.parent)
        output = Path("./repository")
    elif way == "without --force":
        force = []
    state = read_state(repository)
    who = f"process {run.process.pid}, gRPC on {run.grpc}"
    if way == "no state file":
        (repository / STATE).unlink()
        who = f"tritonserver, process {state.server_pid}"
    try:
        assert render([str(bundle), "--output", str(output), *force]) == 2
    finally:
        write_state(repository, state)
    message = f"--output {output} is served by {who}: stop it first, or choose another\n"
    assert capsys.readouterr().err == f"error: {message}"
    assert contents(repository) == before and Rest(run.http).ready()


def test_a_served_repository_is_found_under_another_name(live, bundle, tmp_path, capsys):
    """Its server's command line and state file have the old one."""
    run, repository = live
    moved = repository.rename(repository.with_name("moved"))
    try:
        assert render([str(bundle), "--output", str(moved), "--force"]) == 2
        assert serve(["--repository", str(moved)]) == 2
        assert (moved / STATE).exists()
    finally:
        moved.rename(repository)
    lines = capsys.readouterr().err.splitlines()
    assert all(f"in use by process {run.process.pid} on " in line for line in lines), lines
    assert len(lines) == 2


def test_a_copy_of_a_served_repository_is_served_by_nobody(live, bundle, tmp_path, capsys):
    """A rollout does not reach the server whose state file was copied along."""
    _, repository = live
    copy = shutil.copytree(repository, tmp_path / "copy")
    assert roll_out([str(copy), "--bundle", str(bundle)]) == 2
    assert f"{copy}: no server runs on it" in capsys.readouterr().err
    assert render([str(bundle), "--output", str(copy), "--force"]) == 0
    assert not foreign_file(copy) and read_state(repository) is not None


def test_a_served_repository_needs_its_bundle_no_more(live):
    """An export that replaces the bundle, or export.text, cannot change what is served."""
    _, repository = live
    files = [path for path in repository.rglob("*") if not path.is_dir()]
    assert files and all(path.lstat().st_nlink == 1 and path.is_file() for path in files)
    assert not any(path.is_symlink() for path in repository.rglob("*"))


def test_a_repository_whose_server_is_starting_is_left_alone(repository, bundle, held, capsys):
    before = contents(repository)
    assert render([str(bundle), "--output", str(repository), "--force"]) == 2
    assert serve(["--repository", str(repository)]) == 2
    assert serve([str(bundle), "--repository", str(repository)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and contents(repository) == before
    assert all(f"is in use by process {held} on " in line for line in lines), lines
    assert all("serve.run since" in line and "stop it first" in line for line in lines)


def test_what_a_dead_server_left_is_no_obstacle(repository, bundle):
    """Its state file, whose process ids may be others' by now, and its claim."""
    about = {"grpc": "127.0.0.1:1", "http": "127.0.0.1:2", "metrics": "127.0.0.1:3"}
    write_state(repository, State(pid=1, server_pid=os.getpid(), admin_key="k", **about))
    (repository / CLAIM).write_text(json.dumps({"pid": 1, "host": "h", "doing": "serve.run"}))
    old = (repository / MADE_WITH).stat().st_ino
    assert render([str(bundle), "--output", str(repository), "--force"]) == 0
    assert (repository / MADE_WITH).stat().st_ino != old
    assert not (repository / CLAIM).exists() and not (repository / STATE).exists()


def test_a_holder_takes_no_claim_of_another_along(tmp_path):
    """Where another folder took its folder's place meanwhile."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    with claimed(folder, "replacing"):
        folder.rename(other)
        folder.mkdir()
        (folder / CLAIM).write_text("{}")
    assert (folder / CLAIM).exists()


@pytest.mark.parametrize("what", ["link", "fifo", "folder"])
def test_a_claim_that_is_not_a_file_is_refused_and_nothing_written(
    repository, tmp_path, capsys, what
):
    victim, claim = tmp_path / "victim", repository / CLAIM
    victim.write_text("mine")
    {"link": lambda: claim.symlink_to(victim), "fifo": lambda: os.mkfifo(claim)}.get(
        what, claim.mkdir
    )()
    assert serve(["--repository", str(repository)]) == 2
    message = capsys.readouterr().err
    assert message == f"error: {claim} is not a regular file: move it away\n"
    assert victim.read_text() == "mine" and os.path.lexists(claim)


def test_a_claim_that_cannot_be_made_names_an_option_of_the_command(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory \(name another --repository\)"):
        with claimed(tmp_path / "file" / "inner", "serve.run", other="name another --repository"):
            pass


def test_two_starts_that_render_one_repository_do_not_share_it(repository, bundle):
    """The second finds it filled."""
    with pytest.raises(UserError, match="already there"):
        make_repository(read_bundle(bundle), repository, Settings(), durable=False)
