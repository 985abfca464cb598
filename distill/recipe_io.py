"""Recipes and command-line overrides: reading, checking, writing and comparing them.

What is written to a run is complete: it has no `base` (`distill/recipe_files.py`).
"""

import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from contract.errors import UserError, suggest
from distill.config import Recipe, Section, StudentConfig, with_sections
from distill.methods import METHODS
from distill.models.sources import settled_student
from distill.models.start import student_normalization
from distill.recipe_files import (
    RecipeDumper,
    clear_others,
    merged_values,
    present_name,
    read_text,
    shipped_recipes,
    show,
)
from distill.typed_values import field_type, read_typed, settle

_BASE_MEANING = "what the file starts from: a shipped recipe, or a path relative to the file"

PLAIN_WORDS = {
    "model_type": "Input should be a mapping of keys",
    "dict_type": "Input should be a mapping of keys",
    "tuple_type": "Input should be a list",
    "too_long": "too many values",
}
"""Pydantic's messages about Python types, reworded for YAML."""


def load_recipe(name_or_path: str, overrides: Sequence[str]) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, with `key=value` overrides.

    Raises UserError, in one line, for an unknown name or key (with the nearest one), broken YAML or
    a bad value.
    """
    source, text = read_text(name_or_path)
    return parse_recipe(text, source, overrides)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Validate plain data as a recipe, which keeps the section of its own method alone.

    Raises UserError for an unknown method and pydantic's ValidationError for anything else.
    """
    method = values.get("method", Recipe.model_fields["method"].default)
    if not isinstance(method, str) or method not in METHODS:
        hint = suggest(str(method), METHODS)
        raise UserError(f"method = {show(method)} is not known: {hint}")
    whole = _any_recipe().model_validate(values)
    own = _recipe_with((method,))
    parts = {name: getattr(whole, name) for name in own.model_fields}
    recipe = own(**parts | {"student": _with_normalization(whole)})
    return METHODS[method].check(recipe)


def _with_normalization(recipe: Recipe) -> StudentConfig:
    """A student that starts from weights with the mean and deviation that they expect, as far as
    the recipe sets none, and of a folder or repository what that has. Recipes of runs have them
    written out, and keep them.
    """
    student = settled_student(recipe.student)
    if student is not recipe.student:
        recipe = recipe.model_copy(update={"student": student})
    unset = {"mean", "std"} - student.model_fields_set
    chosen = student_normalization(student, recipe.teachers) if unset else None
    return student.model_copy(update={key: getattr(chosen, key) for key in unset} if chosen else {})


def _any_recipe() -> type[Recipe]:
    """A recipe as a file may have it: with sections of methods that it does not use."""
    return _recipe_with(tuple(METHODS))


@cache
def _recipe_with(methods: tuple[str, ...]) -> type[Recipe]:
    sections: dict[str, type[Section]] = {}
    for name in methods:
        sections |= {name: METHODS[name].Config, **METHODS[name].Sections}
    return with_sections(sections)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse YAML `text` and apply overrides; raises UserError as `load_recipe` does.

    `source` is its name or path, for messages and for a `base` relative to it.
    """
    values, chain = merged_values(text, source)
    source = ", based on ".join(chain)
    try:
        values = settle("", values, _any_recipe())
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    keys = [_apply_override(values, override) for override in overrides]
    clear_others(values, keys)
    try:
        recipe = make_recipe(values)
        for key in keys:
            section = key.split(".")[0]
            if section not in type(recipe).model_fields:
                owner = _owner(section)
                raise UserError(
                    f"{key} is for method {owner}, and the recipe's is {recipe.method}: add "
                    f"method={owner}, or leave {key} out"
                )
        return recipe
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error


def _owner(section: str) -> str:
    """The method that a section belongs to."""
    return next(name for name, m in METHODS.items() if section == name or section in m.Sections)


def _apply_override(values: dict, override: str) -> str:
    """Set one dotted `key=value` in nested `values`, the value read by the field's type; returns
    the key.
    """
    key, equals, text = override.partition("=")
    key = present_name(key.strip())
    if not equals or not key:
        raise UserError(f"'{override}' is not an override: write key=value, e.g. train.steps=100")
    parts = key.split(".")
    _check_key(key, len(values["teachers"]) if isinstance(values.get("teachers"), list) else 0)
    value = read_typed(key, text, field_type(_any_recipe(), key))
    place: Any = values
    for depth, part in enumerate(parts[:-1], start=1):
        if isinstance(place, list):
            place = place[int(part)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise UserError(
                f"{key}: '{'.'.join(parts[:depth])}' is {show(place)}, a single value without parts"
            )
    place[int(parts[-1]) if isinstance(place, list) else parts[-1]] = value
    return key


def values_taken(recipe: Recipe, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Key and value of every override of a recipe, as the recipe has them."""
    whole = recipe.model_dump(mode="json")
    taken = {}
    for override in overrides:
        key = present_name(override.partition("=")[0].strip())
        place: Any = whole
        for part in key.split("."):
            place = place[int(part)] if isinstance(place, list) else place[part]
        taken[key] = place
    return list(taken.items())


def _check_key(key: str, teachers: int) -> None:
    """Raise UserError, naming the nearest key, unless `key` is a field, a section, or inside a
    free mapping.
    """
    parts = key.split(".")
    if key == "base":
        raise UserError("base is for recipe files: name the recipe to start from as the recipe")
    if parts[0] == "teachers" and len(parts) > 1:
        if not parts[1].isdecimal() or int(parts[1]) >= teachers:
            hint = _suggest_key(key)
            if "'teacher_" in hint:  # the cache and the runtime are sections of their own
                raise UserError(f"unknown key '{key}': {hint}")
            count = "1 teacher" if teachers == 1 else f"{teachers} teachers"
            raise UserError(
                f"{key}: the recipe has {count}, numbered from 0; '{parts[1]}' is not one of them"
            )
        parts[1] = "N"
    pattern = ".".join(parts)
    for field, kind, _, _ in recipe_fields():
        inside = pattern.startswith(f"{field}.") and kind == "mapping"
        if pattern == field or field.startswith(f"{pattern}.") or inside:
            return
    raise UserError(f"unknown key '{key}': {_suggest_key(key)}")


def _suggest_key(key: str) -> str:
    """Name the nearest dotted key: a similar one, one with the same last part, or those of its
    section.
    """
    parts = key.split(".")
    number = parts[1] if parts[0] == "teachers" and len(parts) > 1 else "N"
    known = [field.replace(".N", f".{number}") for field, _, _, _ in recipe_fields()]
    hint = suggest(key, known)
    if hint.startswith("did you mean"):
        return hint
    same = [field for field in known if field.split(".")[-1] == parts[-1]]
    if same:
        return "did you mean " + " or ".join(f"'{field}'" for field in same) + "?"
    section = [field for field in known if field.startswith(f"{parts[0]}.")]
    return f"known: {', '.join(section or list(_any_recipe().model_fields))}"


def _explain(error: ValidationError) -> str:
    """The first problem of a validation in one line: dotted key, value, what is wrong with it."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:  # first, because a misspelt key also leaves the right one missing
        key = _dotted(unknown[0]["loc"])
        return f"unknown key '{key}': {_suggest_key(key)}"
    first = _dotted(problems[0]["loc"])
    # A field of several types (int | 'auto') has one problem for each; the deepest is the most
    # specific ([a, 3]: item 1).
    problems = [
        p
        for p in problems
        if _dotted(p["loc"]) == first or _dotted(p["loc"]).startswith(f"{first}.")
    ]
    key = max((_dotted(problem["loc"]) for problem in problems), key=lambda k: k.count("."))
    problems = [problem for problem in problems if _dotted(problem["loc"]) == key]
    problem = problems[0]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing" and key[-1].isdigit():
        return f"{key.rpartition('.')[0]} = {show(problem['input'])}: too few values"
    if problem["type"] == "missing":
        return (
            f"{key} is missing: every {'teacher' if key.startswith('teachers.') else 'recipe'} "
            "needs it"
        )
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key and not message.startswith(key) else message
    text = [PLAIN_WORDS.get(p["type"], p["msg"]).split(", unable to")[0] for p in problems]
    expected = " or ".join(
        dict.fromkeys([text[0], *(words.removeprefix("Input should be ") for words in text[1:])])
    )
    return f"{key} = {show(problem['input'])}: {expected}"


def _dotted(location: Sequence[str | int]) -> str:
    """The recipe's key of a pydantic location, which also names the members of a union it tried."""
    parts: list[str] = []
    section: type[BaseModel] | None = _any_recipe()
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
        elif section:
            parts.append(part)
            section = (
                _section_of(section.model_fields[part].annotation)
                if part in section.model_fields
                else None
            )
    return ".".join(parts)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a nested section or of a list of sections; None for a plain field."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe, every default written out, as YAML that reads back to an equal
    recipe.
    """
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True
    )


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested mappings and lists of mappings; an empty mapping has no
    leaves.
    """
    if isinstance(value, dict):
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


def recipe_fields(
    model: type[BaseModel] | None = None, prefix: str = ""
) -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of everything a recipe can set; `teachers.N.` stands for any
    teacher.
    """
    rows = []
    for name, field in (model or _any_recipe()).model_fields.items():
        key = f"{prefix}{name}"
        section = _section_of(field.annotation)
        if section:
            several = "" if section is field.annotation else "N."
            rows += recipe_fields(section, f"{key}.{several}")
            continue
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            default = value if isinstance(value, str) else show(value)
        rows.append((key, _type_text(field.annotation), default, field.description or ""))
    return rows


def _type_text(annotation: Any) -> str:
    """A field's type in YAML's terms: "int | auto", "[float, float]", "mapping"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(kind) for kind in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"[{_type_text(inner[0])}, …]"
    if origin is tuple:
        return f"[{', '.join(_type_text(kind) for kind in inner)}]"
    if origin is list:
        return f"[{_type_text(inner[0])}, …]"
    if origin is dict:
        return "mapping"
    return "null" if annotation is type(None) else annotation.__name__


def describe_recipes() -> str:
    """Shipped recipes by method, with the first line of their headers, and every key with default
    and meaning.
    """
    shipped = shipped_recipes()
    by_method: dict[str, list[str]] = {}
    for name in sorted(shipped):
        values, _ = merged_values(shipped[name], name)
        by_method.setdefault(values.get("method", "umt"), []).append(name)
    lines = ["shipped recipes (figures are the papers', in % unless said otherwise):"]
    column = max(map(len, shipped)) + 4
    for method in METHODS:
        if method in by_method:
            lines += ["", f"method {method}"]
        for name in by_method.get(method, ()):
            about = shipped[name].splitlines()[0].lstrip("# ")
            lines.append(_wrap(about, column, f"  {name}"))
    lines += ["", "keys (N is a teacher's number, from 0), with default, type and meaning:"]
    lines += ["  base  (str, in files alone)", _wrap(_BASE_MEANING, 6)]
    return "\n".join([*lines, describe_fields(recipe_fields())])


def describe_fields(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Rows of `recipe_fields` for a terminal of 80 columns: key, default and type on one line, the
    meaning below.
    """
    lines = []
    for key, kind, default, meaning in rows:
        required = default == "required"
        lines.append(
            f"  {key}  ({kind}, required)" if required else f"  {key} = {default}  ({kind})"
        )
        if meaning:
            lines.append(_wrap(meaning, 6))
    return "\n".join(lines)


def _wrap(text: str, indent: int, before: str = "") -> str:
    """Text in lines of at most 80 columns, indented; `before` stands in the first one's indent."""
    return textwrap.fill(
        text,
        80,
        initial_indent=before.ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
