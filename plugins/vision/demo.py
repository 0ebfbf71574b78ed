"""The demo: the embedded micro ViT, pre-trained on one half of the digits, meets the other half upside down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_suite.train.demo import Showcase
from peft_suite.vision.digits import DEMO_DATA, DEMO_METHODS, DEMO_RECIPES, NAME

__all__ = ["run"]


def run(out: str | Path = "runs/demo", seeds: int = 3, progress: bool = True) -> dict[str, Any]:
    """Adapt by every demo method with ``seeds`` seeds, print the table, write the comparison page.

    See :class:`peft_suite.train.demo.Showcase`.
    """
    title = f"Upright digits, then dark ones upside down: {DEMO_DATA['shots']} a class"
    return Showcase("vision", "micro-vit", NAME, title, DEMO_DATA, DEMO_METHODS, DEMO_RECIPES).run(out, seeds, progress)
