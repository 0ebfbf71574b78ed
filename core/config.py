"""Frozen dataclass configurations: typed, validated, JSON in and out, and a string shorthand.

``"vpt(num_tokens=50, deep=True)"``, ``VPTConfig(num_tokens=50, deep=True)`` and
``{"name": "vpt", "num_tokens": 50, "deep": True}`` are three spellings of one object. No torch objects inside.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import keyword
import re
import types
import typing
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from peft_suite.errors import ConfigError, closest

__all__ = ["Config", "MethodConfig", "field_table", "parse_shorthand"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every configuration: checks each field's type when built.

    Raises:
        ConfigError: a field has the wrong type or a value outside its declared choices.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            fixed, ok = _coerce(value, hint)
            if not ok:
                raise ConfigError(
                    f"{type(self).__name__}.{field.name} = {value!r} is not of type {_show(hint)}. "
                    f"Give a value such as {_example(field)!r}."
                )
            object.__setattr__(self, field.name, fixed)
        self.validate()

    def validate(self) -> None:
        """Check values against each other; overridden where types are not enough. Raises ConfigError."""

    def require(self, field: str, ok: bool, rule: str) -> None:
        """Raise ConfigError naming ``field``, its value and ``rule`` unless ``ok``."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {rule}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with every field."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, newer: bool = False) -> Self:
        """Build from a mapping; nested configurations are built from nested mappings.

        Args:
            values: field name to value.
            newer: warn about unknown fields instead of raising (for files written by a later version).

        Raises:
            ConfigError: an unknown field (closest names are listed) or an ill-typed value.
        """
        hints = _hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = [key for key in values if key not in names]
        if unknown and not newer:
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}. {closest(unknown[0], names)}")
        if unknown:
            warnings.warn(
                f"{cls.__name__}: fields {unknown} are unknown to this version of peft-suite and are ignored.",
                stacklevel=2,
            )
        built: dict[str, Any] = {}
        for key, value in values.items():
            if key in names:
                nested = _nested(hints[key])
                built[key] = nested.from_dict(value, newer=newer) if nested and isinstance(value, Mapping) else value
        return cls(**built)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from JSON text; see :meth:`from_dict`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{cls.__name__}: not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        return type(self).from_dict({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes})


@dataclasses.dataclass(frozen=True)
class MethodConfig(Config):
    """Base of every method's configuration; ``method`` is the name that the registry knows."""

    method: ClassVar[str] = ""

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_plain(getattr(self, f.name))!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        ]
        return f"{self.method}({', '.join(changed)})"


_AMOUNT = re.compile(r"(=\s*)(\d+(?:\.\d+)?[kKmM])(?=\s*[,)])")  # 0.4M, which is no literal
_WORDS = "|".join(sorted(set(keyword.kwlist) - {"True", "False", "None"}))
_KEYWORD = re.compile(rf"([=\[,]\s*)({_WORDS})(?=\s*[,)\]])")  # a value such as layernorm=in is a word like others


def parse_shorthand(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name(field=value, ...)"`` into a name and keyword values; ``"name"`` alone is allowed.

    Values are Python literals; a bare word, or a number with a unit such as 0.4M, is a string. Nothing is evaluated.

    Raises:
        ConfigError: the text has another form.
    """
    help_ = 'Write a method as "name" or "name(field=value, ...)", for example "vpt(num_tokens=50, deep=True)".'
    name, bracket, rest = text.strip().partition("(")
    name = name.strip()
    if name.replace("-", "_").isidentifier() and not bracket:
        return name, {}
    try:
        rest = _KEYWORD.sub(r"\1'\2'", _AMOUNT.sub(r"\1'\2'", rest))
        call = ast.parse(f"{name.replace('-', '_')}({rest}", mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"Cannot read method {text!r}. {help_}") from error
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
        raise ConfigError(f"Cannot read method {text!r}. {help_}")
    values: dict[str, Any] = {}
    for given in call.keywords:
        if given.arg is None:
            raise ConfigError(f"Cannot read method {text!r}. {help_}")
        values[given.arg] = _literal(given.value, text, help_)
    return name, values


def field_table(cls: type[Config]) -> list[dict[str, Any]]:
    """One row per field: name, type, default (JSON-ready) and whether it is required."""
    hints = _hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        default = _default(f)
        required = default is dataclasses.MISSING
        rows.append(
            {
                "name": f.name,
                "type": _show(hints[f.name]),
                "default": None if required else _plain(default),
                "required": required,
                "help": f.metadata.get("help", ""),
            }
        )
    return rows


def _literal(node: ast.expr, text: str, help_: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_literal(item, text, help_) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"Cannot read a value in {text!r}: only literals are allowed. {help_}") from error


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING


def _example(field: dataclasses.Field[Any]) -> Any:
    default = _default(field)
    return "..." if default is dataclasses.MISSING else _plain(default)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return value


def _nested(hint: Any) -> type[Config] | None:
    for candidate in (hint, *get_args(hint)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _show(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " | ".join(_show(a) for a in args)
    if origin is tuple:
        inner = [a for a in args if a is not Ellipsis]
        return f"list of {_show(inner[0])}" if Ellipsis in args else f"({', '.join(map(_show, inner))})"
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))


def _coerce(value: Any, hint: Any) -> tuple[Any, bool]:
    """Return (value in its declared type, whether it fits); ints widen to floats and lists to tuples."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value, True
    if origin is Literal:
        return value, any(value == a and type(value) is type(a) for a in args)
    if origin in (Union, types.UnionType):
        for arg in sorted(args, key=lambda a: not (isinstance(a, type) and type(value) is a)):
            fixed, ok = _coerce(value, arg)
            if ok:
                return fixed, True
        return value, False
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return value, False
        hints = [args[0]] * len(value) if Ellipsis in args else list(args)
        if len(hints) != len(value):
            return value, False
        items = [_coerce(v, h) for v, h in zip(value, hints, strict=True)]
        return tuple(v for v, _ in items), all(ok for _, ok in items)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return value, isinstance(value, Mapping)
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value), True
            except ValueError:
                return value, False
        return (
            (float(value), True) if isinstance(value, int | float) and not isinstance(value, bool) else (value, False)
        )
    if hint is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    if hint is type(None):
        return value, value is None
    if isinstance(hint, type) or typing.get_origin(hint) is not None:
        return value, isinstance(value, get_origin(hint) or hint)
    return value, True
