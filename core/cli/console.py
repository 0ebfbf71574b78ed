"""What commands print: tables for people, JSON for programs, errors in one paragraph."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["complain", "console", "interrupted_hint", "note", "on_interrupt", "show_json", "show_mapping", "show_table"]

_WIDTH = 160  # of files and pipes, where no terminal says how wide it is
_hints: list[str] = []


def console(*, stderr: bool = False) -> Console:
    """A console for the stream as it is now."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False)


def show_json(value: Any) -> None:
    """Pure JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def show_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], title: str = "") -> None:
    """A table of ``rows``; ``columns`` maps keys to headings. Columns of numbers are set to the right."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for key, heading in columns.items():
        values = [r.get(key) for r in rows if r.get(key) not in (None, "")]
        numeric = bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in rows:
        table.add_row(*[Text(_cell(row.get(key))) for key in columns])
    console().print(table)


def show_mapping(values: Mapping[str, Any]) -> None:
    """Names and values in two columns; empty values are left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        if value not in (None, "", [], {}):
            table.add_row(key, Text(_cell(value)))
    console().print(table)


def note(text: str) -> None:
    """A line for people, on stderr, so that stdout stays clean."""
    console(stderr=True).print(Text(text), soft_wrap=True)


def complain(message: str) -> None:
    """An error, in red on stderr, never broken into lines (so that commands in it can be copied)."""
    console(stderr=True).print(Text.assemble(("Error: ", "bold red"), (message, "red")), soft_wrap=True)


@contextmanager
def on_interrupt(hint: str) -> Iterator[None]:
    """While inside, Ctrl-C ends with ``hint``."""
    _hints.append(hint)
    try:
        yield
    except KeyboardInterrupt:
        raise  # the hint stays for the one who reports it
    except BaseException:
        _hints.pop()
        raise
    else:
        _hints.pop()


def interrupted_hint() -> str:
    """The newest hint, taken away; "" without one."""
    hint = _hints[-1] if _hints else ""
    _hints.clear()
    return hint


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(v) for v in value)
    return str(value)
