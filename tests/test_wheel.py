"""The wheel out of the checkout: all that commands read is in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from yaml import safe_dump

from tests.conftest import need_tritonserver, small_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("contract", "distill", "export", "serve", "triton_models")
CODE = """
import runpy, sys
for line in sys.stdin:
    module, *words = line.split("\\t")
    sys.argv = [module, *(word.strip() for word in words)]
    try:
        runpy.run_module(module.strip(), run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        assert not stopped.code, (line, stopped.code)
import distill, export, serve, contract
print(*(module.__path__[0] for module in (distill, export, serve, contract)))
"""
"""Many commands in one process: most of each one's time is importing torch."""


@pytest.fixture(scope="module")
def wheel(expensive, tmp_path_factory) -> Path:
    """Built of a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, ignored = folder / "source", shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PACKAGES, "deploy"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, check=True, capture_output=True
    )
    (built,) = folder.glob("*.whl")
    return built


def test_every_file_of_the_packages_and_of_deploy_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = f"{'-'.join(wheel.name.split('-')[:2])}.data/data/share/vfm-distill"
    missing = []
    for folder in (*PACKAGES, "deploy"):
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            if path.is_file() and "__pycache__" not in name:
                if (f"{data}/{name}" if folder == "deploy" else name) not in names:
                    missing.append(name)
    assert missing == []
    assert not {name.split("/")[0] for name in names} & {"tests", "benchmarks"}


def run_there(wheel: Path, folder: Path, *commands: tuple[object, ...]) -> None:
    """Run commands of the wheel in a folder: unpacked, which is all that installing a pure wheel
    is, and in front of whatever else is installed.
    """
    target = folder.parent / f"{folder.name}-site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        input="\n".join("\t".join(map(str, words)) for words in commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    places = done.stdout.splitlines()[-1].split()
    assert places == [str(target / name) for name in ("distill", "export", "serve", "contract")]


def test_its_commands_run_in_another_folder(wheel, small_bundle, tmp_path):
    run_there(
        wheel,
        tmp_path,
        ("distill.run", "--list"),
        ("distill.run", "quickstart", "--dry-run"),
        ("export.check", small_bundle),
        ("serve.repository", small_bundle, "--output", "models"),
    )
    assert (tmp_path / "models" / "features" / "config.pbtxt").is_file()


@pytest.mark.long
def test_its_commands_train_export_and_serve(wheel, photo_folder, tmp_path):
    need_tritonserver()
    recipe = small_recipe(photo_folder, method="plain", train={"steps": 2})
    recipe["teachers"] = [
        {
            "name": "vit_tiny_patch16_224",
            "role": "mae",
            "checkpoint": "package:photo-mae",
            "kwargs": {"embed_dim": 128, "depth": 6, "num_heads": 4},
            "image_size": 112,
        }
    ]
    (tmp_path / "recipe.yaml").write_text(safe_dump(recipe))
    run_there(
        wheel,
        tmp_path,
        ("distill.run", "recipe.yaml", "--output", "run"),
        ("export.run", "run", "--output", "bundle", "--max-batch", "2"),
        ("serve.trial", "bundle", next(photo_folder.rglob("*.jpg")), "--output", "answers"),
    )
    assert list((tmp_path / "answers").iterdir())
