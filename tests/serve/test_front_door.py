"""`features`, as one model and as an ensemble: every selection of outputs is answered, rightly, and
runs only the graphs it needs; models of two bundles answer an error.
"""

import io
import json
import os
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpc
from PIL import Image

from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from serve.bundle import read_bundle
from serve.repository.models import needed, served_name
from serve.server.rest import Refused, Rest
from tests.conftest import serving
from tests.serve.test_rollout import disturb, rewrite

TEACHERS = ("cls", "mae", "dino")


@pytest.fixture(scope="module")
def bundle(small_bundle):
    return read_bundle(small_bundle)


@pytest.fixture(scope="module")
def client(server):
    with grpc.InferenceServerClient(server.grpc) as found:
        yield found


@pytest.fixture(scope="module")
def apart(apart_server):
    with grpc.InferenceServerClient(apart_server.grpc) as found:
        yield found


@pytest.fixture(scope="module")
def pixels(bundle):
    """Three photographs as the model reads them."""
    photos, size = PackagedPhotos(), bundle.manifest.resolution
    return np.stack(
        [SQUASH.pixels(photos.load(number), size.height, size.width) for number in range(3)]
    )


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


def models_run(client):
    """How often each model of a server was executed."""
    return {
        stat.name: stat.execution_count for stat in client.get_inference_statistics().model_stats
    }


def graphs_run(server):
    """How often `features` executed each of its graphs, when nothing is left to be counted."""
    found, last = read_metric(server), None
    while found != last:
        time.sleep(0.15)  # the metric is that old at most
        found, last = read_metric(server), found
    return found


def read_metric(server):
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r"^student_graph_executions\{(.*)\} (\S+)$", text, re.M)
    return {re.search(r'graph="(\w+)"', labels)[1]: float(count) for labels, count in found}


def needs(bundle, outputs):
    """Graphs that must run for some outputs, and no others."""
    found = set()
    for graph in bundle.parts:
        if {tensor.name for tensor in graph.outputs} & set(outputs):
            found |= {part.name for part in needed(bundle, graph.name)}
    return found


def that_ran(count, before, wanted):
    """What was executed, once all that is wanted was."""
    for _ in range(100):  # counts come a moment after the answer
        after = count()
        ran = {name for name in after if after[name] > before.get(name, 0)}
        if ran >= wanted:
            break
        time.sleep(0.02)
    return ran


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
def test_a_selection_runs_exactly_the_graphs_it_needs(
    client, server, bundle, pixels, expected, outputs
):
    wanted = needs(bundle, outputs)
    before = graphs_run(server)
    found = ask(client, "features", outputs, pixels)
    assert that_ran(lambda: graphs_run(server), before, wanted) == wanted
    assert set(found) == set(outputs)
    for name in outputs:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("outputs", list(selections())[::3], ids="+".join)
def test_an_ensemble_runs_exactly_the_models_it_needs(apart, bundle, pixels, expected, outputs):
    wanted = {served_name(name) for name in needs(bundle, outputs)} | {"features"}
    before = models_run(apart)
    found = ask(apart, "features", outputs, pixels)
    assert that_ran(lambda: models_run(apart), before, wanted) == wanted
    assert set(found) == set(outputs)
    for name in outputs:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_both_forms_answer_the_same_bits(client, apart, bundle, pixels):
    outputs = [tensor.name for tensor in bundle.outputs]
    for count in (1, 3):
        one, other = (ask(door, "features", outputs, pixels[:count]) for door in (client, apart))
        for name in outputs:
            assert np.array_equal(one[name], other[name]), name
        for task, answer in (("segmentation", "class_map"), ("depth", "depth_map")):
            one, other = (ask(door, task, [answer], pixels[:count]) for door in (client, apart))
            assert np.array_equal(one[answer], other[answer])


def test_of_files_too_only_the_graphs_of_the_wanted_outputs_run(client, server, pixels):
    before = graphs_run(server)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, "PNG")
    encoded = grpc.InferInput("encoded", [1, 1], "BYTES")
    encoded.set_data_from_numpy(np.array([[buffer.getvalue()]], dtype=np.object_))
    wanted = [grpc.InferRequestedOutput("mae_token")]
    answer = client.infer("features_encoded", [encoded], outputs=wanted)
    assert [port.name for port in answer.get_response().outputs] == ["mae_token"]
    graphs = {"backbone", "interaction", "head_mae"}
    assert that_ran(lambda: graphs_run(server), before, graphs) == graphs


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


def test_a_head_that_fails_fails_the_requests_for_it_alone(small_bundle, bundle, pixels, tmp_path):
    """Also in one batch with others."""
    # no warm-up, which would run the broken ones
    settings = {"fused": False, "encoded": False, "warmup": False}
    with serving(small_bundle, tmp_path, **settings) as served:
        model = served.repository / "features" / "1" / "model.py"
        broken = """
    def open(self, graph, threads=None, views=False):
        call = super().open(graph, threads, views)
        if "head_mae" in graph.name:
            return lambda feeds: [value * np.nan for value in call(feeds)]
        if "head_cls" in graph.name:
            return lambda feeds: call(None)
        return call

    def read(self, request)"""
        code = model.read_text()
        assert "\n    def read(self, request)" in code
        model.write_text(code.replace("\n    def read(self, request)", broken, 1))
        Rest(served.http, served.admin_key).load("features")
        with (
            ThreadPoolExecutor(8) as threads,
            grpc.InferenceServerClient(served.grpc) as client,
        ):

            def answer(output):
                try:
                    return ask(client, "features", [output], pixels[:1])[output]
                except grpc.InferenceServerException as error:
                    return error.message()

            asked = ["mae_token", "dino_token", "cls_token", "backbone_global"] * 6
            for output, found in zip(asked, threads.map(answer, asked), strict=True):
                match output:
                    case "mae_token":
                        assert found == "output 'mae_token' holds NaN or infinity"
                    case "cls_token":
                        assert found == "the graph 'head_cls' failed: the server's log says why"
                    case _:
                        assert np.isfinite(found).all()
            stats = client.get_inference_statistics("features").model_stats[0]
            assert stats.inference_count > stats.execution_count, "nothing was batched"


@pytest.fixture(scope="module")
def other_bundle(small_bundle, tmp_path_factory):
    """A bundle of the same interface; its graphs say something else, and so do its classes."""
    folder = shutil.copytree(small_bundle, tmp_path_factory.mktemp("other") / "bundle")
    for graph in ("backbone", "head_cls"):
        disturb(folder / f"{graph}.onnx", 2.0)
    graphs = []
    for graph in read_bundle(folder).manifest.graphs:
        if graph.name == "segmentation":
            names = [f"other {name}" for name in graph.about["classes"]]
            graph = graph.model_copy(update={"about": {**graph.about, "classes": names}})
        graphs.append(graph)
    rewrite(folder, graphs=tuple(graphs))
    return folder


def exchange(served, other, model):
    """Put another bundle's model in the place of one, and load it."""
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings

    place = served.repository.parent / f"other_{model}"
    known = json.loads((served.repository / "made_with.json").read_text())["settings"]
    make_repository(read_bundle(other), place, Settings(**known))
    kept = served.repository.parent / f"kept_{model}"
    (served.repository / model).rename(kept)
    shutil.copytree(place / model, served.repository / model)
    for path in (served.repository / model).rglob("*"):
        os.utime(path)
    Rest(served.http, served.admin_key).load(model)
    return kept


@pytest.mark.parametrize("model", ["backbone", "head_cls", "segmentation_map"])
def test_an_ensemble_of_two_bundles_models_answers_an_error(
    apart_server, apart, small_bundle, other_bundle, pixels, model
):
    mine, theirs = (read_bundle(path).version for path in (small_bundle, other_bundle))
    kept = exchange(apart_server, other_bundle, model)
    try:
        for door, outputs in (("features", ["cls_token"]), ("segmentation", ["class_map"])):
            concerned = {"backbone": True, "head_cls": door == "features"}.get(
                model, door == "segmentation"
            )
            if not concerned:
                ask(apart, door, outputs, pixels[:1])
                continue
            with pytest.raises(grpc.InferenceServerException) as raised:
                ask(apart, door, outputs, pixels[:1])
            assert "the models are of two bundles" in raised.value.message()
            assert {mine, theirs} <= set(re.findall(r"[0-9a-f]{12}", raised.value.message()))
    finally:
        shutil.rmtree(apart_server.repository / model)
        kept.rename(apart_server.repository / model)
        for path in (apart_server.repository / model).rglob("*"):
            os.utime(path)
        Rest(apart_server.http, apart_server.admin_key).load(model)
    assert ask(apart, "features", ["cls_token"], pixels[:1])["cls_token"].shape[0] == 1


def test_a_task_of_another_bundle_does_not_name_this_ones_classes(
    small_bundle, other_bundle, pixels, tmp_path
):
    """One model holds the graphs, but another reads a head's output."""
    with (
        serving(small_bundle, tmp_path, fused=False, encoded=False) as served,
        grpc.InferenceServerClient(served.grpc) as client,
    ):
        ask(client, "segmentation", ["class_map"], pixels[:1])
        for model in ("segmentation", "depth"):
            exchange(served, other_bundle, model)
        with pytest.raises(grpc.InferenceServerException) as raised:
            ask(client, "segmentation", ["class_map"], pixels[:1])
        bundles = {read_bundle(path).version for path in (small_bundle, other_bundle)}
        assert bundles == set(re.findall(r"[0-9a-f]{12}", raised.value.message()))
        # a map of depths in metres is the same whoever makes it
        assert ask(client, "depth", ["depth_map"], pixels[:1])["depth_map"].shape[0] == 1
        graph = served.repository / "features" / "1" / "head_cls.onnx"
        graph.write_bytes((other_bundle / "head_cls.onnx").read_bytes())
        with pytest.raises(Refused, match="head_cls.onnx does not match its sha256"):
            Rest(served.http, served.admin_key).load("features")
        answer = ask(client, "features", ["cls_token"], pixels[:1])  # of what is still loaded
        assert np.isfinite(answer["cls_token"]).all()
