"""Checks of several adapters on one backbone: switching, disabling, removing, and what each verb leaves alone."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn

import peft_suite as ps
from peft_suite.errors import AdapterError, AdapterNameError
from peft_suite.testing.case import (
    Case,
    LeftOut,
    adapter,
    assert_differs,
    assert_equal,
    assert_unchanged,
    call,
    loss,
    outputs,
    snapshot,
)
from peft_suite.testing.registry import check


@check()
def check_two_adapters(case: Case) -> None:
    """Two adapters differ, and switching back restores each bit for bit."""
    model, batch = case.backbone()
    base = outputs(model, batch)
    case.adapt(model, "first", seed=1)
    first = outputs(model, batch)
    case.adapt(model, "second", seed=2)
    second = outputs(model, batch)
    assert_differs(second, first, "two adapters with different values compute the same")
    for name, wanted in (("first", first), ("second", second), ("first", first)):
        ps.activate(model, name)
        assert_equal(outputs(model, batch), wanted, f"after activate({name!r})")
    ps.activate(model)
    assert_equal(outputs(model, batch), base, "with none active")


@check()
def check_both_at_once(case: Case) -> None:
    """Two active adapters act together; of those that stand in for base values the last one wins."""
    model, batch = case.backbone()
    case.adapt(model, "first", seed=1)
    first = outputs(model, batch)
    case.adapt(model, "second", seed=2)
    second = outputs(model, batch)
    if case.capabilities.changes_sequence:
        before = snapshot(model)
        try:
            ps.activate(model, "first", "second")
        except AdapterError:
            assert_unchanged(model, before, "activate() refused")
            raise LeftOut("changes_sequence=True: two of its adapters at once are refused (that was checked)") from None
        raise AssertionError("two adapters that change the sequence were activated at once")
    ps.activate(model, "first", "second")
    both = outputs(model, batch)
    assert_differs(both, first, "both and the first alone")
    if case.capabilities.trains_base_entries:
        kinds = {name for _, name in case.kinds()}
        if kinds <= {"peft_suite.edits.Trained"}:
            assert_equal(both, second, "both, where the second replaces all of the first")
    else:
        assert_differs(both, second, "both and the second alone")
    ps.activate(model, "second")
    assert_equal(outputs(model, batch), second, "the second alone again")


@check()
def check_disabled(case: Case) -> None:
    """Inside ``disabled`` the model is the frozen one bit for bit; afterwards it is as before, also after errors."""
    model, batch = case.backbone()
    base = outputs(model, batch)
    case.adapt(model)
    wanted, before = outputs(model, batch), snapshot(model)
    with ps.disabled(model):
        assert_equal(outputs(model, batch), base, "disabled")
        with ps.disabled(model):
            assert_equal(outputs(model, batch), base, "disabled twice")
        assert_equal(outputs(model, batch), base, "disabled, after an inner disabled")
    assert_equal(outputs(model, batch), wanted, "enabled again")
    try:
        with ps.disabled(model):
            raise KeyError("inside")
    except KeyError:
        pass
    assert_equal(outputs(model, batch), wanted, "enabled again after an exception")
    assert_unchanged(model, before, "disabled()")
    ps.activate(model)
    with ps.disabled(model):
        pass
    assert_equal(outputs(model, batch), base, "none was active before disabled(), so none is afterwards")
    model.train()
    ps.activate(model, "default")
    with ps.disabled(model):
        assert model.training
    assert_equal(outputs(model.eval(), batch), wanted, "enabled again after train() and eval()")


@check()
def check_remove(case: Case) -> None:
    """Active and inactive adapters go one by one; an unknown name is an error that changes nothing."""
    model, batch = case.backbone()
    base = outputs(model, batch)
    for i, name in enumerate(("first", "second", "third")):
        case.adapt(model, name, seed=i + 1)
    ps.activate(model, "second")
    wanted, before = outputs(model, batch), snapshot(model)
    for names in (("nobody",), ("first", "nobody")):
        _raises(AdapterNameError, lambda names=names: ps.remove(model, *names), f"remove{names}")
        _raises(AdapterNameError, lambda names=names: ps.activate(model, *names), f"activate{names}")
        _raises(AdapterNameError, lambda names=names: ps.trainable(model, *names), f"trainable{names}")
    _raises(AdapterNameError, lambda: ps.activate(model, "first", "first"), "activate twice")
    assert_unchanged(model, before, "refused operations")
    ps.remove(model, "first")
    assert_equal(outputs(model, batch), wanted, "an inactive adapter was removed")
    assert not [k for k in model.state_dict() if ".first." in k], "tensors of a removed adapter are left"
    ps.remove(model, "second")
    assert_equal(outputs(model, batch), base, "the active adapter was removed")
    assert _names(model) == ["third"]
    ps.remove(model)
    assert_equal(outputs(model, batch), base, "all adapters were removed")
    _raises(AdapterError, lambda: ps.remove(model), "remove without an adapter")


@check(essential=True)
def check_undo(case: Case) -> None:
    """``remove`` gives the original back: objects, classes, hooks, attributes, values, flags."""
    model, batch = case.backbone()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    batch_norm = nn.modules.batchnorm._BatchNorm  # in train mode it would change the bare model by itself
    children = [c for c in model.children() if not any(isinstance(m, batch_norm) for m in c.modules())]
    if children:
        children[-1].train()
    before, base = snapshot(model), outputs(model, batch)
    case.adapt(model, "first", seed=1)
    case.adapt(model, "second", seed=2)
    ps.trainable(ps.activate(model, "first"), "first")
    if not case.capabilities.forward_only:
        loss(call(model, batch)).backward()  # type: ignore[no-untyped-call]
    with ps.disabled(model):
        outputs(model, batch)
    ps.remove(model, "second")
    ps.remove(model, "first")
    assert_unchanged(model, before, "after remove()")
    assert_equal(outputs(model, batch), base, "after remove()")
    assert not [n for n, p in model.named_parameters() if p.grad is not None], (
        "gradients were left on frozen parameters"
    )
    case.adapt(model, seed=1)
    ps.remove(model)
    assert_unchanged(model, before, "after a second adapt() and remove()")


@check()
def check_requires_grad(case: Case) -> None:
    """Only ``adapt`` and ``trainable`` set ``requires_grad``; the head follows its adapter."""
    model, _ = case.backbone()
    case.adapt(model, "first")
    assert _moving(model) == {"first"}, "adapt() trains the new adapter alone"
    case.adapt(model, "second")
    assert _moving(model) == {"second"}, "adapt() trains the new adapter alone"
    for names in (("first",), (), ("second",)):
        ps.activate(model, *names)
        assert _moving(model) == {"second"}, f"activate{names} changed requires_grad"
        with ps.disabled(model):
            assert _moving(model) == {"second"}, "disabled() changed requires_grad"
    ps.trainable(model, "first", "second")
    assert _moving(model) == {"first", "second"}
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder, "first")
        ps.load(model, folder, "third")
        assert _moving(model) == {"first", "second"}, "a loaded adapter is frozen, the others keep their flags"
        ps.load(model, folder, "fourth", trainable=True)
        assert _moving(model) == {"first", "second", "fourth"}, "load(trainable=True)"
    ps.trainable(model)
    assert _moving(model) == set()


@check()
def check_duplicate_name(case: Case) -> None:
    """A name that is taken or not allowed is refused with nothing changed, whether adapting or loading."""
    model, _ = case.adapted()
    plain, _ = case.backbone()
    before, untouched = snapshot(model), snapshot(plain)
    for name in ("default", "", "train", "forward", "a.b", "type"):
        _raises(AdapterNameError, lambda name=name: ps.adapt(model, case.method, name=name), f"adapt(name={name!r})")
        if name != "default":
            _raises(
                AdapterNameError, lambda name=name: ps.adapt(plain, case.method, name=name), f"adapt(name={name!r})"
            )
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        _raises(AdapterNameError, lambda: ps.load(model, folder), "load() under a taken name")
    assert_unchanged(model, before, "a refused name")
    assert_unchanged(plain, untouched, "a refused name on a plain model")


@check()
def check_train_mode(case: Case) -> None:
    """New adapters take the model's mode and follow it."""
    model, _ = case.backbone()
    model.train()
    case.adapt(model)
    assert all(m.training for m in adapter(model).modules()), "adapted in train mode"
    model.eval()
    assert not any(m.training for m in model.modules()), "eval() does not reach everything"
    model.train()
    assert adapter(model).training
    if case.capabilities.backbone_eval:
        adapters: Any = model.adapters
        heads = tuple(f"{n}." for n, m in model.named_children() if adapters.is_head(n, m))
        base = [m for n, m in model.named_modules() if n and not f"{n}.".startswith(("adapters.", *heads))]
        assert not any(m.training for m in base), "backbone_eval=True, and yet the backbone went into train mode"
        ps.activate(model)
        assert all(m.training for m in base), "with the adapter off the backbone is in train mode again"


def _moving(model: nn.Module) -> set[str]:
    """Adapters with trainable parameters: all or none of each; the backbone never."""
    base = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("adapters.")]
    assert not base, f"backbone parameters train: {base[:4]}"
    adapters: Any = model.adapters
    flags = {name: {p.requires_grad for p in a.parameters()} for name, a in adapters.items()}
    mixed = [n for n, f in flags.items() if len(f) > 1]
    assert not mixed, f"only some parameters of {mixed} train"
    return {n for n, f in flags.items() if f == {True}}


def _names(model: nn.Module) -> list[str]:
    adapters: Any = model.adapters
    return list(adapters)


def _raises(kind: type[Exception], act: Any, what: str) -> None:
    try:
        act()
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"{what} was accepted")
    assert len(message) > 20, f"{what}: the message says nothing: {message}"
