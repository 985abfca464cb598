"""A new bundle takes over from the old one under load, without a failed request; what is not fit to
serve never does.
"""

import json
import shutil
import threading
import time

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpc
from onnx import numpy_helper

from contract.errors import UserError
from contract.files import file_sha256
from contract.golden import GOLDEN, read_golden
from contract.manifest import MANIFEST, read_manifest
from serve.bundle import Bundle, read_bundle
from serve.client import FeatureClient
from serve.repository.build import make_repository
from serve.repository.settings import Settings
from serve.repository.versions import Repository
from serve.rollout import main
from serve.server.process import Options, Server
from serve.server.triton import find_tritonserver
from tests.conftest import need_tritonserver

OUTPUTS = ["backbone_global", "cls_token", "segmentation_logits"]


def rewrite(bundle, **changes):
    """Seal a manifest anew after files were changed, as an export of them would have."""
    manifest = read_manifest(bundle)
    files = {name: file_sha256(bundle / name) for name in manifest.files}
    changed = manifest.model_copy(update={"files": files, **changes}).sealed()
    (bundle / MANIFEST).write_text(changed.model_dump_json(indent=1))


def disturb(graph, share):
    """Add noise to every matrix of a graph: it says something else, but stays a graph of the same
    interface.
    """
    model, rng = onnx.load(graph), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if len(tensor.dims) >= 2 and tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            noise = share * values.std() * rng.standard_normal(values.shape)
            tensor.CopyFrom(
                numpy_helper.from_array(values + noise.astype(values.dtype), tensor.name)
            )
    onnx.save(model, graph)


@pytest.fixture(scope="module")
def other_bundle(small_bundle, tmp_path_factory):
    """The same student, but for a head that says something a little else; its golden outputs are
    what that says.
    """
    from safetensors.numpy import load_file, safe_open, save_file

    folder = shutil.copytree(small_bundle, tmp_path_factory.mktemp("second") / "bundle")
    disturb(folder / "head_cls.onnx", 2.0)
    import onnxruntime

    tensors = load_file(folder / "golden.safetensors")
    with safe_open(folder / "golden.safetensors", framework="np") as file:
        metadata = file.metadata()
    known, bundle = {"image": tensors["image"]}, read_bundle(small_bundle)
    for name in ("backbone", "interaction", "head_cls"):
        graph = bundle.graphs[name]
        session = onnxruntime.InferenceSession(
            folder / graph.file, providers=["CPUExecutionProvider"]
        )
        said = session.run(None, {tensor.name: known[tensor.name] for tensor in graph.inputs})
        known |= dict(zip((tensor.name for tensor in graph.outputs), said, strict=True))
    save_file(
        tensors | {name: known[name] for name in ("cls_token", "cls_patches")},
        folder / "golden.safetensors",
        metadata,
    )
    rewrite(folder)
    return folder


@pytest.fixture(params=["together", pytest.param("apart", marks=pytest.mark.long)])
def running(request, expensive, small_bundle, tmp_path):
    """A server of its own, whose versions a test may change."""
    need_tritonserver()
    repository = tmp_path / "repository"
    settings = Settings(fused=False, encoded=False, parts=request.param)
    make_repository(read_bundle(small_bundle), repository, settings)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    with Server(find_tritonserver(None, tmp_path), repository, options, lambda line: None) as found:
        yield found


def ask(client, image):
    tensor = grpc.InferInput("image", image.shape, "UINT8")
    tensor.set_data_from_numpy(image)
    answer = client.infer(
        "features", [tensor], outputs=[grpc.InferRequestedOutput(name) for name in OUTPUTS]
    )
    version = int(answer.get_response().model_version)
    return version, {name: answer.as_numpy(name) for name in OUTPUTS}


def ask_depth(client, image):
    """A task, whose model calls `features` or is an ensemble of the same version."""
    tensor = grpc.InferInput("image", image.shape, "UINT8")
    tensor.set_data_from_numpy(image)
    assert np.isfinite(client.infer("depth", [tensor]).as_numpy("depth_map")).all()


class Load:
    """Clients that ask for golden pictures all the while and keep what they hear."""

    def __init__(self, address, image, clients=3):
        self.address, self.image, self.heard, self.failed, self.done = (
            address,
            image,
            [],
            [],
            threading.Event(),
        )
        self.threads = [threading.Thread(target=self.work) for _ in range(clients)]

    def work(self):
        with grpc.InferenceServerClient(self.address) as client:
            while not self.done.is_set():
                try:
                    self.heard.append(ask(client, self.image))
                    ask_depth(client, self.image)
                except Exception as error:
                    self.failed.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *_):
        time.sleep(0.3)
        self.done.set()
        for thread in self.threads:
            thread.join()


def cosine(one, other):
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def test_under_load_every_answer_is_of_one_version_and_none_fails(
    running, other_bundle, small_bundle
):
    first, second = (read_golden(path / GOLDEN) for path in (small_bundle, other_bundle))
    assert cosine(first.outputs["cls_token"][0], second.outputs["cls_token"][0]) < 0.9995
    image = first.image[:1]
    with Load(running.grpc, image) as load:
        assert main([str(running.repository), "--bundle", str(other_bundle)]) == 0
        time.sleep(0.5)
        assert main([str(running.repository), "--back"]) == 0
        time.sleep(0.5)
        assert main([str(running.repository), "--bundle", str(other_bundle)]) == 0
        assert main([str(running.repository), "--finish"]) == 0
    assert load.failed == []
    versions = [version for version, _ in load.heard]
    assert {1, 2} <= set(versions)
    for version, outputs in load.heard:
        expected = first if version == 1 else second
        for name in OUTPUTS:
            assert cosine(outputs[name][0].ravel(), expected.outputs[name][0].ravel()) > 0.99999, (
                version,
                name,
            )
    assert [path.name for path in (running.repository / "features").glob("[0-9]*")] == ["2"]


@pytest.mark.parametrize("parts", ["together", pytest.param("apart", marks=pytest.mark.long)])
def test_a_new_version_may_see_pictures_otherwise(
    expensive, small_bundle, photo_folder, tmp_path, parts
):
    need_tritonserver()
    bundle, repository = tmp_path / "bundle", tmp_path / "repository"
    shutil.copytree(small_bundle, bundle)
    rewrite(bundle, view="centre-crop:0.5")
    make_repository(read_bundle(small_bundle), repository, Settings(parts=parts))
    # `fused` runs in what its version's model.json says: a rollout leaves this as it was
    fused = repository / "fused" / "config.pbtxt"
    assert '"onnxruntime"' in fused.read_text()
    fused.write_text(fused.read_text().replace('"onnxruntime"', '"of an earlier version"'))
    photo = next(photo_folder.rglob("*.jpg"))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    with (
        Server(find_tritonserver(None, tmp_path), repository, options, lambda line: None) as served,
        FeatureClient(served.grpc) as client,
    ):

        def nearest():
            found = client.features(photo, "backbone_global", encoded=True)["backbone_global"]
            return min(seen, key=lambda view: float(np.abs(seen[view] - found).max()))

        seen = {
            view: client.features(photo, "backbone_global", view=view)["backbone_global"]
            for view in ("squash", "centre-crop:0.5")
        }
        assert nearest() == "squash"
        assert main([str(repository), "--bundle", str(bundle)]) == 0
        assert nearest() == "centre-crop:0.5"
        assert main([str(repository), "--back"]) == 0
        assert nearest() == "squash"


def test_a_new_version_may_run_in_another_precision_but_not_at_other_limits(small_bundle, tmp_path):
    bundle, folder = read_bundle(small_bundle), tmp_path / "repository"
    settings = Settings(runtime="openvino", parts="apart")
    make_repository(bundle, folder, settings, durable=False)
    repository = Repository(folder)
    faster = bundle.manifest.model_copy(update={"openvino_precision": "bf16"})
    models = repository.render(Bundle(bundle.path, faster), 2)
    repository.check_interface(models)
    about = {model.name: model.files.get("model.json", b"{}") for model in models}
    for name in ("backbone", "fused", "head_cls"):
        assert json.loads(about[name])["runtime"] == "openvino-bf16"
    resolution = bundle.manifest.resolution.model_copy(update={"min_height": 16})
    other = bundle.manifest.model_copy(update={"resolution": resolution})
    with pytest.raises(
        UserError, match=r"has min_height 16 \(served now: 64\): clients rely on it"
    ):
        repository.check_interface(repository.render(Bundle(bundle.path, other), 2))
    # with nothing that decodes, the front door alone knows
    for parts in ("together", "apart"):
        place = tmp_path / parts
        alone = Settings(encoded=False, fused=False, parts=parts)
        make_repository(bundle, place, alone, durable=False)
        with pytest.raises(UserError, match=r"min_height 16 \(served now: 64\)"):
            Repository(place).check_interface(
                Repository(place).render(Bundle(bundle.path, other), 2)
            )


def broken(kind, bundle):
    """Break a copy of a bundle in one way; returns what the refusal must name."""
    match kind:
        case "a changed byte":
            content = bytearray((bundle / "head_cls.onnx").read_bytes())
            content[len(content) // 2] ^= 1
            (bundle / "head_cls.onnx").write_bytes(content)
            return "head_cls.onnx does not match its sha256"
        case "a missing file":
            (bundle / "backbone.onnx").unlink()
            return "backbone.onnx is missing"
        case "a file that is no graph":
            (bundle / "head_cls.onnx").write_bytes(b"no graph at all")
            rewrite(bundle)
            return "head_cls.onnx: not valid ONNX"
        case "a graph that says something else":
            disturb(bundle / "head_cls.onnx", 2.0)
            rewrite(bundle)
            return "output 'cls_token' is not what was recorded"
        case "another interface":
            manifest = read_manifest(bundle)
            rewrite(bundle, max_batch=manifest.max_batch - 1)
            return "another max_batch_size"


KINDS = [
    "a changed byte",
    "a missing file",
    "a file that is no graph",
    "a graph that says something else",
    "another interface",
]


def test_what_is_not_fit_to_serve_is_refused_and_the_old_version_goes_on(
    running, small_bundle, tmp_path, capsys
):
    golden = read_golden(small_bundle / GOLDEN)
    with Load(running.grpc, golden.image[:1], clients=1) as load:
        for number, kind in enumerate(KINDS):
            bundle = shutil.copytree(small_bundle, tmp_path / f"bundle{number}")
            reason = broken(kind, bundle)
            assert main([str(running.repository), "--bundle", str(bundle)]) in (1, 2), kind
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and reason in said, (kind, said)
            assert not list(running.repository.glob("staged_*"))
    assert load.failed == []
    assert {version for version, _ in load.heard} == {1}
    with grpc.InferenceServerClient(running.grpc) as client:
        assert client.is_model_ready("features") and not client.is_model_ready("staged_features")


@pytest.mark.slow
def test_mistakes_are_one_line(running, tmp_path, capsys):
    assert main([str(tmp_path), "--back"]) == 2
    assert "is not a repository of serve.run" in capsys.readouterr().err
    assert main([str(running.repository), "--back"]) == 2
    assert "has no version before 1" in capsys.readouterr().err
    running.stop()
    assert main([str(running.repository), "--finish"]) == 2
    assert "no server runs on it" in capsys.readouterr().err
