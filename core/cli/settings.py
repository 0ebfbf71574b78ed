"""One run configuration from a YAML file, named flags and ``field=value`` words, in rising order of precedence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_suite.config import parse_shorthand
from peft_suite.errors import ConfigError, closest
from peft_suite.train.config import BackboneConfig, Recipe, RunConfig
from peft_suite.train.suites import merged

__all__ = ["FLAGS", "assemble", "dump", "overrides", "read_yaml", "split_methods"]

FLAGS: Mapping[str, str] = {
    "backbone": "backbone.name",
    "checkpoint": "backbone.checkpoint",
    "pretrained": "backbone.pretrained",
    "data": "data.root",
    "shots": "data.shots",
    "skip_bad": "data.skip_bad",
    "method": "method",
    "epochs": "recipe.epochs",
    "lr": "recipe.lr",
    "batch_size": "recipe.batch_size",
    "precision": "recipe.precision",
    "seed": "seed",
    "seeds": "seeds",
    "out": "out",
    "device": "device",
    "task": "data.task",
}
_SECTIONS = {"backbone": BackboneConfig, "recipe": Recipe}


def assemble(
    plugin: str,
    file: Path | None,
    flags: Mapping[str, Any],
    words: Iterable[str],
    start: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration; every unknown or ill-typed field is an error that names it.

    Args:
        plugin: what the command belongs to; a file that names another plugin is refused.
        file: YAML with the fields of :class:`RunConfig`.
        flags: values by flag name; None is "not given".
        words: ``dotted.field=value``, the value in YAML.
        start: fields of a named recipe, which everything else overrides.

    Raises:
        ConfigError: with the closest valid names.
    """
    given = read_yaml(file) if file else {}
    values = merged({k: v for k, v in (start or {}).items() if k != "method" or k not in given}, given)
    named = values.setdefault("plugin", plugin)
    if named != plugin:
        raise ConfigError(f"{file} is for the plugin {named!r}. Run: peft-suite {named} train --config {file}")
    for flag, value in flags.items():
        if value is not None:
            _put(values, FLAGS[flag], str(value) if isinstance(value, Path) else value)
    for name, value in overrides(words):
        _put(values, name, value)
    for name in ("backbone", "recipe", "data"):
        if not isinstance(values.get(name, {}), Mapping):
            raise ConfigError(f"{name} = {values[name]!r} must be a mapping of fields. {_fields(name)}")
    return RunConfig.from_dict(values)


def overrides(words: Iterable[str]) -> list[tuple[str, Any]]:
    """``["recipe.lr=1e-3"]`` as ``[("recipe.lr", "1e-3")]``, values read as YAML."""
    found = []
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name.strip():
            raise ConfigError(
                f"Cannot read {word!r}. Write FIELD=VALUE, for example recipe.lr=1e-3 or method.num_tokens=20."
            )
        try:
            found.append((name.strip(), yaml.safe_load(text) if text else ""))
        except yaml.YAMLError as error:
            raise ConfigError(f"Cannot read the value of {word!r} as YAML. Put it in quotes.") from error
    return found


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: missing, unreadable or not a mapping.
    """
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"The configuration file {file} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The configuration file {file} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise ConfigError(f"The configuration file {file} must hold fields such as 'method: ssf'. {_fields('')}")
    return values


def dump(config: RunConfig) -> str:
    """The configuration as YAML that ``--config`` reads."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def split_methods(text: str) -> list[str]:
    """``"ssf,vpt(num_tokens=5, deep=True)"`` as two methods: commas in brackets do not separate."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    methods = [part.strip() for part in parts if part.strip()]
    if not methods or depth:
        raise ConfigError(
            f"Cannot read the methods {text!r}. Separate them by commas, for example linear,ssf,vpt(deep=True)."
        )
    return methods


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted field; a method given in short becomes a mapping when one of its fields is set."""
    head, *path = name.split(".")
    if head not in {f.name for f in dataclasses.fields(RunConfig)}:
        raise ConfigError(f"Unknown field {name!r}. {_fields('', head)}")
    if head in _SECTIONS and path:
        known = [f.name for f in dataclasses.fields(_SECTIONS[head])]
        if path[0] not in known:
            raise ConfigError(f"Unknown field {name!r}. {_fields(head, path[0])}")
    if head == "method" and path and not isinstance(values.get("method"), Mapping):
        method, fields = parse_shorthand(str(values.get("method", "linear")))
        values["method"] = {"name": method, **fields}
    if head == "plugin":
        raise ConfigError("The plugin is the word after peft-suite; it cannot be set as a field.")
    node = values
    for depth, key in enumerate([head, *path][:-1]):
        child = node.setdefault(key, {})
        if not isinstance(child, Mapping):
            raise ConfigError(
                f"{'.'.join([head, *path][: depth + 1])} is a single value and has no field {path[depth]!r}."
            )
        node[key] = child = dict(child)
        node = child
    node[[head, *path][-1]] = value


def _fields(section: str, near: str = "") -> str:
    cls: type = _SECTIONS.get(section, RunConfig)
    names = [f.name for f in dataclasses.fields(cls)]
    return closest(near, names) if near else f"Valid fields: {', '.join(names)}."
