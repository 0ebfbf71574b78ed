"""Cases of the conformance suite: one (method, backbone) pair each, and the material that the checks share."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import peft_suite as ps
from peft_suite.anatomy import Anatomy, anatomy_of
from peft_suite.edits import Edit
from peft_suite.lifecycle import prepare
from peft_suite.merging import folds
from peft_suite.method import Capabilities, make_method
from peft_suite.plugins import resolve

__all__ = ["Case", "LeftOut"]

TOLERANCE = 1e-5  # of the output's norm, in float32


class LeftOut(Exception):  # noqa: N818 - a verdict, not an error
    """A check that does not apply to a case; the text says why."""


@dataclass(frozen=True)
class Case:
    """One method on one backbone. Plain text, so that it travels to other processes.

    Attributes:
        method: shorthand such as ``"vpt(deep=True)"``.
        family: name of the anatomy.
        example: ``"module:function"`` that returns ``(model, batch)``.
    """

    method: str
    family: str
    example: str

    @property
    def backbone_id(self) -> str:
        """The family, and which of its examples: ``example_deit`` of timm-vit is ``timm-vit-deit``."""
        last = self.example.rpartition(":")[2].rpartition(".")[2].removeprefix("example").strip("_")
        return f"{self.family}-{last}" if last else self.family

    @property
    def id(self) -> str:
        """``method-backbone``."""
        return f"{self.method.replace(' ', '')}-{self.backbone_id}"

    @property
    def capabilities(self) -> Capabilities:
        """What the method declares, without merging where the backbone has a site that no weight can take in."""
        declared = make_method(self.method).capabilities
        if declared.mergeable and not all(folds(_built(self.example, 0)[0], e) for e in self.edits()):
            return replace(declared, mergeable=False)
        return declared

    def backbone(self, seed: int = 0) -> tuple[nn.Module, Any]:
        """A frozen model in eval mode and a batch; the seed decides the weights, the batch is always the same."""
        return _backbone(self.example, seed), _built(self.example, 0)[1]

    def other_batch(self) -> Any:
        """A batch of the same form with other floating-point values."""
        with seeded(11):
            return pytree.tree_map_only(
                Tensor, lambda t: t + 0.5 * torch.randn_like(t) if t.is_floating_point() else t, self.backbone()[1]
            )

    def anatomy(self) -> Anatomy:
        """The description of the backbone."""
        return _anatomy(self.example)

    def edits(self) -> tuple[Edit, ...]:
        """What the method records on this backbone (parts without memory).

        Raises:
            UnsupportedError: the backbone cannot carry the method.
        """
        return _edits(self)

    def kinds(self) -> set[tuple[str, str]]:
        """(kind of edit, class of part) pairs that the case exercises."""
        return {(e.kind, f"{type(e.part).__module__}.{type(e.part).__qualname__}") for e in self.edits()}

    def adapt(self, model: nn.Module, name: str = "default", *, seed: int = 1, fresh: bool = False) -> nn.Module:
        """Attach the method; unless ``fresh``, with random values in every parameter, as if it had been trained."""
        with seeded(seed):
            ps.adapt(model, self.method, name=name)
            if self.capabilities.needs_calibration:
                kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
                batch = pytree.tree_map_only(
                    Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, self.backbone()[1]
                )
                ps.events(model).calibrate([batch], lambda b: loss(call(model, b)))
            if not fresh:
                randomise(adapter(model, name))
        return model

    def adapted(self, name: str = "default", *, seed: int = 1, fresh: bool = False) -> tuple[nn.Module, Any]:
        """A new adapted backbone and a batch."""
        model, batch = self.backbone()
        return self.adapt(model, name, seed=seed, fresh=fresh), batch

    def copy_adapter(self, source: nn.Module, name: str, model: nn.Module) -> None:
        """Give ``model`` the values of an adapter, which it has already unless other places would be chosen on it."""
        own = adapter(source, name).state_dict()
        there = name in model.adapters if "adapters" in model._modules else False  # type: ignore[operator]
        here = adapter(model, name).state_dict() if there else {}
        if self.capabilities.needs_calibration or any(n in here and here[n].shape != t.shape for n, t in own.items()):
            if "adapters" in model._modules and name in model.adapters:  # type: ignore[operator]
                ps.remove(model, name)
            with tempfile.TemporaryDirectory() as folder:
                ps.save(source, folder, name)
                ps.load(model, folder, trainable=True, check="none")
        else:
            adapter(model, name).load_state_dict(own)

    def bare(self, attempt: Callable[[nn.Module, Any], Any], once: str = "") -> None:
        """Try something on the plain backbone first: what that cannot do, nobody asks of an adapted one.

        ``once`` names an attempt that need not be repeated for other methods in this process.
        """
        key = (self.example, once)
        if not once or key not in _verdicts:
            try:
                attempt(*self.backbone())
                _verdicts[key] = ""
            except Exception as error:
                first = str(error).strip().splitlines()
                _verdicts[key] = (
                    f"the bare {self.backbone_id} fails: {type(error).__name__}: {first[0] if first else ''}"
                )
        if reason := _verdicts[key]:
            raise LeftOut(reason)


_verdicts: dict[tuple[str, str], str] = {}


@functools.cache
def _built(example: str, seed: int) -> tuple[nn.Module, Any]:
    with seeded(seed):
        model, batch = resolve(example)()
        settle(model)
    return model.eval(), batch


def _backbone(example: str, seed: int) -> nn.Module:
    try:
        return copy.deepcopy(_built(example, seed)[0])
    except Exception:  # a backbone that cannot be copied is built again
        return _built.__wrapped__(example, seed)[0]


@functools.cache
def _anatomy(example: str) -> Anatomy:
    return anatomy_of(_built(example, 0)[0])


@functools.cache
def _edits(case: Case) -> tuple[Edit, ...]:
    model, method = _built(case.example, 0)[0], make_method(case.method)  # preparing changes nothing: no copy
    return prepare(model, method, "default", _anatomy(case.example), torch.device("meta")).edits


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside, undisturbed outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def settle(model: nn.Module) -> None:
    """Make an example fit for comparison: no randomness, no constant tensors (zero heads, unit scales)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            if isinstance(getattr(module, "drop_prob", None), float):
                module.drop_prob = 0.0  # type: ignore[assignment]
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def randomise(module: nn.Module) -> None:
    """Add noise to every parameter, in proportion to its size, so that later equalities mean something."""
    with torch.no_grad():
        for parameter in module.parameters():
            size = float(parameter.float().square().mean().sqrt()) if parameter.numel() else 0.0
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float32).to(parameter.dtype) * (0.2 * size + 0.03))


def adapter(model: nn.Module, name: str = "default") -> ps.Adapter:
    """``model.adapters[name]``, typed."""
    adapters = model.adapters
    assert isinstance(adapters, ps.Adapters)
    return adapters[name]


def call(model: Any, batch: Any) -> Any:
    """Mappings are keyword arguments, tuples positional ones."""
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of any output structure."""
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def outputs(model: Any, batch: Any) -> list[Tensor]:
    """What the model computes, without gradients."""
    with torch.no_grad():
        return tensors(call(model, batch))


def loss(output: Any) -> Tensor:
    """A scalar with a different gradient for every output value."""
    terms = []
    for t in tensors(output):
        goal = torch.sin(torch.arange(t.numel(), device=t.device, dtype=torch.float32)).view(t.shape)
        terms.append((t.float() - goal).square().mean())
    return torch.stack(terms).sum()


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest ``|found - wanted| / |wanted|`` over the tensors; infinite where the structures differ."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().double(), b.detach().double()
        gap = float((a - b).norm() / b.norm().clamp_min(1e-12))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def assert_close(found: list[Tensor], wanted: list[Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Fail with ``what`` when the relative error passes the tolerance."""
    gap = error(found, wanted)
    assert gap <= tolerance, f"{what}: relative error {gap:.2e}, allowed {tolerance:.0e}"


def assert_equal(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    """Fail with ``what`` unless all values agree bit for bit."""
    same = len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert same, f"{what}: not bit for bit equal, relative error {error(found, wanted):.2e}"


def assert_differs(found: list[Tensor], wanted: list[Tensor], what: str, at_least: float = 1e-4) -> None:
    """Fail with ``what`` when the two are closer than ``at_least``."""
    gap = error(found, wanted)
    assert gap >= at_least, f"{what}: relative difference only {gap:.2e}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, copied."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients(
    found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, tolerance: float = TOLERANCE
) -> None:
    """Fail with ``what`` unless the same parameters have the same gradients, relative to the norm of all together."""
    assert found.keys() == wanted.keys(), (
        f"{what}: gradients of other parameters {sorted(found.keys() ^ wanted.keys())[:4]}"
    )
    assert wanted, f"{what}: no gradients at all"
    size = torch.stack([g.double().norm() for g in wanted.values()]).norm()
    for name, grad in wanted.items():
        gap = float((found[name].double() - grad.double()).norm() / size)
        assert gap <= tolerance, (
            f"{what}: gradient of {name} differs by {gap:.2e} of the whole, allowed {tolerance:.0e}"
        )


def train(model: nn.Module, batch: Any, steps: int = 4) -> set[str]:
    """A plain loop with weight decay over *all* parameters; returns the names that saw a gradient other than zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.05)
    events = ps.events(model)
    seen: set[str] = set()
    for step in range(steps):
        optimizer.zero_grad()
        value, penalty = loss(call(model, batch)), events.penalty()
        (value if penalty is None else value + penalty).backward()  # type: ignore[no-untyped-call]
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        events.before_step(step, optimizer)
        optimizer.step()
        events.after_step(step, optimizer)
    events.finish()
    optimizer.zero_grad()
    return seen


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that a refused operation must leave alone and an undone one must give back."""
    modules = dict(model.named_modules())
    adapters = model._modules.get("adapters")
    return {
        "value": {**state(model)},
        "module object": {n: id(m) for n, m in modules.items()},
        "class": {n: type(m) for n, m in modules.items()},
        "parameter object": {n: id(p) for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training flag": {n: m.training for n, m in modules.items()},
        "instance attributes": {n: frozenset(m.__dict__) for n, m in modules.items()},
        "hooks": {n: tuple(len(getattr(m, h)) for h in _HOOKS) for n, m in modules.items()},
        "active adapters": {"": getattr(adapters, "active", None)},
    }


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
)


def assert_unchanged(model: nn.Module, before: dict[str, dict[str, Any]], what: str) -> None:
    """Fail with ``what`` and the first difference when the model is not as in the snapshot."""
    after = snapshot(model)
    for aspect, old in before.items():
        new = after[aspect]
        assert list(old) == list(new), f"{what}: {aspect}: other names or order {sorted(set(old) ^ set(new))[:4]}"
        for name, value in old.items():
            same = torch.equal(value, new[name]) if isinstance(value, Tensor) else value == new[name]
            assert same, f"{what}: {aspect} of {name or 'the model'} changed"
