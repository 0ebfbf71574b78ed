"""A method that trains the largest entries of every weight, for this process only: the ``select`` edit at work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from peft_suite import Anatomy, Capabilities, Editor, Method, MethodConfig, MethodEntry, Plugin, Weight
from peft_suite.edits import functional_of


@dataclass(frozen=True)
class LargestConfig(MethodConfig):
    """``share`` of the entries of every weight and bias, the largest in magnitude."""

    method: ClassVar[str] = "largest"
    share: float = 0.2


class Largest(Method[LargestConfig]):
    """Linear, convolution, norm and embedding layers alike."""

    config_class = LargestConfig

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(mergeable=True, trains_base_entries=True)

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """One select edit for every layer outside the head."""
        for path, module in edit.model.named_modules():
            own = {n for n, _ in module.named_parameters(prefix=path, recurse=False)}
            known = functional_of(module, anatomy.functionals) is not None
            if (
                own
                and known
                and not is_parametrized(module)
                and not path.startswith("adapters")
                and not {f"{path}.weight"} & {*anatomy.idle, *anatomy.tied}
                and not own & set(anatomy.fresh)
            ):
                bias = getattr(module, "bias", None)
                chosen = None if bias is None else self._largest(bias)
                edit.select(Weight(path), "select", self._largest(module.weight), chosen)

    def _largest(self, tensor: Tensor) -> Tensor:
        count = min(tensor.numel(), max(2, round(self.config.share * tensor.numel())))
        with torch.device("cpu"):
            return tensor.detach().cpu().float().abs().flatten().topk(count).indices.sort().values


plugin = Plugin(
    name="select-testbed",
    summary="A method that trains chosen entries",
    methods=(MethodEntry("largest", "select_testbed:Largest", "The largest entries of every weight"),),
)
