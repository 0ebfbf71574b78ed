"""What every verb needs: the plugin it was called for, and whether that plugin is ready."""

from __future__ import annotations

from typing import Any

import typer

from peft_suite.errors import PluginError
from peft_suite.plugins import Plugin, find_plugin

__all__ = ["plugin_of", "ready"]


def plugin_of(ctx: typer.Context) -> Plugin:
    """The plugin whose group the verb was called through."""
    parent: Any = ctx.parent
    return find_plugin(str(parent.info_name))


def ready(plugin: Plugin, *needs: str) -> None:
    """The plugin declares what the verb needs, and its libraries are installed."""
    for need in ("backbones", *needs):
        if not getattr(plugin, need):
            raise PluginError(f"The plugin {plugin.name!r} declares no {need}, so this verb does not work for it.")
    plugin.ensure()
