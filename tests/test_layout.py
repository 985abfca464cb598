"""Which file may import which: data flows from `distill` to `export` to `serve`, `contract` is what
they share, and inside a package lower folders know nothing of higher ones.
"""

import ast
from collections.abc import Iterator, Set
from functools import cache
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

COMMANDS = {
    "distill": {
        "distill.attach",
        "distill.pretrain_mae",
        "distill.run",
        "distill.similarity",
        "distill.visualize",
    },
    "export": {"export.run", "export.assemble"},
    "serve": {"serve.run", "serve.rollout", "serve.status", "serve.trial", "serve.bench"},
}
"""What only commands import."""

ABOVE = {
    "distill.data": {
        "distill.teachers",
        "distill.methods",
        "distill.training",
        "distill.evaluate",
    },
    "distill.decoders": {"distill.training", "distill.evaluate"},
    "distill.models": {
        "distill.data",
        "distill.teachers",
        "distill.methods",
        "distill.training",
        "distill.evaluate",
    },
    "distill.methods": {"distill.teachers", "distill.training", "distill.evaluate"},
    "distill.teachers": {"distill.training", "distill.evaluate"},
    "distill.training": {"distill.evaluate"},
    "distill.evaluate": {"distill.training"},
    "export.tensorrt": {"export.runtimes", "export.bench", "export.text"},
    "export.runtimes": {"export.bench", "export.text"},
    "export.bench": {"export.text", "export.hub"},
    "export.hub": {"export.tensorrt", "export.runtimes", "export.bench", "export.text"},
    "export.text": {"export.bench"},
    "serve.repository": {
        "serve.server",
        "serve.client",
        "serve.embed",
        "serve.demo",
        "serve.gateway",
    },
    "serve.server": {"serve.client", "serve.embed", "serve.demo", "serve.gateway"},
    "serve.client": {"serve.embed", "serve.demo", "serve.gateway"},
    "serve.embed": {"serve.demo", "serve.gateway"},
    "serve.demo": {"serve.embed", "serve.gateway"},
    "serve.gateway": {"serve.embed", "serve.demo"},
}
"""The folders that each folder must not import, at import time or later; and no folder imports a
command.
"""

ALLOWED: dict[tuple[str, str], str] = {}
"""Imports that break a rule, importer and imported, with the reason why they may."""


def nodes(tree: ast.AST, left_out: tuple[type, ...]) -> Iterator[ast.AST]:
    """Every node but those of some kinds, and what is in those."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, left_out):
            yield child
            yield from nodes(child, left_out)


def imported(source: str, later: bool = True, types: bool = True) -> Iterator[tuple[int, str]]:
    """Line and name of every absolute import: a module's, and for `from x import y` also x.y.

    `later`: also those in functions; `types`: also those that only a type checker sees.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree) if not types else ():
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    functions = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda
    for node in nodes(tree, () if later else functions):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Files of the four packages by module."""
    return {module_of(path): path for package in PACKAGES for path in sources(package)}


def inside(name: str, folders: Set[str]) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


@cache
def arrows(later: bool) -> dict[str, set[str]]:
    """The modules of ours that each module imports."""
    return {
        name: {other for _, other in imported(path.read_text(encoding="utf-8"), later, types=later)}
        & modules().keys()
        for name, path in modules().items()
    }


def test_every_form_of_import_is_seen():
    source = (
        "import torch.nn as nn, json\ndef f():\n    from distill.config import Recipe\nfrom . "
        "import x\n"
    )
    source += "import importlib\nimportlib.import_module('serve.client')\n"
    source += "if TYPE_CHECKING:\n    import onnx\n"
    assert {name for _, name in imported(source)} == {
        "torch.nn",
        "json",
        "distill.config",
        "distill.config.Recipe",
        "importlib",
        "serve.client",
        "onnx",
    }
    assert "distill.config" not in {name for _, name in imported(source, later=False)}
    assert "onnx" not in {name for _, name in imported(source, types=False)}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = sources(package)
    assert files, f"{package}/ holds no Python files"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported(path.read_text(encoding="utf-8"))
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_lower_folders_do_not_import_higher_ones():
    wrong = []
    for name, others in arrows(later=True).items():
        package, _, rest = name.partition(".")
        folder = f"{package}.{rest.partition('.')[0]}"
        above = ABOVE.get(folder, set())
        if folder in ABOVE or package == "contract":
            above = above | COMMANDS.get(package, set())
        wrong += [(name, other) for other in sorted(others) if inside(other, above)]
    assert set(wrong) == set(ALLOWED), "an entry of ALLOWED that nobody needs goes, too"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_has_rules(package):
    folders = {f"{package}.{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}
    assert folders <= ABOVE.keys()
    assert COMMANDS.get(package, set()) <= modules().keys()


def test_no_modules_import_one_another_in_a_circle():
    """At import time: a module's own folders are loaded with it, and count."""
    graph = {}
    for name, others in arrows(later=False).items():
        with_folders = {
            ".".join(parts[:count])
            for other in others
            for parts in [other.split(".")]
            for count in range(1, len(parts) + 1)
        }
        own = {name} | {folder for folder in modules() if name.startswith(f"{folder}.")}
        graph[name] = (with_folders & modules().keys()) - own
    left = set(graph)
    while free := {name for name in left if not graph[name] & left}:
        left -= free
    assert not left, f"these import one another, or what does: {sorted(left)}"


def test_a_module_of_contract_is_used_by_two_packages():
    """Directly or by way of another module of contract; triton_models import the copies beside them
    by their file's name.
    """
    users = {name: {name.partition(".")[0]} - {"contract"} for name in modules()}
    for path in sources("triton_models"):
        for _, name in imported(path.read_text(encoding="utf-8")):
            if f"contract.{name}" in users:
                users[f"contract.{name}"].add("triton_models")
    waiting = list(arrows(later=True).items())
    for _ in range(len([name for name in users if name.startswith("contract.")])):
        for name, others in waiting:
            for other in others:
                if other.startswith("contract."):
                    users[other] |= users[name]
    few = {
        name: sorted(packages)
        for name, packages in users.items()
        if name.startswith("contract.") and len(packages) < 2
    }
    assert few == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_grows_past_450_lines(package):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(package)
    }
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_benchmarks_help_fits_into_80_columns():
    """What argparse prints as it is: a file's docstring (harness.py prints those of others)."""
    wide = []
    for file in sorted((ROOT / "benchmarks").glob("*.py")):
        text = file.read_text()
        if file.name != "harness.py" and any(
            raw in text for raw in ("RawDescriptionHelpFormatter", "parser(__doc__,")
        ):
            lines = ast.get_docstring(ast.parse(text)).splitlines()
            wide += [f"{file.name}: {line}" for line in lines if len(line) > 80]
    assert not wide
