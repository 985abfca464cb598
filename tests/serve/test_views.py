"""Evaluation, export, this process, the server by pixels and by files: one picture, one view."""

import asyncio
import base64
import io
import json
import shutil
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
from PIL import Image

from contract import dense
from contract.images import TRUSTED, Limits
from contract.manifest import MANIFEST, read_manifest
from contract.tasks import TASKS
from contract.views import UNSEEN, ViewPolicy
from distill.data.pictures import PackagedPhotos
from distill.evaluate.config import ExtractConfig
from distill.evaluate.encoder import RunEncoder
from distill.evaluate.extract import seen
from distill.methods.deployment import BACKBONE
from distill.runs import load_run
from export.photographs import shown
from serve.bundle import read_bundle
from serve.client import FeatureClient
from serve.client.__main__ import main as client_main
from serve.client.inputs import Picture, list_pictures, to_tensor
from serve.client.tasks.depth import estimate_depth
from serve.client.tasks.maps import map_of_tiles, predict_map
from serve.client.tasks.segmentation import segment
from serve.embed.data import Entry
from serve.embed.reading import read_row
from serve.errors import BadRequest, NotServed
from serve.status import main as status
from tests.conftest import long_case, need_tritonserver
from tests.serve.raw_requests import encode

SIZE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """The 19 packaged photographs as PNG, which every decoder gives the same pixels of."""
    folder, source, paths = tmp_path_factory.mktemp("photos"), PackagedPhotos(), []
    for number in range(len(source)):
        paths.append(folder / f"{number:02d}.png")
        source.load(number).convert("RGB").save(paths[-1], compress_level=1)
    return paths


def with_view(bundle: Path, folder: Path, view: str) -> Path:
    """A copy of a bundle whose manifest says another view, as export writes it, and a mean of
    0.5.
    """
    shutil.copytree(bundle, folder)
    manifest = read_manifest(folder)
    preprocessing = manifest.preprocessing.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    changes = {"view": view, "preprocessing": preprocessing}
    manifest = manifest.model_copy(update=changes).sealed()
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


@pytest.fixture(
    scope="module",
    params=["centre-crop:0.875", *map(long_case, ("squash", "letterbox:7c7468,bilinear"))],
)
def served(request, expensive, small_bundle, tmp_path_factory):
    """A policy, and a server on a bundle with it."""
    with serving(small_bundle, tmp_path_factory.mktemp("views"), request.param) as server:
        yield ViewPolicy.parse(request.param), server


@pytest.fixture(scope="module")
def tiled(expensive, small_bundle, tmp_path_factory):
    """A server on a bundle of tiles."""
    with serving(small_bundle, tmp_path_factory.mktemp("tiles"), "tiles:0.25") as server:
        yield server


@contextmanager
def serving(small_bundle: Path, folder: Path, view: str):
    """A server on a copy of the small bundle with another view."""
    need_tritonserver()
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    bundle = read_bundle(with_view(small_bundle, folder / "bundle", view))
    make_repository(bundle, folder / "repository", Settings(fused=False))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, lambda line: None
    ) as server:
        yield server


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def decoded(address: str, files: list[bytes]) -> np.ndarray:
    """What the server's own step `decode` makes of files."""
    port = grpc.InferInput("encoded", [len(files), 1], "BYTES")
    port.set_data_from_numpy(np.array(files, np.object_)[:, None])
    with grpc.InferenceServerClient(address) as client:
        return client.infer("decode", [port]).as_numpy("image")


def test_all_see_the_same_pixels(served, small_bundle, photos):
    view, server = served
    run = load_run(small_bundle.parent / "run")
    assert run.recipe.view == "centre-crop:0.875"
    encoder = RunEncoder(run, BACKBONE)
    policy = encoder.view_of(ExtractConfig(view=str(view)))
    pictures = [opened(path) for path in photos]
    evaluated = torch.stack([seen(photo, SIZE, policy) for photo in pictures])
    wanted = evaluated.permute(0, 2, 3, 1).numpy()
    exported = [shown(photo, (SIZE, SIZE), view) for photo in pictures]
    assert np.array_equal(exported, wanted), "export's comparison"
    sent = to_tensor(list_pictures(photos), (SIZE, SIZE), view, False, Limits())["image"]
    assert np.array_equal(sent, wanted), "a client's pixels"
    rows = [read_row(Entry(str(path)), SIZE, SIZE, view).pixels for path in photos]
    assert np.array_equal(rows, wanted), "serve.embed"
    files = [path.read_bytes() for path in photos]
    there = [decoded(server.grpc, files[n : n + 4]) for n in range(0, len(files), 4)]
    assert np.array_equal(np.concatenate(there), wanted), "the server's decoder"
    # JPEGs are decoded smaller where they are served, and whole where they are evaluated
    worst = 0.0
    for photo in pictures:
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=92)
        data = buffer.getvalue()
        whole = shown(Image.open(io.BytesIO(data)), (SIZE, SIZE), view).astype(int)
        near = Picture(data, "a JPEG").views((SIZE, SIZE), view, TRUSTED)[0]
        assert np.array_equal(decoded(server.grpc, [data])[0], near)
        worst = max(worst, float(np.abs(near - whole).mean()))
    assert worst < 4, "of 255, on average in the photograph that differs most"

    # and so the same classes: of 50 at random, which another view changes
    with torch.inference_mode():
        summaries = encoder(evaluated).summary.numpy()
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(summaries.shape[1], 50)).astype(np.float32)
    with FeatureClient(server.grpc) as client:
        answers = {
            name: client.features(photos, "backbone_global", **options)["backbone_global"]
            for name, options in {
                "pixels": {},
                "files": {"encoded": True},
                "another": {"view": "squash" if view.kind != "squash" else "centre-crop"},
            }.items()
        }
    centred = summaries - summaries.mean(0)
    classes = {
        name: ((answer - summaries.mean(0)) @ rows).argmax(1) for name, answer in answers.items()
    }
    for name in ("pixels", "files"):
        np.testing.assert_allclose(answers[name], summaries, rtol=1e-3, atol=1e-3)
        assert np.array_equal(classes[name], (centred @ rows).argmax(1)), f"19 of 19 by {name}"
    assert (classes["another"] != classes["pixels"]).any()


def test_maps_have_the_pictures_own_size(served, photos, tmp_path, capsys):
    view, server = served
    chosen = [photos[3], photos[14], photos[9]]
    sizes = [opened(path).size[::-1] for path in chosen]
    with FeatureClient(server.grpc) as client:
        for side in ("server", "client"):
            classes = segment(client, chosen, side=side).class_map
            depth = estimate_depth(client, chosen, side=side).depth
            assert [values.shape for values in classes] == sizes
            for one, metres in zip(classes, depth, strict=True):
                unseen = one == UNSEEN
                assert np.array_equal(np.isnan(metres), unseen)
                assert unseen.any() == (view.kind == "centre-crop")
        pixels = to_tensor(list_pictures(chosen), (SIZE, SIZE), view, False, Limits())["image"]
        # those of the model's size are as they were sent
        raw = segment(client, pixels)
        for one, other, size in zip(classes, raw.class_map, sizes, strict=True):
            back = view.undo(other[None], size, nearest=True)
            assert (back != one).mean() < 1e-3
        # and sent as files they are seen as any file is
        arrays, files = (
            predict_map(client, "segmentation", source, side="client", encoded=True).values
            for source in (pixels, [encode(Image.fromarray(one), "PNG") for one in pixels])
        )
        assert np.array_equal(arrays, files)
        tiled = predict_map(client, "segmentation", chosen, view="tiles:0.25")
        assert [values.shape for values in tiled.values] == sizes
        assert min(values.min() for values in tiled.values) >= 0
        with pytest.raises(BadRequest, match="tiles are for maps"):
            client.features(chosen, view="tiles")
        with pytest.raises(BadRequest, match="leave one of them out"):
            client.features(chosen, view="squash", encoded=True)
        with pytest.raises(BadRequest, match="view 'crop': choose squash, centre-crop"):
            client.features(chosen, view="crop")
    out = tmp_path / "out"
    words = [*map(str, chosen[:2]), "--task", "segmentation", "--url", server.grpc]
    assert client_main([*words, "--output", str(out)]) == 0
    with np.load(out / "segmentation.npz") as arrays:
        assert arrays["class_map.1"].shape == sizes[1]
        with Image.open(out / f"{chosen[1].stem}_classes.png") as picture:
            drawn = np.asarray(picture)
        expected = arrays["class_map.1"]
        assert np.array_equal(drawn, np.where(expected == UNSEEN, 255, expected))
    assert client_main([*words, "--task", "features", "--output", str(out)]) == 0
    with np.load(out / "features.npz") as arrays:
        assert str(arrays["view"]) == str(view)
    capsys.readouterr()
    assert status(["--url", server.http, "--metrics", server.metrics]) == 0
    assert f"view of features version 1: {view}" in capsys.readouterr().out


def test_a_letterbox_lies_on_the_mean_that_the_network_subtracts(served, small_bundle, photos):
    _, server = served
    picture = opened(photos[0]).resize((120, 40))
    with FeatureClient(server.grpc) as client:
        found, grey, other = (
            client.features([picture], outputs=["backbone_global"], view=view).arrays[
                "backbone_global"
            ]
            for view in ("letterbox", "letterbox:808080", "letterbox:7c7468")
        )
    assert np.array_equal(found, grey) and not np.array_equal(found, other)


def test_a_bundle_of_tiles_has_no_decoder(small_bundle, tmp_path, capsys):
    from serve.repository.build import make_repository
    from serve.repository.models import build_models
    from serve.repository.settings import Settings
    from serve.run import show
    from serve.server.launch import Options

    bundle = read_bundle(with_view(small_bundle, tmp_path / "bundle", "tiles:0.25"))
    models = {model.name: model for model in build_models(bundle, Settings())}
    assert not {"decode", "features_encoded"} & set(models)
    about = json.loads(models["features"].config.parameters["about"].string_value)
    assert about["view"] == "tiles:0.25"
    make_repository(bundle, tmp_path / "models", Settings())
    server = SimpleNamespace(
        repository=tmp_path / "models",
        options=Options(),
        grpc="127.0.0.1:8001",
        front=None,
        http="",
        metrics="",
        tritonserver=SimpleNamespace(executable=""),
    )
    show(server, 0, kept=True)
    assert " --view letterbox" in capsys.readouterr().out, "the command that it tells is answered"


def test_the_gateway_embeds_the_whole_picture_where_the_view_is_tiles(tiled, photos, caplog):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("prometheus_client", reason="the optional extra [gateway] is not installed")
    from serve.client.aio import AsyncFeatureClient
    from serve.gateway.app import Gateway
    from serve.gateway.keys import Keys
    from serve.gateway.metrics import Metrics
    from serve.gateway.offer import Watch

    chosen = [photos[3], photos[14]]
    coded = [base64.b64encode(path.read_bytes()).decode() for path in chosen]
    body = {
        "model": "backbone_global",
        "input": [f"data:image/png;base64,{text}" for text in coded],
    }

    async def ask() -> list:
        async with AsyncFeatureClient(tiled.grpc) as client:
            watch = Watch(client)
            for _ in range(3):
                await watch.look()
            assert not watch.offer.decodes
            app = httpx.ASGITransport(Gateway(client, watch, Keys(()), Metrics()))
            async with httpx.AsyncClient(transport=app, base_url="http://gateway") as there:
                answers = [await there.post("/v1/embeddings", json=body)]
                return [*answers, await there.get("/v1/models"), await there.get("/health/ready")]

    with caplog.at_level("WARNING", "serve.gateway"):
        answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    rows = np.float32([row["embedding"] for row in answers[0].json()["data"]])
    with FeatureClient(tiled.grpc) as client:
        wanted = client.features(chosen, "backbone_global", view="letterbox")["backbone_global"]
    np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-5)
    said = [record.getMessage() for record in caplog.records if "tiles" in record.getMessage()]
    assert len(said) == 1, "once, however often the server is asked"
    assert "view is tiles:0.25" in said[0] and "view letterbox" in said[0]


def test_the_page_shows_the_whole_picture_where_the_view_is_tiles(tiled, photos, monkeypatch):
    from serve.demo import answers

    with FeatureClient(tiled.grpc) as client:
        offer = answers.ask_offer(client)
        # the bundle has neither classes nor a detector: that they are asked with it is enough
        more = offer._replace(tasks=(*offer.tasks, "zero_shot", "detection"))
        monkeypatch.setattr(answers, "ask_offer", lambda client: more)
        views = []

        def asked(*_: object, view: str | None = None) -> None:
            views.append(view)
            raise NotServed("not here")

        for name in ("classify", "detect"):
            monkeypatch.setattr(answers, name, asked)
        *_, (page, _) = answers.look(client, opened(photos[3]), None)
    assert views == ["letterbox"] * 2 and page.count("not here") == 2
    cards = ('class="card patches', 'class="card segmentation', 'class="card depth')
    assert all(card in page for card in cards)


def test_scores_of_tiles_are_not_held_together():
    """Eight tiles' scores at every pixel are 60 MB; the overlapping sum of them is 47 MB."""
    task, size, picture, classes = TASKS["segmentation"], (112, 112), (112, 700), 150
    view = ViewPolicy.parse("tiles:0.25")
    places = view.places(picture, size)
    cells = np.random.default_rng(0).normal(size=(len(places), 64, classes)).astype(np.float32)
    tracemalloc.start()
    try:
        found = map_of_tiles(task, cells, view, size, picture, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tile = 4 * size[0] * size[1] * classes
    total = 4 * places[0].height * places[0].width * classes
    assert len(places) == 8 and peak < total + 3 * tile, f"{peak / tile:.1f} tiles"
    assert np.array_equal(found, view.undo(dense.upsample(cells, *size), picture, scores=True))
