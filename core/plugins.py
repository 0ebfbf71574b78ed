"""Plugins: what a package declares, and how the suite finds it.

A plugin is one :class:`Plugin` object behind an entry point of the group ``peft_suite.plugins``. It is pure data:
strings that name what to import on first use, so that listing never imports torch or a modality's libraries.
The suite's own packages use the same door.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft_suite.errors import MissingExtraError, PluginError, UnknownNameError

__all__ = [
    "AnatomyEntry",
    "DatasetEntry",
    "FlagEntry",
    "FoundPlugin",
    "MethodEntry",
    "Plugin",
    "TaskEntry",
    "VerbEntry",
    "families",
    "find_method",
    "find_plugin",
    "methods",
    "plugins",
    "register",
    "resolve",
]

GROUP = "peft_suite.plugins"


@dataclass(frozen=True)
class MethodEntry:
    """A fine-tuning method, or a named preset of one.

    Attributes:
        name: what users type.
        target: ``"module:Class"`` of a :class:`peft_suite.Method`, imported on first use. The module may import the
            core, the kernels and torch, nothing of its plugin's heavy dependencies.
        summary: one line for listings.
        paper: source, for example ``"Lian et al., NeurIPS 2022"``.
        preset: field values that this name fixes as defaults.
    """

    name: str
    target: str
    summary: str
    paper: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnatomyEntry:
    """A backbone family: the classes that belong to it and the function that describes one model.

    Attributes:
        family: name for messages, for example ``"timm-vit"``.
        classes: qualified class names, ``"timm.models.vision_transformer.VisionTransformer"``; subclasses count.
        target: ``"module:function"``, called with the model, returns a :class:`peft_suite.Anatomy`.
        examples: ``"module:function"`` names; each returns ``(model, batch)`` without arguments: tiny, randomly
            initialised members of the family for the conformance suite.
        kin: another family described by the same code. What the conformance suite has tried there, it does not try
            again here, but for the checks that every pair gets and the expensive ones of a new family.
    """

    family: str
    classes: tuple[str, ...]
    target: str
    examples: tuple[str, ...] = ()
    kin: str = ""


@dataclass(frozen=True)
class DatasetEntry:
    """A data layout or a named data set that the plugin's loader understands."""

    name: str
    summary: str


@dataclass(frozen=True)
class VerbEntry:
    """An extra command of the plugin, beside those that the core builds for everyone.

    Attributes:
        target: names a function whose signature Typer reads.
        example: what stands after the verb's name in the example of its ``--help``; "" for none.
    """

    name: str
    target: str
    summary: str
    example: str = ""


@dataclass(frozen=True)
class FlagEntry:
    """A flag of ``train`` that other tools of the modality have made usual; it sets a field as ``FIELD=VALUE`` does.

    Attributes:
        name: ``instance-prompt`` for ``--instance-prompt``.
        field: dotted name of the field, such as ``data.instance_prompt``.
        summary: one line.
        kind: "text" takes a value as it stands, "value" reads it as YAML, "switch" takes none and sets true.
    """

    name: str
    field: str
    summary: str
    kind: str = "text"


@dataclass(frozen=True)
class TaskEntry:
    """Another task than the plugin's usual one, for example segmentation beside classification.

    Attributes:
        name: value of the field ``task`` of a run.
        summary: one line.
        backbones, data: as in :class:`Plugin`; the data's splits carry the task object (``DataSplits.task``).
    """

    name: str
    summary: str
    backbones: str
    data: str


@dataclass(frozen=True)
class Plugin:
    """Everything that a package adds to the suite.

    Attributes:
        name: ``peft-suite NAME ...`` on the command line.
        summary: one line.
        extra: the extra of ``peft-suite`` (or the full requirement) that installs what ``requires`` lists.
        requires: top-level import names that must be importable before the plugin's loaders run.
        methods, anatomies, datasets, verbs: see the entry classes.
        backbones: ``"module:object"`` with the interface of :class:`peft_suite.train.Backbones`.
        data: ``"module:object"`` with the interface of :class:`peft_suite.train.DataSource`.
        tasks: other tasks with backbones and data of their own.
        recipes: ``"module:object"``, a :class:`peft_suite.train.suites.Book` of suites and recipes.
        demo: ``"module:function"`` behind ``peft-suite demo NAME``.
        example: ``(backbone, data)`` that work without a download; they stand in the examples of ``--help``.
        use: what to do with a trained adapter, a verb and its arguments, ``{adapter}`` being its folder.
        flags: further flags of ``train``; see :class:`FlagEntry`.
        doctor: ``"module:function"`` that returns further rows for ``peft-suite doctor``; called when nothing of
            ``requires`` is missing.
    """

    name: str
    summary: str = ""
    extra: str = ""
    requires: tuple[str, ...] = ()
    methods: tuple[MethodEntry, ...] = ()
    anatomies: tuple[AnatomyEntry, ...] = ()
    datasets: tuple[DatasetEntry, ...] = ()
    verbs: tuple[VerbEntry, ...] = ()
    backbones: str = ""
    data: str = ""
    tasks: tuple[TaskEntry, ...] = ()
    recipes: str = ""
    demo: str = ""
    example: tuple[str, str] = ("", "")
    doctor: str = ""
    use: str = "predict {adapter} FILES"
    flags: tuple[FlagEntry, ...] = ()

    def for_task(self, task: str) -> Plugin:
        """The plugin with the backbones and data of a task; itself for "".

        Raises:
            UnknownNameError: it declares no such task.
        """
        if not task:
            return self
        for entry in self.tasks:
            if entry.name == task:
                return replace(self, backbones=entry.backbones, data=entry.data)
        raise UnknownNameError("task", task, [t.name for t in self.tasks], "Leave it empty for the usual task.")

    def missing(self) -> list[str]:
        """Import names of ``requires`` that are not installed; nothing is imported."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    def install_line(self) -> str:
        """The command that installs what this plugin needs."""
        target = self.extra if not self.extra or "-" in self.extra or "[" in self.extra else f"peft-suite[{self.extra}]"
        return f"pip install '{target}'"

    def ensure(self) -> None:
        """Raise MissingExtraError with the install line when a requirement is missing."""
        if lost := self.missing():
            raise MissingExtraError(
                f"The {self.name} plugin needs {', '.join(lost)}, which is not installed. Run: {self.install_line()}"
            )


@dataclass(frozen=True)
class FoundPlugin:
    """One entry point and what became of it: ``plugin`` is None exactly when ``error`` says why."""

    name: str
    distribution: str
    version: str
    plugin: Plugin | None
    error: str = ""


_local: dict[str, Plugin] = {}


def register(plugin: Plugin) -> None:
    """Add a plugin for this process only, without packaging (notebooks, tests).

    Raises:
        PluginError: the object is no Plugin, or its name is taken.
    """
    if not isinstance(plugin, Plugin):
        raise PluginError(f"register() takes a peft_suite.Plugin, got {type(plugin).__name__}.")
    taken = {found.name for found in plugins()}
    if plugin.name in taken:
        raise PluginError(f"A plugin named {plugin.name!r} is already registered. Choose another name.")
    _local[plugin.name] = plugin
    _checked.cache_clear()
    families.cache_clear()


def plugins() -> tuple[FoundPlugin, ...]:
    """Every plugin found, broken ones included with their reason. Imports no torch.

    ``PEFT_SUITE_DISABLE=name,other`` hides plugins.
    """
    return _checked(os.environ.get("PEFT_SUITE_DISABLE", ""))


@functools.cache
def _checked(disabled: str) -> tuple[FoundPlugin, ...]:
    hidden = {name.strip() for name in disabled.split(",") if name.strip()}
    found: list[FoundPlugin] = []
    seen: set[tuple[str, str, str]] = set()
    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: p.name):
        dist = point.dist.name if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        if point.name in hidden or (point.name, point.value, dist) in seen:
            continue
        seen.add((point.name, point.value, dist))
        found.append(_load(point, dist, version))
    found += [FoundPlugin(n, "this process", "", p) for n, p in _local.items() if n not in hidden]
    return _refuse_duplicates(found)


def _load(point: importlib.metadata.EntryPoint, dist: str, version: str) -> FoundPlugin:
    try:
        plugin = point.load()
    except Exception as error:
        return FoundPlugin(point.name, dist, version, None, f"{type(error).__name__}: {error}")
    if not isinstance(plugin, Plugin):
        reason = f"{point.value} is a {type(plugin).__name__}, not a peft_suite.Plugin"
        return FoundPlugin(point.name, dist, version, None, reason)
    if plugin.name != point.name:
        return FoundPlugin(
            point.name, dist, version, None, f"its entry point says {point.name!r}, the object says {plugin.name!r}"
        )
    return FoundPlugin(point.name, dist, version, plugin)


def _refuse_duplicates(found: list[FoundPlugin]) -> tuple[FoundPlugin, ...]:
    owners: dict[tuple[str, str], FoundPlugin] = {}
    for item in found:
        names = [("plugin", item.name)]
        if item.plugin:
            names += [("method", m.name) for m in item.plugin.methods]
            names += [("backbone family", a.family) for a in item.plugin.anatomies]
        for key in names:
            other = owners.setdefault(key, item)
            if other is not item:
                raise PluginError(
                    f"The {key[0]} {key[1]!r} is declared by both {other.distribution} {other.version} and "
                    f"{item.distribution} {item.version}. Uninstall one, or hide its plugin with "
                    f"PEFT_SUITE_DISABLE={item.name}."
                )
    return tuple(found)


@functools.cache
def families() -> dict[str, tuple[AnatomyEntry, Plugin]]:
    """Every described class name with its entry and the plugin that provides it."""
    return {name: (entry, plugin) for _, plugin in _working() for entry in plugin.anatomies for name in entry.classes}


def _working() -> Iterator[tuple[FoundPlugin, Plugin]]:
    for found in plugins():
        if found.plugin is not None:
            yield found, found.plugin


def methods() -> dict[str, tuple[MethodEntry, FoundPlugin]]:
    """Every method name with its entry and the plugin that provides it."""
    return {entry.name: (entry, found) for found, plugin in _working() for entry in plugin.methods}


def find_method(name: str) -> MethodEntry:
    """The entry behind a method name; ``-`` and ``_`` are the same.

    Raises:
        UnknownNameError: with the closest names.
    """
    table = methods()
    for key in (name, name.replace("-", "_"), name.replace("_", "-")):
        if key in table:
            return table[key][0]
    raise UnknownNameError("method", name, table, "List them with: peft-suite methods")


def find_plugin(name: str) -> Plugin:
    """The working plugin of that name.

    Raises:
        UnknownNameError: no such plugin.
        PluginError: it is installed but broken; the reason is given.
    """
    for found in plugins():
        if found.name == name:
            if found.plugin is None:
                raise PluginError(
                    f"The plugin {name!r} of {found.distribution} {found.version} is broken: {found.error}. "
                    "Reinstall or update that distribution."
                )
            return found.plugin
    raise UnknownNameError("plugin", name, [f.name for f in plugins()], "List them with: peft-suite plugins")


def resolve(target: str, plugin: Plugin | None = None) -> Any:
    """Import ``"module:attribute"``.

    Raises:
        MissingExtraError: a requirement of ``plugin`` is not installed.
        PluginError: the module or the attribute does not exist.
    """
    if plugin is not None:
        plugin.ensure()
    module, _, attribute = target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except AttributeError as error:
        raise PluginError(f"{target!r} does not exist: {error}.") from error
