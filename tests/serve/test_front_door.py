"""The ensemble `features`: every selection of outputs is answered, rightly, and runs only the
models it needs.
"""

import io
import time
from itertools import combinations

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc
from PIL import Image

from contract.images import fit
from distill.data.pictures import PackagedPhotos
from serve.bundle import read_bundle
from serve.repository.models import needed, served_name

TEACHERS = ("cls", "mae", "dino")


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


@pytest.fixture(scope="module")
def client(server):
    with grpc.InferenceServerClient(server.grpc) as found:
        yield found


@pytest.fixture(scope="module")
def pixels(bundle):
    """Three photographs as the model reads them."""
    photos, size = PackagedPhotos(), bundle.manifest.resolution
    return np.stack([fit(photos.load(number), size.height, size.width) for number in range(3)])


@pytest.fixture(scope="module")
def expected(bundle, pixels):
    """What onnxruntime says of the same graphs in this process, by name."""
    known = {"image": pixels}
    for graph in bundle.parts:
        session = onnxruntime.InferenceSession(
            bundle.path / graph.file, providers=["CPUExecutionProvider"]
        )
        said = session.run(None, {tensor.name: known[tensor.name] for tensor in graph.inputs})
        known |= dict(zip((tensor.name for tensor in graph.outputs), said, strict=True))
    return known


def ask(client, model, outputs, pixels):
    image = grpc.InferInput("image", pixels.shape, "UINT8")
    image.set_data_from_numpy(pixels)
    answer = client.infer(
        model, [image], outputs=[grpc.InferRequestedOutput(name) for name in outputs]
    )
    return {port.name: answer.as_numpy(port.name) for port in answer.get_response().outputs}


def executions(client):
    return {
        stat.name: stat.execution_count for stat in client.get_inference_statistics().model_stats
    }


def runs_needed(bundle, outputs):
    """Models that must run for some outputs, and no others."""
    found = set()
    for graph in bundle.parts:
        if {tensor.name for tensor in graph.outputs} & set(outputs):
            found |= {served_name(part.name) for part in needed(bundle, graph.name)}
    return found


def selections():
    """Every subset of the teachers' heads and the backbone; tasks alone and in pairs with a
    head.
    """
    units = [
        ("backbone_global", "backbone_patches"),
        *((f"{t}_token", f"{t}_patches") for t in TEACHERS),
    ]
    for count in range(1, len(units) + 1):
        for chosen in combinations(units, count):
            yield tuple(name for unit in chosen for name in unit)
    tasks = ("classification_logits", "segmentation_logits", "depth")
    singles = (
        "backbone_global",
        "backbone_patches",
        *(f"{t}_{kind}" for t in TEACHERS for kind in ("token", "patches")),
    )
    yield from ((name,) for name in (*singles, *tasks))
    yield from combinations(tasks, 2)
    yield from ((task, f"{t}_token") for task in tasks for t in TEACHERS)


@pytest.mark.parametrize("outputs", list(selections()), ids="+".join)
def test_a_selection_runs_exactly_the_models_it_needs(client, bundle, pixels, expected, outputs):
    before = executions(client)
    found = ask(client, "features", outputs, pixels)
    wanted = runs_needed(bundle, outputs) | {"features"}
    for _ in range(100):  # Triton counts a moment after it answers
        after = executions(client)
        ran = {name for name in after if after[name] > before.get(name, 0)}
        if ran >= wanted:
            break
        time.sleep(0.02)
    assert ran == wanted
    assert set(found) == set(outputs)
    for name in outputs:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_the_encoded_door_decodes_as_a_client_would(client, bundle, pixels, expected):
    outputs, files = [tensor.name for tensor in bundle.outputs], []
    for picture in pixels:  # already of the model's size and lossless: the same pixels must arrive
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append([buffer.getvalue()])
    encoded = grpc.InferInput("encoded", [len(files), 1], "BYTES")
    encoded.set_data_from_numpy(np.array(files, dtype=np.object_))
    answer = client.infer(
        "features_encoded", [encoded], outputs=[grpc.InferRequestedOutput(name) for name in outputs]
    )
    for name in outputs:
        np.testing.assert_allclose(answer.as_numpy(name), expected[name], rtol=1e-3, atol=1e-4)


def test_fused_says_what_the_front_door_says(client, bundle, pixels):
    outputs = [tensor.name for tensor in bundle.outputs]
    one, other = (ask(client, model, outputs, pixels) for model in ("fused", "features"))
    for name in outputs:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_requests_of_different_selections_at_once_each_get_their_own(
    client, bundle, pixels, expected
):
    every = [(tensor.name,) for tensor in bundle.outputs]
    pending = []
    for turn in range(60):
        image = grpc.InferInput("image", [1, *pixels.shape[1:]], "UINT8")
        picture = turn % len(pixels)
        image.set_data_from_numpy(pixels[picture : picture + 1])
        wanted = every[turn % len(every)]
        answers: list = []
        client.async_infer(
            "features",
            [image],
            lambda result, error, answers=answers: answers.append((result, error)),
            outputs=[grpc.InferRequestedOutput(name) for name in wanted],
            client_timeout=60,
        )
        pending.append((picture, wanted, answers))
    deadline = 600
    while any(not answers for *_, answers in pending) and deadline:
        time.sleep(0.1)
        deadline -= 1
    for picture, wanted, answers in pending:
        result, error = answers[0]
        assert error is None
        assert [port.name for port in result.get_response().outputs] == list(wanted)
        np.testing.assert_allclose(
            result.as_numpy(wanted[0])[0], expected[wanted[0]][picture], rtol=1e-3, atol=1e-4
        )
