"""Manifests of older formats are read and upgraded; their seal is that of the bytes as written."""

import json
import shutil
from pathlib import Path

import pytest
from pydantic_core import to_json

from contract.errors import UserError
from contract.manifest import FORMAT, MANIFEST, add_files, read_manifest

OLD = Path(__file__).resolve().parents[1] / "data" / "manifest_format_3.json"
"""Of a real export, when 3 was the format."""


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with a manifest of format 3 and nothing else."""
    shutil.copy(OLD, tmp_path / MANIFEST)
    return tmp_path


def test_a_manifest_of_format_3_is_read_and_written_in_the_present_format(old):
    assert json.loads(OLD.read_bytes())["format"] == 3
    manifest = read_manifest(old)
    assert manifest.format == FORMAT and manifest.teachers[0].token_dim == 32
    assert [graph.name for graph in manifest.graphs] == ["backbone", "head_mae", "fused"]
    (old / "embeddings").write_bytes(b"x")
    add_files(old, ["embeddings"])
    assert json.loads((old / MANIFEST).read_bytes())["format"] == FORMAT
    again = read_manifest(old)
    assert again.files.keys() == manifest.files.keys() | {"embeddings"}
    assert again.parity == manifest.parity


def test_a_changed_manifest_of_format_3_is_refused_before_it_is_upgraded(old):
    text = OLD.read_text()
    (old / MANIFEST).write_text(text.replace('"max_batch": 1', '"max_batch": 9'))
    with pytest.raises(UserError, match="does not match its own seal"):
        read_manifest(old)
    (old / MANIFEST).write_text(text.replace('"format": 3', f'"format": {FORMAT}'))
    with pytest.raises(UserError, match="does not match its own seal"):
        read_manifest(old)


@pytest.mark.parametrize("version", [1, 2, FORMAT + 1, "3", None, [3], True])
def test_other_formats_are_named(old, version):
    content = json.loads(OLD.read_bytes()) | {"format": version}
    (old / MANIFEST).write_bytes(to_json(content, indent=1))
    with pytest.raises(UserError, match=f"this version reads 3, 4 and {FORMAT}: export"):
        read_manifest(old)


def test_a_teacher_without_a_token_is_read(old):
    manifest = read_manifest(old)
    teacher = manifest.teachers[0].model_copy(update={"token_dim": None})
    changed = manifest.model_copy(update={"teachers": (teacher,)}).sealed()
    (old / MANIFEST).write_bytes(changed.to_bytes())
    assert read_manifest(old).teachers == (teacher,)
