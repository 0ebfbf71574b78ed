"""peft-suite: parameter-efficient fine-tuning for vision, point clouds, audio and diffusion.

    import timm, peft_suite as ps

    model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
    ps.adapt(model, "ssf")
    print(ps.summary(model))

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_suite.adapter import Adapter, Adapters
    from peft_suite.anatomy import Anatomy, Block, Point, Weight, anatomy_of
    from peft_suite.bridge import export_peft, import_peft
    from peft_suite.config import MethodConfig
    from peft_suite.edits import Part
    from peft_suite.files import load, read_config, save
    from peft_suite.lifecycle import activate, adapt, disabled, events, plan, remove, summary, trainable
    from peft_suite.merging import merge
    from peft_suite.method import Capabilities, Editor, Method
    from peft_suite.plugins import AnatomyEntry, DatasetEntry, MethodEntry, Plugin, TaskEntry, VerbEntry, register
    from peft_suite.strength import scale
    from peft_suite.tables import Plan, Summary
    from peft_suite.verification import verify

_HOME = {
    "Adapter": "adapter",
    "Adapters": "adapter",
    "Anatomy": "anatomy",
    "AnatomyEntry": "plugins",
    "Block": "anatomy",
    "Capabilities": "method",
    "DatasetEntry": "plugins",
    "Editor": "method",
    "Method": "method",
    "MethodConfig": "config",
    "MethodEntry": "plugins",
    "Part": "edits",
    "Plan": "tables",
    "Plugin": "plugins",
    "Point": "anatomy",
    "Summary": "tables",
    "TaskEntry": "plugins",
    "VerbEntry": "plugins",
    "Weight": "anatomy",
    "activate": "lifecycle",
    "adapt": "lifecycle",
    "anatomy_of": "anatomy",
    "disabled": "lifecycle",
    "events": "lifecycle",
    "export_peft": "bridge",
    "import_peft": "bridge",
    "load": "files",
    "merge": "merging",
    "plan": "lifecycle",
    "read_config": "files",
    "register": "plugins",
    "remove": "lifecycle",
    "save": "files",
    "scale": "strength",
    "summary": "lifecycle",
    "trainable": "lifecycle",
    "verify": "verification",
}
__all__ = [
    "Adapter",
    "Adapters",
    "Anatomy",
    "AnatomyEntry",
    "Block",
    "Capabilities",
    "DatasetEntry",
    "Editor",
    "Method",
    "MethodConfig",
    "MethodEntry",
    "Part",
    "Plan",
    "Plugin",
    "Point",
    "Summary",
    "TaskEntry",
    "VerbEntry",
    "Weight",
    "activate",
    "adapt",
    "anatomy_of",
    "disabled",
    "events",
    "export_peft",
    "import_peft",
    "load",
    "merge",
    "plan",
    "read_config",
    "register",
    "remove",
    "save",
    "scale",
    "summary",
    "trainable",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("peft-suite")
    if name not in _HOME:
        raise AttributeError(f"module 'peft_suite' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"peft_suite.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
