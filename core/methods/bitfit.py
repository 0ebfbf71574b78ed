"""BitFit (Ben Zaken et al., ACL 2022): train the bias vectors and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.errors import UnsupportedError
from peft_suite.method import Capabilities, Editor, Method


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """No options: every parameter named ``bias`` (also ``q_bias`` and the like), patch embedding and norms included."""

    method: ClassVar[str] = "bitfit"


class BitFit(Method[BitFitConfig]):
    """Train every bias of the backbone: 102,912 on ViT-B/16."""

    config_class = BitFitConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """A trained copy of every bias.

        Raises:
            UnsupportedError: the backbone has no bias.
        """
        names = [n for n, _ in edit.model.named_parameters() if n.endswith("bias") and not n.startswith("adapters.")]
        if not set(names) - set(anatomy.fresh):
            raise UnsupportedError(f"bitfit trains biases, and this {anatomy.family} model has none.")
        edit.own(names)
