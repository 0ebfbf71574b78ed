"""The command line ``peft-suite``. Importing it, and ``peft-suite --help``, import neither torch nor numpy."""

from __future__ import annotations

from peft_suite.cli.app import build, main

__all__ = ["build", "main"]
