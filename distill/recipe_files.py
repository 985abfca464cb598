"""Recipe files: their YAML, the shipped ones, and files that start from another.

`base: NAME` is a shipped recipe or a path relative to the file. The file's values are the base's
with its own merged in: mappings key by key, anything else (so the list of teachers) as a whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from contract.errors import UserError, first_line, suggest
from distill.config import Recipe
from distill.methods import METHODS

_EXCLUSIVE = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
"""Setting one of a pair, on the command line or over a base, clears the other, which the recipe or
the base may have set."""


_RENAMED = {"kpu.adapter.checkpoint": "kpu.adapter.grad_checkpointing"}
"""Keys of earlier versions, by what they are called now; files and command lines may have both."""


class Ambiguous(str):
    """A plain word that is text here and something else in YAML 1.1: `no`, `012`, `12:30:00`, a
    date. Who wrote it may have meant either; `distill/typed_values.py` decides.
    """

    @property
    def other(self) -> object:
        """What YAML 1.1 makes of it."""
        return yaml.safe_load(self)


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of version 1.2: only true and false are switches, only decimal
    figures are numbers (1e-4 is one), and dates and times are text. Refuses duplicate keys.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping; YAML itself would silently use the last of two equal keys."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A string; one that YAML 1.1 would not read as one is marked."""
        plain = node.style is None and node.value
        if plain and _YAML_1_1.resolve(yaml.ScalarNode, node.value, (True, False)) != node.tag:
            return Ambiguous(node.value)
        return node.value


class RecipeDumper(yaml.SafeDumper):
    """Safe YAML that quotes a string which `RecipeLoader`, or YAML 1.1, would read as something
    else.
    """


_YAML_1_1 = yaml.SafeLoader("")
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII)
_FIGURES = re.compile(
    r"(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    re.ASCII,
)
for kind, pattern, first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"[-+]?(?:0|[1-9]\d*)$", re.ASCII), "-+0123456789"),
    ("float", _FIGURES, "-+.0123456789"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<$"), "<"),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, list(first))
RecipeLoader.add_constructor("tag:yaml.org,2002:str", RecipeLoader.construct_text)
RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def shipped_recipes() -> dict[str, str]:
    """Name and YAML text of every recipe in the package."""
    folder = resources.files("distill") / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def read_text(name_or_path: str, folder: Path = Path()) -> tuple[str, str]:
    """What to call a recipe in messages (a shipped name, or a path, from `folder`), and its text.
    Raises UserError.
    """
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return name_or_path, shipped[name_or_path]
    path = folder / name_or_path
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise UserError(
            f"recipe '{name_or_path}' is not shipped: {suggest(name_or_path, shipped)} (or use a "
            ".yaml file)"
        )
    try:
        return str(path), path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"recipe {path}: no such file (shipped ones go by name, see python -m distill.run "
            "--list)"
        ) from error
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe {path} is not a text file: use a .yaml file or a shipped name"
        ) from error


def merged_values(text: str, source: str, above: Sequence[str] = ()) -> tuple[dict, list[str]]:
    """The values of a recipe's text, merged into those of its base if it names one, and the files
    they come from; `above` are the files that are based on this one.
    """
    try:
        values = yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{place}: not valid YAML ({problem})") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys, got {show(values)}")
    _rename(values)
    if "base" not in values:
        return values, [source]
    base = values.pop("base")
    if not isinstance(base, str):
        raise UserError(f"{source}: base = {show(base)}: name a shipped recipe or a .yaml file")
    try:
        below, base_text = read_text(base, Path(source).parent)
    except UserError as error:
        raise UserError(f"{source}: base: {error}") from error
    files = [*above, source]
    if _identity(below) in map(_identity, files):
        raise UserError(
            f"{source}: base = {base}: {' is based on '.join([*files, below])}, a circle: remove "
            "one of these bases"
        )
    inherited, chain = merged_values(base_text, below, files)
    method = inherited.get("method", Recipe.model_fields["method"].default)
    if values.get("method", method) != method and isinstance(method, str) and method in METHODS:
        for name in (method, *METHODS[method].Sections):
            inherited.pop(name, None)
    merged = _merge(inherited, values)
    sections = {name: part for name, part in values.items() if isinstance(part, dict)}
    clear_others(merged, [f"{name}.{key}" for name, part in sections.items() for key in part])
    return merged, [source, *chain]


def present_name(key: str) -> str:
    """What a key of an earlier version is called now."""
    return _RENAMED.get(key, key)


def _rename(values: dict) -> None:
    """Give values of an earlier version's keys the present names, unless those are there too."""
    for old, new in _RENAMED.items():
        *sections, name = old.split(".")
        place: Any = values
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            place.setdefault(new.split(".")[-1], place.pop(name))


def _identity(source: str) -> str:
    """What is the same for two names of one recipe."""
    return source if source in shipped_recipes() else str(Path(source).resolve())


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`: mappings key by key, everything else as a whole."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merge(inner, value) if both else value
    return merged


def clear_others(values: dict, keys: Sequence[str]) -> None:
    """Clear what the `keys` that were set exclude, unless it was set with them."""
    for key in keys:
        other = _EXCLUSIVE.get(key)
        if other and other not in keys:
            section, name = other.split(".")
            values[section][name] = None


def show(value: Any, limit: int = 80) -> str:
    """A value as YAML on one line, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]}…"
