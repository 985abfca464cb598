"""Recipes as files and command-line overrides: reading, checking, writing and comparing them."""

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill.config import Recipe
from distill.errors import UserError, suggest

EXCLUSIVE = {"train.steps": "train.epochs", "train.epochs": "train.steps"}
"""Setting one of a pair on the command line clears the other, which a recipe may have set."""


def shipped_recipes() -> dict[str, str]:
    """Name and YAML text of every recipe in the package."""
    folder = resources.files("distill") / "recipes"
    return {f.name.removesuffix(".yaml"): f.read_text() for f in folder.iterdir() if f.name.endswith(".yaml")}


def load_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, with `key=value` overrides.

    Raises UserError, in one line, for an unknown name or key (with the nearest one), broken YAML or a bad value.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe {path}: no such file")
        return parse_recipe(path.read_text(), str(path), overrides)
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"recipe '{name}' is not shipped: {suggest(name, shipped)} (or give a .yaml file)")
    return parse_recipe(shipped[name], name, overrides)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse YAML `text` (from `source`, for messages) and apply overrides."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{place}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys, got {type(values).__name__}")
    for override in overrides:
        apply_override(values, override, overrides)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from error


def apply_override(values: dict, override: str, all_overrides: Sequence[str]) -> None:
    """Set one dotted `key=value` in a nested mapping; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is no override: write key=value, e.g. train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: '{text}' is not valid YAML") from error
    place: Any = values
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(place, list):
            place = step_into_list(place, part, key, value if last else None, last)
        elif not isinstance(place, dict):
            raise UserError(f"{key}: '{'.'.join(parts[:depth])}' has no parts ({suggest_key(key)})")
        elif last:
            place[part] = value
        else:
            check_key(key, parts[: depth + 1])
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
    other = EXCLUSIVE.get(key)
    if other and value is not None and not any(o.startswith(f"{other}=") for o in all_overrides):
        section, name = other.split(".")
        values[section][name] = None


def step_into_list(place: list, part: str, key: str, value: object, last: bool) -> object:
    """Element `part` of a list (set to `value` if it is the `last` part of the key)."""
    if not part.isdigit() or int(part) >= len(place):
        raise UserError(f"{key}: there are {len(place)} teachers, numbered from 0; '{part}' is none of them")
    if last:
        place[int(part)] = value
    return place[int(part)]


def check_key(key: str, parts: list[str]) -> None:
    """Raise UserError if a dotted prefix names no section."""
    known = [field for field, _, _, _ in recipe_fields()]
    if not any(field.split(".")[0] == parts[0] for field in known):
        raise UserError(f"unknown key '{key}': {suggest_key(key)}")


def suggest_key(key: str) -> str:
    """The nearest dotted key; list positions count as any position."""
    pattern = ".".join("N" if part.isdigit() else part for part in key.split("."))
    digits = [part for part in key.split(".") if part.isdigit()]
    hint = suggest(pattern, [field for field, _, _, _ in recipe_fields()])
    return hint.replace(".N.", f".{digits[0]}.") if digits else hint


def explain(error: ValidationError) -> str:
    """The first problem of a validation in one line."""
    problem = error.errors()[0]
    key = ".".join(
        str(part)
        for part in problem["loc"]
        if not str(part).startswith(("literal[", "function-", "int", "constrained"))
    )
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}': {suggest_key(key)}"
    if problem["type"] == "missing":
        return f"{key} is missing: every recipe needs it"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key and not message.startswith(key) else message
    more = [e["msg"] for e in error.errors()[1:] if e["loc"][:1] == problem["loc"][:1] and len(e["loc"]) > 1]
    alternatives = f" (or: {more[0]})" if more and problem["loc"][-1] != error.errors()[1]["loc"][-1] else ""
    return f"{key} = {problem['input']!r}: {message}{alternatives}"


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe, every default written out, as YAML that reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested mappings and lists."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flatten(part, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for index, part in enumerate(value):
            yield from flatten(part, f"{prefix}.{index}")
    else:
        yield prefix, value


def differing_fields(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both values (None for one that is absent)."""
    old, new = (dict(flatten(recipe.model_dump(mode="json"))) for recipe in (before, after))
    return [(key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)]


def recipe_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of everything a recipe can set; `teachers.N.` stands for any teacher."""
    rows = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            inner = [a for a in get_args(section) if isinstance(a, type) and issubclass(a, BaseModel)]
            section, key = (inner[0], f"{key}.N") if inner else (None, key)
        if section:
            rows += recipe_fields(section, f"{key}.")
            continue
        default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
        rows.append((key, type_name(field.annotation), default, field.description or ""))
    return rows


def type_name(annotation: Any) -> str:
    """A short name of a field's type."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("NoneType", "None")


def describe_recipes() -> str:
    """Shipped recipes with the first line of their headers, and every key with default and meaning."""
    lines = ["shipped recipes:"]
    for name, text in sorted(shipped_recipes().items()):
        lines.append(f"  {name:26} {text.splitlines()[0].lstrip('# ')}")
    lines += ["", "keys (set any with key=value; N is a teacher's number from 0):"]
    lines += [f"  {key:34} {default:14} {meaning}" for key, _, default, meaning in recipe_fields()]
    return "\n".join(lines)
