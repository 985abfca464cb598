"""`key=value` settings of the evaluation command, checked like a recipe's."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from contract.errors import UserError, suggest
from distill.evaluate.config import EvaluationConfig
from distill.recipe_files import show
from distill.recipe_io import PLAIN_WORDS, describe_fields, recipe_fields
from distill.typed_values import field_type, read_typed

_RENAMED = {"extract.crop": "extract.view: write extract.view=centre-crop:SHARE"}
"""Keys of earlier versions whose values have another form now."""


def load_settings(overrides: Sequence[str]) -> EvaluationConfig:
    """The default settings with `section.key=value` applied; raises UserError naming the key, the
    value and the remedy.
    """
    known = [field for field, _, _, _ in recipe_fields(EvaluationConfig)]
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not a setting: write key=value, e.g. probe.epochs=20")
        if key in _RENAMED:
            raise UserError(f"'{key}' is now {_RENAMED[key]} (--list shows all)")
        if key not in known:
            same = [field for field in known if field.split(".")[-1] == key.split(".")[-1]]
            hint = f"did you mean '{same[0]}'?" if same else suggest(key, known)
            raise UserError(f"unknown key '{key}': {hint} (--list shows all)")
        section, _, name = key.rpartition(".")
        place = values.setdefault(section, {}) if section else values
        place[name] = read_typed(key, text, field_type(EvaluationConfig, key))
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(
            str(part) for part in problem["loc"] if not str(part).startswith("function-")
        )
        message = PLAIN_WORDS.get(problem["type"], problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "value_error":
            raise UserError(message if message.startswith(key) else f"{key}: {message}") from error
        raise UserError(f"{key} = {show(problem['input'])}: {message}") from error


def describe_settings() -> str:
    return describe_fields(recipe_fields(EvaluationConfig))
