"""Zero-shot detection in a real server: boxes are those computed in this process, prompts are
encoded once, what is refused, and what clients write.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from contract.detection import detections, read_tokenizer, text_inputs
from contract.errors import UserError
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from export.runtimes.onnx import OnnxRuntime
from serve.bundle import read_bundle
from serve.client import FeatureClient
from serve.client.__main__ import main as client_command
from serve.client.aio import AsyncFeatureClient
from serve.client.tasks.detection import detect
from serve.demo.answers import look
from serve.errors import BadRequest, NotServed
from serve.repository.build import make_repository
from serve.repository.graph_files import graph_json
from serve.repository.lint import lint
from serve.repository.models import build_models
from serve.repository.settings import Settings
from serve.repository.versions import Repository
from tests.conftest import need_tritonserver

ROOT = Path(__file__).resolve().parents[2]
SIZE = (70, 98)
LABELS = ("cat", "traffic light", "dog")


@pytest.fixture(scope="module")
def served(expensive, detection_bundle, tmp_path_factory):
    """A server on the bundle."""
    need_tritonserver()
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder = tmp_path_factory.mktemp("server")
    settings = Settings(fused=False)
    make_repository(read_bundle(detection_bundle), folder / "repository", settings)
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    triton = find_tritonserver(None, folder)
    with Server(triton, folder / "repository", options, lambda line: None) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with FeatureClient(served.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def raw(served):
    with grpc.InferenceServerClient(served.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Four photographs, one more than a request may hold."""
    photos = PackagedPhotos()
    return np.stack([SQUASH.pixels(photos.load(number), *SIZE) for number in range(4)])


def in_process(bundle, pixels, labels, threshold) -> list:
    """Detections of the bundle's graphs, without a server."""
    record = read_bundle(bundle).manifest.detector
    names = ("backbone", "head_detector", record.text.name, record.boxes.name)
    runtime = OnnxRuntime({name: bundle / f"{name}.onnx" for name in names})
    prompt = text_inputs(labels, read_tokenizer(bundle / record.vocabulary))
    known = {name: np.repeat(v, len(pixels), 0) for name, v in prompt._asdict().items()}
    known |= {"image": pixels, "text_mask": np.ones_like(known["ids"], dtype=bool)}
    graphs = {graph.name: graph for graph in (*read_bundle(bundle).parts, *record.graphs)}
    for name in names:
        feeds = {tensor.name: known[tensor.name] for tensor in graphs[name].inputs}
        outputs = [tensor.name for tensor in graphs[name].outputs]
        known |= dict(zip(outputs, runtime.run(name, feeds), strict=True))
    return [
        detections(logits, boxes, prompt.label_map, threshold=threshold)
        for logits, boxes in zip(known["logits"], known["boxes"], strict=True)
    ]


def test_boxes_are_those_computed_here(client, detection_bundle, pixels):
    result = detect(client, pixels, LABELS, threshold=0.0)
    wanted = in_process(detection_bundle, pixels[:3], LABELS, 0.0)
    wanted += in_process(detection_bundle, pixels[3:], LABELS, 0.0)
    assert result.classes == LABELS and len(result.pictures) == 4
    for found, expected in zip(result.pictures, wanted, strict=True):
        assert len(found.scores) == len(expected.scores) == 20 * 3
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
        assert found.boxes.min() >= 0 and found.boxes.max() <= 1
        assert (np.diff(found.scores) <= 0).all()
    assert np.ptp([found.scores[0] for found in result.pictures]) > 0, "pictures must differ"


def test_the_threshold_cuts_the_list(client, pixels):
    everything = detect(client, pixels[:1], LABELS, threshold=0.0).pictures[0]
    middle = float(np.sort(everything.scores)[30])
    some = detect(client, pixels[:1], LABELS, threshold=middle).pictures[0]
    np.testing.assert_allclose(some.scores, everything.scores[everything.scores > middle])
    assert len(detect(client, pixels[:1], LABELS, threshold=1.0).pictures[0].scores) == 0


def test_asyncio_gives_the_same(served, client, pixels):
    async def ask():
        async with AsyncFeatureClient(served.grpc) as other:
            return await detect(other, pixels[:2], LABELS, threshold=0.1)

    found, wanted = asyncio.run(ask()), detect(client, pixels[:2], LABELS, threshold=0.1)
    for one, other in zip(found.pictures, wanted.pictures, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_labels_are_encoded_once_in_each_process(client, raw, pixels):
    def counts():
        return {
            stat.name: stat.execution_count for stat in raw.get_inference_statistics().model_stats
        }

    before = counts()
    for _ in range(6):
        detect(client, pixels[:1], ["bird", "a cup"])
    ran = {name: count - before[name] for name, count in counts().items() if count > before[name]}
    assert set(ran) == {"detection", "features", *GRAPHS}
    assert ran["detector"] == 6 and ran["text_detector"] <= 2  # there are two processes


GRAPHS = ("detector", "text_detector")


def ask(raw, **inputs) -> dict[str, np.ndarray]:
    kinds = {"image": "UINT8", "labels": "BYTES", "threshold": "FP32"}
    tensors = []
    for name, value in inputs.items():
        array = np.array(value, {"labels": np.object_, "threshold": np.float32}.get(name))
        tensors.append(grpc.InferInput(name, array.shape, kinds[name]).set_data_from_numpy(array))
    answer = raw.infer("detection", tensors, client_timeout=60)
    return {port.name: answer.as_numpy(port.name) for port in answer.get_response().outputs}


def test_without_a_threshold_it_is_a_quarter_and_the_rest_is_padding(raw, pixels):
    answer = ask(raw, image=pixels[:2], labels=[b"cat"])
    same = ask(raw, image=pixels[:2], labels=[b"cat"], threshold=[0.25])
    for name in answer:
        np.testing.assert_array_equal(answer[name], same[name])
    assert answer["boxes"].shape == (2, 20, 4)
    for row, count in enumerate(answer["counts"]):
        assert (answer["scores"][row, :count] > 0.25).all()
        assert not answer["scores"][row, count:].any() and not answer["boxes"][row, count:].any()
        assert (answer["classes"][row, count:] == -1).all()


def test_a_prompt_of_256_tokens_is_answered_as_here(raw, detection_bundle, pixels):
    label = " ".join(["a"] * 253)
    (wanted,) = in_process(detection_bundle, pixels[:1], [label], 0.0)
    answer = ask(raw, image=pixels[:1], labels=[label.encode()], threshold=[0.0])
    assert answer["counts"].tolist() == [20] == [len(wanted.scores)]
    np.testing.assert_allclose(answer["scores"][0], wanted.scores, atol=1e-4)
    with pytest.raises(InferenceServerException, match="more than 256 tokens"):
        ask(raw, image=pixels[:1], labels=[label.encode() + b" a"])


BLACK = np.zeros((1, *SIZE, 3), np.uint8)
BAD = {
    "no label": ({"labels": []}, "no labels: give at least one"),
    "an empty label": ({"labels": [b"cat", b" . "]}, "label 1 is empty"),
    "no UTF-8": ({"labels": [b"caf\xe9"]}, "label 0 is not UTF-8"),
    "too many bytes": ({"labels": [b"x" * 513]}, "label 0 has 513 bytes, at most 512"),
    "unknown": ({"labels": ["猫".encode()]}, "label '猫' is unknown to the detector's vocabulary"),
    "twice": ({"labels": [b"cat", b"Cat."]}, "label 'Cat.' reads like 'cat'"),
    "too many tokens": (
        {"labels": [b"%d" % n for n in range(1000, 100_000)]},
        "the 99000 labels make more than 256 tokens",
    ),
    "above 1": ({"threshold": [1.5]}, "threshold 1.5: give a number from 0 to 1"),
    "no number": ({"threshold": [np.nan]}, "threshold nan: give a number from 0 to 1"),
    "too large a batch": ({"image": np.repeat(BLACK, 4, 0)}, "4 pictures in a request: 1 to 3"),
    "no picture": ({"image": BLACK[:0]}, "0 pictures in a request: 1 to 3"),
    "another size": ({"image": BLACK[:, :56]}, "unexpected shape for input 'image'"),
    "no image": ({"image": None}, "input 'image' is missing"),
    "no labels": ({"labels": None}, "input 'labels' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_invalid_argument_in_a_sentence_and_the_next_is_answered(raw, case):
    changes, says = BAD[case]
    inputs = {"image": BLACK, "labels": [b"cat"], "threshold": [0.25]} | changes
    with pytest.raises(InferenceServerException) as refused:
        ask(raw, **{name: value for name, value in inputs.items() if value is not None})
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT", refused.value
    assert says in refused.value.message() and "\n" not in refused.value.message()
    assert ask(raw, image=BLACK, labels=[b"cat"])["boxes"].shape == (1, 20, 4)


def test_zeros_as_a_supervisor_sends_are_refused_by_the_graphs_themselves(raw):
    """Not answered with NaN, which would count as a failure."""
    mask = grpc.InferInput("self_mask", (1, 1, 1), "BOOL").set_data_from_numpy(
        np.zeros((1, 1, 1), bool)
    )
    tokens = [
        grpc.InferInput(name, (1, 1), "INT64").set_data_from_numpy(np.zeros((1, 1), np.int64))
        for name in ("ids", "position_ids")
    ]
    with pytest.raises(InferenceServerException, match="must see itself") as refused:
        raw.infer("text_detector", [mask, *tokens])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("labels", "threshold", "says"),
    [
        ("cat", 0.5, "give a list of them"),
        ([], 0.5, "give at least one"),
        (["cat", " cat"], 0.5, "label 'cat' is given twice"),
        (["cat"], 2, "threshold 2: give a number from 0 to 1"),
    ],
)
def test_the_client_refuses_the_same_before_it_asks(client, labels, threshold, says):
    with pytest.raises(BadRequest, match=says):
        detect(client, BLACK, labels, threshold=threshold)


def test_the_command_draws_boxes_and_writes_them_in_pixels(served, tmp_path, capsys):
    photos = PackagedPhotos()
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        photos.load(number).convert("RGB").resize((120, 80)).save(path)
    words = ["--task", "detection", "--labels", "cat", "traffic light", "--threshold", "0"]
    place = ["--url", served.grpc, "--output", str(tmp_path / "answers")]
    assert client_command([*map(str, paths), *words, *place]) == 0
    said = capsys.readouterr().out
    assert "0.png: 40 found: " in said
    for path in paths:
        about = json.loads((tmp_path / "answers" / f"{path.stem}_detection.json").read_text())
        assert (about["width"], about["height"]) == (120, 80) and len(about["detections"]) == 40
        assert about["labels"] == ["cat", "traffic light"] and about["threshold"] == 0
        box = np.array([one["box"] for one in about["detections"]])
        assert (box >= 0).all() and (box[:, ::2] <= 120).all() and (box[:, 1::2] <= 80).all()
        with Image.open(tmp_path / "answers" / f"{path.stem}_detection.png") as drawn:
            assert drawn.size == (120, 80)
            assert np.abs(np.asarray(drawn) - np.asarray(Image.open(path), int)).max() > 20
    with np.load(tmp_path / "answers" / "detection.npz") as arrays:
        assert arrays["boxes"].shape == (80, 4) and arrays["counts"].tolist() == [40, 40]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "detection"], "--task detection needs --labels"),
        (["--task", "detection", "--labels", "cat", "--side", "client"], "on the server only"),
        (["--task", "depth", "--threshold", "0.5"], "--threshold is for --task detection"),
        (["--task", "depth", "--threshold", "0"], "--threshold is for --task detection"),
        (["--task", "detection", "--labels", "cat", "--encoded"], "takes pixels"),
        (["--task", "detection", "--labels", "cat", "--threshold", "7"], "from 0 to 1"),
    ],
)
def test_mistakes_at_the_command_line_are_told_in_a_line(tmp_path, capsys, words, says):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    assert client_command([str(photo), *words, "--output", str(tmp_path / "answers")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and not (tmp_path / "answers").exists()


def test_the_page_shows_boxes(client):
    photo = PackagedPhotos().load(0)
    *_, (answers, requests) = look(client, photo, ["cat", "<b>dog</b>"])
    assert 'class="card detection"' in answers and 'alt="detection"' in answers
    assert "<b>dog</b>" not in answers and "text_detector" in requests
    *_, (answers, _) = look(client, photo, None)
    assert "found of 5 labels" in answers, "what to look for where nobody said"


def test_the_liveness_probe_asks_for_detections(served):
    words = ["--url", f"http://{served.http}", "--repository", served.repository]
    probe = [sys.executable, ROOT / "deploy" / "probe.py", *words]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_server_without_a_detector_says_how_to_get_one(server):
    with FeatureClient(server.grpc) as client, pytest.raises(NotServed, match="--detector adds"):
        detect(client, np.zeros((1, 64, 64, 3), np.uint8), ["cat"])


@pytest.mark.slow
def test_the_lint_agrees_and_every_backend_runs_the_detector_in_onnxruntime(detection_bundle):
    for settings, on_gpu in (
        (Settings(), False),
        (Settings(runtime="openvino"), False),
        (Settings(kind="gpu"), True),
        (Settings(backend="onnxruntime"), False),
        (Settings(backend="onnxruntime", kind="gpu"), False),  # as NVIDIA's image is started
    ):
        models = {m.name: m for m in build_models(read_bundle(detection_bundle), settings)}
        assert lint({name: model.config for name, model in models.items()}) == []
        for name in GRAPHS:
            config = models[name].config
            assert config.backend == "python" and config.max_batch_size == 3
            assert config.parameters["runtime"].string_value == "onnxruntime"
            (group,) = config.instance_group
            assert group.kind == (group.KIND_GPU if on_gpu else group.KIND_CPU)
        assert models["detection"].config.max_batch_size == 0
        steps = {step.model_name for step in models["features"].config.ensemble_scheduling.step}
        assert not steps & {*GRAPHS, "detection"}


@pytest.mark.slow
def test_a_rollout_to_another_detector_is_refused(detection_bundle, tmp_path):
    settings = Settings(fused=False, encoded=False)
    make_repository(read_bundle(detection_bundle), tmp_path / "repository", settings)
    repository = Repository(tmp_path / "repository")
    bundle = read_bundle(detection_bundle)
    repository.check_interface(repository.render(bundle, 2))
    other = bundle.manifest.detector.model_copy(update={"sha256": "0" * 64})
    bundle.manifest = bundle.manifest.model_copy(update={"detector": other})
    with pytest.raises(UserError, match="model 'detection' has parameter about") as error:
        repository.check_interface(repository.render(bundle, 2))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_every_axis_of_the_detectors_inputs_has_a_size(detection_bundle):
    bundle = read_bundle(detection_bundle)
    detector = bundle.manifest.detector
    ids, *others = detector.text.inputs
    inputs = (ids.model_copy(update={"shape": ("batch", "rows_4")}), *others)
    text = detector.text.model_copy(update={"inputs": inputs})
    changed = detector.model_copy(update={"text": text})
    bundle.manifest = bundle.manifest.model_copy(update={"detector": changed})
    assert json.loads(graph_json(bundle, text))["largest"][0] == [18]  # of 70 pixels
