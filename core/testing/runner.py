"""Which cases there are, and the two ways to run them: ``run()`` anywhere, ``conformance()`` under pytest."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft_suite.errors import MissingExtraError, UnsupportedError
from peft_suite.plugins import methods, plugins, resolve
from peft_suite.testing.case import Case, LeftOut
from peft_suite.testing.registry import Check, all_checks

__all__ = ["Report", "Result", "cases", "conformance", "everything", "examples", "run"]


def everything() -> bool:
    """Whether PEFT_SUITE_TEST_ALL asks for every check on every pair."""
    return os.environ.get("PEFT_SUITE_TEST_ALL", "") not in ("", "0")


def examples() -> Iterator[tuple[str, str]]:
    """(family, ``"module:function"``) of every registered anatomy with examples whose libraries are installed."""
    for found in plugins():
        if found.plugin is not None and not found.plugin.missing():
            for entry in found.plugin.anatomies:
                for target in entry.examples:
                    yield entry.family, target


def specs(name: str) -> tuple[str, ...]:
    """Shorthands to test for a method name: those of the class's ``examples`` with that name, else the name alone."""
    declared = resolve(methods()[name][0].target).examples
    own = tuple(s for s in declared if s.partition("(")[0].replace("_", "-") == name.replace("_", "-"))
    return own or (name,)


def cases(
    *names: str, plugin: str = "", backbones: Sequence[str] = (), extra: Sequence[str] = (), every: bool | None = None
) -> list[Case]:
    """Pairs to test, those that the backbone cannot carry included.

    A method's first shorthand meets every backbone, of a family that names kin its first example; further ones meet
    the first example of the other families.

    Args:
        names: methods, or shorthands such as ``"lora(rank=2)"``; none: every registered one.
        plugin: only pairs in which the method or the backbone comes from this plugin.
        backbones: families, or ids such as "timm-vit-deit"; none: every registered one.
        extra: more shorthands.
        every: all shorthands on all examples; None asks PEFT_SUITE_TEST_ALL.
    """
    every = everything() if every is None else every
    table = methods()
    asked = list(names) or list(table)
    related = {a.family for f in plugins() if f.plugin for a in f.plugin.anatomies if a.kin}
    own_families = {a.family for f in plugins() if f.plugin and f.name == plugin for a in f.plugin.anatomies}
    found: dict[str, Case] = {}
    for position, name in [*((0, n) for n in asked), *((1, s) for s in extra)]:
        variants = specs(name) if name in table else (name,)
        for number, spec in enumerate(variants):
            seen: set[str] = set()
            for family, target in examples():
                case = Case(spec, family, target)
                first = family not in seen
                seen.add(family)
                if backbones and family not in backbones and case.backbone_id not in backbones:
                    continue
                owner = table.get(spec.partition("(")[0])
                if plugin and family not in own_families and not (owner and owner[1].name == plugin):
                    continue
                own = bool(backbones) or family not in related
                chosen = own or first if number == position == 0 else own and first
                if chosen or every:
                    found.setdefault(case.id, case)
    return list(found.values())


def pairs(chosen: Sequence[Case], every: bool, cheap: bool = False) -> Iterator[tuple[Case, Check | None, str]]:
    """(case, check, reason): check None with a reason is a pair that the backbone cannot carry.

    A pair gets every check that is not expensive if it is the first with some part, or the first with some kind of
    edit in its family or its kin, or ``cheap``; the others get the essential ones, or, where a family has kin that
    passed them with the same parts, those of the place alone: do the edits fire, and does nothing else move? Expensive
    checks go to the first pair with some part and to the first pair of every family, counted with its kin.
    """
    covered: set[object] = set()
    kin = {a.family: a.kin for f in plugins() if f.plugin for a in f.plugin.anatomies}
    for case in chosen:
        try:
            kinds = case.kinds()
        except (UnsupportedError, MissingExtraError) as error:
            yield case, None, f"cannot carry: {error}"
            continue
        family = kin.get(case.family) or case.family
        parts, edits = set(kinds), {(family, kind) for kind, _ in kinds}
        costly = every or family not in covered or not parts <= covered
        whole = costly or cheap or not edits <= covered
        known = not whole and family != case.family and {(family, *part) for part in parts} <= covered
        covered |= {family, *parts, *edits, *((family, *part) for part in parts)}
        for item in all_checks():
            if costly if item.expensive else whole or item.place or (item.essential and not known):
                yield case, item, ""


@dataclass(frozen=True)
class Result:
    """One check on one case. ``outcome``: "passed", "failed", "left out" or "cannot carry"."""

    case: Case
    check: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What a run found; ``str()`` is a table."""

    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Nothing failed, and something passed."""
        outcomes = {r.outcome for r in self.results}
        return "failed" not in outcomes and "passed" in outcomes

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        rows = [
            {"method": r.case.method, "backbone": r.case.backbone_id, "check": r.check}
            | {"outcome": r.outcome, "detail": r.detail, "seconds": round(r.seconds, 4)}
            for r in self.results
        ]
        return {"ok": self.ok, "results": rows}

    def __str__(self) -> str:
        ids = list(dict.fromkeys(r.case.id for r in self.results))
        width = max((len(i) for i in ids), default=4)
        lines = [f"{'pair'.ljust(width)}  passed  failed  left out  seconds"]
        for i in ids:
            rows = [r for r in self.results if r.case.id == i]
            count = Counter(r.outcome for r in rows)
            if count["cannot carry"]:
                lines.append(f"{i.ljust(width)}  {rows[0].detail}")
            else:
                seconds = sum(r.seconds for r in rows)
                lines.append(
                    f"{i.ljust(width)}  {count['passed']:6}  {count['failed']:6}  {count['left out']:8}  {seconds:7.1f}"
                )
        left = Counter((r.check, r.detail) for r in self.results if r.outcome == "left out")
        if left:
            lines += ["", "left out:"] + [f"  {check} ({n} pairs): {why}" for (check, why), n in left.items()]
        failed = [r for r in self.results if r.outcome == "failed"]
        if failed:
            lines += ["", "failed:"] + [f"  {r.case.id} {r.check}: {r.detail.strip().splitlines()[-1]}" for r in failed]
        return "\n".join(lines)


def run(
    *names: str,
    plugin: str = "",
    backbones: Sequence[str] = (),
    checks: Sequence[str] = (),
    extra: Sequence[str] = (),
    every: bool | None = None,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Run the suite without pytest; see :func:`cases` for the selection.

    Args:
        names, plugin, backbones, extra: which pairs.
        checks: names of checks; none: all.
        every: expensive checks on every pair too; None asks PEFT_SUITE_TEST_ALL.
        progress: called with each result.
    """
    every = everything() if every is None else every
    results = []
    chosen = cases(*names, plugin=plugin, backbones=backbones, extra=extra, every=every)
    for case, item, reason in pairs(chosen, every, cheap=bool(names)):
        if item is None:
            result = Result(case, "", "cannot carry", reason)
        elif checks and item.name not in checks:
            continue
        else:
            start = time.perf_counter()
            outcome, detail = "passed", ""
            try:
                item(case)
            except LeftOut as why:
                outcome, detail = "left out", str(why)
            except Exception:
                outcome, detail = "failed", traceback.format_exc()
            result = Result(case, item.name, outcome, detail, time.perf_counter() - start)
        results.append(result)
        if progress:
            progress(result)
    return Report(tuple(results))


def conformance(
    *names: str, plugin: str = "", backbones: Sequence[str] = (), extra: Sequence[str] = (), every: bool | None = None
) -> Callable[..., None]:
    """A pytest test, one id per method, backbone and check. In a plugin's tests one line is enough::

        from peft_suite.testing import conformance

        test_conformance = conformance(plugin="myplugin")      # or conformance("mymethod")

    Checks that do not apply are skipped with the reason. See :func:`cases` for the arguments.
    """
    import pytest

    every = everything() if every is None else every
    params = []
    chosen = cases(*names, plugin=plugin, backbones=backbones, extra=extra, every=every)
    for case, item, reason in pairs(chosen, every, cheap=bool(names)):
        name = item.name if item else "cannot_carry"
        params.append(pytest.param(case, item, reason, id=f"{case.id}-{name}"))

    @pytest.mark.parametrize(("case", "check", "reason"), params)
    def test_conformance(case: Case, check: Check | None, reason: str) -> None:
        if check is None:
            pytest.skip(f"{case.id} {reason}")
        try:
            check(case)
        except LeftOut as why:
            pytest.skip(f"{check.name} left out: {why}")

    return test_conformance
