"""A task that is not shipped, `normals`, from its head to the demo's page: an entry in the table, a
head and a function that makes the map are all that it takes.
"""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract import dense
from contract.manifest import read_manifest
from contract.tasks import POSITIONS, TASKS, Map, Task
from distill.data.pictures import PackagedPhotos
from distill.heads import KINDS, load_head, save_head
from export.run import main as export
from serve.bundle import read_bundle
from serve.client import FeatureClient
from serve.client.__main__ import main as client_main
from serve.client.tasks.maps import TaskMap, predict_map
from serve.demo.answers import look
from serve.demo.cards import map_card
from serve.repository.lint import lint
from serve.repository.model_config import CONTRACT
from serve.repository.models import build_models
from serve.repository.settings import Settings
from tests.conftest import need_tritonserver, run_here

NORMALS = Task(
    name="normals",
    output="normals",
    axes=(POSITIONS, 3),
    meaning="a unit vector at every {cell}, row-major",
    facts=("stride",),
    map=Map("normal_map", "normal_map", "float32", "vector", array="normals", axes=(3,)),
)

FUNCTION = '''

def normal_map(values, height, width, stride=None):
    """Unit vectors: float32 [B, positions, 3] -> float32 [B, height, width, 3]."""
    vectors = upsample(values, height, width, stride)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
'''


class LinearNormals(nn.Module):
    """Patches [B, h, w, d] to unit vectors [B, 3, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.linear = nn.Conv2d(width, 3, 1)

    def forward(self, patches: Tensor) -> Tensor:
        return F.normalize(self.linear(patches.permute(0, 3, 1, 2)), dim=1)


@pytest.fixture(scope="module", autouse=True)
def task(tmp_path_factory):
    """The three things that whoever adds the task writes."""
    contract = tmp_path_factory.mktemp("normals") / "contract"
    shutil.copytree(CONTRACT, contract)
    with open(contract / "dense.py", "a") as file:
        file.write(FUNCTION)
    made: dict = {}
    exec(FUNCTION, vars(dense), made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "normals", NORMALS)
        patch.setitem(KINDS, "linear-normals", LinearNormals)
        patch.setattr(dense, "normal_map", made["normal_map"], raising=False)
        for module in ("models", "student"):  # one for each form of repository
            patch.setattr(f"serve.repository.{module}.CONTRACT", contract)
        yield


@pytest.fixture(scope="module")
def bundle(task, small_bundle, tmp_path_factory):
    """The small student with such a head, exported."""
    folder = tmp_path_factory.mktemp("normals")
    run = shutil.copytree(small_bundle.parent / "run", folder / "run")
    depth = load_head(run / "heads" / "depth.safetensors")
    torch.manual_seed(3)
    head = LinearNormals(depth.module.settings["width"])
    about = {"reads": "backbone", "student_sha256": depth.about["student_sha256"]}
    save_head(run / "heads", "normals", head, about)
    done = run_here(run, "--output", folder / "bundle", "--max-batch", 4, command=export)
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.fixture(scope="module")
def client(bundle, tmp_path_factory):
    need_tritonserver()
    from serve.repository.build import make_repository
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    folder = tmp_path_factory.mktemp("normals_server")
    make_repository(
        read_bundle(bundle), folder / "repository", Settings(fused=False, encoded=False)
    )
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=5)
    with Server(
        find_tritonserver(None, folder), folder / "repository", options, lambda line: None
    ) as server:
        with FeatureClient(server.grpc) as result:
            yield result


@pytest.fixture(scope="module")
def photo():
    return PackagedPhotos().load(0).convert("RGB").resize((90, 60))


def test_it_is_exported_and_agrees_with_the_student(bundle):
    manifest = read_manifest(bundle)
    (port,) = manifest.graph("normals").outputs
    assert (port.name, port.shape, port.meaning) == (
        "normals",
        ("batch", 16, 3),
        "a unit vector at every patch, row-major",
    )
    assert manifest.graph("normals").about == {"reads": "backbone", "stride": 16, "grid": [4, 4]}
    rows = [row for row in manifest.parity if row.output == "normals"]
    assert {row.graph for row in rows} == {"normals", "fused"}
    assert all(row.passed and row.position_cosine > 0.999 for row in rows)


def test_its_models_are_rendered_and_pass_the_lint(bundle):
    configs = {model.name: model.config for model in build_models(read_bundle(bundle), Settings())}
    assert lint(configs) == []
    (port,) = configs["normals"].output
    assert (port.name, list(port.dims)) == ("normal_map", [-1, -1, 3])
    settings = Settings(parts="apart")
    configs = {model.name: model.config for model in build_models(read_bundle(bundle), settings)}
    steps = [step.model_name for step in configs["normals"].ensemble_scheduling.step]
    assert steps == ["backbone", "normals_head", "normals_map"]
    assert "normals" in [port.name for port in configs["features"].output]


def test_clients_get_unit_vectors_from_either_side(client, photo):
    there = predict_map(client, "normals", [photo] * 5)
    here = predict_map(client, "normals", [photo] * 5, side="client")
    assert {value.shape for value in there.values} == {(60, 90, 3)}
    assert there.values[0].dtype == np.float32
    lengths = np.linalg.norm(there.values, axis=-1)
    seen = ~np.isnan(lengths)
    assert 0.45 < seen.mean() < 0.55, "by default the centre is shown: 52.5 x 52.5 of 90 x 60"
    np.testing.assert_allclose(lengths[seen], 1, atol=1e-5)
    np.testing.assert_allclose(there.values, here.values, atol=1e-4)
    assert (there.task, there.classes, there.unit) == (NORMALS, (), "")
    # where tiles overlap, means of unit vectors are shorter
    (tiled,) = predict_map(client, "normals", photo, view="tiles:0.5").values
    assert tiled.shape == (60, 90, 3)
    np.testing.assert_allclose(np.linalg.norm(tiled, axis=-1), 1, atol=1e-5)


def test_the_command_line_writes_them(client, photo, tmp_path, capsys):
    photo.save(tmp_path / "cat.png")
    arguments = [str(tmp_path / "cat.png"), "--task", "normals", "--url", client.url]
    assert client_main([*arguments, "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^cat.png: mean -?\d\.\d\d, -?\d\.\d\d, -?\d\.\d\d$", output, re.MULTILINE)
    with np.load(tmp_path / "out" / "normals.npz") as arrays:
        assert set(arrays) == {"normals", "images"} and arrays["normals"].shape == (1, 60, 90, 3)
    assert (tmp_path / "out" / "cat_normals.png").is_file()


def test_the_page_shows_them(client, photo):
    *_, (cards, requests) = look(client, photo, None)
    names = re.findall(r'class="card ([\w-]+)', cards)
    assert names == ["patches", "segmentation", "depth", "normals"]
    assert 'alt="normals" src="data:image/' in cards and "problem" not in cards
    assert '<dd class="ran">features, normals</dd>' in requests


def test_a_card_needs_no_server(photo):
    values = np.zeros((1, 8, 8, 3), np.float32)
    values[..., 2] = 1
    html = map_card(photo, TaskMap(NORMALS, values, (), ""))
    assert '<section class="card normals"' in html and "<h3>Normals" in html
