"""Which method works on which backbone family: asked of the code, for the documentation."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft_suite.errors import MissingExtraError, UnsupportedError
from peft_suite.plugins import methods, resolve
from peft_suite.vision import plugin

__all__ = ["YES", "markdown", "matrix"]

YES = "✔"

# What to ask for where a method's default targets do not exist.
_OTHERWISE: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora(targets=[o, fc1, fc2])", "lora(targets=[fc1, fc2])", "lora(targets=[conv1, conv2])"),
    "ia3": ("ia3(targets=[fc2])",),
    "hst": ("hst(dims=[8, 12], heads=[2, 3])",),
    "vpt": ("vpt(location=pad, num_tokens=2, image_size=32)",),
    "mam": ("mam(prefix=0)",),
    "bi-lora": ("bi-lora(targets=[fc1, fc2])",),
}

_CHOICES = re.compile(r" \((Valid choices|Did you mean|There is nothing)[^)]*\)")


def matrix() -> dict[str, dict[str, str]]:
    """Method -> example backbone -> verdict, for the methods of the core and of this plugin.

    The verdict is ``YES``, ``YES`` with the shorthand that works where the default does not, or the one sentence with
    which the method is refused. Backbones are named by family and example: ``timm-swin``, ``timm-swin-v2``.
    """
    names = [name for name, (_, found) in methods().items() if found.name in ("core", plugin.name)]
    return {name: {label: _verdict(name, target) for _, label, target in _examples()} for name in names}


def markdown() -> str:
    """The matrix as a table of methods and families; footnotes give the sentences, and the examples that differ."""
    table = matrix()
    families: dict[str, list[str]] = {}
    for family, label, _ in _examples():
        families.setdefault(family, []).append(label)
    notes: dict[str, int] = {}
    lines = [f"| method | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
    for name, row in table.items():
        cells = [_cell({label: row[label] for label in labels}, notes) for labels in families.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items()), ""])


def _cell(verdicts: Mapping[str, str], notes: dict[str, int]) -> str:
    """A tick or a dash, with the numbers of its footnotes."""
    mark = YES if any(v.startswith(YES) for v in verdicts.values()) else "—"
    verdicts = {label: _CHOICES.sub("", v) for label, v in verdicts.items()}
    same = len(set(verdicts.values())) == 1
    texts = [v if same else f"{label}: {v}" for label, v in verdicts.items() if v != YES]
    numbers = [notes.setdefault(text, len(notes) + 1) for text in dict.fromkeys(texts)]
    return mark + (f"<sup>{', '.join(map(str, numbers))}</sup>" if numbers else "")


def _examples() -> Iterator[tuple[str, str, str]]:
    """(family, label, target) of every example."""
    for entry in plugin.anatomies:
        for target in entry.examples:
            kind = target.rpartition(":")[2].removeprefix("example").strip("_")
            yield entry.family, f"{entry.family}-{kind}" if kind else entry.family, target


def _verdict(name: str, target: str) -> str:
    reason = _refusal(name, target)
    if not reason:
        return YES
    for spec in _OTHERWISE.get(name, ()):
        if not _refusal(spec, target):
            return f"{YES} as `{spec}`; by default: {reason}"
    return reason


def _refusal(spec: str, target: str) -> str:
    """Why an example cannot carry a method; empty when it can."""
    import peft_suite as ps

    try:
        ps.plan(_model(target), spec)
    except (UnsupportedError, MissingExtraError) as error:
        return str(error)
    return ""


@functools.cache
def _model(target: str) -> Any:
    return resolve(target, plugin)()[0]
