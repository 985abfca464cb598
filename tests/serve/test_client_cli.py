"""`python -m serve.client`: what it writes and prints, and one line for every mistake."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from contract.views import UNSEEN
from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.client.__main__ import main, task_names
from serve.client.commands import _describe
from serve.client.pictures import NOTHING_SEEN, scalar_figure
from serve.client.tasks.depth import estimate_depth
from serve.client.tasks.maps import TaskMap
from serve.client.tasks.segmentation import segment
from serve.server.front import FrontOptions
from serve.server.front_process import Front


@pytest.fixture
def pictures(tmp_path):
    """Two photographs of one name in two folders."""
    paths = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "cat.v1.jpg")
        PackagedPhotos().load(number).convert("RGB").resize((90, 60)).save(paths[-1])
    return paths


def run(capsys, *arguments):
    """Exit status, and what was printed and complained."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_features_are_written_with_their_meaning_and_pictures(server, pictures, tmp_path, capsys):
    status, said, _ = run(capsys, *pictures, "--url", server.grpc, "--output", tmp_path / "out")
    assert status == 0, said
    with FeatureClient(server.grpc) as client:
        expected = client.features(pictures)
    with np.load(tmp_path / "out" / "features.npz") as found:
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)
        assert found["images"].tolist() == [str(path) for path in pictures]
        assert found["size"].tolist() == [64, 64] and json.loads(str(found["grids"]))[
            "mae_patches"
        ] == [4, 4]
    for name in ("cat.v1_features.png", "cat.v1_2_features.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 3 * picture.height
        assert f"wrote     {tmp_path / 'out' / name}" in said
    assert re.search(
        r"next      python -m serve.client .* --task segmentation --output .* --url", said
    )


def test_a_choice_of_outputs_as_safetensors(server, pictures, tmp_path, capsys):
    status, said, _ = run(
        capsys,
        *pictures,
        "--url",
        server.grpc,
        "--outputs",
        "mae_token",
        "depth",
        "--format",
        "safetensors",
        "--encoded",
        "--partial",
        "--output",
        tmp_path / "out",
        "--shm",
        "--admin-key",
        server.admin_key,
    )
    assert status == 0, said
    with safe_open(tmp_path / "out" / "features.safetensors", "np") as file:
        assert set(file.keys()) == {"mae_token", "depth"}
        assert json.loads(file.metadata()["images"]) == [str(path) for path in pictures]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "features.safetensors"
    ]  # no maps, no pictures


@pytest.mark.parametrize("side", ["server", "client"])
def test_segmentation_and_depth_are_written_from_either_side(
    server, pictures, tmp_path, capsys, side
):
    out = tmp_path / "out"
    for task in ("segmentation", "depth"):
        status, said, _ = run(
            capsys, *pictures, "--url", server.grpc, "--task", task, "--side", side, "--output", out
        )
        assert status == 0, said
        assert f"{pictures[0].name}: " in said and "next      python -m serve.client" in said
    with FeatureClient(server.grpc) as client:
        classes, depth = segment(client, pictures), estimate_depth(client, pictures)
    with np.load(out / "segmentation.npz") as found:
        assert (found["class_map"] != classes.class_map).mean() < 1e-3
        assert tuple(found["classes"].tolist()) == classes.classes
        assert np.array_equal(
            np.asarray(Image.open(out / "cat.v1_classes.png")), found["class_map"][0]
        )
    with np.load(out / "depth.npz") as found:
        assert found["depth"].shape == (2, 60, 90), "of the pictures' own size"
        np.testing.assert_allclose(found["depth"], depth.depth, rtol=1e-4, atol=1e-5)
        assert str(found["unit"]) == "metre"
    names = {
        f"cat.v1{n}_{what}.png" for n in ("", "_2") for what in ("classes", "segmentation", "depth")
    }
    assert names <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--outputs", "mae_tokens"], "did you mean 'mae_token'"),
        (["--task", "depth", "--outputs", "depth"], "--outputs is for --task features"),
        (["--task", "depth", "--encoded"], "--side client"),
        (["--task", "zero-shot"], "export.text"),
        (["--task", "zero-shot", "--side", "client"], "--embeddings FILE go together"),
        (["--size", "64"], "448x336"),
        (["--size", "128x128"], "64x64 only"),
        (["--timeout", "0"], "--timeout 0"),
        (["--retries", "-1"], "--retries -1"),
        (["--shm"], "--admin-key"),
        (["--shm", "cuda"], "cuda"),
        (["--ssl-root", "nowhere.pem"], "nowhere.pem"),
        (["--ssl"], "does not answer in TLS"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(server, pictures, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    status, _, complaint = run(
        capsys, pictures[0], *arguments, "--url", server.grpc, "--output", out
    )
    assert status == 2 and said in complaint
    assert len(complaint.strip().splitlines()) == 1 and not out.exists()


def photographs(folder, count):
    """So many small photographs; returns their paths."""
    folder.mkdir()
    photos = PackagedPhotos()
    paths = [folder / f"{number:02d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        photos.load(number % len(photos)).convert("RGB").resize((40, 30)).save(path)
    return paths


def bad_lines(complaint):
    """What was listed, by file."""
    lines = [line for line in complaint.splitlines() if line.startswith("bad ")]
    return {line.split()[1].removesuffix(":"): line for line in lines}


@pytest.mark.parametrize("sent", [[], ["--encoded"]])
def test_bad_pictures_among_many_are_listed_and_the_others_answered(server, tmp_path, capsys, sent):
    """More than are asked about at once: 20, and 16 are 4 requests of 4."""
    paths = photographs(tmp_path / "photos", 20)
    paths[1].write_bytes(b"no picture")
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    paths[17].write_bytes(b"")
    paths[19].unlink()
    bad = [paths[n] for n in (1, 3, 17, 19)]
    good = [path for path in paths if path not in bad]
    outputs = ("--outputs", "mae_token", "--output", tmp_path / "out")
    status, said, complaint = run(capsys, *paths, "--url", server.grpc, *outputs, *sent)
    assert status == 3, complaint
    listed = bad_lines(complaint)
    assert list(listed) == [str(path) for path in bad] and complaint.count("\n") == 4
    assert "not a JPEG" in listed[str(paths[1])] and "0 bytes" in listed[str(paths[17])]
    assert "No such file" in listed[str(paths[19])]
    assert "answered  16 of 20 pictures, 4 of the others cannot be read" in said
    with FeatureClient(server.grpc) as client:
        wanted = client.features(good, ["mae_token"], encoded=bool(sent))["mae_token"]
    with np.load(tmp_path / "out" / "features.npz") as found:
        assert found["images"].tolist() == [str(path) for path in good]
        np.testing.assert_allclose(found["mae_token"], wanted, rtol=1e-4, atol=1e-5)


def test_a_folder_is_the_pictures_in_it(server, tmp_path, capsys):
    """Hidden files, other files and links as everywhere; a bad one changes nobody's name."""
    top, out = tmp_path / "photos", tmp_path / "out"
    first = photographs(top, 1)[0]
    first.rename(top / "cat.jpg")
    for name in ("a/cat.jpg", "b/cat.png", ".hidden.jpg", ".ipynb_checkpoints/cat.jpg"):
        (top / name).parent.mkdir(exist_ok=True)
        Image.open(top / "cat.jpg").save(top / name)
    (top / "a" / "cat.jpg").write_bytes(b"no picture")
    (top / "notes.txt").write_text("mine")
    (top / "again").symlink_to(top)
    (top / "link.png").symlink_to(top / "b" / "cat.png")
    (top / "gone.jpg").symlink_to(top / "nowhere")
    status, said, complaint = run(
        capsys, top, "--url", server.grpc, "--task", "depth", "--output", out
    )
    assert status == 3, complaint
    assert list(bad_lines(complaint)) == [str(top / "a" / "cat.jpg"), str(top / "gone.jpg")]
    with np.load(out / "depth.npz") as found:
        names = [str(top / name) for name in ("b/cat.png", "cat.jpg", "link.png")]
        assert found["images"].tolist() == names and len(found["depth"]) == 3
    written = {path.name for path in out.iterdir()}
    assert written == {"depth.npz", "cat_2_depth.png", "cat_3_depth.png", "link_depth.png"}
    (tmp_path / "empty").mkdir()
    status, _, complaint = run(capsys, tmp_path / "empty", top, "--url", server.grpc)
    assert status == 2 and "empty has no pictures in it" in complaint


def test_where_every_picture_is_bad_nothing_is_written(server, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    for path in pictures:
        path.write_bytes(b"no picture")
    status, _, complaint = run(capsys, *pictures, "--url", server.grpc, "--output", out)
    assert status == 2 and not out.exists()
    assert list(bad_lines(complaint)) == [str(path) for path in pictures]
    assert "error: none of the 2 pictures can be read" in complaint
    status, _, complaint = run(capsys, pictures[0], "--url", server.grpc, "--output", out)
    assert status == 2 and f"error: {pictures[0]}: the bytes are not a JPEG" in complaint


def test_what_was_answered_is_kept_when_the_server_breaks_off(
    server, tmp_path, capsys, monkeypatch
):
    """The front that clients reach ends once the first picture is written."""
    monkeypatch.setattr("serve.client.commands._group_size", lambda client, count: 4)
    paths, out = photographs(tmp_path / "photos", 6), tmp_path / "out"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{found.getsockname()[1]}"
    front = Front(FrontOptions(url, server.grpc, exit_seconds=1), lambda line: None)
    front.start()
    ended = threading.Event()

    def end():
        while not list(out.glob("*_depth.png")) and not ended.wait(0.01):
            pass
        front.stop()

    watcher = threading.Thread(target=end)
    watcher.start()
    try:
        status, said, complaint = run(
            capsys, *paths, "--url", url, "--task", "depth", "--output", out, "--retries", 0
        )
    finally:
        ended.set()
        watcher.join()
    assert status == 1 and "answered  4 of 6 pictures" in said, complaint
    assert complaint.startswith("error: ") and url in complaint and complaint.count("\n") == 1
    with np.load(out / "depth.npz") as found:
        assert found["images"].tolist() == [str(path) for path in paths[:4]]
    assert len(list(out.glob("*_depth.png"))) == 4


def test_no_server_is_said_with_the_command_that_starts_one(pictures, capsys):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{found.getsockname()[1]}"
    for address in (url, "no-such-host.invalid:8001"):
        status, _, complaint = run(capsys, pictures[0], "--url", address, "--retries", "1")
        assert status == 1 and len(complaint.strip().splitlines()) == 1
        assert address in complaint and "python -m serve.run BUNDLE" in complaint


def test_help_has_examples_of_every_task_and_loads_neither_torch_nor_training():
    code = (
        "import sys; from serve.client.__main__ import main\ntry: main(['--help'])\nfinally: "
        "assert not {'torch', 'distill', 'export', 'matplotlib'} & set(sys.modules), 'slow'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (
        all(f"--task {task}" in done.stdout for task in task_names()[1:])
        and "examples:" in done.stdout
    )


@pytest.mark.slow
def test_the_module_is_the_command(server, pictures, tmp_path):
    command = [
        sys.executable,
        "-m",
        "serve.client",
        str(pictures[0]),
        "--url",
        server.grpc,
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([*command, "--task", "depth"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "o" / "cat.v1_depth.png").exists(), done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("kind", ["classes", "scalar", "vector"])
def test_a_map_of_which_nothing_was_seen_is_said_as_such(kind):
    task = SimpleNamespace(map=SimpleNamespace(kind=kind))
    values = np.full((2, 2), UNSEEN) if kind == "classes" else np.full((2, 2), np.nan)
    answer = TaskMap(task, (values,), ("cat",), "metres")
    assert _describe(answer, 0) == NOTHING_SEEN
    if kind == "scalar":
        figure = scalar_figure(Image.new("RGB", (2, 2)), values, "metre")
        assert figure.axes[1].get_title() == NOTHING_SEEN
