"""Verbs of the root: what is installed, what a method or an adapter is, and the demo."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_suite.cli.console import console, note, on_interrupt, show_json, show_mapping, show_table
from peft_suite.errors import PeftSuiteError, PluginError, UnknownNameError
from peft_suite.plugins import find_method, find_plugin, plugins, resolve
from peft_suite.plugins import methods as all_methods

__all__ = ["Json", "add_to", "method_rows", "show_methods"]

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else.")]


def add_to(app: typer.Typer) -> None:
    """Add the root verbs to ``app``."""
    app.command(epilog="Example: peft-suite doctor")(doctor)
    app.command("plugins", epilog="Example: peft-suite plugins --json")(list_plugins)
    app.command("methods", epilog="Example: peft-suite methods lora")(list_methods)
    app.command(epilog="Example: peft-suite info runs/latest/adapter")(info)
    app.command(epilog="Example: peft-suite demo vision --seeds 1")(demo)


def doctor(json: Json = False) -> None:
    """Check Python, libraries, devices, plugins and disk; say what mends what is wrong."""
    from peft_suite.cli.doctor import examine

    checks = examine()
    broken = [c for c in checks if c["status"] == "broken"]
    if json:
        show_json({"ok": not broken, "checks": checks})
    else:
        show_table(checks, {"group": "", "name": "what", "status": "state", "detail": "found", "fix": "how to mend it"})
        console().print(f"{len(broken)} broken." if broken else "Nothing is broken.")
    if broken:
        raise typer.Exit(1)


def list_plugins(json: Json = False) -> None:
    """List plugins, also broken ones and those whose optional libraries are missing."""
    rows: list[dict[str, Any]] = []
    for found in plugins():
        plugin = found.plugin
        row = {
            "name": found.name,
            "distribution": found.distribution,
            "version": found.version,
            "status": "broken" if plugin is None else ("missing extra" if plugin.missing() else "ready"),
            "summary": plugin.summary if plugin else "",
            "methods": [m.name for m in plugin.methods] if plugin else [],
            "families": [a.family for a in plugin.anatomies] if plugin else [],
            "verbs": [v.name for v in plugin.verbs] if plugin else [],
            "missing": plugin.missing() if plugin else [],
            "install": plugin.install_line() if plugin and plugin.missing() else "",
            "error": found.error,
        }
        rows.append({**row, "note": row["install"] or row["error"] or row["summary"]})
    if json:
        show_json([{k: v for k, v in row.items() if k != "note"} for row in rows])
        return
    columns = {"name": "plugin", "status": "state", "distribution": "from", "version": "version", "methods": "methods"}
    show_table(rows, {**columns, "note": "note"})


def list_methods(
    name: Annotated[str, typer.Argument(help="One method, in detail.", show_default=False)] = "", json: Json = False
) -> None:
    """List the methods, or show one with every field."""
    show_methods(name, json)


def show_methods(name: str, json: bool) -> None:
    """All methods, or one with its fields."""
    if not name:
        rows = method_rows(fields=json)
        if json:
            show_json(rows)
        else:
            show_table(rows, {"name": "method", "plugin": "plugin", "summary": "what it trains", "paper": "paper"})
            console().print("Fields of one: peft-suite methods NAME")
        return
    entry = find_method(name)
    row = next(r for r in method_rows(fields=True, only=entry.name))
    if json:
        show_json(row)
        return
    if "error" in row:
        raise PluginError(f"The method {entry.name!r} of the plugin {row['plugin']!r} is broken: {row['error']}")
    show_mapping({"method": row["name"], "what": row["summary"], "paper": row["paper"], "plugin": row["plugin"]})
    if row["fields"]:
        show_table(row["fields"], {"name": "field", "type": "type", "default": "default", "help": ""})
        first = row["fields"][0]
        value = first["default"]
        text = f'"{value}"' if isinstance(value, str) else value
        console().print(f"Write it as: {entry.name}({first['name']}={text})", markup=False)


def method_rows(*, fields: bool, only: str = "") -> list[dict[str, Any]]:
    """One JSON-ready row per method; ``fields`` imports the methods (and torch) to describe their configurations."""
    rows: list[dict[str, Any]] = []
    for name, (entry, found) in sorted(all_methods().items()):
        if only and name != only:
            continue
        row: dict[str, Any] = {
            "name": name,
            "plugin": found.name,
            "distribution": found.distribution,
            "summary": entry.summary,
            "paper": entry.paper,
        }
        if fields:
            try:
                row["fields"] = _fields(entry.target, entry.preset)
            except Exception as error:  # one broken method of a third party must not hide the others
                row.update(fields=[], error=f"{type(error).__name__}: {error}")
        rows.append(row)
    return rows


def _fields(target: str, preset: Any) -> list[dict[str, Any]]:
    from peft_suite.config import field_table

    rows = field_table(resolve(target).config_class)
    for row in rows:
        if row["name"] in preset:
            value = preset[row["name"]]
            row.update(default=list(value) if isinstance(value, tuple) else value, required=False)
    return rows


def _decision(config: Mapping[str, Any]) -> str:
    """What the method's calibration decided; "" where the method is not installed."""
    from peft_suite.method import make_method

    try:
        return make_method({"name": config.get("method"), **(config.get("method_config") or {})}).decision
    except PeftSuiteError:
        return ""


def info(
    adapter: Annotated[Path, typer.Argument(help="Directory that train or save() wrote.")], json: Json = False
) -> None:
    """Say what an adapter directory holds: method, backbone, classes, sizes."""
    from peft_suite.files import read_config

    config = read_config(adapter)
    if json:
        show_json(config)
        return
    metadata = config.get("metadata") or {}
    backbone, classes = metadata.get("backbone") or {}, metadata.get("classes") or []
    frozen = config.get("backbone") or {}
    fields = {k: v if len(str(v)) <= 200 else "..." for k, v in (config.get("method_config") or {}).items()}
    shown = ", ".join(map(str, classes[:12])) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    values = {
        "method": config.get("method"),
        "fields": fields,
        "calibrated": _decision(config),
        "provided by": config.get("provided_by"),
        "backbone": backbone.get("name"),
        "checkpoint": backbone.get("checkpoint"),
        "class": f"{frozen.get('class')} ({frozen.get('family')})",
        "fingerprint": (frozen.get("fingerprint") or {}).get("weights"),
        "values in the file": config.get("parameters"),
        "bytes": config.get("bytes"),
        "classes": f"{len(classes)}: {shown}" if classes else "",
        "plugin": metadata.get("plugin"),
        "data": (metadata.get("data_config") or {}).get("root"),
        "preprocessing": metadata.get("preprocessing"),
        "versions": config.get("versions"),
    }
    show_mapping(values)
    if metadata.get("plugin"):
        console().print(f"Next: peft-suite {metadata['plugin']} predict {adapter} FILES", markup=False, soft_wrap=True)


def demo(
    plugin: Annotated[
        str, typer.Argument(help="One plugin; without it, every plugin with a demo.", show_default=False)
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("runs/demo"),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs per method; without it, each demo's own number.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Adapt a small embedded model by several methods and compare them. Nothing is downloaded."""
    chosen = [find_plugin(plugin)] if plugin else [f.plugin for f in plugins() if f.plugin and f.plugin.demo]
    if plugin and not chosen[0].demo:
        having = [f.name for f in plugins() if f.plugin and f.plugin.demo]
        raise UnknownNameError("demo", plugin, having, f"The plugin {plugin!r} has none.")
    if not chosen:
        raise PluginError("No installed plugin has a demo. List them with: peft-suite plugins")
    results: dict[str, Any] = {}
    failures: list[str] = []
    for one in chosen:
        try:
            function = resolve(one.demo, one)
            options: dict[str, Any] = {"out": out / one.name, "json": json, "progress": not json}
            if seeds is not None:
                options["seeds"] = seeds
            known = inspect.signature(function).parameters
            with on_interrupt("Finished runs are kept: start the same command again to go on."):
                results[one.name] = function(**{k: v for k, v in options.items() if k in known})
        except PeftSuiteError as error:
            if plugin:
                raise
            failures.append(f"{one.name}: {error}")
    if json:
        show_json(results)
    for failure in failures:
        note(f"Left out. {failure}")
    if not results:
        raise typer.Exit(1)
