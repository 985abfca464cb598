"""Small real things shared by tests: a folder of photographs, a recipe of seconds, the command
line.
"""

import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from filelock import FileLock
from onnxscript import ir
from PIL import Image
from safetensors.torch import load_file

from contract.tars import CACHE_VARIABLE
from distill.data.pictures import PackagedPhotos
from distill.evaluate.__main__ import main as evaluate
from distill.evaluate.encoder import Encoder, parse_model, teacher_encoder
from distill.run import main
from distill.scenes import write
from distill.tiny import save_tiny_detector
from export.run import main as export

# One thread everywhere: sums come out in one order, here and in the processes that tests start.
torch.set_num_threads(1)


def long_case(*values: object) -> object:
    """One set of values of a parametrized test that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of tar files do not go into the home of whoever runs the tests."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def expensive() -> None:
    """A fixture that takes more than about three seconds requests this one: its tests are slow."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "expensive" in getattr(item, "fixturenames", ()) or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(name, make)`: a folder that `make(folder)` fills once for all of pytest-xdist's
    processes. Tests only read it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder of its own below

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def identity(module: torch.nn.Module) -> str:
    """A hash of all that a module's forward may depend on: classes, attributes, hooks, tensors."""
    digest = hashlib.sha256()
    hooks = {"_forward_hooks", "_forward_pre_hooks"}
    for name, part in module.named_modules():
        attributes = {k: v for k, v in vars(part).items() if not k.startswith("_") or k in hooks}
        # of tensors the repr is cut short
        known = {k: v.tolist() if torch.is_tensor(v) else v for k, v in attributes.items()}
        said = repr((name, type(part), known))
        digest.update(said.encode())
        if ADDRESS.search(said):  # a function: another at another address, and in another process
            digest.update(str(os.getpid()).encode())
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Traced:
    """What export uses of torch's `ONNXProgram`."""

    model: ir.Model

    @property
    def model_proto(self) -> onnx.ModelProto:
        return ir.to_proto(self.model)


@pytest.fixture(scope="session", autouse=True)
def traced_once(made_once: Callable[..., Path]) -> Iterator[None]:
    """torch.onnx.export traces a module once, however often and in whichever process it is
    exported: that is nearly all of an export's time.
    """
    trace = torch.onnx.export

    def once(module: torch.nn.Module, inputs: tuple, **options: object) -> Traced:
        shapes = tuple((tensor.dtype, tensor.shape) for tensor in inputs)
        said = repr((identity(module), shapes, sorted(options.items())))
        key = hashlib.sha256(said.encode()).hexdigest()

        def make(folder: Path) -> None:
            onnx.save(trace(module, inputs, **options).model_proto, folder / "graph.onnx")

        graph = made_once(f"trace_{key}", make) / "graph.onnx"
        return Traced(ir.from_proto(onnx.load(graph)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", once)
        yield trace


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve real photographs of 96 px in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    photos = PackagedPhotos()
    for number in range(12):
        image = (
            photos.load(number % len(photos))
            .convert("RGB")
            .resize((96, 80), Image.Resampling.BICUBIC)
        )
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_vit() -> Encoder:
    """A random ViT of stride 16 at 64 px, 48 channels, two blocks."""
    config = parse_model("vit_tiny_patch16_224@random")
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    return teacher_encoder(config.model_copy(update={"kwargs": kwargs}), size=64, name="tiny-vit")


@pytest.fixture(scope="session")
def tiny_cnn() -> Encoder:
    """A random ResNet of stride 32 at 64 px."""
    return teacher_encoder(parse_model("resnet10t@random"), size=64, name="tiny-cnn")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes of 64 px: 24 to learn from, 8 to score on."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write(folder, train=24, val=8, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two real photographs, a class each: 12 to learn from, 6 to score on, easily told
    apart.
    """
    root = tmp_path_factory.mktemp("classes")
    photos = PackagedPhotos()
    names = {"chelsea": "chelsea.png", "coins": "coins.png"}
    numbers = {photos.name(number): number for number in range(len(photos))}
    for label, file in names.items():
        photo = photos.load(numbers[file])
        for index in range(9):
            left, top = 12 * index, 8 * index
            crop = photo.crop((left, top, left + 160, top + 160)).resize((80, 80))
            path = root / ("train" if index < 6 else "val") / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            crop.save(path)
    return root


@pytest.fixture(scope="session")
def tiny_detector(made_once: Callable[..., Path]) -> Path:
    """A folder with a GroundingDINO of random weights."""
    return made_once("detector", save_tiny_detector)


def small_recipe(photos: Path, **changes: object) -> dict:
    """A recipe with a ViT student and three random small teachers of three kinds, as plain data."""
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    recipe = {
        "method": "umt",
        "student": {
            "name": "vit_tiny_patch16_224",
            "image_size": 64,
            "drop_path": 0.2,
            "kwargs": {"embed_dim": 48, "depth": 2, "num_heads": 2},
        },
        "teachers": [
            {
                "name": "resnet10t",
                "role": "classification",
                "alias": "cls",
                "pretrained": False,
                "image_size": 64,
            },
            {
                "name": "vit_tiny_patch16_224",
                "role": "mae",
                "pretrained": False,
                "image_size": 64,
                "kwargs": vit,
            },
            {
                "name": "vit_small_patch14_dinov2",
                "role": "dino",
                "pretrained": False,
                "image_size": 56,
                "kwargs": vit,
            },
        ],
        "umt": {"space_dim": "student", "token_dim": 16},
        "targets": {"normalize": "standardize", "batches": 2},
        "data": {"kind": "folder", "path": str(photos), "workers": 0, "crop_scale": [0.3, 1.0]},
        "train": {"steps": 8, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2, "log_every": 1},
        "checkpoint": {"every_steps": 3},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return recipe


@pytest.fixture
def recipe_file(tmp_path: Path, photo_folder: Path):
    """A function that writes a small recipe (with changes) to a YAML file."""

    def write(**changes: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(small_recipe(photo_folder, **changes)))
        return path

    return write


@pytest.fixture(scope="session")
def small_bundle(photo_folder: Path, scenes: Path, made_once: Callable[..., Path]) -> Path:
    """An exported UMT student of three teachers with trained heads for three tasks, segmentation's
    reading dino's, which sees whole pictures. Its run lies beside it, in `run`.
    """

    def make(folder: Path) -> None:
        recipe, run = folder / "recipe.yaml", folder / "run"
        recipe.write_text(yaml.safe_dump(small_recipe(photo_folder, train={"steps": 2})))
        done = [run_here(recipe, "--output", run)]
        quick = (
            "extract.workers=0",
            "probe.epochs=2",
            "probe.rates=2",
            "dense.size=64",
            "dense.steps=5",
        )
        for features, tasks in (("backbone", "linear,depth"), ("dino", "segmentation")):
            wanted = ("--data", scenes, "--features", features, "--tasks", tasks)
            done.append(run_here(run, *wanted, *quick, command=evaluate))
        output = ("--output", folder / "bundle", "--max-batch", 4, "--view", "squash")
        done.append(run_here(run, *output, command=export))
        assert all(step.returncode == 0 for step in done), [step.stderr for step in done]

    return made_once("small", make) / "bundle"


@pytest.fixture(scope="session")
def detection_bundle(
    expensive: None, photo_folder: Path, tiny_detector: Path, made_once: Callable[..., Path]
) -> Path:
    """An exported KPU student of a detector alone, for whole pictures of 70 x 98, with that
    detector. Its run lies beside it, in `run`.
    """

    def make(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(detection_recipe(photo_folder, tiny_detector))
        )
        done = [run_here(folder / "recipe.yaml", "--output", folder / "run")]
        words = ("--resolutions", "70x98", "--max-batch", 3, "--images", photo_folder)
        words += ("--detector", tiny_detector, "--output", folder / "bundle", "--view", "squash")
        done.append(run_here(folder / "run", *words, command=export))
        assert all(step.returncode == 0 for step in done), [step.stderr for step in done]

    return made_once("detection", make) / "bundle"


def detection_recipe(photos: Path, detector: Path) -> dict:
    """KPU's with a detector alone, as small as can be."""
    vit = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    teacher = {"name": "grounding_dino", "role": "detector", "checkpoint": str(detector)}
    recipe = small_recipe(
        photos,
        method="kpu",
        teachers=[teacher | {"image_size": 96}],
        targets={"normalize": "none"},
        train={"steps": 1, "batch_size": 2},
    )
    recipe["student"] = {"name": "vit_small_patch14_dinov2", "image_size": 70, "kwargs": vit}
    recipe["kpu"] = {"adapter": {"blocks": 1, "extra": 1, "heads": 2, "points": 2, "width": 32}}
    return recipe


@pytest.fixture(scope="session")
def plain_run(photo_folder: Path, made_once: Callable[..., Path]) -> Path:
    """A run of plain heads and one teacher, `mae`: the fewest graphs to export."""

    def make(folder: Path) -> None:
        recipe = small_recipe(photo_folder, method="plain", train={"steps": 2})
        recipe["teachers"] = recipe["teachers"][1:2]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        done = run_here(folder / "recipe.yaml", "--output", folder / "run")
        assert done.returncode == 0, done.stderr

    return made_once("plain", make) / "run"


@pytest.fixture(scope="session")
def varying_bundle(
    expensive: None, photo_folder: Path, scenes: Path, made_once: Callable[..., Path]
) -> Path:
    """A student of one teacher, `mae`, that takes any multiples of 16 from 32 to 64 x 96, and a
    depth head.
    """

    def make(folder: Path) -> None:
        recipe = small_recipe(photo_folder, method="plain", train={"steps": 2})
        recipe["teachers"] = recipe["teachers"][1:2]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run, quick = folder / "run", ("extract.workers=0", "dense.size=64", "dense.steps=2")
        done = [run_here(folder / "recipe.yaml", "--output", run)]
        wanted = ("--data", scenes, "--features", "backbone", "--tasks", "depth")
        done.append(run_here(run, *wanted, *quick, command=evaluate))
        sizes = ("--resolutions", 32, "64x96", "--max-batch", 4, "--view", "squash")
        done.append(run_here(run, "--output", folder / "bundle", *sizes, command=export))
        assert all(step.returncode == 0 for step in done), [step.stderr for step in done]

    return made_once("varying", make) / "bundle"


@dataclass(frozen=True)
class Served:
    """A running tritonserver: HOST:PORT of its three endpoints, what it serves, the key of its
    restricted endpoints.
    """

    grpc: str
    http: str
    metrics: str
    repository: Path
    bundle: Path
    admin_key: str


def need_tritonserver() -> None:
    """Skip a test where the embedded tritonserver cannot run."""
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip(
            "nvidia-pytriton is not installed (it has no wheel for this Python): no embedded "
            "tritonserver"
        )
    if int(np.__version__.split(".")[0]) >= 2:
        pytest.skip(
            f"numpy {np.__version__}: the embedded tritonserver's python backend needs numpy below "
            "2"
        )


@contextlib.contextmanager
def serving(bundle: Path, folder: Path, **settings: object) -> Iterator[Served]:
    """The embedded tritonserver on a bundle, one instance a model unless told otherwise, without a
    supervisor: it counts requests too.
    """
    need_tritonserver()
    from serve.bundle import read_bundle
    from serve.repository.build import make_repository
    from serve.repository.settings import Settings
    from serve.server.process import Options, Server
    from serve.server.triton import find_tritonserver

    repository, lines = folder / "repository", []
    make_repository(read_bundle(bundle), repository, Settings(**settings))
    options = Options(grpc_port=0, http_port=0, metrics_port=0, exit_seconds=10)
    with Server(find_tritonserver(None, folder), repository, options, lines.append) as triton:
        yield Served(triton.grpc, triton.http, triton.metrics, repository, bundle, triton.admin_key)
    (folder / "log").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def server(
    expensive: None, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A tritonserver on `small_bundle`, in the form of CPUs: all graphs in one model."""
    with serving(small_bundle, tmp_path_factory.mktemp("server")) as served:
        yield served


@pytest.fixture(scope="session")
def apart_server(
    expensive: None, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The same in the form of GPUs: each graph in a model of its own, joined by ensembles."""
    folder = tmp_path_factory.mktemp("apart")
    with serving(small_bundle, folder, parts="apart", fused=False) as served:
        yield served


def command(*arguments: object, ranks: int = 1) -> list[str]:
    """The command line of `python -m distill.run`, under torchrun if there are several ranks."""
    launcher = (
        ["-m"]
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    )
    return [sys.executable, *launcher, "distill.run", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process, so that two ranks share two cores and sums come out in one order."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run_command(
    *arguments: object, ranks: int = 1, **options: object
) -> subprocess.CompletedProcess:
    """Run `python -m distill.run` to its end."""
    return subprocess.run(
        command(*arguments, ranks=ranks),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
        **options,
    )


def kill_after(step: int, out: Path, words: Sequence[object]) -> None:
    """Start a command that trains into `out`, and kill it once it has a checkpoint of `step`."""
    process = subprocess.Popen(
        [str(word) for word in words], env=environment(), stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 200
    while not (out / "checkpoint" / f"step_{step:08d}.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()


def run_here(*arguments: object, command=main) -> subprocess.CompletedProcess:
    """Run a command's main in this process, which saves the seconds that importing torch takes."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        status = command([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run folder."""
    return load_file(folder / "student.safetensors")


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
