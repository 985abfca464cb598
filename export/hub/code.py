"""The code of a model repository: what some modules need of this package, in one file.

Definitions that are reached from a root are copied as they are written. Others are left out, and so
are methods that no copied code calls by their name. What comes out needs torch, timm and
transformers, and nothing of this package.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from contract.errors import Failure

_OURS = ("contract", "distill", "export", "serve")
_CALLED_BY_TORCH = {"forward", "train"}


class Name(NamedTuple):
    """A definition at the top level of a module."""

    module: str
    name: str


def bundle(
    head: str,
    roots: Sequence[Name],
    replaced: Mapping[Name, Name] | None = None,
) -> str:
    """The source of a module that begins with `head` and has `roots`, whole, and all that they
    need.

    Other definitions stand for those that are `replaced`. Raises Failure where two definitions have
    one name.
    """
    result = _Bundle(roots, replaced or {})
    result.settle()
    return result.source(head)


class _Module:
    """A module's source: its definitions, and where its imported names come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(importlib.util.find_spec(name).origin)
        text = self.path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, ast.Import | ast.ImportFrom] = {}
        self.documented: dict[str, ast.stmt] = {}
        before: str | None = None
        for node in ast.parse(text).body:
            names = list(_defined(node))
            if before and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                self.documented[before] = node
            self.definitions |= dict.fromkeys(names, node)
            before = names[0] if names and not hasattr(node, "body") else None
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = node

    def origin(self, name: str) -> Name | None:
        """Which definition of ours an imported name is; None for one of a library."""
        node = self.imports[name]
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in _OURS:
            return None
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        return Name(node.module, alias.name)

    def import_line(self, name: str) -> tuple[str, str]:
        """Library and line of an imported name."""
        node = self.imports[name]
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        if isinstance(node, ast.Import):
            return "", f"import {ast.unparse(alias)}"
        return node.module, ast.unparse(alias)


class _Bundle:
    """Definitions that are needed, and the names of attributes in them."""

    def __init__(self, roots: Sequence[Name], replaced: Mapping[Name, Name]) -> None:
        self._roots, self._replaced = roots, replaced
        self._modules: dict[str, _Module] = {}
        self._needed: dict[Name, None] = {}
        self._attributes = set(_CALLED_BY_TORCH)
        self._after: dict[str, set[str]] = {}
        self._imports: set[tuple[str, str]] = set()
        self._hinted: set[str] = set()
        for root in roots:
            self._need(root)

    def _need(self, name: Name) -> None:
        """Take in a definition."""
        module = self._module(name.module)
        if name.name not in module.definitions:
            raise Failure(f"{name.module} does not define {name.name}")
        self._needed.setdefault(name)
        self._after.setdefault(name.module, set())

    def settle(self) -> None:
        """Take in what definitions need until nothing is missing."""
        before = None
        while before != (before := (len(self._needed), len(self._attributes))):
            for name in list(self._needed):
                for part in self._kept(name):
                    self._follow(name.module, part)

    def source(self, head: str) -> str:
        """The module's text."""
        names: dict[str, Name] = {}
        texts = []
        for module in self._ordered():
            chosen = [name for name in self._needed if name.module == module.name]
            chosen.sort(key=lambda name: module.definitions[name.name].lineno)
            part = [f"# From {module.name} of vfm-distill."]
            for name in chosen:
                text = self._text(name)
                other = names.setdefault(name.name, name)
                if other == name:
                    part.append(text)
                elif self._text(other) != text:
                    raise Failure(f"{other.module} and {name.module} both define {name.name}")
            texts.append("\n\n\n".join(part))
        hints = [f"{name} = Any  # for annotations" for name in sorted(self._hinted - set(names))]
        if hints:
            self._imports.add(("typing", "Any"))
        top = [head.rstrip(), "from __future__ import annotations", "\n".join(self._import_lines())]
        top += ["\n".join(hints)] if hints else []
        return "\n\n".join(top) + "\n\n\n" + "\n\n\n".join(texts) + "\n"

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module(name)
        return self._modules[name]

    def _kept(self, name: Name) -> list[ast.AST]:
        """The parts of a definition that are copied."""
        node = self._module(name.module).definitions[name.name]
        if not isinstance(node, ast.ClassDef):
            return [node]
        return [*node.bases, *node.decorator_list, *node.keywords] + [
            part for part in node.body if not self._is_dropped(name, part)
        ]

    def _is_dropped(self, of: Name, part: ast.stmt) -> bool:
        """Whether a statement in the class `of` is a method that nothing calls."""
        if not isinstance(part, ast.FunctionDef) or part.name.startswith("__"):
            return False
        if of in self._roots:
            return False
        return part.name not in self._attributes

    def _follow(self, module: str, part: ast.AST) -> None:
        """Take in the names in a part of a module's definition."""
        hints = set(_annotations(part))
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute):
                self._attributes.add(node.attr)
            elif isinstance(node, ast.Name):
                self._resolve(module, node.id, node in hints)

    def _resolve(self, module: str, name: str, hint: bool) -> None:
        source, target = self._module(module), Name(module, name)
        if name in source.imports and name not in source.definitions:
            origin = source.origin(name)
            if origin is None:
                self._imports.add(source.import_line(name))
                return
            target = origin
        elif name not in source.definitions:
            return  # a local name, or one of Python's
        target = self._replaced.get(target, target)
        kind = self._module(target.module).definitions.get(target.name)
        if hint and isinstance(kind, ast.ClassDef):
            self._hinted.add(target.name)
            return
        self._need(target)
        if target.module != module:
            self._after[module].add(target.module)

    def _ordered(self) -> Iterator[_Module]:
        """The modules, each after those that it needs."""
        done: set[str] = set()

        def visit(name: str) -> Iterator[_Module]:
            if name not in done:
                done.add(name)
                for other in sorted(self._after[name]):
                    yield from visit(other)
                yield self._module(name)

        for name in sorted(self._after):
            yield from visit(name)

    def _text(self, name: Name) -> str:
        """A definition as it is written, without the methods that are dropped."""
        module = self._module(name.module)
        node = module.definitions[name.name]
        last = module.documented.get(name.name, node).end_lineno
        dropped: set[int] = set()
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if self._is_dropped(name, part):
                    dropped |= set(range(_first(part), part.end_lineno + 1))
        lines = [
            module.lines[number - 1]
            for number in range(_first(node), last + 1)
            if number not in dropped
        ]
        return _without_gaps(lines)

    def _import_lines(self) -> list[str]:
        modules: dict[str, set[str]] = {}
        for module, name in self._imports:
            modules.setdefault(module, set()).add(name)
        lines = sorted(modules.pop("", set()))
        for module, names in sorted(modules.items()):
            lines.append(f"from {module} import {', '.join(sorted(names))}")
        return lines


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top level defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for part in ast.walk(target) if target is not None else ():
            if isinstance(part, ast.Name):
                yield part.id


def _annotations(part: ast.AST) -> Iterator[ast.AST]:
    """Everything inside annotations, which nothing evaluates."""
    for node in ast.walk(part):
        for name in ("annotation", "returns"):
            if (hint := getattr(node, name, None)) is not None:
                yield from ast.walk(hint)


def _first(node: ast.stmt) -> int:
    """The line on which a statement begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _without_gaps(lines: Sequence[str]) -> str:
    """Lines with at most one empty one between two, and none at the end."""
    result: list[str] = []
    for line in lines:
        if line.strip() or (result and result[-1].strip()):
            result.append(line)
    while result and not result[-1].strip():
        result.pop()
    return "\n".join(result)
