"""Linear probe: the backbone stays frozen and in eval mode, the head trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """No options: the head is what the anatomy calls fresh."""

    method: ClassVar[str] = "linear"


class Linear(Method[LinearConfig]):
    """Train the head only: ``d*C + C`` parameters for a linear head on width d with C classes."""

    config_class = LinearConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True, backbone_eval=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Nothing beyond the fresh parameters, which the core trains for every method.

        Raises:
            UnsupportedError: the model has no head.
        """
        if not anatomy.fresh:
            raise UnsupportedError(
                f"linear trains the head, and this {anatomy.family} model has none. Build it with num_classes > 0."
            )
