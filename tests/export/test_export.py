"""`python -m export.run` and `export.check`: graphs that say what the student says, and bundles
that are whole or absent.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save_file
from yaml import safe_dump

from contract.golden import GOLDEN, read_golden
from contract.gpu import compute_capabilities
from contract.manifest import add_files, read_manifest
from distill.runs import load_run
from export.bundle_files import verify_files
from export.check import main as check
from export.run import main
from tests.conftest import long_case, run_here, small_recipe


def call(command, *arguments: object) -> subprocess.CompletedProcess:
    """Run a command's main in this process."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = command([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def vit(small_bundle) -> Path:
    """A UMT run of a ViT with trained task heads, the segmentation one reading the dino head."""
    return small_bundle.parent / "run"


@pytest.fixture(scope="module")
def cnn(photo_folder, tmp_path_factory) -> Path:
    """A UMT run of a CNN and two teachers."""
    student = {"name": "resnet10t", "kwargs": {}, "drop_path": 0.0}
    umt = {"space_dim": 32, "token_dim": 32, "groups": 8}
    recipe = small_recipe(photo_folder, student=student, umt=umt, train={"steps": 2})
    recipe["teachers"] = recipe["teachers"][::2]
    folder = tmp_path_factory.mktemp("cnn")
    (folder / "recipe.yaml").write_text(safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def plain(plain_run) -> Path:
    return plain_run


@pytest.fixture(scope="module")
def bundle(expensive, vit, tmp_path_factory) -> Path:
    """The ViT run exported for varying sizes."""
    folder = tmp_path_factory.mktemp("bundles") / "vit"
    done = call(
        main, vit, "--output", folder, "--resolutions", 64, "96x64", "32x128", "--max-batch", 4
    )
    assert done.returncode == 0, done.stderr
    return folder


def sessions(bundle: Path) -> dict[str, onnxruntime.InferenceSession]:
    return {path.stem: onnxruntime.InferenceSession(str(path)) for path in bundle.glob("*.onnx")}


def test_a_bundle_has_every_graph_and_says_what_each_gives(bundle):
    manifest = read_manifest(bundle)
    assert [graph.name for graph in manifest.graphs] == [
        "backbone",
        "interaction",
        "head_cls",
        "head_mae",
        "head_dino",
        "classification",
        "segmentation",
        "depth",
        "fused",
    ]
    outputs = {graph.name: [t.name for t in graph.outputs] for graph in manifest.graphs}
    assert outputs["backbone"] == [
        "backbone_global",
        "backbone_patches",
        "features",
        "features_global",
    ]
    assert outputs["head_dino"] == ["dino_token", "dino_patches"]
    image = manifest.graph("backbone").inputs[0]
    assert (image.name, image.dtype, image.shape) == (
        "image",
        "uint8",
        ("batch", "height", "width", 3),
    )
    assert manifest.graph("segmentation").about["classes"][0] == "wall"
    assert manifest.graph("depth").about["unit"] == "metre"
    assert manifest.student.method == "umt" and manifest.student.stride == 16
    assert [(t.label, t.role) for t in manifest.teachers][1] == ("mae", "mae")
    assert manifest.resolution.dynamic and (64, 64) in manifest.resolution.checked
    assert all(row.passed and row.cosine > 0.99999 for row in manifest.parity)
    assert {row.batch for row in manifest.parity} == {1, 3, 4}
    # as many positions in another aspect ratio: what a constant position embedding gets wrong; and
    # the largest
    assert {(32, 128), (96, 128)} < {(row.height, row.width) for row in manifest.parity}
    size = manifest.resolution
    assert (size.min_height, size.height, size.min_width, size.width) == (32, 96, 64, 128)


def test_graphs_in_a_row_say_what_the_deployed_student_says(bundle, vit):
    deployment = load_run(vit).method.deploy()
    found = sessions(bundle)
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 48, 3), dtype=np.uint8)
    with torch.inference_mode():
        wanted = deployment(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255)
    summary, patches, features, features_global = found["backbone"].run(None, {"image": image})
    np.testing.assert_allclose(summary, wanted["backbone"].token, atol=1e-5)
    (spaces,) = found["interaction"].run(
        None, {"features": features, "features_global": features_global}
    )
    for label in ("cls", "mae", "dino"):
        token, flat = found[f"head_{label}"].run(None, {"spaces": spaces})
        np.testing.assert_allclose(token, wanted[label].token, atol=1e-4)
        np.testing.assert_allclose(flat, wanted[label].patches.flatten(1, 2), atol=1e-3, rtol=1e-4)
    fused = dict(
        zip(
            [o.name for o in found["fused"].get_outputs()],
            found["fused"].run(None, {"image": image}),
            strict=True,
        )
    )
    (logits,) = found["segmentation"].run(None, {"spaces": spaces})
    np.testing.assert_allclose(fused["segmentation_logits"], logits, atol=1e-4)
    assert logits.shape == (3, 6 * 3, 7) and fused["depth"].shape == (3, 6 * 3)
    assert (fused["depth"] > 0).all()


def test_graphs_carry_nothing_of_this_machine(bundle):
    for path in bundle.glob("*.onnx"):
        data = path.read_bytes()
        assert (
            b"site-packages" not in data and str(Path(__file__).parent.parent).encode() not in data
        )
        model = onnx.load(path)
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert {p.key for p in model.metadata_props} >= {
            "method",
            "student",
            "licences",
            "precision",
        }
        assert not any(n.op_type == "Resize" for n in model.graph.node)


def sign_keys(folder: Path) -> tuple[Path, Path]:
    """A private and its public key, as files."""
    private = Ed25519PrivateKey.generate()
    plain = serialization.NoEncryption()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(private.private_bytes(pem, pkcs8, plain))
    (folder / "public.pem").write_bytes(private.public_key().public_bytes(pem, spki))
    return folder / "key.pem", folder / "public.pem"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "precision"),
    [long_case("cnn", "fp32"), ("plain", "fp32"), ("vit", "fp16"), long_case("cnn", "bf16")],
)
def test_students_of_every_kind_pass_parity(student, precision, request, tmp_path):
    run = request.getfixturevalue(student)
    key, public = sign_keys(tmp_path)
    wanted = ("--precision", precision, "--max-batch", 4, "--sign", key)
    done = call(main, run, "--output", tmp_path / "b", *wanted)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "b")
    assert manifest.precision == precision and not manifest.resolution.dynamic
    assert ("interaction" in [g.name for g in manifest.graphs]) == (student != "plain")
    types = {t.data_type for t in onnx.load(tmp_path / "b" / "backbone.onnx").graph.initializer}
    wanted = {
        "fp32": onnx.TensorProto.FLOAT,
        "fp16": onnx.TensorProto.FLOAT16,
        "bf16": onnx.TensorProto.BFLOAT16,
    }
    assert wanted[precision] in types
    assert call(check, tmp_path / "b", "--trust", public).returncode == 0


@pytest.mark.slow
def test_rtx_engines_of_every_graph_are_built_for_gpus_that_are_not_here(cnn, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="the optional extra [tensorrt-rtx] is not installed")
    wanted = (
        "--formats",
        "onnx,tensorrt-rtx",
        "--compute-capability",
        "8.6",
        "8.9",
        "12.0",
        "--max-batch",
        3,
    )
    done = call(main, cnn, "--output", tmp_path / "b", "--resolutions", 64, "96x64", *wanted)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "b")
    assert [entry.graph for entry in manifest.engines] == [graph.name for graph in manifest.graphs]
    backbone = manifest.engines[0]
    assert backbone.compute_capabilities == ("8.6", "8.9", "12.0")
    assert backbone.inputs[0].shape == (-1, -1, -1, 3)
    ranges = backbone.profiles[0].shapes["image"]
    assert ranges == ((1, 64, 64, 3), (3, 64, 64, 3), (3, 96, 64, 3)), "smallest, usual, largest"
    assert backbone.options.tf32 is False, "a float32 engine says what the float32 student says"
    if not compute_capabilities():
        assert (
            "tensorrt-rtx engines were not run: built for GPUs of compute capability 8.6, 8.9, 12.0"
            in done.stdout
        )
        assert {row.runtime for row in manifest.parity} == {"onnxruntime-cpu"}
        (checked,) = {manifest.resolution.checked}
        assert all(64 <= height <= 96 and width == 64 for height, width in checked), (
            "sizes that engines refuse"
        )
    assert call(check, tmp_path / "b").returncode == 0
    engine = tmp_path / "b" / backbone.file
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    found = call(check, tmp_path / "b")
    assert found.returncode == 1 and "sha256" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vit", "cnn"])
def test_int8_is_calibrated_and_the_same_alone_as_in_a_batch(
    student, photo_folder, tmp_path, request
):
    run = request.getfixturevalue(student)
    done = call(
        main,
        run,
        "--output",
        tmp_path / "b",
        "--precision",
        "int8",
        "--max-batch",
        4,
        "--calibration",
        photo_folder,
        "--images",
        photo_folder,
    )
    assert done.returncode == 0, done.stderr
    model = onnx.load(tmp_path / "b" / "backbone.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert onnx.TensorProto.INT32 not in {
        t.data_type for t in model.graph.initializer if t.name.endswith("bias_quantized")
    }
    fused = sessions(tmp_path / "b")["fused"]
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    together = fused.run(None, {"image": images})
    for row in range(4):
        alone = fused.run(None, {"image": images[row : row + 1]})
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[row], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_outputs_that_do_not_agree_fail_and_leave_nothing_unless_allowed(plain, tmp_path):
    """A head that says numbers beyond float16's range says infinity in fp16."""
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    change_weights(
        run / "student.safetensors",
        lambda name, w: w * 1e7 if name == "heads.mae.token.3.weight" else w,
    )
    wanted = (run, "--precision", "fp16", "--max-batch", 2, "--output", tmp_path / "b")
    done = call(main, *wanted)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and all(
        w in done.stderr for w in ("'mae_token'", "cosine", "picture", "fp16")
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"], (
        "no half bundle, and nothing aside"
    )
    assert call(main, *wanted, "--allow-parity-failure").returncode == 0
    failed = {row.output for row in read_manifest(tmp_path / "b").parity if not row.passed}
    assert failed == {"mae_token"}
    golden = read_golden(tmp_path / "b" / GOLDEN)
    assert golden.allowed == {"mae_token": (-1.0, 1.5e6)}, "a rollout knows what to expect"
    found = call(check, tmp_path / "b")
    assert found.returncode == 1 and "comparisons failed" in found.stdout


def change_weights(path: Path, change) -> None:
    """Rewrite a student's weights with its hashes in order."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from distill.models.weights import tensors_sha256

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata=metadata | {"sha256": tensors_sha256(weights)})


@pytest.mark.slow
def test_two_exports_are_the_same_bytes(plain, tmp_path, traced_once, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", traced_once)  # torch's own, which traces every time
    hashes = []
    for name in ("a", "b"):
        assert call(main, plain, "--output", tmp_path / name, "--max-batch", 2).returncode == 0
        hashes.append(read_manifest(tmp_path / name).files)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["backbone.onnx", "head_mae.onnx", "manifest.json"])
def test_a_changed_byte_is_found(bundle, tmp_path, name):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    assert call(check, copy).returncode == 0
    data = bytearray((copy / name).read_bytes())
    place = data.index(b'"max_batch"') + 13 if name == "manifest.json" else len(data) // 2
    data[place] ^= 1
    (copy / name).write_bytes(data)
    assert call(check, copy).returncode != 0


def test_missing_and_foreign_files_are_found(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "head_cls.onnx").unlink()
    (copy / "extra.bin").write_bytes(b"x")
    problems = verify_files(copy, read_manifest(copy))
    assert problems["head_cls.onnx"] == "missing" and problems["extra.bin"] == "not in the manifest"
    assert call(check, copy).returncode == 1


def test_force_replaces_a_bundle_whole(bundle, plain, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    refused = call(main, plain, "--output", copy)
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert read_manifest(copy).student.method == "umt"
    assert call(main, plain, "--output", copy, "--force", "--max-batch", 2).returncode == 0
    assert (
        read_manifest(copy).student.method == "plain" and not (copy / "interaction.onnx").exists()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("NOWHERE",), "has no student.safetensors"),
        (
            ("RUN", "--resolutions", "70"),
            "70 is not a multiple of the student's stride 16: use 64 or 80",
        ),
        (("RUN", "--resolutions", "64x"), "write pixels"),
        (("RUN", "--max-batch", "0"), "--max-batch 0"),
        (("RUN", "--precision", "int8"), "add --calibration DIR"),
        (("RUN", "--precision", "int8", "--calibration", "nowhere"), "nowhere"),
        (("RUN", "--formats", "onnx,tensort"), "--formats tensort: known are"),
        (("RUN", "--images", "nowhere"), "nowhere"),
        (("RUN", "--formats", "tensorrt"), "tensorrt"),
        (("RUN", "--formats", "tensorrt-rtx", "--compute-capability", "9.0"), "9.0"),
        (("RUN", "--compute-capability", "8.9"), "is for --formats tensorrt-rtx"),
        (("HALF",), "damaged or half-written"),
        (("UNKNOWN",), "is not a timm architecture"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(plain, tmp_path, arguments, words):
    run = Path(shutil.copytree(plain, tmp_path / "run"))
    student = run / "student.safetensors"
    if "HALF" in arguments:
        student.write_bytes(student.read_bytes()[:-100])
    if "UNKNOWN" in arguments:
        rename_student(student)
    stand_ins = {"RUN": run, "HALF": run, "UNKNOWN": run, "NOWHERE": tmp_path}
    done = call(main, *(stand_ins.get(a, a) for a in arguments), "--output", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def rename_student(path: Path) -> None:
    """Make the file name a network that does not exist."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["recipe"] = metadata["recipe"].replace("vit_tiny_patch16_224", "vit_huge_patch99_224")
    save_file(load_file(path), path, metadata=metadata)


def test_check_of_no_bundle_is_one_line(tmp_path):
    done = call(check, tmp_path)
    assert done.returncode == 2 and "is not a bundle" in done.stderr
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    assert "format 99" in call(check, tmp_path).stderr


def test_files_added_later_are_in_the_manifest(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    save_file(
        {"embeddings": np.ones((1, 8), np.float32)},
        copy / "class_embeddings.safetensors",
        {"classes": '["cat"]'},
    )
    assert call(check, copy).returncode == 1
    add_files(copy, ["class_embeddings.safetensors"])
    assert call(check, copy).returncode == 0
    add_files(tmp_path, ["nothing"])  # no bundle: nothing to do


@pytest.mark.parametrize("module", ["export.run", "export.check", "export.bench"])
def test_help_shows_examples(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"python -m {module} " in done.stdout
