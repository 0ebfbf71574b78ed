"""Verbs that list: ``methods``, ``backbones``, ``datasets``."""

from __future__ import annotations

from typing import Annotated

import typer

from peft_suite.cli.common import plugin_of, ready
from peft_suite.cli.console import show_json, show_table
from peft_suite.cli.root import Json, show_methods
from peft_suite.errors import UnknownNameError
from peft_suite.plugins import resolve

__all__ = ["list_backbones", "list_datasets", "list_methods"]


def list_methods(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="One method, in detail.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """List the methods (every plugin's methods serve every backbone that can carry them)."""
    plugin_of(ctx)
    show_methods(name, json)


def list_backbones(
    ctx: typer.Context,
    pattern: Annotated[str, typer.Argument(help="Glob on the name.")] = "*",
    json: Json = False,
) -> None:
    """List backbones."""
    plugin = plugin_of(ctx)
    ready(plugin, "backbones")
    found = resolve(plugin.backbones, plugin).list(pattern)
    if json:
        show_json([{k: getattr(b, k) for k in ("name", "family", "summary", "parameters")} for b in found])
        return
    if not found:
        every = [b.name for b in resolve(plugin.backbones, plugin).list()]
        raise UnknownNameError("backbone", pattern, every, "Patterns may hold * and ?.")
    show_table(
        [vars(b) for b in found], {"name": "backbone", "family": "family", "parameters": "parameters", "summary": ""}
    )


def list_datasets(ctx: typer.Context, json: Json = False) -> None:
    """List data layouts and built-in data sets, and the fields of data.*"""
    plugin = plugin_of(ctx)
    rows = [{"name": d.name, "summary": d.summary} for d in plugin.datasets]
    if json:
        show_json(rows)
        return
    show_table(rows, {"name": "layout or data set", "summary": ""})
    if plugin.data and not plugin.missing():
        from peft_suite.config import field_table

        fields = field_table(resolve(plugin.data, plugin).config)
        show_table(
            [{**f, "name": f"data.{f['name']}"} for f in fields],
            {"name": "field", "type": "type", "default": "default"},
        )
