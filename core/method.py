"""What a method is: a configuration, declared capabilities, a ``build`` that records edits, and optional events."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.config import MethodConfig, parse_shorthand
from peft_suite.edits import BatchStatistics, Edit, Part, Trained, functional_of
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.plugins import find_method, resolve
from peft_suite.selecting import Select

if TYPE_CHECKING:
    from peft_suite.adapter import Adapter

__all__ = ["Capabilities", "Editor", "Method", "MethodSpec", "config_class", "make_method"]

C = TypeVar("C", bound=MethodConfig)
S = TypeVar("S", bound=Select)
MethodSpec = str | MethodConfig | Mapping[str, Any]


@dataclass(frozen=True)
class Capabilities:
    """What generic code may expect of a method; declared, never discovered.

    Attributes:
        mergeable: every edit folds into the weights exactly.
        identity_at_init: a fresh adapter (with the head as it was) leaves the output as it is.
        changes_sequence: adds tokens inside the model.
        needs_geometry: needs per-sample context such as point coordinates from the backbone's blocks.
        trains_base_entries: its values stand in for entries of frozen weights.
        needs_calibration: ``calibrate`` must see batches before training.
        calibrates_on_all: it wants all training samples, not the recipe's ``calibration_batches``.
        forward_only: trained without backward.
        backbone_eval: backbone dropout and drop path stay off while training.
    """

    mergeable: bool = False
    identity_at_init: bool = True
    changes_sequence: bool = False
    needs_geometry: bool = False
    trains_base_entries: bool = False
    needs_calibration: bool = False
    calibrates_on_all: bool = False
    forward_only: bool = False
    backbone_eval: bool = False


class Method(Generic[C]):
    """Base of every method. A subclass sets ``config_class``, overrides ``capabilities`` and ``build``.

    Events are optional; each receives the adapter that the method built.
    """

    config_class: ClassVar[type[MethodConfig]]
    examples: ClassVar[tuple[str, ...]] = ()  # shorthands that suit a tiny model, for the conformance suite

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """The registered name."""
        return self.config.method

    @property
    def capabilities(self) -> Capabilities:
        """Declared capabilities, which may depend on the configuration."""
        return Capabilities()

    def build(self, anatomy: Anatomy, edit: Editor) -> None:
        """Record the edits. Raise UnsupportedError, in one sentence, for what the backbone lacks."""
        raise NotImplementedError(f"{type(self).__name__} does not define build()")

    @property
    def decision(self) -> str:
        """What ``calibrate`` decided, in one line for people; "" before it and where it decides nothing."""
        return ""

    @property
    def pending(self) -> int:
        """Values that ``calibrate`` has yet to place, for plans."""
        return 0

    def calibrate(self, adapter: Adapter, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Method[Any] | None:
        """Gather statistics before training. ``loss(batch)`` runs the model; batches are streamed.

        Returns:
            None, or, where the edits follow from what was seen, the method whose configuration records it: the adapter
            is built again with it, and files bring it along. Call it through ``events(model).calibrate``.
        """
        return None

    def begin(self, adapter: Adapter, steps: int) -> None:
        """Called once before the first step of a run, or of its continuation, with the optimizer steps of the whole."""

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """A term added to the loss."""
        return None

    def before_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after backward and before the optimizer's step."""

    def after_step(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after the optimizer's step."""

    def finish(self, adapter: Adapter) -> None:
        """Called once when training ends."""


def config_class(name: str) -> type[MethodConfig]:
    """The configuration class behind a method name."""
    return cast("type[MethodConfig]", resolve(find_method(name).target).config_class)


def make_method(spec: MethodSpec) -> Method[Any]:
    """The method that a name, shorthand, mapping or configuration object describes.

    Raises:
        UnknownNameError: no plugin provides the name; the closest are listed.
        ConfigError: a field is unknown, ill-typed or out of range.
    """
    if isinstance(spec, MethodConfig):
        return cast("Method[Any]", resolve(find_method(spec.method).target)(spec))
    if isinstance(spec, str):
        name, values = parse_shorthand(spec)
    elif isinstance(spec, Mapping):
        values = dict(spec)
        name = values.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"A method given as a mapping needs a 'name', got the keys {sorted(map(str, spec))}.")
    else:
        raise ConfigError(f"A method is a name, a mapping or a MethodConfig, not {type(spec).__name__}.")
    entry = find_method(name)
    cls = resolve(entry.target)
    return cast("Method[Any]", cls(cls.config_class.from_dict({**entry.preset, **values})))


class Editor:
    """Records the edits of one adapter while a method builds it; the model is only read.

    Parts are created on ``device`` ("meta" for a dry run). ``key`` names a part inside the adapter's file:
    ``<module path>.<label>``. ``stored``: tensors and their sizes come from a file or a checkpoint, so that nothing
    need be worked out from the weights' values.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, device: torch.device, *, stored: bool = False) -> None:
        self.model, self.anatomy, self.device, self.stored = model, anatomy, device, stored
        self.edits: list[Edit] = []
        self._owned: dict[str, list[str]] = {}
        self._left: set[str] = set()
        self._modules: dict[str, nn.Module] = dict(model.named_modules())

    def module(self, path: str) -> nn.Module:
        """The base module at ``path``, for its shape and type; raises UnsupportedError when it does not exist."""
        if path not in self._modules:
            raise UnsupportedError(f"{self.anatomy.family} describes {path!r}, which this model does not have.")
        return self._modules[path]

    def before(self, point: Point, part: Part, label: str) -> None:
        """``x = part(x)`` on the module's input stream."""
        self._record(Edit("before", point.path, _key(point.path, label), part, point.argument))

    def after(self, point: Point, part: Part, label: str) -> None:
        """``y = part(y)`` on the module's output stream."""
        self._record(Edit("after", point.path, _key(point.path, label), part, point.argument, point.output))

    def beside(self, point: Point, part: Part, label: str) -> None:
        """``y = part(y, x)`` from the module's output and input streams."""
        self._record(Edit("beside", point.path, _key(point.path, label), part, point.argument, point.output))

    def branch(self, block: Block, branch: str, part: Part, label: str, *, normed: bool = False) -> None:
        """``h = x + sublayer(norm(x)) + part(x)`` for the residual branch "attn" or "mlp" of a block.

        ``normed``: the part reads what the sub-layer reads, ``part(norm(x))``.
        """
        module = self.module(block.point.path)
        if branch not in block.branches or type(module).forward not in self.anatomy.block_forwards:
            raise UnsupportedError(
                f"{self.anatomy.family} does not give access to the residual stream of the {branch!r} branch "
                f"of {block.point.path} ({type(module).__name__})."
            )
        self._record(
            Edit("branch", block.point.path, _key(block.point.path, label), part, branch=branch, normed=normed)
        )

    def inside(self, point: Point, place: str, part: Part, label: str) -> None:
        """``values = part(*values)`` at a named place inside the module's forward; see ``Anatomy.places``."""
        module = self.module(point.path)
        if place not in self.anatomy.places.get(type(module).forward, ()):
            raise UnsupportedError(
                f"{self.anatomy.family} gives no access to the {place!r} of {point.path} ({type(module).__name__})."
            )
        self._record(Edit("inside", point.path, _key(point.path, label), part, branch=place))

    def having(self, place: str) -> tuple[str, ...]:
        """Paths of the modules whose described forward has a place of that name, in the order of the model."""
        places = self.anatomy.places
        return tuple(path for path, module in self._modules.items() if place in places.get(type(module).forward, ()))

    def reweigh(self, weight: Weight, part: Part, label: str) -> None:
        """``weight, bias = part(weight, bias)`` for a module."""
        module = self.module(weight.path)
        if functional_of(module, self.anatomy.functionals) is None:
            raise UnsupportedError(
                f"The weight of {weight.path} cannot be replaced: the forward of {type(module).__name__} is not known. "
                "Add it to Anatomy.functionals."
            )
        self._record(Edit("reweigh", weight.path, _key(weight.path, label), part))

    def select(
        self,
        weight: Weight,
        label: str,
        index: Tensor | None,
        bias_index: Tensor | None = None,
        part: type[S] = Select,  # type: ignore[assignment]  # the default of a type variable
    ) -> S:
        """Train chosen entries of a module's weight (and bias): flat sorted positions; None leaves a tensor alone.

        A method that chooses later, in ``calibrate``, gives an empty index here and calls :meth:`Select.choose`.
        ``part``: the class of the part, for methods that keep more about the entries.

        Raises:
            UnsupportedError: the module's forward is not known, or it has no such tensor.
            KernelArgumentError: a position twice, out of order or out of range.
        """
        module = self.module(weight.path)
        if functional_of(module, self.anatomy.functionals) is None:
            raise UnsupportedError(
                f"Entries of {weight.path} cannot be chosen: the forward of {type(module).__name__} is not known. "
                "Add it to Anatomy.functionals."
            )
        chosen = {n: i for n, i in (("weight", index), ("bias", bias_index)) if i is not None}
        for name in chosen:
            if not isinstance(getattr(module, name, None), Tensor):
                raise UnsupportedError(f"{weight.path} ({type(module).__name__}) has no {name} to choose entries of.")
        if module.weight.dtype in (torch.float16, torch.bfloat16) and not any(e.kind == "select" for e in self.edits):
            warnings.warn(
                f"Chosen entries of {str(module.weight.dtype).removeprefix('torch.')} weights: changes smaller than "
                "the weights' rounding step are lost. Keep these layers in float32, or watch kernels.rounded_away.",
                stacklevel=3,
            )
        made = part(module, chosen, self.device)
        self._record(Edit("select", weight.path, _key(weight.path, label), made))
        return made

    def own(self, parameters: Iterable[str]) -> None:
        """Train copies of base parameters, by full names; they start at the base values and travel in the file.

        Parameters that the anatomy calls idle are left out: nothing would ever reach them.
        """
        for given in parameters:
            full = self.anatomy.tied.get(given, given)
            if full in self.anatomy.idle or full in self._left:
                continue
            path, _, name = full.rpartition(".")
            if getattr(self.module(path), name, None) is None:
                raise UnsupportedError(f"{self.anatomy.family} names the parameter {full!r}, which this model lacks.")
            names = self._owned.setdefault(path, [])
            if name not in names:
                names.append(name)

    def leave(self, parameters: Iterable[str]) -> None:
        """Train no copies of these, not even of fresh ones: the method brings its own values for them."""
        self._left |= set(parameters)

    def own_statistics(self, *, fresh_only: bool = False) -> None:
        """Let batch-norm statistics move with training, in buffers of the adapter; or those of fresh layers alone."""
        for path, module in self._modules.items():
            foreign = path.startswith("adapters.")
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and not foreign:
                fresh = any(f"{path}.{n}" in self.anatomy.fresh for n in module._parameters)
                if fresh or not fresh_only:
                    part = BatchStatistics(module, self.device, fresh)
                    self._record(Edit("reweigh", path, _key(path, "statistics"), part))

    def finish(self) -> list[Edit]:
        """All edits; owned parameters become one part per module."""
        for path, names in self._owned.items():
            module = self.module(path)
            called = path not in self.anatomy.read_directly
            known = called and functional_of(module, self.anatomy.functionals) is not None
            plain = tuple(n for n in names if known and n in ("weight", "bias"))
            direct = tuple(n for n in names if n not in plain)
            if plain:
                part = Trained(module, plain, self.device)
                self._record(Edit("reweigh", path, _key(path, "trained"), part))
            if direct:
                part = Trained(module, direct, self.device, direct=True)
                self._record(Edit("shadow", path, _key(path, "direct"), part))
        self._owned = {}
        return self.edits

    def _record(self, edit: Edit) -> None:
        self.module(edit.path)
        if edit.kind != "shadow" and edit.path in self.anatomy.read_directly:
            raise UnsupportedError(
                f"Nothing can be attached to {edit.path}: this {self.anatomy.family} model reads its weight without "
                "calling it. Choose other targets, or another method."
            )
        if any(e.key == edit.key for e in self.edits):
            raise UnsupportedError(f"Two edits of one adapter have the key {edit.key!r}; give them different labels.")
        self.edits.append(edit)


def _key(path: str, label: str) -> str:
    return f"{path}.{label}" if path else label
