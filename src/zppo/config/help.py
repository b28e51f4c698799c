"""What settings there are: every dotted key with type, default and meaning, read off the settings models."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zppo.config.data_settings import MixtureSource
from zppo.config.settings import Settings

_HELP_WIDTH = 100
_PLAIN_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
_BOUNDS = (
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "<="),
    (annotated_types.Lt, "lt", "<"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe.

    Attributes:
        name: dotted, e.g. train.learning_rate.
        kind: what it takes, in words.
        default: what it is when it is not set; meaningless where `required`.
        required: whether there is no default.
        description: what it means.
        section: whether it holds further keys.
        types: the Python types that it takes, None left out.
    """

    name: str
    kind: str
    default: Any
    required: bool
    description: str
    section: bool
    types: tuple[Any, ...]


@lru_cache(maxsize=1)
def known_keys() -> Mapping[str, Key]:
    """Every key of `Settings`, sections too; the plain keys of a section before the sections in it."""
    return {key.name: key for key in _walk(Settings, "", None)}


ITEM = "data.train[]"
"""How a source of a data.train that is a list is called here."""
_ITEMS = ((re.compile(r"data\.train\.\d+(?=\.|$)"), ITEM), (re.compile(r"more_teachers\.\d+(?=\.|$)"), "teacher"))


@lru_cache(maxsize=1)
def item_keys() -> Mapping[str, Key]:
    """Every key of a source of a data.train that is a list."""
    return {key.name: key for key in _walk(MixtureSource, f"{ITEM}.", None)}


def find_key(name: str) -> Key | None:
    """What is known of a key, also of one in a list: of `data.train.0.cap`, of `more_teachers.0.model`."""
    for pattern, known in _ITEMS:
        name = pattern.sub(known, name, count=1)
    return known_keys().get(name) or item_keys().get(name)


def nearest_key(name: str) -> str:
    """The known key that most resembles a misspelt one: one of that very name elsewhere, else in the same section, else anywhere."""
    above, _, last = name.lower().rpartition(".")
    number = re.match(r"data\.train\.\d+", name)
    known = [key.replace(ITEM, number[0]) for key in item_keys()] if number else list(known_keys())
    same_name = [key for key in known if last in (key.rpartition(".")[2], _initials(key))]
    same_section = [key for key in known if key.rpartition(".")[0] == above] if above else []

    def likeness(key: str) -> float:
        whole = difflib.SequenceMatcher(None, name.lower(), key).ratio()
        return whole + difflib.SequenceMatcher(None, last, key.rpartition(".")[2]).ratio()

    return max(same_name or same_section or known, key=likeness)


def _initials(key: str) -> str:
    """lr for train.learning_rate: the short form that people try first."""
    words = key.rpartition(".")[2].split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else key


def help_text() -> str:
    """Every setting with its type, default and meaning, in lines of at most 100 columns."""
    lines = ["settings (keys of a recipe; on the command line --key=value):"]
    for key in known_keys().values():
        if key.section:
            lines += ["", *_wrap(f"{key.name}: {key.description}", "  ")]
            continue
        default = "required" if key.required else f"default {show(key.default)}"
        lines += _wrap(f"{key.name}  [{key.kind}; {default}]", "    ")
        lines += _wrap(key.description, "        ")
    lines += ["", *_wrap(f"{ITEM}: each source, where data.train is a list of several", "  ")]
    for key in item_keys().values():
        if not key.section and key.name.count(".") == 2:
            lines += _wrap(f"{key.name}  [{key.kind}; {'required' if key.required else f'default {show(key.default)}'}]", "    ")
            lines += _wrap(key.description, "        ")
        elif key.name.count(".") == 2:
            lines += [*_wrap(f"{key.name}  [a section of keys]", "    "), *_wrap(key.description, "        ")]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as one would write it in a recipe."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _HELP_WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _walk(model: type[BaseModel], prefix: str, instance: BaseModel | None) -> Iterator[Key]:
    """Keys of a settings model, sections last; `instance` holds defaults where a section's default differs from its class's."""
    for name, field in sorted(model.model_fields.items(), key=lambda item: _section(item[1]) is not None):
        dotted = f"{prefix}{name}"
        default = getattr(instance, name) if instance is not None else field.default
        required = instance is None and field.is_required()
        types = tuple(_bare(t) for t in _members(field.annotation) if t is not NoneType)
        below = _section(field)
        description = field.description or ""
        if below is None:
            yield Key(dotted, _kind(field), default, required, description, False, types)
        else:
            yield Key(dotted, "a section of keys", default, required, description, True, types)
            yield from _walk(below, f"{dotted}.", default if isinstance(default, BaseModel) else None)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of a field that is a section."""
    return next((t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _kind(field: FieldInfo) -> str:
    """A field's type in words, with its bounds."""
    members = _members(field.annotation)
    text = _bounded(" or ".join(_words(t) for t in members if t is not NoneType), field.metadata)
    return f"{text}, or empty" if NoneType in members else text


def _bounded(words: str, metadata: Sequence[Any]) -> str:
    bounds = [f"{sign} {getattr(bound, attribute):g}" for bound in metadata for kind, attribute, sign in _BOUNDS if isinstance(bound, kind)]
    return f"{words} {' and '.join(bounds)}" if bounds else words


def _words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:  # a bound on one member of a union
        fields = [given for given in args[1:] if isinstance(given, FieldInfo)]
        return _bounded(_words(args[0]), [bound for field in fields for bound in field.metadata])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {_words(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(map(_words, args))}"
    if origin is dict:
        return "mapping of names to values" if args[1] is Any else f"mapping of names to {_words(args[1])}"
    return _PLAIN_TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))
