"""The root command: verbs of its own, and one group per plugin, built from what the plugin declares."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from peft_suite.cli import root, verbs
from peft_suite.cli.console import complain, interrupted_hint, note
from peft_suite.errors import PeftSuiteError
from peft_suite.plugins import FoundPlugin, Plugin, VerbEntry, plugins, resolve

__all__ = ["build", "main"]

_Debug = Annotated[bool, typer.Option("--debug", envvar="PEFT_SUITE_DEBUG", help="Show the traceback of an error.")]
_Version = Annotated[bool, typer.Option("--version", help="Print the version and stop.")]


class _Root(TyperGroup):
    """Adds the plugins' groups, and turns errors into one paragraph and an exit code: 1, or 130 for Ctrl-C."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for found in _found():
            plugin = found.plugin  # a root verb of the same name wins; `plugins` still lists the plugin
            if plugin and (plugin.backbones or plugin.data or plugin.verbs) and found.name not in self.commands:
                self.add_command(_PluginGroup(plugin), found.name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PeftSuiteError as error:
            if ctx.params.get("debug"):
                raise
            complain(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            hint = interrupted_hint()
            note(f"Interrupted. {hint}".rstrip())
            raise typer.Exit(130) from error


class _PluginVerb(TyperCommand):
    """A plugin's own verb: its function is imported when the verb is used, not when it is listed."""

    def __init__(self, plugin: Plugin, entry: VerbEntry) -> None:
        super().__init__(name=entry.name, help=entry.summary)
        self._plugin, self._entry = plugin, entry

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        app = typer.Typer(add_completion=False)
        entry = self._entry
        shown = f"Example: peft-suite {self._plugin.name} {entry.name} {entry.example}" if entry.example else None
        app.command(entry.name, help=entry.summary, epilog=shown)(resolve(entry.target, self._plugin))
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


class _PluginGroup(TyperGroup):
    """A plugin's group. The shared verbs are turned into commands when the group is looked into."""

    def __init__(self, plugin: Plugin) -> None:
        lost = plugin.missing()
        needs = f" (needs {', '.join(lost)}: {plugin.install_line()})" if lost else ""
        summary = (plugin.summary or f"The {plugin.name} plugin") + needs
        example = f"Example: peft-suite {plugin.name} backbones"
        super().__init__(name=plugin.name, help=summary, epilog=example, no_args_is_help=True)
        self.rich_help_panel = "Plugins"
        self._plugin = plugin
        self._own = {entry.name: _PluginVerb(plugin, entry) for entry in plugin.verbs}
        self._made: dict[str, Any] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        self.commands = self._commands()
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self.commands = self._commands()
        return self.commands.get(cmd_name)

    def _commands(self) -> dict[str, Any]:
        if not self._made:
            app = typer.Typer(add_completion=False)
            verbs.add_to(app, self._plugin)
            group: Any = typer.main.get_group(app)
            self._made = {**group.commands, **self._own}
        return self._made


def build() -> typer.Typer:
    """The application for the plugins that are installed now."""
    app = typer.Typer(
        name="peft-suite",
        cls=_Root,
        help="Parameter-efficient fine-tuning: adapt pre-trained models to your data with few trained parameters.",
        epilog="Example: peft-suite demo",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def options(debug: _Debug = False, version: _Version = False) -> None:
        if version:
            from importlib.metadata import version as installed

            typer.echo(f"peft-suite {installed('peft-suite')}")
            raise typer.Exit

    root.add_to(app)
    return app


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _tell
    build()(args=None if args is None else list(args), prog_name="peft-suite")


def _tell(message: Warning | str, *place: Any, **further: Any) -> None:
    """A warning as a line for people, without the place in the code."""
    note(f"Warning: {message}")


def _found() -> tuple[FoundPlugin, ...]:
    try:
        return plugins()
    except PeftSuiteError as error:  # two distributions declare one name: say so, and let `--help` and `doctor` work
        complain(str(error))
        return ()
