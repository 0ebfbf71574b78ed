"""The demo: the embedded AST, trained on clean simple sounds, meets bells, birds and engines in noisy rooms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft_suite.audio import micro, shifted
from peft_suite.config import parse_shorthand
from peft_suite.plugins import methods
from peft_suite.train.demo import Showcase

__all__ = ["DATA", "METHODS", "RECIPES", "run", "showcase"]

_COMMON: Mapping[str, Any] = MappingProxyType(
    # 100 validation sounds are too few to choose an epoch by: the last one is taken
    {"epochs": 16, "batch_size": 25, "warmup_epochs": 2.0, "eval_every": 16, "checkpoint_every": 0, "select": "last"}
)
_LR: Mapping[str, float] = MappingProxyType(
    # by validation sounds of other seeds: benchmarks/audio/choose_demo.py
    {
        **dict.fromkeys(("lora", "pfeiffer", "conformer", "prompts"), 0.01),
        "linear": 0.03,
        "soft-moa": 0.03,
        "full": 0.001,
    }
)

DATA: Mapping[str, Any] = MappingProxyType(
    {"root": shifted.NAME, "shots": 10, "augment": "roll(most=20)+spec-augment(freq=8, time=12)"}
)
METHODS: Mapping[str, str] = MappingProxyType(  # sizes that suit five blocks of 96
    {
        "linear": "linear",
        "full": "full",
        "lora": "ast-lora",
        "pfeiffer": "ast-pfeiffer(bottleneck=8)",
        "conformer": "conformer(bottleneck=8, kernel=7)",
        "soft-moa": "soft-moa(experts=4, bottleneck=4)",
        "prompts": "audio-prompts(num_tokens=8)",
    }
)
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType({**_COMMON, "lr": lr}) for name, lr in _LR.items()}
)


def showcase() -> Showcase:
    """The comparison, with those methods that are installed."""
    here = methods()
    return Showcase(
        plugin="audio",
        backbone=micro.NAME,
        task=shifted.NAME,
        title=f"Clean simple sounds, then other ones in noisy rooms: {DATA['shots']} a class",
        data=DATA,
        methods={name: spec for name, spec in METHODS.items() if parse_shorthand(spec)[0] in here},
        recipes=RECIPES,
    )


def run(out: str | Path = "runs/demo/audio", seeds: int = 1, progress: bool = True) -> dict[str, Any]:
    """Adapt by every method with ``seeds`` seeds, print the table, write the comparison page; see :class:`Showcase`."""
    return showcase().run(out, seeds, progress)
