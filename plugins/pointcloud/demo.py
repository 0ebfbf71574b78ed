"""The demo: the embedded point transformer, pre-trained on simple solids, meets poor scans of furniture and tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft_suite.config import parse_shorthand
from peft_suite.plugins import methods
from peft_suite.pointcloud import micro, shifted
from peft_suite.train.demo import Showcase

__all__ = ["DATA", "METHODS", "RECIPES", "run", "showcase"]

_COMMON: Mapping[str, Any] = MappingProxyType(
    # 100 validation clouds are too few to choose an epoch by: the last one is taken
    {"epochs": 25, "batch_size": 25, "warmup_epochs": 2.0, "eval_every": 25, "checkpoint_every": 0, "select": "last"}
)
_LR: Mapping[str, float] = MappingProxyType(
    # by validation clouds of other seeds: benchmarks/pointcloud/choose_demo.py
    {**dict.fromkeys(("linear", "vpt", "lora", "idpt", "point-peft", "dapt"), 0.01), "full": 0.001, "pointgst": 0.003}
)

DATA: Mapping[str, Any] = MappingProxyType({"root": shifted.NAME, "shots": 10, "augment": "rotate+scale"})
METHODS: Mapping[str, str] = MappingProxyType(  # sizes that suit five blocks of 72
    {
        "linear": "linear",
        "full": "full",
        "vpt": "vpt(num_tokens=10, deep=True)",
        "lora": "lora",
        "idpt": "idpt(generator=dgcnn_light, neighbors=8)",
        "point-peft": "point-peft(num_prompts=6, prompted_blocks=2)",
        "pointgst": "pointgst(rank=16, local=8)",
        "dapt": "dapt(rank=16)",
    }
)
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: MappingProxyType({**_COMMON, "lr": lr}) for name, lr in _LR.items()}
)


def showcase() -> Showcase:
    """The comparison, with those methods that are installed."""
    here = methods()
    return Showcase(
        plugin="pointcloud",
        backbone=micro.NAME,
        task=shifted.NAME,
        title=f"Clean simple solids, then poor scans of furniture and tools: {DATA['shots']} a class",
        data=DATA,
        methods={name: spec for name, spec in METHODS.items() if parse_shorthand(spec)[0] in here},
        recipes=RECIPES,
    )


def run(out: str | Path = "runs/demo/pointcloud", seeds: int = 1, progress: bool = True) -> dict[str, Any]:
    """Adapt by every method with ``seeds`` seeds, print the table, write the comparison page; see :class:`Showcase`."""
    return showcase().run(out, seeds, progress)
