"""Flags that a plugin adds to a verb: each is a word ``FIELD=VALUE`` under the name that people know."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from peft_suite.plugins import FlagEntry

__all__ = ["with_flags"]


def with_flags(verb: Callable[..., None], flags: Sequence[FlagEntry]) -> Callable[..., None]:
    """``verb`` with the flags, as Typer reads it; its second parameter is the list of words."""
    keys = {flag.name.replace("-", "_"): flag for flag in flags}

    @functools.wraps(verb)
    def called(ctx: typer.Context, words: list[str] | None = None, **values: Any) -> None:
        given = {key: values.pop(key) for key in keys}
        own = [f"{keys[key].field}={_text(keys[key], value)}" for key, value in given.items() if value is not None]
        verb(ctx, [*own, *(words or ())], **values)

    signature = inspect.signature(verb, eval_str=True)
    extra = [
        inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_kind(f)) for k, f in keys.items()
    ]
    parameters = [*signature.parameters.values(), *extra]
    described: Any = called
    described.__signature__ = signature.replace(parameters=parameters)
    described.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _kind(flag: FlagEntry) -> Any:
    option = typer.Option(f"--{flag.name}", help=f"{flag.summary} Field {flag.field}.")
    return Annotated[bool | None, option] if flag.kind == "switch" else Annotated[str | None, option]


def _text(flag: FlagEntry, value: Any) -> str:
    """The value as YAML; text stays text, whatever it looks like."""
    return json.dumps(value) if flag.kind in ("text", "switch") else str(value)
