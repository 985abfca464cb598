"""A bundle replaces only what it may, appears whole or not at all however its export ends, and no
change to it goes unseen.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from contract import files
from contract.bundle_check import graph_problem
from contract.errors import UserError, exit_status
from contract.files import file_sha256
from contract.gpu import compute_capabilities
from contract.manifest import MANIFEST, add_files, read_manifest
from export.bundle_files import verify_files
from export.check import main as check
from export.output import appearing, check_output
from export.run import main as export
from serve.bundle import read_bundle
from tests.conftest import run_here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(small_bundle, tmp_path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


@pytest.fixture
def run(small_bundle, tmp_path) -> Path:
    """A run folder of one's own."""
    return Path(shutil.copytree(small_bundle.parent / "run", tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: the bytes of files, nothing of folders."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
    }


def refused(*arguments: object, status: int = 2) -> str:
    """The one line in which an export is refused."""
    done = run_here(*arguments, command=export)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr
    assert "graph " not in done.stdout, "refused before graphs are made"
    return done.stderr


def make(output: Path, force: bool = False, content: str = "new") -> Path:
    """What an export does to its output, with one file for a bundle."""
    place = check_output(output, force, {})
    with appearing(output, place, force) as aside:
        (aside / "graph.onnx").write_text(content)
        files = {"graph.onnx": file_sha256(aside / "graph.onnx")}
        (aside / MANIFEST).write_text(json.dumps({"files": files, "seal": "x"}))
    return place


# --- what may be replaced


def test_force_replaces_no_folder_with_anything_but_a_bundle(copy, run, tmp_path):
    (copy / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    said = refused(run, "--output", copy, "--force")
    assert "holds thesis.txt, which is not part of a bundle" in said
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / MANIFEST).write_text('{"name": "a web page"}')
    assert f"holds {MANIFEST}, which is not part" in refused(run, "--output", photos, "--force")
    shutil.rmtree(photos)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("where", ["run", ".", "run/heads"])
def test_force_replaces_nothing_that_is_read(run, tmp_path, where):
    before = tree(tmp_path)
    said = refused(run, "--output", tmp_path / where, "--force")
    assert "which is read" in said or "not part of a bundle" in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--images", "--calibration", "--timing-cache"])
def test_an_output_above_what_is_read_is_refused(tmp_path, option):
    inside = tmp_path / "out" / "photos"
    inside.mkdir(parents=True)
    with pytest.raises(UserError, match=f"holds {option} "):
        check_output(tmp_path / "out", True, {option: inside})
    with pytest.raises(UserError, match=f"is {option} "):
        check_output(inside / ".." / "photos", True, {option: inside})
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match=f"holds {option} "):
        check_output(tmp_path / "link", True, {option: inside})
    assert check_output(inside / "bundle", True, {option: inside}) == inside / "bundle", (
        "inside one is fine"
    )


def test_the_current_and_the_home_folder_stay(copy, monkeypatch):
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="is or holds the current folder"):
        check_output(copy, True, {})
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy / "me"))
    with pytest.raises(UserError, match="is or holds the home folder"):
        check_output(copy, True, {})
    os.mkfifo(copy.parent / f".{copy.name}.1.tmp")  # a killed export's would have such a name
    monkeypatch.setenv("HOME", "/")
    assert check_output(copy, True, {}) == copy


def test_force_replaces_bundles_of_other_formats_and_damaged_ones_and_empty_folders(copy, tmp_path):
    content = json.loads((copy / MANIFEST).read_text()) | {"format": 1}
    (copy / MANIFEST).write_text(json.dumps(content))
    (copy / "backbone.onnx").write_bytes(b"damaged")
    make(copy, force=True)
    (tmp_path / "empty").mkdir()
    for place in (copy, make(tmp_path / "empty"), make(tmp_path / "new" / "deep", force=True)):
        assert sorted(tree(place)) == ["graph.onnx", MANIFEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "empty", "new"]


def test_a_listed_name_that_is_a_link_or_folder_is_not_deleted(tmp_path):
    make(tmp_path / "b")
    (tmp_path / "b" / "graph.onnx").unlink()
    (tmp_path / "b" / "graph.onnx").mkdir()
    (tmp_path / "b" / "graph.onnx" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not part of a bundle"):
        make(tmp_path / "b", force=True)
    assert (tmp_path / "b" / "graph.onnx" / "thesis.txt").exists()


def test_a_link_is_followed_and_stays(tmp_path):
    make(tmp_path / "real", content="old")
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "real" / "graph.onnx"
    ).read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="choose another"):
        make(tmp_path / "loop", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop", "real"]


def test_what_an_export_replaces_is_looked_at_again_at_the_end(tmp_path):
    """Two exports at once: the later one says so."""
    for force, wanted in ((False, "filled by somebody else meanwhile"), (True, "holds thesis.txt")):
        place = tmp_path / str(force)
        with pytest.raises(UserError, match=wanted), appearing(place, place, force):
            place.mkdir()
            (place / "thesis.txt").write_text("mine")
        assert [path.name for path in place.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True"]


def test_a_rename_that_fails_is_one_line_and_leaves_the_old_bundle(tmp_path, monkeypatch):
    make(tmp_path / "new" / "b", content="old")

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(UserError, match=r"cannot be put in place \(Device or resource busy\)"):
        make(tmp_path / "new" / "b", force=True)
    with pytest.raises(UserError, match="cannot be put in place"):
        make(tmp_path / "other" / "deep" / "b")
    assert (tmp_path / "new" / "b" / "graph.onnx").read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "graph.onnx", MANIFEST, "new"]


# --- however it ends


@pytest.mark.parametrize("atomic", [True, False])
def test_there_is_a_bundle_at_every_moment_of_its_replacement(tmp_path, monkeypatch, atomic):
    """Where the file system exchanges; elsewhere the old one is beside it, and taken back."""
    if not atomic:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    make(tmp_path / "b", content="old")
    seen, rename = [], os.rename
    monkeypatch.setattr(
        os, "rename", lambda *names: (rename(*names), seen.append((tmp_path / "b").exists()))
    )
    make(tmp_path / "b", force=True)
    if atomic:
        assert seen == [], "exchanged in one step"
    else:
        assert seen == [False, True]
    assert (tmp_path / "b" / "graph.onnx").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


EXPORT = """
import json, os, signal, sys, time
from pathlib import Path
from contract import files
from contract.errors import exit_status
from export import output

def export():
    place = Path(sys.argv[1])
    with output.appearing(place, place, True) as aside:
        (aside / "manifest.json").write_text('{"files": {}, "seal": "x"}')
        HERE
"""
"""What an export does to its output, without the seconds that importing torch takes."""


def start(here: str, place: Path, before: str = "") -> subprocess.Popen:
    """Start an export that does `here` inside and `before` before."""
    code = EXPORT.replace("HERE", here) + before + "\nsys.exit(exit_status(export))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(place)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


KILLED = """
files._exchange = lambda *_: False
rename = os.rename
def killed(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = killed
"""


def test_a_bundle_whose_replacement_was_killed_between_renames_is_taken_back(tmp_path):
    place = tmp_path / "b"
    make(place, content="old")
    process = start("pass", place, before=KILLED)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not place.exists()
    with pytest.raises(UserError, match="already holds files"):
        check_output(place, False, {})
    assert (place / "graph.onnx").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["b"], (
        "and what the killed export had made is gone"
    )


def test_what_dead_exports_left_is_swept_and_what_others_do_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = (
        f".b.{dead.pid}.tmp",
        ".b.old",
        f".b.{os.getppid()}.tmp",
        f".c.{dead.pid}.tmp",
        ".b.x.tmp",
    )
    for name in names:
        make(tmp_path / "b", force=True)
        shutil.copytree(tmp_path / "b", tmp_path / name)
    check_output(tmp_path / "b", True, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*names[2:], "b"))


def test_an_export_in_another_container_is_left_alone(tmp_path):
    """There, the process id is another's, or one's own."""
    aside = tmp_path / f".b.{os.getpid()}.tmp"
    aside.mkdir()
    held = files._hold(aside)
    check_output(tmp_path / "b", False, {})
    assert aside.exists()
    os.close(held)
    check_output(tmp_path / "b", False, {})
    assert not aside.exists()


def stop(process: subprocess.Popen, number: int, folder: Path) -> tuple[int, str]:
    """Send a signal as soon as there is something aside in a folder; returns status and standard
    error.
    """
    deadline = time.monotonic() + 200
    while (
        not list(folder.glob(".b.*.tmp")) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_export_says_so_and_leaves_nothing(tmp_path, number, status):
    place = tmp_path / "new" / "deep" / "b"
    process = start("time.sleep(60)", place)
    assert stop(process, number, place.parent) == (status, "stopped\n")
    assert list(tmp_path.iterdir()) == [], "the folders made for it are gone too"


@pytest.mark.slow
def test_an_export_that_is_stopped_while_it_works_leaves_nothing(small_bundle, tmp_path):
    command = [
        sys.executable,
        "-m",
        "export.run",
        str(small_bundle.parent / "run"),
        "--output",
        str(tmp_path / "b"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet
    )
    assert stop(process, signal.SIGTERM, tmp_path) == (143, "stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_nohup_keeps_an_export_going(tmp_path):
    here = "os.kill(os.getpid(), signal.SIGHUP)"
    process = start(here, tmp_path / "b", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert (tmp_path / "b" / MANIFEST).exists()


def test_ctrl_c_is_one_line_and_130(capsys):
    def command() -> int:
        raise KeyboardInterrupt

    assert exit_status(command) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_who_has_seen_enough_ends_a_command_without_a_word(lines):
    code = (
        "import sys; from contract.errors import exit_status; sys.exit(exit_status(lambda: "
        f"print('x\\n' * {lines})))"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer), os.close(reader)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 128 + signal.SIGPIPE


def test_files_are_on_the_disk_before_the_bundle_has_its_name(tmp_path, monkeypatch):
    done, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    make(tmp_path / "b")
    assert {Path(name).name for name in done} >= {"graph.onnx", MANIFEST, tmp_path.name}
    assert done[-1] == str(tmp_path), "the folder's own names last"


# --- no change goes unseen


def test_every_flipped_bit_of_a_manifest_is_found(copy, monkeypatch):
    whole, places = (copy / MANIFEST).read_bytes(), random.Random(0)
    read_manifest(copy), read_bundle(copy)
    for _ in range(300):
        data = bytearray(whole)
        data[places.randrange(len(data))] ^= 1 << places.randrange(8)
        (copy / MANIFEST).write_bytes(data)
        with pytest.raises(UserError):
            read_manifest(copy)
        with pytest.raises(UserError):
            read_bundle(copy)


@pytest.mark.parametrize("change", ["end", "space", "tab", "escape", "order", "surrogate", "list"])
def test_a_manifest_that_says_the_same_in_other_bytes_is_refused(copy, change):
    text = (copy / MANIFEST).read_text()
    content = json.loads(text)
    changed = {
        "end": text + "\n",
        "space": text.replace('"max_batch": 4', '"max_batch":  4'),
        "tab": text.replace("\n ", "\n\t", 1),
        "escape": text.replace('"umt"', '"\\u0075mt"'),
        "order": json.dumps(dict(reversed(content.items())), indent=1),
        "surrogate": text.replace('"umt"', '"\\ud800"'),
        "list": "[]",
    }[change]
    assert changed != text
    (copy / MANIFEST).write_text(changed)
    with pytest.raises(UserError):
        read_manifest(copy)
    with pytest.raises(UserError):
        read_bundle(copy)


def replace_by_link(path: Path, elsewhere: Path) -> None:
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


CHANGES = {
    "backbone.onnx": lambda b, out: replace_by_link(b / "backbone.onnx", out / "elsewhere.onnx"),
    "link": lambda b, _: (b / "link").symlink_to(b / "backbone.onnx"),
    "dangling": lambda b, _: (b / "dangling").symlink_to("nowhere"),
    "folder-link": lambda b, out: (b / "folder-link").symlink_to(out),
    "pipe": lambda b, _: os.mkfifo(b / "pipe"),
    "empty": lambda b, _: (b / "empty").mkdir(),
    "deep/er": lambda b, _: (b / "deep" / "er").mkdir(parents=True),
    ".hidden": lambda b, _: (b / ".hidden").write_text(""),
    "[red]odd\udcff": lambda b, _: (b / "[red]odd\udcff").write_text(""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_does_not_belong_in_a_bundle_is_found(copy, tmp_path, name):
    CHANGES[name](copy, tmp_path)
    found = verify_files(copy, read_manifest(copy))
    assert name in {name for name, problem in found.items() if problem}
    done = run_here(copy, command=check)
    assert done.returncode == 1 and name.split("\udcff")[0] in done.stdout


def test_a_manifest_that_is_a_link_is_refused(copy, tmp_path):
    replace_by_link(copy / MANIFEST, tmp_path / "elsewhere.json")
    done = run_here(copy, command=check)
    assert done.returncode == 2 and f"{MANIFEST} is a link" in done.stderr


def test_a_listed_pipe_is_no_file_and_nobody_waits_for_it(copy):
    (copy / "backbone.onnx").unlink()
    os.mkfifo(copy / "backbone.onnx")
    assert verify_files(copy, read_manifest(copy))["backbone.onnx"] == "not a regular file"


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/hostname", "a/../b", "./a", "a//b", ".", "manifest.json"]
)
def test_names_that_lead_out_of_a_bundle_are_refused(copy, tmp_path, name):
    (tmp_path / "elsewhere").write_text("x")
    manifest = read_manifest(copy)
    changed = manifest.model_copy(
        update={"files": manifest.files | {name: file_sha256(tmp_path / "elsewhere")}}
    )
    (copy / MANIFEST).write_bytes(changed.sealed().to_bytes())
    with pytest.raises(UserError, match="is not the name of a file in a bundle"):
        read_manifest(copy)
    with pytest.raises(UserError):
        read_bundle(copy).file(name)


def test_serving_opens_no_links(copy, tmp_path):
    replace_by_link(copy / "backbone.onnx", tmp_path / "elsewhere.onnx")
    with pytest.raises(UserError, match="is a link"):
        read_bundle(copy).file("backbone.onnx")
    shutil.move(copy / "backbone.onnx", copy / "kept")


# --- what the manifest says


@pytest.mark.slow
def test_a_manifest_says_what_was_trained_and_what_graphs_compute_in(run, tmp_path):
    done = run_here(
        run, "--output", run / "bundle", "--precision", "fp16", "--max-batch", 4, command=export
    )
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(run / "bundle")
    assert manifest.student.trained_steps == 2
    dtypes = {graph.name: graph.dtypes for graph in manifest.graphs}
    assert "float16" in dtypes["backbone"] and "float16" not in dtypes["classification"]
    assert all(graph.precision == "fp16" for graph in manifest.graphs)
    for graph in manifest.graphs:
        kinds = {t.data_type for t in onnx.load(run / "bundle" / graph.file).graph.initializer}
        assert len(kinds) == len(graph.dtypes)
    wrong = tuple(
        g.model_copy(update={"dtypes": ("float16",)}) if g.name == "depth" else g
        for g in manifest.graphs
    )
    (run / "bundle" / MANIFEST).write_bytes(
        manifest.model_copy(update={"graphs": wrong}).sealed().to_bytes()
    )
    found = run_here(run / "bundle", command=check)
    assert found.returncode == 1 and "the manifest says float16" in found.stdout


def test_damaged_tensors_are_found_even_where_hashes_are_right(copy):
    with safe_open(copy / "golden.safetensors", framework="np") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in tensors if name != "image")
    for problem, changed in (
        ("lacks " + name, {k: v for k, v in tensors.items() if k != name}),
        ("not finite", tensors | {name: np.full_like(tensors[name], np.nan)}),
    ):
        save_file(changed, copy / "golden.safetensors", about)
        add_files(copy, ["golden.safetensors"])
        done = run_here(copy, command=check)
        assert done.returncode == 1 and problem in done.stdout
    (copy / "golden.safetensors").write_bytes(b"{}")
    save_file(
        {"embeddings": np.ones((3, 4), np.float32)},
        copy / "class_embeddings.safetensors",
        {"classes": '["a"]'},
    )
    add_files(copy, ["golden.safetensors", "class_embeddings.safetensors"])
    done = run_here(copy, command=check)
    assert "cannot be read" in done.stdout and "3 embeddings for 1 classes" in done.stdout


def test_a_text_encoder_is_opened_and_held_against_its_description(copy):
    shutil.copy(copy / "depth.onnx", copy / "text_encoder.onnx")
    (copy / "words.gz").write_bytes(b"words")
    depth = read_manifest(copy).graph("depth")
    special = {"token": "<start_of_text>", "id": 1}
    tokenizer = {"kind": "clip-bpe", "vocabulary_size": 600, "context_length": 77, "pad_id": 0}
    tokenizer |= {"pattern": "", "clean": "lower", "start": special, "end": special}
    about = {
        "format": 1,
        "text_weights_sha256": "0" * 64,
        "graph": {
            "file": "text_encoder.onnx",
            "sha256": file_sha256(copy / "depth.onnx"),
            "opset": depth.opset,
        },
        "tokenizer": tokenizer
        | {"vocabulary": {"file": "words.gz", "sha256": file_sha256(copy / "words.gz")}},
        "input": depth.inputs[0].model_dump(mode="json"),
        "output": depth.outputs[0].model_dump(mode="json"),
    }
    names = ["text_encoder.onnx", "words.gz", "text_encoder.json"]

    def said(about: dict) -> str:
        (copy / "text_encoder.json").write_text(json.dumps(about))
        add_files(copy, names)
        return run_here(copy, command=check).stdout

    assert "all checks passed" in said(about)
    assert "opset" in said(about | {"graph": about["graph"] | {"opset": 7}})
    assert "where text_encoder.json says" in said(about | {"output": about["input"]})
    assert "is not the one that" in said(about | {"graph": about["graph"] | {"sha256": "0" * 64}})
    assert "does not describe an encoder" in said({})
    replaced = about["graph"] | {"file": "model.py"}
    assert "does not describe an encoder" in said(about | {"graph": replaced})
    (copy / "text_encoder.onnx").write_bytes(b"no graph")
    graph = about["graph"] | {"sha256": file_sha256(copy / "text_encoder.onnx")}
    assert "not valid ONNX" in said(about | {"graph": graph})


def test_a_manifest_is_read_without_torch():
    code = "import sys, contract.manifest, export.check, export.run; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("where", ["input", "initializer"])
@pytest.mark.parametrize("number", [0, 99])
def test_a_type_that_onnx_does_not_have_is_told(copy, where, number):
    """The checker lets such a number pass where no node reads the tensor."""
    record = read_manifest(copy).graph("depth")
    model = onnx.load(copy / record.file)
    if where == "input":
        value = model.graph.input.add(name="more")
        value.CopyFrom(onnx.helper.make_tensor_value_info("more", number, ["batch", 2]))
    else:
        model.graph.initializer.add(name="more", data_type=number, dims=[1], raw_data=bytes(8))
    onnx.save(model, copy / record.file)
    add_files(copy, [record.file])
    said = graph_problem(copy, read_manifest(copy), record)
    assert any(word in said for word in (f"type {number}", f"type ({number})", "UNDEFINED"))


# --- the command line


RTX = ("--formats", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workspace", "1"), "--workspace is for TensorRT"),
        (("--optimization-level", "0"), "--optimization-level is for TensorRT"),
        (("--strip-weights",), "--strip-weights is for TensorRT"),
        (("--refit",), "--refit is for TensorRT"),
        (("--version-compatible",), "--version-compatible is for TensorRT"),
        (("--timing-cache", "c"), "--timing-cache is for TensorRT"),
        ((*RTX, "--timing-cache", "c"), "--timing-cache is for --formats tensorrt:"),
        ((*RTX, "--workspace", "-1"), "--workspace -1: give more than 0"),
        ((*RTX, "--workspace", "nan"), "--workspace nan: give more than 0"),
        ((*RTX, "--optimization-level", "6"), "--optimization-level 6"),
        (("--calibration", "packaged-photos"), "--calibration is for --precision int8"),
        (("--calibration-images", "64"), "--calibration-images is for --precision int8"),
        (("--calibration-method", "minmax"), "--calibration-method is for --precision int8"),
        (
            ("--precision", "int8", "--calibration", "nowhere"),
            "--calibration nowhere: no such folder",
        ),
        (("--images", "nowhere"), "--images nowhere: no such folder"),
        (("--images", __file__), "is a file"),
        (("--images", "EMPTY"), "--images"),
        (("--precision", "int8", "--calibration", "EMPTY"), "--calibration"),
    ],
)
def test_options_that_do_nothing_or_name_nothing_are_one_line(
    small_bundle, tmp_path, arguments, words
):
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "empty" if argument == "EMPTY" else argument for argument in arguments]
    said = refused(small_bundle.parent / "run", "--output", tmp_path / "b", *given)
    assert words in said and "data.path" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.skipif(bool(compute_capabilities()), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no compute capability named"),
        (("--compute-capability", "9.0"), "cannot build for compute capability 9.0"),
        (("--compute-capability", "8.9", "--refit"), "refit cannot be built without a GPU"),
        (
            ("--compute-capability", "8.9", "--strip-weights"),
            "strip_weights cannot be built without a GPU",
        ),
    ],
)
def test_what_engines_need_is_looked_at_before_graphs_are_made(
    small_bundle, tmp_path, options, words
):
    pytest.importorskip("tensorrt_rtx", reason="the optional extra [tensorrt-rtx] is not installed")
    assert words in refused(small_bundle.parent / "run", "--output", tmp_path / "b", *RTX, *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("run", "--output", "b", "--precision", "fp61"),
            "--precision: no such choice 'fp61': did you mean 'fp16'?",
        ),
        (
            ("run", "--output", "b", "--presicion", "fp16"),
            "--presicion: did you mean '--precision'?",
        ),
        (("run",), "--output"),
        (("run", "--output", "b", "--max-batch", "many"), "--max-batch: invalid int value: 'many'"),
        (("run", "more", "--output", "b"), "more: one argument too many"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        export(arguments)
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and said.startswith("error: ")
        and said.count("\n") == 1
        and words in said
    )


def test_help_explains_precision_and_calibration(capsys):
    with pytest.raises(SystemExit):
        export(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("weights and arithmetic", "ranges of activations", "rare outliers"):
        assert words in said
