"""`python -m serve.demo`: the real page of a real server in headless Chromium."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from contract.views import SQUASH
from distill.data.pictures import PackagedPhotos
from export.text.__main__ import main as text
from serve.demo.__main__ import main
from tests.conftest import need_tritonserver, run_here
from tests.serve.running import lasting_port

LABELS = ("cat", "steam engine", "espresso")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a screen."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the optional extra [demo] is not installed")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else []
        )
        yield found
        found.close()


@pytest.fixture(scope="module")
def labelled(expensive, small_bundle, tmp_path_factory):
    """A server with zero-shot classes and a text encoder beside the small bundle's models."""
    need_tritonserver()
    open_clip = pytest.importorskip(
        "open_clip", reason="the optional extra [text] is not installed"
    )
    from serve.bundle import read_bundle
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder = tmp_path_factory.mktemp("labelled")
    configuration = {
        "embed_dim": 32,  # as wide as dino's token
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
    save_file(
        {key: value.contiguous() for key, value in clip.state_dict().items()},
        folder / "clip.safetensors",
    )
    (folder / "labels.txt").write_text("\n".join(LABELS))
    bundle = shutil.copytree(small_bundle, folder / "bundle")
    done = run_here(
        "--output",
        bundle,
        "--model",
        folder / "small-clip.json",
        "--pretrained",
        folder / "clip.safetensors",
        "--labels",
        folder / "labels.txt",
        "--teacher",
        "dino",
        "--with-encoder",
        command=text,
    )
    assert done.returncode == 0, done.stderr
    make_repository(
        read_bundle(bundle), folder / "repository", Settings(fused=False, encoded=False)
    )
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, lambda line: None
    ) as found:
        yield found


@contextmanager
def serving(url: str, *more: str):
    """The command itself; gives the page's address, and looks that it ends as told."""
    port = lasting_port()
    command = [sys.executable, "-m", "serve.demo", "--url", url, "--port", str(port), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "stop      " not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert f"page      http://127.0.0.1:{port}\n" in said
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and not said, said
    finally:
        process.kill()
        print(process.communicate()[0])  # pytest shows it if the test failed


@pytest.fixture(scope="module")
def address(browser, labelled):
    with serving(labelled.grpc) as found:
        yield found


@pytest.fixture
def page(browser, address):
    """The page, opened; nothing may be asked of another machine, nor go wrong in the browser."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found, asked, wrong = context.new_page(), [], []
    found.set_default_timeout(20_000)
    found.on("request", lambda request: asked.append(request.url))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    opened(found, address)
    yield found
    context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not wrong


def opened(page, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#photograph input[type=file]", state="attached")
    page.wait_for_selector(".heading h1")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "cat.png"
    PackagedPhotos().load(0).convert("RGB").resize((300, 200)).save(path)
    return path


def answered(page, requests: int) -> None:
    """Wait for so many answers; a sentence about something that went wrong is none."""
    page.wait_for_selector(f".requests dt:nth-of-type({requests}), .problem, .toast-body")
    wrong = page.locator(".problem, .toast-body").all_inner_texts()
    assert not wrong
    page.wait_for_selector(f".requests dt:nth-of-type({requests})")


def drop(page, path: Path) -> None:
    """Let go of a file over the page, as a mouse does."""
    held = page.evaluate_handle(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const held = new DataTransfer();
            held.items.add(new File([bytes], name, {type: "image/png"}));
            return held;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), path.name],
    )
    page.dispatch_event("#photograph button[aria-dropeffect]", "drop", {"dataTransfer": held})


def picture(page, selector: str) -> Image.Image:
    """A picture of the page, as the browser got it; it must be drawn, too."""
    assert page.eval_on_selector(selector, "image => image.complete && image.naturalWidth > 0")
    kind, data = page.get_attribute(selector, "src").split(",")
    assert kind.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def spread(image: Image.Image) -> float:
    """How much pixels differ: 0 for a blank picture."""
    return float(np.asarray(image, np.float32).reshape(-1, 3).std(axis=0).max())


def test_a_dropped_photograph_is_answered_by_everything_the_server_has(page, photo, tmp_path):
    drop(page, photo)
    answered(page, 4)
    names = page.locator(".patches figcaption").all_inner_texts()
    assert [name.split("\n")[0] for name in names] == [
        "as the model sees it",
        "backbone",
        "cls",
        "mae",
        "dino",
    ]
    seen = picture(page, ".patches img.seen")
    np.testing.assert_array_equal(seen, SQUASH.pixels(Image.open(photo), 64, 64))
    maps = [picture(page, f".patches figure:nth-of-type({number}) img") for number in range(2, 6)]
    assert all(spread(image) > 20 for image in maps)
    assert len({image.tobytes() for image in maps}) == 4
    for task in ("segmentation", "depth"):
        shown = picture(page, f".{task} img")
        assert spread(shown) > 10 and shown.width / shown.height == pytest.approx(1.5, abs=0.01)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", page.inner_text(".legend"))]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    marks = [float(mark) for mark in page.locator(".scale span").all_inner_texts()]
    assert len(marks) == 5 and marks == sorted(marks) and marks[0] > 0
    assert sorted(page.locator(".bars span").all_inner_texts()) == sorted(LABELS)
    requests = dict(
        zip(
            page.locator(".requests dt").all_inner_texts(),
            page.locator(".ran").all_inner_texts(),
            strict=True,
        )
    )
    ran = {what: set(models.split(", ")) for what, models in requests.items()}
    assert ran["features, 4 outputs"] == {"features"}
    assert ran["depth"] == {"depth", "features"}
    assert ran["zero_shot"] >= {"zero_shot", "features"}
    times = [
        float(time.removesuffix(" ms"))
        for time in page.locator(".requests dd:not(.ran)").all_inner_texts()
    ]
    assert len(times) == 4 and min(times) > 0
    page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (1280, 900) and spread(shot.convert("RGB")) > 20


def test_an_example_is_answered_too(page):
    page.click(".gallery-item >> nth=0")
    answered(page, 4)
    assert spread(picture(page, ".patches img.seen")) > 10


def test_new_labels_are_answered_as_they_were_written(page, photo):
    page.set_input_files("#photograph input[type=file]", photo)
    page.wait_for_selector(".bars")
    before = picture(page, ".segmentation img")
    labels = ["<b>dog</b>", "${1 + 1} {{x}}", "naïve café"]
    page.fill("#labels textarea", "\n".join([*labels, "", "  "]))
    page.click("#again")
    page.wait_for_selector(".zero-shot:has-text('your labels')")
    assert sorted(page.locator(".bars span").all_inner_texts()) == sorted(labels)
    chances = [float(chance.rstrip("%")) for chance in page.locator(".bars b").all_inner_texts()]
    assert sum(chances) == pytest.approx(100, abs=0.3) and chances == sorted(chances, reverse=True)
    assert ImageChops.difference(before, picture(page, ".segmentation img")).getbbox() is None
    page.fill("#labels textarea", "cat\ncat")
    page.click("#again")
    page.wait_for_selector(".problem")
    assert "label 'cat' is given twice" in page.inner_text(".problem").lower()
    assert page.locator(".patches img").count() == 5  # one request's mistake is not the others'


def test_what_is_no_picture_is_told_in_a_sentence(page, photo, tmp_path):
    for name, data in (("torn.png", photo.read_bytes()[:900]), ("none.jpg", b"no picture at all")):
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#photograph input[type=file]", tmp_path / name)
        page.wait_for_selector(f".problem:has-text('{name}')")
        said = page.inner_text(".problem")
        assert "This picture cannot be read" in said and "Traceback" not in page.content()
        assert "not a JPEG, PNG or WEBP picture" in said or "cannot be decoded" in said
        assert page.locator(".cards img").count() == 0
        page.click("#photograph button[aria-label='Remove Image']")
        page.wait_for_selector(".hint")
    page.set_input_files("#photograph input[type=file]", photo)
    page.wait_for_selector(".patches img")


def test_files_that_were_not_uploaded_are_not_read(page, photo, address):
    """A request written by hand may name any file: this one is a picture that could be shown."""
    said = page.evaluate(
        """async path => {
            const {dependencies} = await (await fetch("config")).json();
            const number = dependencies.find(one => one.inputs.length == 2).id;
            const asked = {data: [{path}, ""], fn_index: number, session_hash: "by-hand"};
            const headers = {"Content-Type": "application/json"};
            await fetch("gradio_api/queue/join", {method: "POST", headers, body: JSON.stringify(asked)});
            const reader = (await fetch("gradio_api/queue/data?session_hash=by-hand")).body.getReader();
            let said = "";
            while (!said.includes("process_completed")) said += new TextDecoder().decode((await reader.read()).value);
            return said;
        }""",
        str(photo),
    )
    assert "The file was not uploaded to this page" in said and "<img" not in said


def test_a_server_that_is_gone_is_told_in_a_sentence_and_may_come_back(
    page, photo, labelled, address
):
    labelled.kill()
    try:
        page.set_input_files("#photograph input[type=file]", photo)
        page.wait_for_selector(".problem")
        assert f"No server answers at {labelled.grpc}" in page.inner_text(".problem")
        page.reload()
        page.wait_for_selector(".heading:has-text('No server answers')")
    finally:
        labelled.start()
    opened(page, address)
    page.set_input_files("#photograph input[type=file]", photo)
    answered(page, 4)


def test_without_zero_shot_nothing_is_said_of_it(browser, server, photo):
    with serving(server.grpc) as address:
        page = browser.new_page()
        opened(page, address)
        page.set_input_files("#photograph input[type=file]", photo)
        answered(page, 3)
        page.wait_for_timeout(300)
        assert page.locator(".zero-shot, .problem, #labels:visible, #again:visible").count() == 0
        assert page.locator(".segmentation, .depth").count() == 2
        page.close()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ("--url", "127.0.0.1:1"),
            1,
            "no server answers at 127.0.0.1:1: start one with python -m serve.run BUNDLE",
        ),
        (("--port", "0"), 2, "--port 0: ports are 1 to 65535"),
        (("--host", "203.0.113.7"), 2, "Cannot assign requested address"),
        (
            ("--ssl-root", "nowhere.pem"),
            2,
            "TLS root nowhere.pem: No such file or directory (give a PEM file)",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, status, says, capsys):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the optional extra [demo] is not installed")
    given = ["--port", str(lasting_port()), *arguments]
    assert main(given) == status
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_port_in_use_is_one_line(capsys):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the optional extra [demo] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert (
        f"port {port} of 127.0.0.1: Address already in use (choose another with --port)"
        in capsys.readouterr().err
    )


def test_labels_for_a_server_without_zero_shot_are_refused(server, capsys):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the optional extra [demo] is not installed")
    assert main(["--url", server.grpc, "--port", str(lasting_port()), "--labels", "cat"]) == 2
    assert "--labels: the server has no zero_shot and no detection" in capsys.readouterr().err


def test_a_server_without_tls_is_told_apart_from_none(server, capsys):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the optional extra [demo] is not installed")
    assert main(["--url", server.grpc, "--port", str(lasting_port()), "--ssl"]) == 2
    assert "does not answer in TLS" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert main([]) == 2
    assert "pip install 'vfm-distill[demo]'" in capsys.readouterr().err


def test_the_gateway_embeds_texts_in_the_space_of_the_teacher(labelled):
    """Here, because this server has a text encoder; it takes no files, so the gateway decodes."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("prometheus_client", reason="the optional extra [gateway] is not installed")
    from serve.client import FeatureClient
    from serve.client.aio import AsyncFeatureClient
    from serve.client.tasks.text import embed_texts
    from serve.gateway.app import Gateway
    from serve.gateway.keys import Keys
    from serve.gateway.metrics import Metrics
    from serve.gateway.offer import Watch

    buffer = io.BytesIO()
    PackagedPhotos().load(0).convert("RGB").resize((90, 60)).save(buffer, "JPEG")
    data = buffer.getvalue()
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"

    async def ask(*bodies: dict) -> list:
        async with AsyncFeatureClient(labelled.grpc) as client:
            watch = Watch(client)
            await watch.look()
            app = httpx.ASGITransport(Gateway(client, watch, Keys(()), Metrics()))
            async with httpx.AsyncClient(transport=app, base_url="http://gateway") as there:
                return [await there.post("/v1/embeddings", json=body) for body in bodies] + [
                    await there.get("/v1/models/dino_token")
                ]

    texts = {"model": "dino_token", "input": ["a cat", uri, {"type": "text", "text": "espresso"}]}
    long = texts | {"input": ["a cat", "x" * 600]}
    damaged = f"data:image/jpeg;base64,{base64.b64encode(data[:900]).decode()}"
    half = {"model": "dino_token", "input": [uri, damaged]}
    # in a thread of its own: Playwright's browser, in earlier tests, leaves a loop running here
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: asyncio.run(ask(texts, long, half)))
    mixed, refused, broken, model = answers.result()
    assert model.json()["modalities"] == ["image", "text"]
    rows = [np.float32(row["embedding"]) for row in mixed.json()["data"]]
    with FeatureClient(labelled.grpc) as client:
        cat, espresso = embed_texts(client, ["a cat", "espresso"])
        picture = client.features([data], ["dino_token"])["dino_token"][0]
    for found, expected in zip(rows, (cat, picture, espresso), strict=True):
        assert np.array_equal(found, expected)
    assert np.isclose(np.linalg.norm(cat), 1, atol=1e-5) and not np.allclose(cat, espresso)
    for response, code in ((refused, "invalid_text"), (broken, "invalid_image")):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, code, "input[1]")
