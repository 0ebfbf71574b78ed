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
    """Every parameter named ``bias`` (also ``q_bias`` and the like), those of norms included.

    Attributes:
        embed: biases in front of the first block too, the patch embedding's; the audio study leaves them frozen.
    """

    method: ClassVar[str] = "bitfit"
    embed: bool = True


class BitFit(Method[BitFitConfig]):
    """Train every bias of the backbone: 102,912 on ViT-B/16, 768 less without ``embed``."""

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
        if not self.config.embed:
            names = [n for n in names if not n.startswith(tuple(f"{point.path}." for point in anatomy.stem))]
        if not set(names) - set(anatomy.fresh):
            raise UnsupportedError(f"bitfit trains biases, and this {anatomy.family} model has none.")
        final = anatomy.norm
        if final is not None and final.path in anatomy.norms:  # part of the head or not, its scale stays frozen
            edit.leave([f"{final.path}.weight"])
        edit.own(names)
