"""Reports: ``curves.png`` and one self-contained ``report.html`` per run, and pages over many runs.

Everything is read back from ``run.json``, so a report can be made again at any time, also of an interrupted run.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_comparison", "write_report", "write_summary"]


def write_report(run_dir: str | Path) -> Path:
    """Write ``curves.png`` and ``report.html`` next to ``run_dir/run.json`` and return the page's path.

    Raises:
        FileFormatError: there is no readable ``run.json``.
    """
    from peft_suite.report.page import run_page

    return run_page(Path(run_dir))


def write_summary(out_dir: str | Path) -> Path:
    """Write ``summary.html`` and ``summary.json`` over the runs of several seeds below ``out_dir``.

    Raises:
        FileFormatError: there is no ``run.json`` below the folder.
    """
    from peft_suite.report.group import group_page

    return group_page(Path(out_dir), "summary")


def write_comparison(out_dir: str | Path) -> Path:
    """Write ``comparison.html``, ``.json``, ``.csv`` and ``.png`` over all runs below ``out_dir``; failures are listed.

    Where ``suite.json`` says that the runs are a suite, the page has its means and the published results.

    Raises:
        FileFormatError: there is no ``run.json`` below the folder.
    """
    from peft_suite.report.group import group_page
    from peft_suite.report.suite import SUITE, suite_page

    out = Path(out_dir)
    return suite_page(out) if (out / SUITE).exists() else group_page(out, "comparison")
