"""The conformance suite: what every adapter method must pass, on every backbone, ours and third parties' alike.

Under pytest, one line in a plugin's tests::

    from peft_suite.testing import conformance

    test_conformance = conformance(plugin="myplugin")

Without pytest::

    from peft_suite.testing import run

    print(run("mymethod", backbones=["timm-vit"]))

Pairs are discovered: every registered method with every registered anatomy that has ``examples``. A method class may
declare ``examples = ("mymethod", "mymethod(rank=2)")``, shorthands that suit a tiny model. What a method's declared
capabilities rule out is left out, with the reason. Five essential checks run on every pair, two of them between kin;
all cheap ones where a part, or a kind of edit in a family, is met first; expensive ones (compilers, export, DDP,
FSDP2) where a part or a family is met first. ``PEFT_SUITE_TEST_ALL=1`` runs everything on every pair.
"""

from __future__ import annotations

from peft_suite.testing.case import Case, LeftOut
from peft_suite.testing.registry import Check, all_checks, check
from peft_suite.testing.runner import Report, Result, cases, conformance, run

__all__ = ["Case", "Check", "LeftOut", "Report", "Result", "all_checks", "cases", "check", "conformance", "run"]
