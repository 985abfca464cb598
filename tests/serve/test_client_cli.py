"""`python -m serve.client`: what it writes and prints, and one line for every mistake."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from distill.data.pictures import PackagedPhotos
from serve.client import FeatureClient
from serve.client.__main__ import main, task_names
from serve.client.tasks.depth import estimate_depth
from serve.client.tasks.segmentation import segment


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
        (["nowhere.jpg"], "nowhere.jpg: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(server, pictures, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    status, _, complaint = run(
        capsys, pictures[0], *arguments, "--url", server.grpc, "--output", out
    )
    assert status == 2 and said in complaint
    assert len(complaint.strip().splitlines()) == 1 and not out.exists()


def test_a_picture_that_is_none_is_named(server, pictures, capsys):
    pictures[1].write_bytes(b"no picture")
    status, _, complaint = run(capsys, *pictures, "--url", server.grpc, "--task", "segmentation")
    assert status == 2 and f"error: {pictures[1]}: the bytes are not a JPEG" in complaint


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
