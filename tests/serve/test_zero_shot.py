"""The models `zero_shot` and `text_encoder` in a real server: probabilities, new labels, and what
is refused in a sentence.
"""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import tritonclient.grpc as grpc
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tritonclient.utils import InferenceServerException

from contract.class_scores import ClassVectors, probabilities
from contract.errors import UserError
from contract.manifest import add_files
from contract.text_encoder import TEXT_ENCODER
from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from export.run import main as export
from export.text.__main__ import main as text
from serve.bundle import read_bundle
from serve.repository.build import make_repository
from serve.repository.lint import lint
from serve.repository.models import build_models
from serve.repository.settings import Settings
from serve.repository.versions import Repository
from serve.repository.zero_shot import EMBEDDINGS, read_class_embeddings
from serve.server.golden import GoldenCheck, GoldenRefused
from tests.conftest import need_tritonserver, run_here, small_recipe
from tests.serve.running import until

open_clip = pytest.importorskip("open_clip", reason="the optional extra [text] is not installed")

LABELS = ("cat", "golden retriever", "steam engine")
WIDTH = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A small CLIP's configuration and weights, labels of two kinds, and weights of a
    classifier.
    """
    folder = tmp_path_factory.mktemp("files")
    configuration = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / "small-clip.json").write_text(json.dumps(configuration))
    open_clip.add_model_config(folder / "small-clip.json")
    torch.manual_seed(5)
    clip = open_clip.create_model("small-clip").eval()
    with torch.no_grad():
        clip.token_embedding.weight.mul_(20)  # so that labels differ
    for name, net in (("clip", clip), ("resnet", timm.create_model("resnet10t"))):
        save_file(
            {key: value.contiguous() for key, value in net.state_dict().items()},
            folder / f"{name}.safetensors",
        )
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "imagenet.txt").write_text("tabby cat\nespresso\nmissile\n")
    return folder


@pytest.fixture(scope="module")
def plain_bundle(expensive, files, photo_folder, tmp_path_factory) -> Path:
    """A bundle of varying sizes with a CLIP teacher and a classifying one, without class
    embeddings.
    """
    folder = tmp_path_factory.mktemp("clip")
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": WIDTH}
    teachers = [
        {
            "name": "vit_tiny_patch16_224",
            "role": "clip",
            "alias": "clip",
            "pretrained": False,
            "image_size": 64,
            "kwargs": vit,
        },
        {
            "name": "resnet10t",
            "role": "classification",
            "alias": "cls",
            "image_size": 64,
            "checkpoint": str(files / "resnet.safetensors"),
        },
    ]
    recipe = small_recipe(photo_folder, method="plain", train={"steps": 2}) | {"teachers": teachers}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_here(folder / "recipe.yaml", "--output", folder / "run")
    assert done.returncode == 0, done.stderr
    given = ("--output", folder / "bundle", "--resolutions", 64, "64x96", "--max-batch", 4)
    done = run_here(folder / "run", *given, command=export)
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def clip_text(files, output, *more):
    given = ("--model", files / "small-clip.json", "--pretrained", files / "clip.safetensors")
    done = run_here(
        "--output", output, *given, "--labels", files / "labels.txt", *more, command=text
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clip_bundle(files, plain_bundle, tmp_path_factory) -> Path:
    """With class embeddings and the text encoder."""
    path = shutil.copytree(plain_bundle, tmp_path_factory.mktemp("with-text") / "bundle")
    clip_text(files, path, "--with-encoder")
    return path


@pytest.fixture(scope="module")
def rows_bundle(files, plain_bundle, tmp_path_factory) -> Path:
    """With the rows of the other teacher's classifier."""
    path = shutil.copytree(plain_bundle, tmp_path_factory.mktemp("with-rows") / "bundle")
    given = (
        "--classifier",
        "cls",
        "--run",
        plain_bundle.parent / "run",
        "--labels",
        files / "imagenet.txt",
    )
    done = run_here("--output", path, *given, command=text)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def serving(expensive, tmp_path_factory):
    """A function that serves a bundle and gives the server and a client of it."""
    need_tritonserver()
    from contextlib import ExitStack

    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    with ExitStack() as stack:

        def start(bundle: Path) -> "tuple[Server, grpc.InferenceServerClient]":
            folder = tmp_path_factory.mktemp("server")
            make_repository(
                read_bundle(bundle),
                folder / "repository",
                Settings(max_batch=3, fused=False, encoded=False),
            )
            options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
            server = Server(
                find_tritonserver(None, folder), folder / "repository", options, lambda line: None
            )
            address = stack.enter_context(server).grpc
            return server, stack.enter_context(grpc.InferenceServerClient(address))

        yield start


@pytest.fixture(scope="module")
def clip_server(serving, clip_bundle):
    return serving(clip_bundle)


@pytest.fixture(scope="module")
def client(clip_server):
    return clip_server[1]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Three photographs."""
    photos = PackagedPhotos()
    return np.stack([SQUASH.pixels(photos.load(number), 64, 96) for number in range(3)])


def ask(client, image=None, labels=None, model="zero_shot", outputs=None) -> dict[str, np.ndarray]:
    inputs = []
    for name, value, kind in (("image", image, "UINT8"), ("labels", labels, "BYTES")):
        if value is not None:
            array = np.array(value, np.object_ if kind == "BYTES" else None)
            inputs.append(grpc.InferInput(name, array.shape, kind).set_data_from_numpy(array))
    wanted = [grpc.InferRequestedOutput(name) for name in outputs] if outputs else None
    answer = client.infer(model, inputs, outputs=wanted, client_timeout=60)
    return {port.name: answer.as_numpy(port.name).copy() for port in answer.get_response().outputs}


def test_probabilities_are_the_softmax_of_scaled_cosines_with_the_bundles_classes(
    client, clip_bundle, pixels
):
    token = torch.from_numpy(
        ask(client, pixels, model="features", outputs=["clip_token"])["clip_token"]
    )
    embeddings = load_file(clip_bundle / EMBEDDINGS)["embeddings"]
    scale = read_class_embeddings(clip_bundle / EMBEDDINGS).vectors.scale
    assert scale == pytest.approx(14.2857, abs=1e-3), "the model's own, not the default of 100"
    wanted = (scale * torch.nn.functional.normalize(token, dim=1) @ embeddings.T).softmax(dim=1)
    found = ask(client, pixels)
    assert found["classes"].tolist() == [label.encode() for label in LABELS]
    assert found["probabilities"].shape == (3, 3)
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
    assert wanted.std(dim=1).min() > 1e-3, "classes must differ, or the comparison shows nothing"


def test_labels_of_the_request_are_embedded_as_export_embeds_them(client, clip_bundle, pixels):
    exported = load_file(clip_bundle / EMBEDDINGS)["embeddings"].numpy()
    found = ask(client, labels=[label.encode() for label in LABELS], model="text_encoder")[
        "embeddings"
    ]
    assert (found * exported).sum(axis=1).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    chosen = ask(client, pixels, [b"steam engine", b"cat"])
    known = ask(client, pixels)["probabilities"][:, [2, 0]]
    np.testing.assert_allclose(
        chosen["probabilities"], known / known.sum(axis=1, keepdims=True), atol=1e-5
    )
    assert chosen["classes"].tolist() == [b"steam engine", b"cat"]


def test_new_labels_of_any_script_are_answered_in_their_order(client, pixels, files, tmp_path):
    words = ["猫", "Привет", "😀 &amp; cat", "naïve café", "cat"]
    found = ask(client, pixels[:1], [word.encode() for word in words])
    assert [name.decode() for name in found["classes"]] == words and found[
        "probabilities"
    ].shape == (1, 5)
    (tmp_path / "labels.txt").write_text("\n".join(words), encoding="utf-8")
    given = ("--model", files / "small-clip.json", "--pretrained", files / "clip.safetensors")
    done = run_here("--output", tmp_path, *given, "--labels", tmp_path / "labels.txt", command=text)
    assert done.returncode == 0, done.stderr
    wanted = load_file(tmp_path / EMBEDDINGS)["embeddings"].numpy()
    served = ask(client, labels=[word.encode() for word in words], model="text_encoder")[
        "embeddings"
    ]
    assert (served * wanted).sum(axis=1).min() >= 0.99999


def test_only_the_output_asked_for_is_sent(client, pixels):
    assert list(ask(client, pixels, outputs=["probabilities"])) == ["probabilities"]


def test_the_front_door_runs_only_what_the_teachers_token_needs(client, pixels):
    def counts():
        return {
            stat.name: stat.execution_count
            for stat in client.get_inference_statistics().model_stats
        }

    def ran():
        return {name for name, count in counts().items() if count > before[name]}

    before = counts()
    ask(client, pixels)
    until(lambda: "zero_shot" in ran(), 5)  # a call is counted after it is answered
    assert ran() == {"zero_shot", "features"}


def test_requests_with_and_without_labels_at_once_each_get_their_own(client, pixels):
    wanted = [
        ask(client, pixels[n : n + 1], None if n % 2 else [b"cat", b"dog"])["probabilities"]
        for n in range(3)
    ]
    found = {}

    def work(turn):
        n = turn % 3
        found[turn] = ask(client, pixels[n : n + 1], None if n % 2 else [b"cat", b"dog"])[
            "probabilities"
        ]

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn, value in found.items():
        np.testing.assert_allclose(value, wanted[turn % 3], atol=1e-5)
    assert len(found) == 24


BAD = {
    "no label": ({"labels": []}, "no labels: give at least one"),
    "an empty label": ({"labels": [b"cat", b" "]}, "label 1 is empty"),
    "no UTF-8": ({"labels": [b"caf\xe9"]}, "label 0 is not UTF-8"),
    "too many bytes": ({"labels": [b"x" * 513]}, "label 0 has 513 bytes, at most 512"),
    "too many words": ({"labels": [b"very " * 90 + b"tall"]}, "tokens, the model reads 77"),
    "too many labels": ({"labels": [b"%d" % n for n in range(1001)]}, "1001 labels, at most 1000"),
    "labels in two axes": ({"labels": [[b"cat", b"dog"]]}, "unexpected shape for input 'labels'"),
    "too large a batch": (
        {"image": np.zeros((4, 64, 64, 3), np.uint8)},
        "4 pictures in a request: 1 to 3 are accepted",
    ),
    "no picture": (
        {"image": np.zeros((0, 64, 64, 3), np.uint8)},
        "0 pictures in a request: 1 to 3",
    ),
    "no multiple": (
        {"image": np.zeros((1, 64, 65, 3), np.uint8)},
        "is 64x65: height and width must be multiples of 16",
    ),
    "too large": (
        {"image": np.zeros((1, 128, 64, 3), np.uint8)},
        "is 128x64: at most 64x96 is served",
    ),
    "without a batch": (
        {"image": np.zeros((64, 64, 3), np.uint8)},
        "unexpected shape for input 'image'",
    ),
    "four channels": (
        {"image": np.zeros((1, 64, 64, 4), np.uint8)},
        "unexpected shape for input 'image'",
    ),
    "nothing": ({"image": None}, "missing required input"),
    "labels alone": ({"image": None, "labels": [b"cat"]}, "input 'image' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_invalid_argument_in_a_sentence_and_the_next_is_answered(
    client, pixels, case
):
    changes, says = BAD[case]
    with pytest.raises(InferenceServerException) as refused:
        ask(client, **({"image": pixels[:1]} | changes))
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT", refused.value
    assert says in refused.value.message()
    assert ask(client, pixels)["probabilities"].shape == (3, 3)


def test_a_start_asks_the_text_encoder_for_vectors_that_the_export_knows(clip_server, tmp_path):
    server, _ = clip_server
    lines: list[str] = []
    state = GoldenCheck(server.repository, "refuse", lines.append)(server.rest)
    assert state.outcome == "passed" and "by features and text_encoder in" in lines[0]
    copy = shutil.copytree(server.repository, tmp_path / "repository")
    path = copy / "zero_shot" / "1" / "classes.npz"
    vectors = dict(np.load(path))
    vectors["embeddings"][1] += 0.05 * np.abs(vectors["embeddings"]).max()
    np.savez(path, **vectors)
    with pytest.raises(GoldenRefused, match=f"text_encoder: embedding of '{LABELS[1]}' has cosine"):
        GoldenCheck(copy, "refuse", print)(server.rest)
    for data in (b"no archive", path.read_bytes()[:-30], b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="classes cannot be read .*render the repository again"):
            GoldenCheck(copy, "refuse", print)(server.rest)


def test_a_text_encoder_asked_directly_refuses_with_the_same_words(client):
    with pytest.raises(InferenceServerException) as refused:
        ask(client, labels=[b"\xff"], model="text_encoder")
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert refused.value.message() == "label 0 is not UTF-8 text (byte 0)"


def test_classifier_rows_give_the_classifiers_own_probabilities_and_a_choice_of_its_classes(
    serving, rows_bundle, files, pixels
):
    _, client = serving(rows_bundle)
    token = torch.from_numpy(
        ask(client, pixels, model="features", outputs=["cls_token"])["cls_token"]
    )
    weights = load_file(files / "resnet.safetensors")
    logits = (token @ weights["fc.weight"].T + weights["fc.bias"])[:, [281, 967, 657]]
    found = ask(client, pixels)
    assert found["classes"].tolist() == [b"tabby cat", b"espresso", b"missile"]
    np.testing.assert_allclose(found["probabilities"], logits.softmax(dim=1), atol=1e-5)
    chosen = ask(client, pixels, [b"missile", b"tabby cat"])
    np.testing.assert_allclose(chosen["probabilities"], logits[:, [2, 0]].softmax(dim=1), atol=1e-5)
    for labels, says in (
        (
            [b"missile", b"dog"],
            r"label 'dog' is not among the bundle's 3 classes \(tabby cat, espresso, missile\)",
        ),
        ([], "an empty list"),
    ):
        with pytest.raises(InferenceServerException, match=says) as refused:
            ask(client, pixels, labels)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert "a classifier, which has no others" in refused.value.message()


def names(bundle: Path) -> set[str]:
    return {model.name for model in build_models(read_bundle(bundle), Settings())}


def test_models_are_rendered_as_far_as_the_bundle_has_what_they_need(
    plain_bundle, clip_bundle, rows_bundle, files, tmp_path
):
    assert names(plain_bundle) & {"zero_shot", "text_encoder"} == set()
    assert names(clip_bundle) >= {"zero_shot", "text_encoder"}
    assert names(rows_bundle) & {"zero_shot", "text_encoder"} == {"zero_shot"}
    mixed = shutil.copytree(
        clip_bundle, tmp_path / "mixed"
    )  # the encoder of a CLIP, the classes of a classifier
    given = (
        "--classifier",
        "cls",
        "--run",
        plain_bundle.parent / "run",
        "--labels",
        files / "imagenet.txt",
    )
    assert run_here("--output", mixed, *given, command=text).returncode == 0
    assert names(mixed) & {"zero_shot", "text_encoder"} == {"zero_shot"}


def test_models_that_take_no_batches_keep_saying_so_and_the_lint_agrees(clip_bundle):
    configs = {
        model.name: model.config
        for model in build_models(read_bundle(clip_bundle), Settings(max_batch=2))
    }
    assert lint(configs) == []
    assert {name for name, config in configs.items() if config.max_batch_size != 2} == {
        "decode",
        "text_encoder",
        "zero_shot",
    }
    del configs["zero_shot"].parameters["unbatched"]
    assert any("zero_shot: max_batch_size is not set" in said for said in lint(configs))


def test_embeddings_that_no_teacher_fits_are_refused_before_serving(plain_bundle, files, tmp_path):
    wider = tmp_path / "wide-clip.json"
    configuration = json.loads((files / "small-clip.json").read_text()) | {"embed_dim": 40}
    wider.write_text(json.dumps(configuration))
    bundle = shutil.copytree(plain_bundle, tmp_path / "bundle")
    given = ("--model", wider, "--pretrained", "random", "--labels", files / "labels.txt")
    assert run_here("--output", tmp_path / "alone", *given, command=text).returncode == 0
    shutil.copy(tmp_path / "alone" / EMBEDDINGS, bundle)
    add_files(bundle, [EMBEDDINGS])
    with pytest.raises(
        UserError,
        match=r"40-d vectors for a CLIP teacher.*clip: clip, 24; cls: classification, 512",
    ):
        names(bundle)
    done = run_here("--output", bundle, *given, "--teacher", "clib", command=text)
    assert done.returncode == 2 and "did you mean 'clip'?" in done.stderr
    clip_text(files, bundle, "--teacher", "clip")
    assert "zero_shot" in names(bundle)


def test_two_clip_teachers_of_one_width_must_be_told_apart(clip_bundle):
    bundle = read_bundle(clip_bundle)
    clip = bundle.manifest.teachers[0]
    twins = (
        clip,
        clip.model_copy(update={"label": "cls"}),
    )  # `cls_token` is an output, so both would fit
    bundle.manifest = bundle.manifest.model_copy(update={"teachers": twins})
    with pytest.raises(UserError, match=r"several \(clip, cls\): name one with --teacher"):
        build_models(bundle, Settings())


def test_a_rollout_to_another_text_tower_is_refused(clip_bundle, tmp_path):
    make_repository(read_bundle(clip_bundle), tmp_path / "repository", Settings(fused=False))
    repository = Repository(tmp_path / "repository")
    repository.check_interface(repository.render(read_bundle(clip_bundle), 2))
    bundle = shutil.copytree(clip_bundle, tmp_path / "bundle")
    other = {"text_weights_sha256": "0" * 64}
    about = json.loads((bundle / TEXT_ENCODER).read_text()) | other
    (bundle / TEXT_ENCODER).write_text(json.dumps(about))
    with safe_open(bundle / EMBEDDINGS, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, bundle / EMBEDDINGS, metadata | other)
    add_files(bundle, [TEXT_ENCODER, EMBEDDINGS])
    with pytest.raises(UserError, match="model 'zero_shot' has parameter about .*text_weights"):
        repository.check_interface(repository.render(read_bundle(bundle), 2))


def test_a_changed_file_of_the_encoder_is_refused(clip_bundle, tmp_path):
    bundle = shutil.copytree(clip_bundle, tmp_path / "bundle")
    with open(bundle / "text_encoder.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="text_encoder.onnx does not match its sha256"):
        names(bundle)


def test_scores_of_a_vector_of_zeros_are_even():
    classes = ClassVectors(np.eye(4, 8, dtype=np.float32))
    np.testing.assert_allclose(probabilities(np.zeros((2, 8), np.float32), classes), 0.25)
