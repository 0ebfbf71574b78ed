"""Norm tuning: train scale and shift of the normalisation layers, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class NormConfig(MethodConfig):
    """Norm tuning.

    Attributes:
        bias: train the shifts as well as the scales (38,400 parameters on ViT-B/16; scales alone 19,200).
    """

    method: ClassVar[str] = "norm"
    bias: bool = True


class Norm(Method[NormConfig]):
    """Train ``weight`` (and ``bias``) of every normalisation layer."""

    config_class = NormConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """A trained copy of every norm's parameters.

        Raises:
            UnsupportedError: the backbone has no norm with parameters.
        """
        wanted = ("weight", "bias") if self.config.bias else ("weight",)
        names = [
            f"{path}.{name}"
            for path in anatomy.norms
            for name in wanted
            if getattr(edit.module(path), name, None) is not None
        ]
        if not names:
            raise UnsupportedError(
                f"norm trains normalisation layers, and this {anatomy.family} model has none with weights."
            )
        edit.own(names)
