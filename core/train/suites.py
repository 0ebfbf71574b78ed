"""Suites and recipes: published protocols of several tasks, and the published settings of a method on one of them.

A plugin declares one :class:`Book` (``Plugin.recipes``): its suites in Python, its recipes as one YAML file each, named
``METHOD-SUITE.yaml``. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from peft_suite.config import Config, parse_shorthand
from peft_suite.errors import ConfigError, UnknownNameError, closest
from peft_suite.train.config import RunConfig

__all__ = ["Book", "NamedRecipe", "Suite", "merged"]


@dataclass(frozen=True)
class Suite:
    """A protocol of several tasks.

    Attributes:
        name, summary: for people.
        groups: group -> its tasks, in the order of tables. Means are taken over groups and over tasks.
        fields: ``fields(task)`` are the fields of :class:`RunConfig` that choose the task in a data root.
        missing: ``missing(root, task, data)`` says in one sentence what of a task is not in a root ("" for nothing);
            ``data`` are the data fields of the recipe.
        find: ``find(name)`` is the task behind a name or an alias; unknown names raise UnknownNameError.
    """

    name: str
    summary: str
    groups: Mapping[str, tuple[str, ...]]
    fields: Callable[[str], Mapping[str, Any]]
    missing: Callable[[str, str, Mapping[str, Any]], str]
    find: Callable[[str], str]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, group by group."""
        return tuple(task for group in self.groups.values() for task in group)


@dataclass(frozen=True)
class NamedRecipe(Config):
    """What a method's authors did on a suite: everything of a run but the place of the data.

    Attributes:
        name: file name; ``METHOD-SUITE``, with an ending for further ones.
        suite: of the plugin.
        method: as in :class:`RunConfig`.
        source: paper, repository and commit that the values were read in.
        summary: one line.
        extends: name of the recipe whose values this one overrides.
        backbone, data, recipe: fields of the sections of :class:`RunConfig`.
        resample: as in :class:`RunConfig`.
        seeds: that the results were averaged over.
        selects_on: data that chose the reported epoch. "test" only where ``reproduces`` says that the paper did so.
        reproduces: "paper" repeats the paper's selection, "" changes it to one that does not look at test data.
        tuning: how values that differ between tasks were chosen, as far as the source says.
        tasks: task -> dotted fields of :class:`RunConfig` that differ there.
        parameters: trainable parameters of the usual backbone: ``without_head`` and ``with_head_100`` (100 classes).
        published: results in percent by group, "mean of groups", "mean of tasks" or task; ``source`` says where.
        departures: what this run does otherwise than the source.
    """

    name: str
    suite: str
    method: Mapping[str, Any] | str
    source: str
    summary: str = ""
    extends: str = ""
    backbone: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    resample: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    selects_on: Literal["nothing", "val", "test"] = "nothing"
    reproduces: Literal["", "paper"] = ""
    tuning: str = ""
    tasks: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    departures: tuple[str, ...] = ()

    def validate(self) -> None:
        rule = {"last": "nothing", "val": "val", "test": "test"}
        said = rule.get(str(self.recipe.get("select", "val")), "")
        self.require("selects_on", said == self.selects_on, f"recipe.select = {self.recipe.get('select', 'val')!r}")
        self.require(
            "selects_on",
            self.selects_on != "test" or self.reproduces == "paper",
            "choosing an epoch on test data is for reproducing a paper that did; say reproduces: paper",
        )
        self.require("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "must be different numbers")
        for name in ("parameters", "published"):
            values = {k: v for k, v in getattr(self, name).items() if k != "source"}
            self.require(name, all(v is None or isinstance(v, int | float) for v in values.values()), "give numbers")

    @property
    def method_name(self) -> str:
        """Name of the method in the registry."""
        if isinstance(self.method, str):
            return parse_shorthand(self.method)[0]
        return str(self.method.get("name", ""))

    def run_fields(self, suite: Suite, task: str = "") -> dict[str, Any]:
        """Fields of :class:`RunConfig` for a task; with "" those that all tasks share."""
        method: Any = self.method
        if isinstance(method, str):
            name, values = parse_shorthand(method)
            method = {"name": name, **values}
        shared = {"backbone": self.backbone, "data": self.data, "recipe": self.recipe, "method": method}
        values = merged(shared, {"resample": self.resample, "seed": self.seeds[0]}, suite.fields(task) if task else {})
        for name, value in self.tasks.get(task, {}).items():
            node = values
            *path, last = str(name).split(".")
            for key in path:
                node = node.setdefault(key, {})
            node[last] = value
        return values

    def take_seeds(self, count: int) -> list[int]:
        """The first ``count`` seeds; where there are fewer, consecutive numbers follow the largest."""
        more = range(max(self.seeds) + 1, max(self.seeds) + 1 + max(0, count - len(self.seeds)))
        return [*self.seeds[:count], *more]


class Book:
    """The suites and recipes of a plugin; the recipes are read from the package on first use.

    Args:
        package: that holds the YAML files, or a folder of them.
        suites: of the plugin.
        folder: below the package.
    """

    def __init__(self, package: str | Path, suites: Iterable[Suite], folder: str = "recipes") -> None:
        self.package, self.folder = package, folder
        self.suites: Mapping[str, Suite] = {suite.name: suite for suite in suites}

    @functools.cached_property
    def recipes(self) -> Mapping[str, NamedRecipe]:
        """Every recipe by name.

        Raises:
            ConfigError: a file is not valid; the message names it.
        """
        root: Any = self.package if isinstance(self.package, Path) else resources.files(self.package) / self.folder
        files = {entry.name.removesuffix(".yaml"): entry for entry in root.iterdir() if entry.name.endswith(".yaml")}
        raw = {name: _read(name, file.read_text("utf-8")) for name, file in sorted(files.items())}
        return {name: self._build(name, raw) for name in raw}

    def suite(self, name: str) -> Suite:
        """The suite of that name; UnknownNameError lists the others."""
        if name not in self.suites:
            raise UnknownNameError("suite", name, self.suites)
        return self.suites[name]

    def recipe(self, name: str) -> NamedRecipe:
        """The recipe of that name; UnknownNameError lists the others."""
        if name not in self.recipes:
            raise UnknownNameError("recipe", name, self.recipes, "List them with the verb: recipes")
        return self.recipes[name]

    def choose(self, entry: str, suite: str) -> NamedRecipe:
        """The recipe for a recipe's name, a method's name, or a method with fields of its own.

        ``vpt`` is the recipe ``vpt-vtab`` on the suite vtab; ``vpt(num_tokens=5)`` the same with five tokens.

        Raises:
            UnknownNameError: the suite has no recipe for it.
        """
        own = {name: recipe for name, recipe in self.recipes.items() if recipe.suite == suite}
        if entry in own:
            return own[entry]
        base, values = parse_shorthand(entry)
        found = own.get(f"{base}-{suite}")
        if found is None:
            same = [r for r in own.values() if r.method_name == base and not r.reproduces]
            if len(same) != 1:
                raise UnknownNameError(
                    f"recipe of the suite {suite}", entry, own, "A method's name or a recipe's name is expected."
                )
            found = same[0]
        if not values:
            return found
        method = {**found.run_fields(self.suite(suite))["method"], **values}
        own_values = {f"method.{key}" for key in values}  # stronger than a task's
        tasks = {task: {k: v for k, v in row.items() if k not in own_values} for task, row in found.tasks.items()}
        return found.replace(method=method, tasks=tasks)

    def _build(self, name: str, raw: Mapping[str, Mapping[str, Any]], below: tuple[str, ...] = ()) -> NamedRecipe:
        try:
            values = dict(_extended(name, raw, below))
            values["tasks"] = _table(values.get("tasks", {}))
            recipe = NamedRecipe.from_dict({"name": name, **values})
            suite = self.suite(recipe.suite)
            for task in recipe.tasks:
                if task not in suite.tasks:
                    raise UnknownNameError(f"task of {suite.name}", task, suite.tasks)
            known = {*suite.groups, *suite.tasks, "mean of groups", "mean of tasks", "source"}
            for key in recipe.published:
                if key not in known:
                    raise UnknownNameError("result", key, known)
            for task in ("", *suite.tasks):
                RunConfig.from_dict({"plugin": "", **recipe.run_fields(suite, task)})
        except (ConfigError, UnknownNameError) as error:
            raise ConfigError(f"Recipe {name}: {error}") from error
        return recipe


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other, the later the stronger; lists and values are replaced."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            both = isinstance(value, Mapping) and isinstance(old, Mapping)
            result[key] = (
                merged(old, value)
                if both and old is not None
                else (merged(value) if isinstance(value, Mapping) else value)
            )
    return result


def _read(name: str, text: str) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Recipe {name}: not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Recipe {name}: the file must hold fields such as 'method: ssf'.")
    fields = [f.name for f in dataclasses.fields(NamedRecipe) if f.name != "name"]
    for key in values:
        if key not in fields:
            raise ConfigError(f"Recipe {name}: unknown field {key!r}. {closest(str(key), fields)}")
    return values


def _extended(name: str, raw: Mapping[str, Mapping[str, Any]], below: Sequence[str]) -> Mapping[str, Any]:
    """The values of a file over those of the file that it extends."""
    own = raw[name]
    parent = str(own.get("extends", ""))
    if not parent:
        return own
    if parent not in raw or parent in (name, *below):
        raise UnknownNameError("recipe to extend", parent, [n for n in raw if n not in (name, *below)])
    base = _extended(parent, raw, (*below, name))
    replaced = {k: v for k, v in base.items() if k not in own or k in ("backbone", "data", "recipe")}
    return merged(replaced, own)


def _table(value: Any) -> dict[str, dict[str, Any]]:
    """``{"fields": [a, b], "cifar": [1, 2]}`` as ``{"cifar": {"a": 1, "b": 2}}``."""
    if not value:
        return {}
    fields = value.get("fields") if isinstance(value, Mapping) else None
    if not isinstance(fields, list) or not all(isinstance(f, str) for f in fields):
        raise ConfigError("tasks needs a line 'fields: [recipe.lr, ...]' that names the columns.")
    for name in fields:
        head = name.partition(".")[0]
        if head not in ("backbone", "data", "recipe", "method"):
            raise ConfigError(
                f"tasks.fields: unknown field {name!r}. {closest(head, ['backbone', 'data', 'recipe', 'method'])}"
            )
    rows = {}
    for task, row in value.items():
        if task == "fields":
            continue
        if not isinstance(row, list) or len(row) != len(fields):
            raise ConfigError(f"tasks.{task} = {row!r} must be a list of {len(fields)} values: {', '.join(fields)}.")
        rows[task] = dict(zip(fields, row, strict=True))
    return rows
