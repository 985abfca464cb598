"""Manifests of older formats are read and upgraded; their seal is that of the bytes as written."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from pydantic_core import to_json

from contract.errors import UserError
from contract.manifest import FORMAT, MANIFEST, GraphRecord, add_files, read_manifest
from contract.tasks import TASKS
from contract.views import SQUASH

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
    assert manifest.policy == SQUASH, "which is how it was served"
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
    with pytest.raises(UserError, match=f"this version reads 3, 4, 5, 6 and {FORMAT}: export"):
        read_manifest(old)


def test_a_view_is_read_and_an_impossible_one_refused(old):
    for text in ("letterbox:7c7468,bilinear", "centre-crop:0.9"):
        changed = read_manifest(old).model_copy(update={"view": text}).sealed()
        (old / MANIFEST).write_bytes(changed.to_bytes())
        assert str(read_manifest(old).policy) == text
    changed = read_manifest(old).model_copy(update={"view": "zoom"}).sealed()
    (old / MANIFEST).write_bytes(changed.to_bytes())
    with pytest.raises(UserError, match="view 'zoom': choose squash, centre-crop"):
        read_manifest(old)


def test_a_teacher_without_a_token_is_read(old):
    manifest = read_manifest(old)
    teacher = manifest.teachers[0].model_copy(update={"token_dim": None})
    changed = manifest.model_copy(update={"teachers": (teacher,)}).sealed()
    (old / MANIFEST).write_bytes(changed.to_bytes())
    assert read_manifest(old).teachers == (teacher,)


def with_graphs(old: Path, *graphs: GraphRecord) -> Path:
    """The manifest with these in place of the graphs of their names, sealed as anybody can."""
    manifest = read_manifest(old)
    named = {graph.name: graph for graph in (*manifest.graphs, *graphs)}
    other = manifest.model_copy(update={"graphs": tuple(named.values())})
    (old / MANIFEST).write_bytes(other.sealed().to_bytes())
    return old


def with_axis(graph: GraphRecord, where: str, axis: str, place: int = 1) -> GraphRecord:
    """A graph whose first input or output has another axis."""
    tensor, *others = getattr(graph, where)
    shape = [*tensor.shape[:place], axis, *tensor.shape[place + 1 :]]
    return graph.model_copy(
        update={where: (tensor.model_copy(update={"shape": tuple(shape)}), *others)}
    )


@pytest.mark.parametrize(
    ("where", "axis"),
    [
        *(("inputs", axis) for axis in ("positions", "rows_4", "columns_9999", "text_tokens")),
        *(("outputs", axis) for axis in ("rows", "positions_32", "depth_positions")),
    ],
)
def test_axes_that_graphs_have_are_read(old, where, axis):
    head = with_axis(read_manifest(old).graph("head_mae"), where, axis)
    assert axis in getattr(read_manifest(with_graphs(old, head)).graph("head_mae"), where)[0].shape


@pytest.mark.parametrize(
    ("where", "axis", "place"),
    [
        ("inputs", "positions_4", 1),
        ("inputs", "depth_positions", 1),
        *(("inputs", axis, 1) for axis in ("foo", "rows_x", "rows_0", "rows_", "rows_12345")),
        *(
            ("outputs", axis, 1)
            for axis in ("foo", "batch", "rows_04", "classes", "rows_4_positions")
        ),
        ("inputs", "rows", 0),
        ("outputs", 1, 0),
    ],
)
def test_an_axis_that_no_graph_has_is_refused_in_a_line(old, where, axis, place):
    graph = with_axis(read_manifest(old).graph("head_mae"), where, axis, place)
    with pytest.raises(UserError, match=f"may not have an axis '{axis}' there") as error:
        read_manifest(with_graphs(old, graph))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_graph_without_its_tasks_output_is_refused(old, task):
    graph = read_manifest(old).graph("head_mae").model_copy(update={"name": task})
    with pytest.raises(UserError, match=f"'{task}' does not give '{TASKS[task].output}'"):
        read_manifest(with_graphs(old, graph))


@pytest.mark.parametrize("name", ["float\nx", "Float32", "", "a" * 200])
def test_a_type_of_weights_is_a_name(old, name):
    graph = read_manifest(old).graph("head_mae").model_copy(update={"dtypes": (name,)})
    with pytest.raises(UserError, match="dtypes") as error:
        read_manifest(with_graphs(old, graph))
    assert "\n" not in str(error.value)


ORIGIN = {"label": "mae", "name": "vit", "source": "file a.pth", "sha256": None, "licence": "mit"}


def with_licences(old: Path, licences: object) -> Path:
    """The manifest in the present format with these, sealed as anybody can."""
    content = json.loads(read_manifest(old).to_bytes()) | {"licences": licences, "seal": ""}
    content["seal"] = hashlib.sha256(to_json(content)).hexdigest()
    (old / MANIFEST).write_bytes(to_json(content, indent=1))
    return old


def test_inherited_licences_may_be_missing_or_there(old):
    assert read_manifest(old).licences is None
    (record,) = read_manifest(with_licences(old, [ORIGIN])).licences
    assert (record.label, record.licence, record.flags) == ("mae", "mit", ())
    assert record.words == "mae: mit, file a.pth"


@pytest.mark.parametrize(
    "change",
    [
        {"label": "a b"},
        {"label": "a." * 300 + "a"},
        {"name": "a\x1b[31m"},
        {"source": "x" * 2001},
        {"sha256": "abc"},
        {"licence": "MIT"},
        {"licence": "mit\n"},
        {"licence": "m" * 101},
        {"flags": ["free"]},
        {"flags": ["custom"] * 4},
        {"more": 1},
    ],
)
def test_hostile_licences_are_refused_in_a_line(old, change):
    with pytest.raises(UserError, match="licences") as error:
        read_manifest(with_licences(old, [ORIGIN | change]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500


def test_more_licences_than_any_student_has_are_refused(old):
    with pytest.raises(UserError, match="licences"):
        read_manifest(with_licences(old, [ORIGIN] * 1001))
