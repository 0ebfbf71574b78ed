"""Full fine-tuning as an adapter: trained copies of every parameter, which switch, save and undo like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """No options."""

    method: ClassVar[str] = "full"


class Full(Method[FullConfig]):
    """Train everything. The frozen weights stay in memory beside the trained ones; ``merge`` drops them."""

    config_class = FullConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """A trained copy of every parameter of the backbone."""
        edit.own(name for name, _ in edit.model.named_parameters() if not name.startswith("adapters."))
