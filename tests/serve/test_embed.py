"""`python -m serve.embed`: tables of folders, tar shards and lists, from a bundle and from a
server; killed, resumed, refused.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
from PIL import ExifTags, Image
from pyarrow import parquet
from webdataset import TarWriter

from contract.errors import Failure
from contract.images import read_views
from contract.manifest import read_manifest
from contract.views import SQUASH
from serve.client import FeatureClient
from serve.embed.__main__ import main
from serve.embed.data import Entry, _links, open_data
from serve.embed.features import ServerFeatures, Source
from serve.embed.progress import Count, duration
from serve.embed.reading import Row, read_row
from serve.embed.table import MANIFEST, Part, TableManifest, open_table
from serve.errors import NotFinite
from tests.conftest import run_here
from tests.serve.test_client_faults import Proxy

OUTPUTS = ("backbone_global", "cls_token", "mae_patches")


@pytest.fixture(scope="module")
def pictures(photo_folder, tmp_path_factory) -> Path:
    """Twelve photographs, one of them held upright by its tag, and two that are no pictures."""
    folder = tmp_path_factory.mktemp("embed") / "pictures"
    shutil.copytree(photo_folder, folder)
    whole = (folder / "even" / "00.jpg").read_bytes()
    (folder / "even" / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "odd" / "empty.jpg").touch()
    held = Image.Exif()
    held[ExifTags.Base.Orientation] = 6
    with Image.open(folder / "even" / "02.jpg") as picture:
        picture.copy().save(folder / "even" / "02.jpg", quality=95, exif=held)
    return folder


@pytest.fixture(scope="module")
def tabled(small_bundle, pictures, tmp_path_factory) -> Path:
    """Their table, in parts of five rows."""
    output = tmp_path_factory.mktemp("tabled") / "table"
    done = embed(pictures, "--bundle", small_bundle, "--output", output, "--part-rows", 5)
    assert done.returncode == 0, done.stderr
    return output


def embed(*words: object, outputs: tuple = OUTPUTS) -> subprocess.CompletedProcess:
    given = ("--outputs", *outputs) if outputs else ()
    return run_here(*words, *given, command=_main)


def _main(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as error:  # argparse's
        return error.code


def array(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists as an array with a row a picture."""
    values, shape = table[name].combine_chunks(), []
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(table.num_rows, *shape)


def test_a_folder_becomes_a_table(small_bundle, pictures, tabled):
    table = parquet.read_table(tabled)
    assert table.column_names == ["id", "uri", "width", "height", *OUTPUTS, "error"]
    assert table["id"].to_pylist() == list(range(14))
    uris = [Path(uri) for uri in table["uri"].to_pylist()]
    assert uris == sorted(pictures.rglob("*.jpg"))
    assert table.schema.field("cls_token").type == pa.list_(pa.field("element", pa.float32()), 512)
    errors = dict(zip([uri.name for uri in uris], table["error"].to_pylist(), strict=True))
    assert "it is damaged" in errors.pop("cut.jpg") and "empty" in errors.pop("empty.jpg")
    assert set(errors.values()) == {None}
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    sizes = dict(zip([uri.name for uri in uris], sizes, strict=True))
    assert sizes["02.jpg"] == (80, 96) and sizes["01.jpg"] == (96, 80)
    assert sizes["cut.jpg"] == (None, None)

    graph = small_bundle / read_manifest(small_bundle).graph("fused").file
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for row, uri in enumerate(uris):
        if uri.name in ("cut.jpg", "empty.jpg"):
            assert all(np.isnan(array(table, name)[row]).all() for name in OUTPUTS)
            continue
        pixels = read_views(uri.read_bytes(), SQUASH, 64, 64)
        for name, value in zip(OUTPUTS, session.run(OUTPUTS, {"image": pixels}), strict=True):
            np.testing.assert_allclose(array(table, name)[row], value[0], rtol=1e-3, atol=1e-4)


def test_the_same_command_again_says_that_it_is_finished(small_bundle, pictures, tabled):
    before = {path: path.stat().st_mtime_ns for path in tabled.iterdir()}
    done = embed(pictures, "--bundle", small_bundle, "--output", tabled)
    assert done.returncode == 0 and "(it was finished before)" in done.stdout
    assert "14 rows in 3 parts, 2 with an error" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in tabled.iterdir()} == before


def test_what_is_missing_is_made_again_and_the_next_command_reads_it(
    small_bundle, pictures, tabled, tmp_path
):
    output = shutil.copytree(tabled, tmp_path / "table")
    (output / "part-00001.parquet").unlink()
    half = output / ".part-00001.parquet.123456.tmp"
    half.write_bytes(b"PAR1")
    done = embed(pictures, "--bundle", small_bundle, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 parts are there" in done.stdout and not half.exists()
    for name in OUTPUTS:
        both = (array(parquet.read_table(folder), name) for folder in (output, tabled))
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)
    code = re.search(r'next      read it:\n  python -c "(.*)"', done.stdout)[1]
    assert "14" not in code and exec(code) is None


def listed(kind: str, pictures: Path, folder: Path) -> list[object]:
    """DATA of another kind with the same pictures, and its options."""
    paths = sorted(pictures.rglob("*.jpg"))
    match kind:
        case "tar":
            for shard in range(2):
                with TarWriter(str(folder / f"s-{shard}.tar")) as tar:
                    for number in range(shard * 7, shard * 7 + 7):
                        data = paths[number].read_bytes()
                        tar.write({"__key__": f"{number:02d}", "jpg": data, "cls": b"1"})
            return [folder / "s-{0..1}.tar"]
        case "list":
            (folder / "list.txt").write_text("".join(f"{path}\n\n" for path in paths))
            return [folder / "list.txt"]
        case "parquet":
            names = [str(path.relative_to(pictures)) for path in paths]
            table = pa.table({"label": ["x"] * 14, "path": names})
            parquet.write_table(table, folder / "list.parquet")
            return [folder / "list.parquet", "--column", "path", "--root", pictures]
        case "memory":
            memory = fsspec.filesystem("memory")
            for path in paths:
                memory.pipe(f"/photos/{path.name}", path.read_bytes())
            memory.pipe("/photos/list.txt", "\n".join(path.name for path in paths).encode())
            return ["memory://photos/list.txt"]
        case "memory folder":
            listed("memory", pictures, folder)
            return ["memory://photos/"]


@pytest.mark.parametrize("kind", ["tar", "list", "parquet", "memory", "memory folder"])
def test_every_kind_of_data_gives_the_same(kind, small_bundle, pictures, tabled, tmp_path):
    data = listed(kind, pictures, tmp_path)
    output = tmp_path / "table"
    done = embed(*data, "--bundle", small_bundle, "--output", output, outputs=())
    assert done.returncode == 0, done.stderr
    made, expected = (parquet.read_table(folder) for folder in (output, tabled))
    order = np.arange(14)
    if kind == "memory folder":  # of names without folders
        order = np.argsort([Path(uri).name for uri in expected["uri"].to_pylist()])
    values = array(expected, "backbone_global")[order]
    np.testing.assert_allclose(array(made, "backbone_global"), values, rtol=1e-5, atol=1e-5)
    for name in ("width", "height", "error"):
        assert made[name].to_pylist() == [expected[name].to_pylist()[n] for n in order]
    first = {"tar": f"{tmp_path}/s-0.tar:00.jpg", "memory": "memory://photos/00.jpg"}
    if kind in first:
        assert made["uri"].to_pylist()[0] == first[kind]


def test_rows_that_cannot_be_read_are_rows_with_a_reason(small_bundle, pictures, tmp_path):
    good = pictures / "even" / "00.jpg"
    rows = [str(good), None, "nowhere.jpg", "memory://nowhere.jpg", str(tmp_path), str(good)]
    parquet.write_table(pa.table({"p": pa.array(rows, pa.string())}), tmp_path / "x.parquet")
    words = (tmp_path / "x.parquet", "--bundle", small_bundle, "--output", tmp_path / "table")
    assert embed(*words, outputs=()).returncode == 0
    table = parquet.read_table(tmp_path / "table")
    reasons = ["the row has no path", "No such file", "no such file", "Is a directory"]
    for reason, error in zip(reasons, table["error"].to_pylist()[1:5], strict=True):
        assert reason in error
    assert table["error"].to_pylist()[::5] == [None, None]
    assert not np.isnan(array(table, "backbone_global")[[0, 5]]).any()


@pytest.fixture
def odd_uris(tmp_path, monkeypatch) -> dict[str, str]:
    """URIs of one object that cannot be read, and why."""
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    memory = fsspec.filesystem("memory")
    here = type(memory).cat_file

    def deny(self, path: str, **options: object) -> bytes:
        if "denied" in path:
            raise PermissionError(13, "Permission denied")
        return here(self, path, **options)

    monkeypatch.setattr(type(memory), "cat_file", deny)
    return {
        f"file://{tmp_path}/bad.zip/x.jpg": "no such file",
        f"file://{tmp_path}/{'a' * 300}.jpg": "File name too long",
        f"file://{tmp_path}/loop.jpg": "Too many levels of symbolic links",
        f"zip://a.jpg::file://{tmp_path}/bad.zip": "BadZipFile",
        "memory://denied/1.jpg": "PermissionError",
    }


def test_one_odd_uri_is_a_row_and_a_storage_that_denies_all_a_failure(odd_uris):
    for uri, reason in odd_uris.items():
        assert reason in read_row(Entry(uri), 8, 8).error
    with pytest.raises(Failure, match="check address and credentials"):
        for number in range(40):
            read_row(Entry(f"memory://denied-all/{number}.jpg"), 8, 8)


def test_a_table_without_any_embedding_is_a_failure(small_bundle, tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    words = (tmp_path / "list.txt", "--bundle", small_bundle, "--output", tmp_path / "table")
    done = embed(*words, outputs=())
    assert done.returncode == 1 and "none of the 2 pictures could be embedded" in done.stderr


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(small_bundle, pictures, tmp_path):
    path, output = pictures / "even" / "00.jpg", tmp_path / "table"
    (tmp_path / "list.txt").write_text(f"{path}\n" * 600)
    words = [tmp_path / "list.txt", "--bundle", small_bundle, "--output", output]
    words += ["--part-rows", 20, "--runtime", "onnxruntime", "--threads", 1]
    command = [sys.executable, "-m", "serve.embed", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (output / "part-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 2 <= len(before) < 30 and all(parquet.read_metadata(path) for path in before)
    done = embed(*words, outputs=())
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 30 parts are there" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    table = parquet.read_table(output)
    assert table["id"].to_pylist() == list(range(600))
    values = array(table, "backbone_global")
    np.testing.assert_allclose(values, values[:1].repeat(600, 0), rtol=1e-5, atol=1e-5)
    assert {path.name for path in output.iterdir()} == {MANIFEST} | {
        f"part-{number:05d}.parquet" for number in range(30)
    }


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open some thirty files more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_are_read_with_few_open_files(small_bundle, pictures, tmp_path, few_files):
    data = (pictures / "even" / "00.jpg").read_bytes()
    for number in range(60):
        with TarWriter(str(tmp_path / f"{number:02d}.tar")) as tar:
            tar.write({"__key__": "a", "jpg": data})
    words = (tmp_path / "*.tar", "--bundle", small_bundle, "--output", tmp_path / "table")
    done = embed(*words, "--decoders", 8, outputs=())
    assert done.returncode == 0, done.stderr
    assert "60 rows in 1 part, 0 with an error" in done.stdout


def test_a_lance_table_has_the_same_rows(small_bundle, pictures, tabled, tmp_path):
    lance = pytest.importorskip("lance")
    words = (pictures, "--bundle", small_bundle, "--output", tmp_path / "table")
    options = ("--format", "lance", "--dtype", "float16", "--part-rows", 5)
    for expected in ("2 with an error;", "it was finished before"):
        done = embed(*words, *options)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    table = lance.dataset(tmp_path / "table").to_table()
    assert table["id"].to_pylist() == list(range(14))
    nulls = [value is None for value in table["mae_patches"].to_pylist()]
    assert nulls == [error is not None for error in table["error"].to_pylist()]
    whole = table.filter(pa.compute.is_null(table["error"]))
    expected = parquet.read_table(tabled)
    expected = array(expected.filter(pa.compute.is_null(expected["error"])), "cls_token")
    assert whole.schema.field("cls_token").type.value_type == pa.float16()
    np.testing.assert_allclose(array(whole, "cls_token"), expected, rtol=2e-3, atol=1e-3)


def table_of(format: str = "parquet", **changes: object) -> TableManifest:
    about = {"bundle": "x", "outputs": {"a": (2,)}, "dtype": "float32", "format": format}
    about |= {"size": (8, 8), "data": "x", "rows": 4, "part_rows": 2}
    return TableManifest(**about | changes)


def row(name: str = "a.jpg", error: str = "") -> Row:
    return Row(Entry(name), None if error else np.zeros((8, 8, 3), np.uint8), (8, 8), error)


def test_lance_killed_between_its_folder_and_its_version_loses_nothing(tmp_path):
    lance = pytest.importorskip("lance")
    folder, manifest = tmp_path / "table", table_of("lance")
    with open_table(folder, manifest, 2) as table:
        for number in table.missing():
            part = Part(manifest, number)
            part.add([row(), row()], {"a": np.ones((2, 2), np.float32)})
            table.write(part)
    (folder / "_versions").mkdir()
    (folder / "_versions" / ".tmp_1.manifest").touch()
    with open_table(folder, manifest, 2) as table:
        assert not table.missing() and not table.committed
        table.commit()
        assert table.committed and lance.dataset(folder).count_rows() == 4
    with open_table(folder, manifest, 2) as table:  # what does not open keeps what it is made of
        (folder / "_fragments").mkdir()
        next((folder / "_versions").glob("[!.]*.manifest")).write_bytes(b"x")
        with pytest.raises(Failure, match="Lance cannot open the table"):
            table.commit()
        assert (folder / "_fragments").exists()


def test_half_a_manifest_of_a_killed_run_is_not_in_the_way(tmp_path):
    folder, half = tmp_path / "table", tmp_path / "table" / f".{MANIFEST}.123456.tmp"
    folder.mkdir()
    half.write_text("{")
    with open_table(folder, table_of(), 2) as table:
        assert table.missing() == [0, 1] and not half.exists()
    assert (folder / MANIFEST).exists()


def test_a_line_of_a_list_is_a_name_whatever_characters_it_has(tmp_path):
    names = ["a\u2028b.jpg", "c\x85d.jpg", "e\x0bf\x1c.jpg", " g.jpg", "h.jpg ", "i\rj.jpg"]
    ends = ["\n", "\r\n", "\n\n", "\n \t\r\n", "\n", ""]
    text = "".join(name + end for name, end in zip(names, ends, strict=True))
    (tmp_path / "some.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    entries = open_data([str(tmp_path / "some.txt")]).entries(0, 9)
    assert [entry.uri for entry in entries] == [f"{tmp_path}/{name}" for name in names]


def test_a_tar_file_that_has_changed_is_other_data(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "jpg": b"1"})
    before = open_data([f"{tmp_path}/a.tar"]).digest()
    assert open_data([f"{tmp_path}/a.tar"]).digest() == before
    os.utime(tmp_path / "a.tar", (1, 1))
    assert open_data([f"{tmp_path}/a.tar"]).digest() != before


def test_colons_in_names_make_no_chain(pictures, tmp_path):
    data = (pictures / "even" / "00.jpg").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.jpg", data)
    (tmp_path / "foo::bar.jpg").write_bytes(data)
    names = ["foo::bar.jpg", f"zip://a.jpg::{tmp_path}/a.zip"]
    names += [f"zip://a.jpg::file://{tmp_path}/a.zip", f"simplecache::memory://{tmp_path}/no.jpg"]
    names += [f"file://{tmp_path}/foo::bar.jpg", "zip://a.jpg::memory://h::b.zip", "zip://a.jpg"]
    (tmp_path / "some.txt").write_text("\n".join(names))
    rows = [read_row(entry, 8, 8) for entry in open_data([f"{tmp_path}/some.txt"]).entries(0, 9)]
    errors = [row.error for row in rows]
    assert errors[:3] == [""] * 3 and errors[4] == ""
    assert errors[3] == "no such file" and "'::' in a name of a chain" in errors[5]
    assert "must follow it" in errors[6]
    assert _links("http://h/a::b.jpg") == ["http://h/a::b.jpg"]


# ---- bad input --------------------------------------------------------------------------------


BAD = {
    "nothing to embed with": (["{pictures}"], "give --bundle BUNDLE or --url HOST:PORT, one of"),
    "both": (["{pictures}", "--bundle", "{bundle}", "--url", "h:1"], "not both"),
    "no such folder": (["/nowhere", "--bundle", "{bundle}"], "no such folder or file"),
    "an empty folder": (["{tmp}/empty", "--bundle", "{bundle}"], "has no pictures"),
    "no such shard": (["{tmp}/x-{{0..3}}.tar", "--bundle", "{bundle}"], "x-0.tar (tar files must"),
    "one picture": (["{pictures}/even/00.jpg", "--bundle", "{bundle}"], "is a single file"),
    "two kinds": (["{pictures}", "{tmp}/a.txt", "--bundle", "{bundle}"], "mixes folder and list"),
    "an empty list": (["{tmp}/a.txt", "--bundle", "{bundle}"], "lists no pictures"),
    "no text": (["{tmp}/b.txt", "--bundle", "{bundle}"], "is not text in UTF-8"),
    "no such column": (
        ["{tmp}/p.parquet", "--column", "urls", "--bundle", "{bundle}"],
        "no such column: did you mean 'url'?",
    ),
    "a column of numbers": (
        ["{tmp}/p.parquet", "--column", "n", "--bundle", "{bundle}"],
        "is not text (columns of text: url, other)",
    ),
    "no column": (["{tmp}/p.parquet", "--bundle", "{bundle}"], "columns of text: url, other"),
    "a column of a folder": (
        ["{pictures}", "--column", "x", "--bundle", "{bundle}"],
        "--column x: DATA is not a parquet",
    ),
    "no parquet": (["{tmp}/q.parquet", "--bundle", "{bundle}"], "is not a whole parquet"),
    "a column that is not UTF-8": (
        ["{tmp}/r.parquet", "--bundle", "{bundle}"],
        "r.parquet: column p is not text in UTF-8 (row 1,",
    ),
    "a package is missing": (
        ["{tmp}/gs.txt", "--bundle", "{bundle}"],
        "'gs' needs another package",
    ),
    "no such protocol": (["{tmp}/odd.txt", "--bundle", "{bundle}"], "does not know 'odd'"),
    "no list there": (["memory://no/list.txt", "--bundle", "{bundle}"], "no such file"),
    "no bundle": (["{pictures}", "--bundle", "{pictures}"], "is not a bundle"),
    "no such output": (
        ["{pictures}", "--bundle", "{bundle}", "--outputs", "clip_token"],
        "no such output; it has backbone_global, backbone_patches, cls_token",
    ),
    "another size": (
        ["{pictures}", "--bundle", "{bundle}", "--size", "96x96"],
        "--size 96x96: the bundle takes 64x64 only",
    ),
    "half a size": (["{pictures}", "--bundle", "{bundle}", "--size", "96"], "height x width"),
    "too large a batch": (["{pictures}", "--bundle", "{bundle}", "--batch", "9"], "up to 4"),
    "workers of nobody": (["{pictures}", "--bundle", "{bundle}", "--workers", "2"], "for --ray"),
    "no server": (
        ["{pictures}", "--url", "localhost:{port}", "--timeout", "2"],
        "no server answers at",
    ),
    "a url of the web": (["{pictures}", "--url", "http://h:1"], "without 'http://'"),
    "a file in the way": (
        ["{pictures}", "--bundle", "{bundle}", "--output", "{tmp}/a.txt"],
        "is a file: name a folder",
    ),
    "no place to write": (
        ["{pictures}", "--bundle", "{bundle}", "--output", "{tmp}/a.txt/table"],
        "cannot create {tmp}/a.txt/table: Not a directory (choose another --output)",
    ),
    "a folder of others": (
        ["{pictures}", "--bundle", "{bundle}", "--output", "{pictures}"],
        "holds files but no _manifest.json",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, small_bundle, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("\n \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    (tmp_path / "gs.txt").write_text("gs://bucket/1.jpg\n")
    (tmp_path / "odd.txt").write_text("odd://bucket/1.jpg\n")
    columns = {"n": [1], "url": ["a.jpg"], "other": ["b"]}
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    bytes_of = pa.array([b"a.jpg", b"\xff.jpg"]).buffers()
    table = pa.table({"p": pa.Array.from_buffers(pa.string(), 2, bytes_of)})
    parquet.write_table(table, tmp_path / "r.parquet")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        places = {"pictures": pictures, "bundle": small_bundle, "tmp": tmp_path}
        places["port"] = unused.getsockname()[1]
        template, message = BAD[name]
        words = [word.format(**places) for word in template]
        words += [] if "--output" in words else ["--output", str(tmp_path / "table")]
        done = embed(*words, outputs=())
    assert done.returncode == (1 if name == "no server" else 2)
    assert message.format(**places) in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    "module, extra, words",
    [
        ("pyarrow", "embed", []),
        ("lance", "lance", ["--format", "lance"]),
        ("ray", "ray", ["--ray"]),
    ],
)
def test_a_missing_library_is_named(module, extra, words, small_bundle, tmp_path, monkeypatch):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == module else here(n))
    given = (tmp_path, "--bundle", small_bundle, "--output", tmp_path / "table", *words)
    done = embed(*given, outputs=())
    assert done.returncode == 2
    assert done.stderr == f"error: {module} is not installed: pip install 'vfm-distill[{extra}]'\n"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bundle": "000000000000"}, "begun with another bundle (000000000000, now "),
        ({"outputs": {"backbone_patches": [16, 48]}}, "begun with another outputs"),
        ({"data": "0" * 64}, "begun with another list of pictures"),
        ({"dtype": "float16"}, "begun with another --dtype (float16, now float32)"),
        ({"part_rows": "five"}, "is not the manifest of a table"),
    ],
)
def test_a_table_of_something_else_is_refused(
    change, message, small_bundle, pictures, tabled, tmp_path
):
    output = shutil.copytree(tabled, tmp_path / "table")
    kept = json.loads((output / MANIFEST).read_text())
    (output / MANIFEST).write_text(json.dumps(kept | change))
    done = embed(pictures, "--bundle", small_bundle, "--output", output)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(list(output.glob("*.parquet"))) == 3


def test_numbers_that_do_not_fit_and_nan_are_rows_with_a_reason():
    part = Part(table_of(dtype="float16", rows=3, part_rows=3), 0)
    values = np.array([[1, 2], [np.nan, 1], [1, -1e5]], np.float32)
    assert part.add([row(), row(), row()], {"a": values}) == 2
    reason = "output 'a' has numbers up to 1e+05, which do not fit float16"
    table = pa.table(part.arrow())
    assert table["error"].to_pylist() == [None, "output 'a' is not finite", reason]
    assert np.isnan(array(table, "a")).tolist() == [[False] * 2, [True] * 2, [True] * 2]


def test_progress_says_how_far_how_fast_and_how_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("serve.embed.progress.time.monotonic", lambda: now[0])
    count = Count(1000, before=200)
    now[0] = 10.0
    count.add(400, 1)
    assert count.words() == "600 of 1,000 (60%), 40.0 images/s, 10s left, errors: 1"
    assert [duration(seconds) for seconds in (3.2, 200, 7500)] == ["3s", "3m20s", "2h05m"]


# ---- a server, a full disk, a cluster ---------------------------------------------------------


class Cable(Proxy):
    """A way to a server that can be cut."""

    def __init__(self, target: str) -> None:
        self.open: list[socket.socket] = []
        super().__init__(0, target)

    def finish_request(self, request: socket.socket, address: object) -> None:
        self.open.append(request)
        super().finish_request(request, address)

    def cut(self) -> None:
        self.shutdown()
        for end in self.open:
            with contextlib.suppress(OSError):  # closed before
                end.shutdown(socket.SHUT_RDWR)
        self.close()


def test_a_server_gives_what_its_bundle_gives(server, pictures, tabled, tmp_path):
    words = (pictures, "--url", server.grpc, "--output", tmp_path / "table", "--part-rows", 5)
    done = embed(*words)
    assert done.returncode == 0, done.stderr
    made, expected = (parquet.read_table(folder) for folder in (tmp_path / "table", tabled))
    for name in ("uri", "width", "height", "error"):
        assert made[name].equals(expected[name])
    good = [n for n, error in enumerate(made["error"].to_pylist()) if error is None]
    with FeatureClient(server.grpc) as client:
        answer = client.features([made["uri"].to_pylist()[n] for n in good], OUTPUTS)
    for name in OUTPUTS:
        for other in (answer[name], array(expected, name)[good]):
            np.testing.assert_allclose(array(made, name)[good], other, rtol=1e-3, atol=1e-4)
    # begun with a bundle, a table goes on with a server of it
    output = shutil.copytree(tabled, tmp_path / "begun")
    (output / "part-00002.parquet").unlink()
    assert embed(pictures, "--url", server.grpc, "--output", output).returncode == 0


def test_a_server_that_is_lost_leaves_finished_parts(server, pictures, tmp_path):
    path, output, cable = pictures / "even" / "00.jpg", tmp_path / "table", Cable(server.grpc)
    (tmp_path / "list.txt").write_text(f"{path}\n" * 4000)
    command = [sys.executable, "-m", "serve.embed", str(tmp_path / "list.txt")]
    command += ["--url", f"127.0.0.1:{cable.server_address[1]}", "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--part-rows", "20", "--timeout", "5"], stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (output / "part-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    cable.cut()
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and error.count("\n") == 1
    parts = len(list(output.glob("*.parquet")))
    assert f"({parts} of 200 parts are finished; the same command goes on from there)" in error
    assert not list(output.glob(".*.tmp"))


def test_a_rollout_in_between_is_noticed(server, tmp_path):
    features = ServerFeatures(Source(("backbone_global",), url=server.grpc))
    try:
        features.check()
        features.bundle = "000000000000"
        with pytest.raises(Failure, match="now, not 000000000000"):
            features.check()
    finally:
        features.close()


class BlackIsNan:
    """A client whose server has an answer that is not finite for black pictures."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def features(self, pixels: np.ndarray, outputs: object, options: object) -> dict:
        self.asked.append(len(pixels))
        if not pixels.reshape(len(pixels), -1).any(1).all():
            error = NotFinite("output 'a' holds NaN or infinity")
            error.output = "a"
            raise error
        return {name: np.ones((len(pixels), 2), np.float32) for name in ("a", "b")}


def test_a_server_whose_answer_about_one_picture_is_not_finite_makes_one_row_of_it():
    features = object.__new__(ServerFeatures)
    features._client, features._outputs, features._request = BlackIsNan(), ("a", "b"), None
    features.shapes = {"a": (2,), "b": (2,)}
    pixels = np.ones((3, 8, 8, 3), np.uint8)
    pixels[1] = 0
    arrays = asyncio.run(features._ask(pixels))
    assert features._client.asked == [3, 1, 1, 1]
    part = Part(table_of(outputs={"a": (2,), "b": (2,)}, rows=3, part_rows=3), 0)
    assert part.add([row(), row(), row()], arrays) == 1
    assert part.arrow()["error"].to_pylist() == [None, "output 'a' is not finite", None]


def test_a_full_disk_leaves_finished_parts_and_no_halves(expensive, small_bundle, pictures):
    script = (
        "mount -t tmpfs -o size=600k tmpfs /mnt && "
        '"$@"; echo status $?; ls -A /mnt/table; dd if=/dev/zero of=/mnt/x bs=1k count=1'
    )
    words = [pictures, "--bundle", small_bundle, "--output", "/mnt/table"]
    words += ["--outputs", "backbone_patches", "mae_patches", "cls_patches", "--part-rows", 3]
    command = [sys.executable, "-m", "serve.embed", *map(str, words)]
    try:
        probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if subprocess.run(probe, capture_output=True).returncode:
            pytest.skip("this user may not mount file systems")
    except FileNotFoundError:
        pytest.skip("no unshare command")
    inside = ["unshare", "--mount", "/bin/sh", "-c", script, "x", *command]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=120)
    assert "status 2" in done.stdout, done.stdout + done.stderr
    assert "No space left on device (free some space, then run the same command" in done.stderr
    left = done.stdout.partition("status 2")[2].split()
    assert MANIFEST in left and all(re.fullmatch(r"part-\d+\.parquet", n) for n in left[1:])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_processes_of_ray_make_the_same_table(small_bundle, pictures, tabled, tmp_path):
    pytest.importorskip("ray")
    output = tmp_path / "table"
    command = [sys.executable, "-m", "serve.embed", str(pictures), "--bundle", str(small_bundle)]
    command += ["--outputs", *OUTPUTS, "--output", str(output), "--part-rows", "3"]
    command += ["--threads", "1", "--ray", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "14 rows in 5 parts, 2 with an error" in done.stdout
    made, expected = (parquet.read_table(folder) for folder in (output, tabled))
    for name in ("id", "uri", "width", "height", "error"):
        assert made[name].equals(expected[name])
    for name in OUTPUTS:
        both = (array(table, name) for table in (made, expected))
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-5)
