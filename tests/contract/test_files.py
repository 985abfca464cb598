"""Files and folders appear whole or not at all; what an export does with them is in
test_bundle_safety.py.
"""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from contract import files
from contract.errors import UserError, first_line
from contract.files import new_folder, tidy, write_all_atomically, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    message = r"cannot write .*/a: No space left on device \(buy a disk; the previous file is"
    with pytest.raises(UserError if isinstance(error, OSError) else error) as caught:
        write_atomically(tmp_path / "a", half, remedy="buy a disk")
    assert isinstance(error, type) or caught.match(message)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_of_files_that_belong_together_none_is_replaced_if_one_fails(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")

    def full(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="/b: No space left"):
        write_all_atomically(
            {tmp_path / "a": lambda path: path.write_text("new"), tmp_path / "b": full}
        )
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "a").read_text() == "old"


def test_a_private_file_is_its_owners_from_the_start_and_others_are_for_all(tmp_path):
    modes = []

    def write(temporary: Path) -> None:
        temporary.write_text("secret")
        modes.append(stat.S_IMODE(temporary.stat().st_mode))

    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "key", write, private=True)
        write_atomically(tmp_path / "open", write)
    finally:
        os.umask(mask)
    assert modes[0] == 0o600
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("key", "open")] == [0o600, 0o644]


def test_files_are_on_the_disk_before_they_have_their_names_and_the_folder_after(
    tmp_path, monkeypatch
):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *pair: (done.append("rename"), replace(*pair)))
    write_atomically(tmp_path / "a", lambda path: path.write_text("x"))
    assert done[0].endswith(".tmp") and done[1:] == ["rename", str(tmp_path)]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaces_another_only_if_it_may(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    place = tmp_path / "place"
    for content in ("old", "new"):
        with new_folder(place, "--output", replaceable=lambda: None) as aside:
            (aside / "file").write_text(content)
    assert (place / "file").read_text() == "new" and names(tmp_path) == ["place"]

    def mine() -> None:
        raise UserError("it is mine")

    for replaceable, message in ((mine, "it is mine"), (None, "filled by somebody else")):
        with (
            pytest.raises(UserError, match=message),
            new_folder(place, "--output", replaceable) as aside,
        ):
            (aside / "file").write_text("newer")
    assert (place / "file").read_text() == "new" and names(tmp_path) == ["place"]


def test_an_old_folder_is_kept_unless_it_may_be_deleted(tmp_path):
    for name in ("place", ".place.old"):
        (tmp_path / name).mkdir()
    tidy(tmp_path / "place", lambda old: False)
    assert names(tmp_path) == [".place.old", "place"]
    tidy(tmp_path / "place", lambda old: True)
    assert names(tmp_path) == ["place"]


def test_an_error_is_named_by_its_first_line_or_its_kind():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(EOFError()) == "EOFError" and first_line("said\nmore") == "said"


def test_threads_may_write_the_same_file(tmp_path):
    """And nobody changes the umask, which is the whole process's, even for a moment."""
    together, path = threading.Barrier(2), tmp_path / "state"

    def write(text: str) -> None:
        def slowly(temporary: Path) -> None:
            together.wait(10)
            temporary.write_text(text)
            together.wait(10)

        write_atomically(path, slowly)

    with ThreadPoolExecutor(2) as threads, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        for _ in range(20):
            list(threads.map(write, "ab"))
    assert path.read_text() in ("a", "b") and names(tmp_path) == ["state"]
