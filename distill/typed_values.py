"""What a value means, in `key=value` or in a recipe file: the field's type decides.

A string is what was typed, whatever it would be in YAML (` #` begins no comment, `no` is no
switch). Where a field has no type (timm's arguments), a word that people and YAML read in different
ways is refused.
"""

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from contract.errors import UserError
from distill.recipe_files import Ambiguous, RecipeLoader, show

_REFERENCES = (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken)


def field_type(model: type[BaseModel], key: str) -> Any:
    """The annotation of a dotted key; `Any` inside a free mapping and for a key that is unknown."""
    kind: Any = model
    for part in key.split("."):
        section = _section(kind)
        if section is None:
            kind = _item(kind)
        elif part in section.model_fields:
            kind = section.model_fields[part].annotation
        else:
            return Any
    return kind


def read_typed(key: str, text: str, kind: Any) -> Any:
    """The value that `text` gives a field of type `kind` on a command line; pydantic checks it.

    Raises UserError, in one line, for text that means something else than it seems to.
    """
    kinds = list(_kinds(kind))
    if text == "" or (text.isspace() and str not in kinds):
        raise UserError(f"{key} = '{text}' is empty: give a value (null for none)")
    bare = text.strip()
    if bare[0] in "[{" and (str not in kinds or bare[0] == "[" and _has_list(kinds)):
        return settle(key, _collection(key, bare), kind)
    if str in kinds:
        return None if bare == "null" and type(None) in kinds else _text(key, text)
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    if quoted and Any in kinds:
        return _load(key, bare)
    # resolved as a whole: ` #` and `: ` in it begin nothing
    node = yaml.ScalarNode(_RESOLVER.resolve(yaml.ScalarNode, bare, (True, False)), bare)
    value = _RESOLVER.construct_object(node)
    return settle(key, text if type(value) is str else value, kind)


_RESOLVER = RecipeLoader("")


def settle(key: str, value: Any, kind: Any) -> Any:
    """A value of a recipe's file without words that could be something else: text where the field
    has a type, and refused where it has none.
    """
    if isinstance(value, Ambiguous):
        if Any not in _kinds(kind):
            return str(value)
        raise UserError(
            f"{key} = {value} is {show(value.other)} to some readers of YAML and text to others: "
            f"write {show(value.other)}, or '{value}' in quotes"
        )
    if isinstance(value, list):
        return [settle(f"{key}.{n}", item, _item(kind)) for n, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    section, settled = _section(kind), {}
    for name, item in value.items():
        inner = _item(kind)
        if section:  # an unknown key is refused as such, whatever its value
            known = section.model_fields.get(str(name))
            inner = known.annotation if known else str
        name = str(name) if isinstance(name, str) else name
        settled[name] = settle(f"{key}.{name}" if key else str(name), item, inner)
    return settled


def _text(key: str, text: str) -> str:
    """Text as it was typed, but not where the shell would have been expected to change it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        raise UserError(
            f"{key} = {text} is in quotes twice: a value is taken as typed, so leave out the inner "
            "ones"
        )
    if text == "~" or text.startswith("~/"):
        raise UserError(
            f"{key} = {text}: the shell expands ~ only at the start of a word: write $HOME"
            f"{text[1:]}, or ./{text} for a folder of that name"
        )
    return text


def _collection(key: str, text: str) -> Any:
    """A list [a, b] or mapping {a: 1}; raises UserError where YAML would drop or rename a part."""
    value = _load(key, text)
    end = 0
    for token in yaml.scan(text, Loader=RecipeLoader):
        if isinstance(token, _REFERENCES):
            part = text[token.start_mark.index : token.end_mark.index]
            raise UserError(f"{key}: {part} refers to something in YAML: put the value in quotes")
        if "#" in text[end : token.start_mark.index]:
            rest = text[end:].strip()
            raise UserError(f"{key}: '{rest}' would be a comment: put the value with # in quotes")
        end = token.end_mark.index
    for empty in _without_value(yaml.compose(text, Loader=RecipeLoader)):
        raise UserError(
            f"{key}: '{empty}' has no value: write a space after the colon, or null for none"
        )
    return value


def _without_value(node: yaml.Node) -> Iterator[str]:
    """Keys of mappings that are followed by nothing."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.style is None and value.value == "":
                yield str(name.value)
            yield from _without_value(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _without_value(item)


def _load(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None)
        twice = f" ({problem})" if problem and "given twice" in problem else ""
        raise UserError(
            f"{key}: '{text}' is not valid YAML{twice} (quote it, or close its brackets)"
        ) from error


def _kinds(annotation: Any) -> Iterator[Any]:
    """The members of a union, without their constraints."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(inner[0])
    elif origin in (Union, types.UnionType):
        for kind in inner:
            yield from _kinds(kind)
    else:
        yield annotation


def _has_list(kinds: list[Any]) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in kinds)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, if it is one."""
    return next(
        (k for k in _kinds(annotation) if isinstance(k, type) and issubclass(k, BaseModel)), None
    )


def _item(annotation: Any) -> Any:
    """The type of what is in a list or mapping; `Any` where it has none."""
    for kind in _kinds(annotation):
        origin, inner = get_origin(kind), get_args(kind)
        if origin in (list, tuple):
            return inner[0]
        if origin is dict:
            return inner[1]
    return Any
