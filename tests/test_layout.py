"""Which package may import which: data flows from `distill` to `export` to `serve`, and `contract`
is what they share.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("contract", "distill", "export", "serve")
FORBIDDEN = {
    "contract": {"torch", "torchvision", "timm", "distill", "export", "serve"},
    "distill": {"export", "serve"},
    "export": {"serve"},
    "serve": {"torch", "torchvision", "timm", "distill", "export"},
}
"""What each package must not import: `export` may rebuild a student with `distill`; `serve` reads
bundles only.
"""


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value).split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_every_form_of_import_is_seen():
    source = (
        "import torch.nn as nn, json\ndef f():\n    from distill.config import Recipe\nfrom . "
        "import x\n"
    )
    source += "import importlib\nimportlib.import_module('serve.client')\n"
    assert {name for _, name in imported(source)} == {
        "torch",
        "json",
        "distill",
        "importlib",
        "serve",
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = sources(package)
    assert files, f"{package}/ holds no Python files"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported(path.read_text(encoding="utf-8"))
        if name in FORBIDDEN[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_grows_past_450_lines(package):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(package)
    }
    assert {name: length for name, length in lengths.items() if length > 450} == {}
