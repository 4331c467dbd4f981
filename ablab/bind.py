# SPDX-License-Identifier: MIT
"""Typed symbol values to frozen dataclasses: the field is the symbol's tail in lower case, no defaults."""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any


class BindError(ValueError):
    """A field and its symbol disagree, or a rule across fields is broken; the text names symbol and origin."""


def bind(cls: type, prefix: str, values: Mapping[str, Any], where: Mapping[str, str] | None = None) -> Any:
    """An instance of the dataclass `cls` from the symbols `prefix`_FIELD.

    `values` are typed values of the visible symbols; `where` maps a symbol to its origin (file:line) for error
    texts.  An Enum field takes the member whose symbol `prefix`_FIELD_MEMBER is y.  A field whose symbol is
    invisible is None, which its annotation must allow.  A symbol called exactly `prefix` binds to `name`.
    Raises BindError on a type that does not fit and on a ValueError of `__post_init__`.
    """
    hints = typing.get_type_hints(cls)
    got = {f.name: _field(prefix, f.name, hints[f.name], values) for f in fields(cls)}
    try:
        return cls(**got)
    except ValueError as error:
        raise BindError(f"{error}{origins(str(error), where or {})}") from error


def origins(text: str, where: Mapping[str, str]) -> str:
    """What follows an error text: where each symbol that it names got its value."""
    named = {word.strip(":,;") for word in text.split()}
    return "".join(f" (CONFIG_{s} from {w})" for s, w in where.items() if f"CONFIG_{s}" in named)


def symbols(cls: type, prefix: str) -> dict[str, tuple[str, ...]]:
    """Field name -> the symbols it binds: one, or for an Enum one for each member."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        kind, _ = _unwrap(hints[f.name])
        symbol = symbol_of(prefix, f.name)
        if isinstance(kind, type) and issubclass(kind, Enum):
            found[f.name] = tuple(f"{symbol}_{m.name}" for m in kind)
        else:
            found[f.name] = (symbol,)
    return found


def symbol_of(prefix: str, field: str) -> str:
    """The symbol of a field; `name` is the symbol that is the prefix itself."""
    return prefix if field == "name" else f"{prefix}_{field.upper()}"


def _unwrap(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType) and type(None) in hint.__args__:
        (kind,) = (a for a in hint.__args__ if a is not type(None))
        return kind, True
    return hint, False


def _field(prefix: str, name: str, hint: Any, values: Mapping[str, Any]) -> Any:
    kind, optional = _unwrap(hint)
    symbol = symbol_of(prefix, name)
    if isinstance(kind, type) and issubclass(kind, Enum):
        value = next((m for m in kind if values.get(f"{symbol}_{m.name}") is True), None)
    else:
        value = values.get(symbol)
    if value is None:
        if optional:
            return None
        raise BindError(f"CONFIG_{symbol}: not visible in this configuration, but {prefix} needs it")
    if kind is Path and isinstance(value, str):
        return Path(value)
    origin = typing.get_origin(kind) or kind
    # bool is an int in Python; a knob must not slip from one to the other
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise BindError(f"CONFIG_{symbol}: {value!r} is {type(value).__name__}, the field wants {origin.__name__}")
    return value
