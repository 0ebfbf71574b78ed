"""Templates, and values as a person reads them. Every value is escaped by Jinja."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from peft_suite.report.records import number
from peft_suite.tables import lower_is_better

__all__ = [
    "NONE",
    "data_uri",
    "facts",
    "render",
    "show",
    "show_bytes",
    "show_count",
    "show_metric",
    "show_mib",
    "show_seconds",
]

NONE = "\N{EN DASH}"


@functools.cache
def _environment() -> jinja2.Environment:
    folder = Path(__file__).with_name("templates")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        metric=show_metric, count=show_count, size=show_bytes, seconds=show_seconds, mib=show_mib
    )
    return environment


def render(template: str, **values: Any) -> str:
    """A template of this package with its values, escaped."""
    return _environment().get_template(template).render(**values)


def show_metric(value: Any, name: str = "") -> str:
    """Shares as percent, other numbers with four digits."""
    known = number(value)
    if known is None:
        return NONE
    return f"{100 * known:.1f} %" if 0 <= known <= 1 and not lower_is_better(name) else f"{known:.4g}"


def show_count(value: Any) -> str:
    """1234567 as 1,234,567."""
    known = number(value)
    return NONE if known is None else (f"{known:,.0f}" if known == int(known) else f"{known:,.4g}")


def show_bytes(value: Any) -> str:
    """Bytes in binary units."""
    known = number(value)
    if known is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if known < 1024:
            return f"{known:.0f} B" if unit == "B" else f"{known:.1f} {unit}"
        known /= 1024
    return f"{known:.1f} GiB"


def show_seconds(value: Any) -> str:
    """A duration for people."""
    known = number(value)
    if known is None:
        return NONE
    if known < 90:
        return f"{known:.3g} s"
    minutes, seconds = divmod(round(known), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_mib(value: Any) -> str:
    known = number(value)
    return NONE if known is None else (f"{known:,.0f} MiB" if known >= 10 else f"{known:.1f} MiB")


def data_uri(png: bytes | None) -> str:
    """A picture as part of a page; "" for none."""
    return "data:image/png;base64," + base64.b64encode(png).decode() if png else ""


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as a person reads them; what is empty is left out."""
    return [(_key(str(k)), show(str(k), v)) for k, v in values.items() if v is not None and v != ""]


def _key(key: str) -> str:
    for unit in ("_mib", "_ms", "_s"):  # the value is shown with its unit
        key = key.removesuffix(unit)
    return key.replace("_", " ")


def show(key: str, value: Any) -> str:
    """A value in the unit that its name ends with."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        if key.endswith("bytes"):
            return show_bytes(value)
        if key.endswith("_mib"):
            return show_mib(value)
        if key.endswith("_ms"):
            return f"{value:.4g} ms"
        if key.endswith("_s") or key == "seconds":
            return show_seconds(value)
        return show_count(value) if isinstance(value, int) and abs(value) > 999 else f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {show(str(k), v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(show("", v) for v in value[:40]) + (" ..." if len(value) > 40 else "") or "none"
    return str(value)
