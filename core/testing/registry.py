"""The table of checks: each declares what it needs of a method, so that what is left out says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peft_suite.testing.case import Case, LeftOut

__all__ = ["Check", "all_checks", "check"]

Function = Callable[[Case], None]
_table: dict[str, Check] = {}


@dataclass(frozen=True)
class Check:
    """One property.

    Attributes:
        name: what test ids show.
        function: raises AssertionError, or LeftOut with a reason.
        needs: capability -> why the check has no meaning without it.
        unless: capability -> why the check has no meaning with it.
        not_kinds: kind of edit -> why the check has no meaning with it.
        expensive: seconds rather than milliseconds; runs once per kind of part and once per family.
        essential: runs on every pair, but see ``place``.
        place: essential wherever a part is attached. The other essential checks are about the part: between kin they
            run where it is met first.
    """

    name: str
    function: Function
    needs: Mapping[str, str]
    unless: Mapping[str, str]
    not_kinds: Mapping[str, str]
    expensive: bool = False
    essential: bool = False
    place: bool = False

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def left_out(self, case: Case) -> str:
        """Why the check does not apply to the case, or nothing."""
        declared = case.capabilities
        for capability, reason in self.needs.items():
            if not getattr(declared, capability):
                return f"{capability}=False: {reason}"
        for capability, reason in self.unless.items():
            if getattr(declared, capability):
                return f"{capability}=True: {reason}"
        kinds = {kind for kind, _ in case.kinds()} if self.not_kinds else set()
        for kind, reason in self.not_kinds.items():
            if kind in kinds:
                return f"{kind} edits: {reason}"
        return ""

    def __call__(self, case: Case) -> None:
        """Run; raises LeftOut where it does not apply."""
        if reason := self.left_out(case):
            raise LeftOut(reason)
        self.function(case)


def check(
    *,
    needs: Mapping[str, str] | None = None,
    unless: Mapping[str, str] | None = None,
    not_kinds: Mapping[str, str] | None = None,
    expensive: bool = False,
    essential: bool = False,
    place: bool = False,
) -> Callable[[Function], Function]:
    """Register a function ``check_xxx(case)`` as the check ``xxx``."""

    def register(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        kinds = needs or {}, unless or {}, not_kinds or {}
        _table[name] = Check(name, function, *kinds, expensive, essential or place, place)
        return function

    return register


def all_checks() -> tuple[Check, ...]:
    """Every check in reading order."""
    import peft_suite.testing.basics
    import peft_suite.testing.ecosystem
    import peft_suite.testing.merging
    import peft_suite.testing.parallel
    import peft_suite.testing.stored
    import peft_suite.testing.switching  # noqa: F401 - importing fills the table

    return tuple(_table.values())
