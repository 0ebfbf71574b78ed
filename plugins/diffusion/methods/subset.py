"""Another method in a part of its places only: what MemControl searches over (Dutt et al., WACV 2025).

A mask over named groups of modules decides where a method may act. A group that is off holds no part of the adapter at
all: nothing there is computed, trained or saved. With nothing off it is the plain method, value for value: parts are
drawn in the same order and those that are off are dropped afterwards.

The published search freezes tensors by name and leaves others of the same block trainable: ``containing="gamma"``
for DiffFit, whose biases and norms then train everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_suite.adapter import Adapter
from peft_suite.anatomy import Anatomy
from peft_suite.config import MethodConfig
from peft_suite.edits import Edit
from peft_suite.errors import UnsupportedError, closest
from peft_suite.method import Capabilities, Editor, Method, make_method


@dataclass(frozen=True)
class SubsetConfig(MethodConfig):
    """A method and where it does not act.

    Attributes:
        of: the method: a shorthand in quotes, or a mapping with ``name``.
        off: module paths; nothing at or below them gets a part.
        containing: of what lies there, leave out only parts whose key contains this text.
    """

    method: ClassVar[str] = "subset"
    of: Mapping[str, Any] | str = "lora"
    off: tuple[str, ...] = ()
    containing: str = ""

    def validate(self) -> None:
        self.require("off", len(set(self.off)) == len(self.off), "names a path twice")
        inner = make_method(self.of)
        self.require("of", not isinstance(inner, Subset), "is a subset itself; join the paths instead")


class Subset(Method[SubsetConfig]):
    """Builds the inner method through an editor that leaves out what is off, and passes its events on."""

    config_class = SubsetConfig

    def __init__(self, config: SubsetConfig) -> None:
        super().__init__(config)
        self.inner = make_method(config.of)

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    @property
    def decision(self) -> str:
        return self.inner.decision

    @property
    def pending(self) -> int:
        return self.inner.pending

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Record the inner method's edits outside of what is off.

        Raises:
            UnsupportedError: the inner method does not fit, or a path holds nothing of it.
        """
        narrowed = _Narrowed(edit, self.config)
        self.inner.build(anatomy, narrowed)
        if idle := [path for path in self.config.off if path not in narrowed.met]:
            raise UnsupportedError(
                f"{self.inner.name} has nothing at {idle[0]!r}, so it cannot be off there. "
                + closest(idle[0], sorted(narrowed.places))
            )

    def calibrate(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any] | None:
        learned = self.inner.calibrate(adapter, batches, loss)
        if learned is None:
            return None
        return Subset(self.config.replace(of={"name": learned.name, **learned.config.to_dict()}))

    def begin(self, adapter: Adapter, steps: int) -> None:
        self.inner.begin(adapter, steps)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        return self.inner.penalty(adapter)

    def before_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.inner.before_step(adapter, step, optimizer)

    def after_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.inner.after_step(adapter, step, optimizer)

    def finish(self, adapter: Adapter) -> None:
        self.inner.finish(adapter)


class _Narrowed(Editor):
    """Writes into another editor's lists what is not off; ``met`` are the paths of ``off`` that held something."""

    def __init__(self, edit: Editor, config: SubsetConfig) -> None:
        super().__init__(edit.model, edit.anatomy, edit.device, stored=edit.stored)
        self.edits, self._owned, self._left = edit.edits, edit._owned, edit._left
        self.off, self.containing = config.off, config.containing
        self.met: set[str] = set()
        self.places: set[str] = set()

    def own(self, parameters: Iterable[str]) -> None:
        super().own(name for name in parameters if not self._drops(name.rpartition(".")[0], name))

    def _record(self, edit: Edit) -> None:
        if not self._drops(edit.path, edit.key):
            super()._record(edit)

    def _drops(self, path: str, key: str) -> bool:
        self.places.add(path)
        below = [off for off in self.off if path == off or path.startswith(f"{off}.")]
        self.met |= set(below)
        return bool(below) and self.containing in key
