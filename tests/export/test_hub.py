"""Folders for timm and transformers: what they load is the student, bad input, and the upload."""

import base64
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, dynamic_module_utils

from contract.errors import Failure, UserError
from contract.views import ViewPolicy
from distill.runs import load_run
from export.hub import card, gate, loaders
from export.hub.__main__ import main as hub
from export.hub.assemble import HEADS, WEIGHTS
from export.hub.code import Name, bundle
from export.hub.describe import public_licences, public_recipe
from export.hub.network import pictures_seen
from export.hub.push import check_push, push
from tests.conftest import long_case, run_here, small_recipe
from tests.distill.methods.test_sefa import sefa_recipe

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


RUN_LOADERS = gate._run


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies the code of repositories, not in the user's home."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, modules: Path) -> None:
    """The loaders run in this process, which saves the seconds that importing torch takes; the
    first test runs them in their own.
    """
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path, str(modules)])
    monkeypatch.setattr(gate, "_run", lambda folder, work: loaders.main(str(folder), work))


@pytest.fixture
def run_of(tmp_path: Path, photo_folder: Path) -> Callable[..., Path]:
    """A function that trains a recipe for a step."""

    def train(recipe: dict) -> Path:
        recipe["train"] |= {"steps": 1, "batch_size": 2}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        done = run_here(tmp_path / "recipe.yaml", "--output", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        return tmp_path / "run"

    return train


def plain(photos: Path, name: str, size: int = 64, **kwargs: object) -> dict:
    recipe = small_recipe(photos, method="plain")
    recipe["student"] = {"name": name, "image_size": size, "kwargs": kwargs}
    return recipe | {"teachers": recipe["teachers"][1:2]}


def kpu(photos: Path) -> dict:
    recipe = small_recipe(photos, method="kpu", targets={"normalize": "none"})
    recipe["student"] = {"name": "vit_small_patch14_dinov2", "image_size": 70, "kwargs": VIT}
    adapter = {"blocks": 1, "extra": 1, "heads": 2, "points": 2, "width": 32}
    return recipe | {"kpu": {"hidden": 16, "adapter": adapter}}


def phi_s(photos: Path) -> dict:
    recipe = small_recipe(photos, targets={"normalize": "phi-s"})
    recipe["student"] = {"name": "resnet10t", "image_size": 64}
    return recipe | {"umt": {"token_dim": 64, "space_dim": 64}}


def literal(photos: Path) -> dict:
    return sefa_recipe(photos, sefa={"head": "dino_literal", "standardize": "fit"})


def ladder(photos: Path) -> dict:
    recipe = small_recipe(photos, method="unic", targets={"normalize": "none"})
    return recipe | {"unic": {"hidden": 16, "last_hidden": 16, "heads": "ladder"}}


def unic(photos: Path) -> dict:
    recipe = small_recipe(photos, method="unic", targets={"normalize": "none"})
    return recipe | {"unic": {"last_hidden": 16, "heads": "mlp"}}


CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


@pytest.mark.parametrize(
    ("recipe", "pooled"),
    [
        (lambda photos: plain(photos, "convnext_atto", **CONVNEXT), False),
        (lambda photos: plain(photos, "vit_small_patch16_dinov3", **VIT), True),
        (lambda photos: sefa_recipe(photos, "udi"), True),
        (kpu, None),
        long_case(lambda photos: plain(photos, "mobilenetv4_conv_small"), False),
        long_case(lambda photos: plain(photos, "vit_base_patch16_siglip_gap_224", **VIT), True),
        long_case(lambda photos: plain(photos, "vit_base_patch16_siglip_224", **VIT), True),
        long_case(phi_s, True),
        long_case(literal, True),
        long_case(unic, True),
        long_case(ladder, True),
    ],
)
def test_what_is_loaded_is_the_student(run_of, photo_folder, tmp_path, recipe, pooled):
    """The command compares features, heads and pixels of all loaders, or fails."""
    run = run_of(recipe(photo_folder))
    words = ("--output", tmp_path / "hub", "--images", photo_folder)
    done = run_here(run, *words, command=hub)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config.get("do_pooling") is pooled
    loaded = [name for name in ("timm", "transformers", "pipeline") if f"\n{name}." in done.stdout]
    assert loaded == ([] if pooled is None else ["timm", "transformers", "pipeline"])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert ("cannot load this student" in card) == (pooled is None)
    assert ("gives another vector" in card) == (pooled is False)
    if pooled is None:
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModel.from_pretrained(tmp_path / "hub", trust_remote_code=False)


@pytest.fixture(scope="module")
def run(small_bundle: Path) -> Path:
    """A finished run of UMT with three teachers."""
    return small_bundle.parent / "run"


@pytest.fixture(scope="module")
def folder(run: Path, modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, made by the command, whose loaders run in a process of their own."""
    place = tmp_path_factory.mktemp("hub") / "umt"
    done = run_here(run, "--output", place, command=hub)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
def test_the_folder_needs_nothing_of_this_package_and_tells_no_paths(folder, photo_folder):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "features.png",
        "model.safetensors",
        "modeling_vfm_distill.py",
        "teacher_heads.safetensors",
    }
    for path in folder.glob("*.py"):
        assert "import distill" not in path.read_text() and "from distill" not in path.read_text()
        compile(path.read_text(), path.name, "exec")
    config = (folder / "config.json").read_text()
    assert str(photo_folder.parent) not in config + (folder / "README.md").read_text()
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "timm" and front["license"] == "other"
    assert "| linear |" in (folder / "README.md").read_text()  # of evaluation.json


SECRET = "/home/me/Client X/"
"""A folder that nobody else is to know, with a blank."""


def test_no_folder_of_this_machine_is_told(plain_run, monkeypatch):
    run = load_run(plain_run)
    (old,) = run.recipe.teachers[:1]
    teachers = [
        old.model_copy(update={"alias": f"t{number}", **update})
        for number, update in enumerate(
            [
                {"name": f"hf:{SECRET}net"},
                {"name": "hf:../Client X/net"},
                {"name": "hf:Client X/net"},
                {"name": "hf:them/net@main"},
                {"name": "hf:Client/net", "pretrained": False},
                {"name": "local-dir:~/Client X/net"},
                {"name": "python:own.nets:build", "kwargs": {"a": [{"b": f"{SECRET}net"}]}},
                {"name": "resnet10t.c3_in1k", "checkpoint": f"{SECRET}x.pth"},
                {"name": "resnet10t", "checkpoint": "Client X/x.pth"},
                {"name": "mobilenetv2_100", "checkpoint": "package:mobilenet-v2"},
                {"name": "run", "checkpoint": f"{SECRET}run/"},
            ]
        )
    ]
    sources = [
        f"folder {SECRET}net",
        "folder ../Client X/net (licence stated in the recipe)",
        "folder Client X/net",
        "hf-hub:them/net@main",
        "random weights",
        "folder ~/Client X/net",
        "python:own.nets:build",
        f"file {SECRET}x.pth",
        "file Client X/x.pth",
        "package:mobilenet-v2 of torch-mobilenet",
        f"run {SECRET}run/",
    ]
    record = run.licences[0]
    records = [
        record.model_copy(update={"label": f"t{i}", "name": teachers[i].name, "source": source})
        for i, source in enumerate(sources)
    ]
    changed = run.recipe.model_copy(
        update={
            "teachers": tuple(teachers),
            "monitor": run.recipe.monitor.model_copy(update={"data": f"{SECRET}labelled"}),
            "data": run.recipe.data.model_copy(update={"path": [f"{SECRET}a.tar", "~/Client/b"]}),
            "student": run.recipe.student.model_copy(
                update={"checkpoint": "../Client X/x.pth", "kwargs": {"file": f"{SECRET}y"}}
            ),
        }
    )
    run = replace(run, recipe=changed, licences=tuple(records))
    values = {"recipe": public_recipe(run), "licences": public_licences(run)}
    text = str(values)
    assert "Client" not in text and "home" not in text
    assert values["recipe"]["monitor"]["data"] == "labelled"
    assert values["recipe"]["data"]["path"] == ["a.tar", "b"]
    assert [record.source for record in values["licences"]] == [
        "folder net",
        "folder net (licence stated in the recipe)",
        "folder net",
        "hf-hub:them/net@main",
        "random weights",
        "folder net",
        "python:own.nets:build",
        "file x.pth",
        "file x.pth",
        "package:mobilenet-v2 of torch-mobilenet",
        "run run",
    ]
    assert [(t["name"], t["checkpoint"]) for t in values["recipe"]["teachers"]] == [
        ("hf:net", None),
        ("hf:net", None),
        ("hf:net", None),
        ("hf:them/net@main", None),
        ("hf:net", None),
        ("local-dir:net", None),
        ("python:own.nets:build", None),
        ("resnet10t.c3_in1k", "x.pth"),
        ("resnet10t", "x.pth"),
        ("mobilenetv2_100", "package:mobilenet-v2"),
        ("run", "run"),
    ]
    rows = {f"teacher t0 (hf:{SECRET}net)": {}, f"{SECRET}run": {}, "student backbone": {}}
    scored = {row: {"knn": {"scores": {"top1": 0.5}}} for row in rows}
    monkeypatch.setattr(card, "read_scores", lambda path: scored)
    table = card._scores(run)[1]
    assert "| teacher t0 (hf:net) |" in table and "| run |" in table
    assert "| student backbone |" in table and "Client" not in table


@pytest.mark.slow
def test_a_model_with_its_heads_can_be_saved_and_loaded_again(folder, tmp_path):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        model.save_pretrained(tmp_path / "tuned")
        again = AutoModel.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
        pixels = torch.rand(1, 3, 64, 64)
        one, other = model(pixels), again(pixels, teachers=["dino", "cls"])
        assert list(other.teachers) == ["dino", "cls"]
        for label, prediction in other.teachers.items():
            assert torch.equal(prediction.patches, one.teachers[label].patches)
        assert torch.equal(one.pooler_output, again(pixels, teachers=[]).pooler_output)
        net = timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()
        assert torch.equal(net(pixels), one.pooler_output)
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert tuned(torch.rand(1, 3, 96, 64)).shape == (1, 7)


@pytest.mark.slow
def test_a_student_that_started_from_such_a_folder_is_written_in_its_turn(
    folder, run_of, photo_folder, tmp_path
):
    recipe = plain(photo_folder, f"local-dir:{folder}")
    recipe["student"]["pretrained"] = True
    done = run_here(run_of(recipe), "--output", tmp_path / "hub", command=hub)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "hub" / "config.json").read_text()
    own = json.loads(text)["vfm_distill"]
    labels = [record["label"] for record in own["licences"]]
    assert labels == ["student", "student.cls", "student.mae", "student.dino", "mae"]
    assert own["licences"][0]["source"] == f"file {WEIGHTS}"
    assert own["recipe"]["student"]["name"] == "vit_tiny_patch16_224"
    assert str(folder.parent) not in text + (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [WEIGHTS, HEADS])
def test_a_folder_that_is_not_the_student_is_not_written(run, tmp_path, monkeypatch, name):
    def damaged(place: Path, work: Path) -> None:
        tensors = load_file(place / name)
        key = max(tensors, key=lambda key: tensors[key].numel())
        save_file(tensors | {key: 2 * tensors[key]}, place / name, {"format": "pt"})
        loaders.main(str(place), work)

    monkeypatch.setattr(gate, "_run", damaged)
    done = run_here(run, "--output", tmp_path / "hub", command=hub)
    assert done.returncode == 1 and "differs by" in done.stderr
    assert not list(tmp_path.iterdir())


def test_code_that_imports_this_package_fails(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(loaders, "__file__", str(tmp_path / "loader.py"))
    refusing = Path(gate.__file__).with_name("loaders.py").read_text()
    refusing = refusing.partition("def main")[0] + "sys.meta_path.insert(0, _Refusing())\n"
    (tmp_path / "loader.py").write_text(refusing + "import distill\n")
    with pytest.raises(Failure, match="the code of the repository imports distill"):
        RUN_LOADERS(tmp_path, tmp_path / "work")


def test_code_is_what_is_needed_and_no_more(tmp_path):
    text = bundle('"""Head."""', [Name("distill.methods.plain", "TeacherHead")])
    names = {}
    exec(compile(text, "bundle", "exec"), names)
    assert {"TeacherHead", "mlp", "Prediction"} <= names.keys()
    assert not {"Plain", "Config", "alignment_losses"} & names.keys()
    with pytest.raises(Failure, match="both define mlp"):
        bundle(
            "", [Name("distill.methods.plain", "mlp"), Name("distill.methods.projectors", "mlp")]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist: give a run folder"),
        (["RUN", "--private"], "--private is for --push"),
        (["RUN", "--images", "nowhere"], "no such folder"),
        (["RUN", "--push", "just-a-name"], "--push just-a-name: give OWNER/NAME"),
        (["RUN", "--push", "a/b/c"], "--push a/b/c"),
        (["RUN", "--push", "me/.."], "--push me/.."),
        (["RUN", "--push", "me/mine"], "set HF_TOKEN, or run `hf auth login`"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("export.hub.push.get_token", lambda: None)
    words = [str(run) if word == "RUN" else word for word in words]
    done = run_here(*words, "--output", tmp_path / "hub", command=hub)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_training_and_a_folder_with_files_are_refused(run, tmp_path):
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    done = run_here(tmp_path / "early", "--output", tmp_path / "hub", command=hub)
    assert done.returncode == 2 and "its training has not finished" in done.stderr
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine.txt").write_text("mine")
    done = run_here(run, "--output", tmp_path / "hub", command=hub)
    assert done.returncode == 2 and "--output" in done.stderr
    assert (tmp_path / "hub" / "mine.txt").read_text() == "mine"


@contextmanager
def small_hub(status: int = 200) -> Iterator[tuple[str, dict]]:
    """A server that speaks the four requests of an upload; yields its address and what it got."""
    got: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self._chunks()
            answer: dict = {"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"}
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                kinds = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                answer = {"files": kinds}
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        got[entry["value"]["path"]] = content
                answer |= {"commitUrl": answer["url"] + "/commit/1", "commitOid": "1" * 40}
            self._send(answer)

        def do_GET(self) -> None:
            self._send({"id": "me/mine", "sha": "1" * 40, "siblings": []})

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def _send(self, answer: dict) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", got
        server.shutdown()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


def some_folder(place: Path) -> Path:
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def test_a_folder_is_uploaded(token, tmp_path):
    check_push("me/mine")
    with small_hub() as (address, got):
        where = push(some_folder(tmp_path / "hub"), "me/mine", private=True, endpoint=address)
    assert where.endswith("me/mine")
    assert got == {"config.json": b"{}", "model.safetensors": b"weights"}


def test_without_a_connection_or_rights_the_folder_stays(token, tmp_path):
    place = some_folder(tmp_path / "hub")
    with pytest.raises(UserError, match="no connection.*hf upload me/mine"):
        push(place, "me/mine", private=False, endpoint="http://127.0.0.1:9")
    with small_hub(status=403) as (address, _):
        with pytest.raises(UserError, match="its token may not write there.*hf upload me/mine"):
            push(place, "me/mine", private=False, endpoint=address)
    assert (place / "config.json").exists()


def test_views_in_words_of_timm():
    mean = (0.5, 0.5, 0.5)
    for text, mode, share in (
        ("squash", "squash", 1.0),
        ("centre-crop:0.9,bilinear", "center", 0.9),
        ("letterbox", "border", 1.0),
    ):
        view = ViewPolicy.parse(text).on(mean)
        words = {"interpolation": view.interpolation, "crop_pct": share, "crop_mode": mode}
        assert pictures_seen(view, mean) == words
    for text in ("tiles", "squash,no-antialias", "letterbox:000000"):
        with pytest.raises(UserError, match="timm and transformers have no tiles") as error:
            pictures_seen(ViewPolicy.parse(text).on(mean), mean)
        assert "\n" not in str(error.value)
