"""Checks under other people's tools: copies, pickles, compilers, export, functional calls, dtypes, checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import peft_suite as ps
from peft_suite.errors import UnsupportedError
from peft_suite.testing.basics import NO_BACKWARD
from peft_suite.testing.case import (
    Case,
    LeftOut,
    adapter,
    arguments,
    assert_close,
    assert_differs,
    assert_equal,
    assert_gradients,
    assert_unchanged,
    call,
    gradients,
    loss,
    outputs,
    randomise,
    seeded,
    snapshot,
    tensors,
)
from peft_suite.testing.registry import check


@check()
def check_deepcopy(case: Case) -> None:
    """A deep copy computes the same and lives on its own."""
    case.bare(lambda model, batch: copy.deepcopy(model), "deepcopy")
    model, batch = case.backbone()
    base = outputs(model, batch)
    wanted = outputs(case.adapt(model), batch)
    before = snapshot(model)
    twin = copy.deepcopy(model)
    assert_equal(outputs(twin, batch), wanted, "the copy computes something else")
    randomise(adapter(twin))
    assert_differs(outputs(twin, batch), wanted, "new values in the copy's adapter do nothing")
    with ps.disabled(twin):
        assert_equal(outputs(twin, batch), base, "disabled copy")
        assert_equal(outputs(model, batch), wanted, "disabling the copy disabled the original")
    with ps.disabled(model):
        assert_differs(outputs(twin, batch), base, "disabling the original disabled the copy")
    case.adapt(twin, "another", seed=4)
    ps.remove(twin)
    assert_equal(outputs(twin, batch), base, "the copy without adapters")
    assert_unchanged(model, before, "work on the copy")
    assert_equal(outputs(model, batch), wanted, "the original after work on the copy")


@check()
def check_pickle(case: Case) -> None:
    """A pickled model computes the same, switches, takes further adapters and is undone like the original."""
    case.bare(lambda model, batch: pickle.loads(pickle.dumps(model)), "pickle")
    model, batch = case.backbone()
    base = outputs(model, batch)
    wanted = outputs(case.adapt(model), batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert_equal(outputs(twin, batch), wanted, "unpickled")
        with ps.disabled(twin):
            assert_equal(outputs(twin, batch), base, "unpickled and disabled")
        case.adapt(twin, "another", seed=4)
        other = outputs(twin, batch)
        ps.activate(twin, "default")
        assert_equal(outputs(twin, batch), wanted, "the old adapter beside a new one on the unpickled model")
        ps.activate(twin, "another")
        assert_equal(outputs(twin, batch), other, "the new adapter on the unpickled model")
        ps.remove(twin)
        assert_equal(outputs(twin, batch), base, "removed from the unpickled model")


@check(
    not_kinds={
        "shadow": "a shadowed tensor is read from the module's attributes, which functional_call does not replace"
    }
)
def check_functional_call(case: Case) -> None:
    """``torch.func.functional_call`` with other adapter values equals writing them."""
    case.bare(lambda model, batch: torch.func.functional_call(model, {}, *arguments(batch)), "functional_call")
    model, batch = case.adapted()
    start = outputs(model, batch)
    twin, _ = case.adapted(seed=8)
    other = [*adapter(twin).named_parameters(), *adapter(twin).named_buffers()]
    values = {f"adapters.default.{name}": value.detach() for name, value in other}
    with torch.no_grad():
        found = tensors(torch.func.functional_call(model, values, *arguments(batch)))
    assert_close(found, outputs(twin, batch), "functional_call with other values")
    assert_equal(outputs(model, batch), start, "functional_call changed the model")


@check()
def check_vmap(case: Case) -> None:
    """``torch.func.vmap`` over the samples equals the batch."""

    def each(model: nn.Module, batch: Any) -> list[Tensor]:
        def one(sample: Any) -> list[Tensor]:
            single = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), sample)
            return [t.squeeze(0) for t in tensors(call(model, single))]

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch names operations that it runs one by one
            return list(torch.func.vmap(one)(batch))

    def agree(model: nn.Module, batch: Any) -> None:
        assert_close(each(model, batch), outputs(model, batch), "vmap", 1e-4)

    case.bare(agree, "vmap")
    model, batch = case.adapted()
    assert_close(each(model, batch), outputs(model, batch), "vmap over the samples of an adapted model")


@check()
def check_half_precision(case: Case) -> None:
    """On float16 and bfloat16 backbones adapters stay float32, outputs have the backbone's dtype and precision."""
    for dtype in (torch.bfloat16, torch.float16):
        for autocast in (False, True):

            def attempt(
                model: nn.Module, batch: Any, dtype: torch.dtype = dtype, autocast: bool = autocast
            ) -> list[Tensor]:
                with torch.autocast("cpu", dtype, enabled=autocast):
                    found = tensors(call(model, _cast(batch, dtype)))
                assert all(bool(t.isfinite().all()) for t in found), (
                    f"outputs are not finite with {dtype}, autocast {autocast}"
                )
                return found

            case.bare(lambda model, batch, f=attempt, d=dtype: f(model.to(d), batch), f"{dtype} {autocast}")  # type: ignore[misc]
            whole, batch = case.adapted()
            wanted = outputs(whole, batch)
            model, _ = case.backbone()
            model.to(dtype)
            kinds = [t.dtype for t in attempt(model, batch)]
            case.adapt(model)
            case.copy_adapter(whole, "default", model)
            # a shadow hides a tensor from code that expects the backbone's dtype
            own = {p.dtype for e in adapter(model).edits if e.kind != "shadow" for p in e.part.parameters()}
            assert own <= {torch.float32}, f"adapter parameters on a {dtype} backbone are {own}"
            found = attempt(model, batch)
            assert [t.dtype for t in found] == kinds, (
                f"output dtypes {[t.dtype for t in found]}, of the backbone {kinds}"
            )
            # the backbone's rounded weights and activations differ from float32 by some units in the last place
            assert_close(
                [t.float() for t in found], wanted, f"{dtype}, autocast {autocast}", 24 * torch.finfo(dtype).eps
            )
            if not case.capabilities.forward_only:
                loss(found).backward()  # type: ignore[no-untyped-call]
                bad = [
                    n
                    for n, p in adapter(model).named_parameters()
                    if p.grad is None or not bool(p.grad.isfinite().all())
                ]
                assert not bad, f"no finite gradient with {dtype}, autocast {autocast}: {bad[:4]}"


@check(unless=NO_BACKWARD)
def check_autocast(case: Case) -> None:
    """bfloat16 autocast over a float32 backbone: finite outputs and gradients, close to those in float32."""

    def attempt(model: nn.Module, batch: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return tensors(call(model, batch))

    case.bare(attempt, "autocast")
    model, batch = case.adapted()
    wanted = outputs(model, batch)
    loss(call(model, batch)).backward()  # type: ignore[no-untyped-call]
    exact = gradients(model)
    model.zero_grad()
    found = attempt(model, batch)
    assert_close([t.float() for t in found], wanted, "under autocast", 24 * torch.finfo(torch.bfloat16).eps)
    loss(found).backward()  # type: ignore[no-untyped-call]
    rough = gradients(model)
    assert rough.keys() == exact.keys(), f"autocast loses gradients of {sorted(exact.keys() - rough.keys())[:4]}"
    a, b = (torch.cat([g[n].flatten().float() for n in exact]) for g in (rough, exact))
    assert bool(a.isfinite().all()), "gradients under autocast are not finite"
    near = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert near > 0.98, f"gradients under autocast point elsewhere: cosine {near:.3f}"


@check(unless=NO_BACKWARD)
def check_checkpointing(case: Case) -> None:
    """Non-reentrant checkpointing of the blocks, two forwards before one backward: gradients as without."""
    _compare_checkpointing(case, compiled=False)


@check(unless=NO_BACKWARD, expensive=True)
def check_checkpointing_compiled(case: Case) -> None:
    """The same with the model compiled."""
    _compare_checkpointing(case, compiled=True)


def _compare_checkpointing(case: Case, compiled: bool) -> None:
    anatomy = case.anatomy()
    if not anatomy.blocks:
        raise LeftOut(f"{case.backbone_id} describes no blocks to checkpoint")
    batches = (case.backbone()[1], case.other_batch())

    def run(model: nn.Module, through_compiler: bool) -> dict[str, Tensor]:
        model.train(not compiled)  # compilers draw other random numbers, so dropout is compared uncompiled
        forward = torch.compile(model, backend="aot_eager") if through_compiler else model
        with seeded(6):
            values = [loss(call(forward, batch)) for batch in batches]
            torch.stack(values).sum().backward()  # type: ignore[no-untyped-call]
        return gradients(model)

    def own(model: nn.Module) -> nn.Module:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise LeftOut("the backbone has no checkpointing of its own")
        switch(True)
        return model

    def wrapped(model: nn.Module) -> nn.Module:
        for block in anatomy.blocks:
            module = model.get_submodule(block.point.path)
            module.__class__ = type(type(module).__name__, (type(module),), {"__call__": _checkpointed(type(module))})
        return model

    wanted = run(case.adapted()[0], False)
    try:
        for how in (wrapped,) if compiled else (own, wrapped):
            if how is own and not hasattr(case.backbone()[0], "set_grad_checkpointing"):
                continue
            once = f"checkpointing {how.__name__} {compiled}"
            case.bare(lambda model, batch, how=how: _grads_of_bare(how(model), batch, compiled), once)  # type: ignore[misc]
            if how is own:  # the model's own switch is set before adapting, so that reentrant checkpointing is refused
                model = own(case.backbone()[0])
                try:
                    case.adapt(model)
                except UnsupportedError as refusal:
                    if "reentrant" not in str(refusal):
                        raise
                    continue
            else:
                model = wrapped(case.adapted()[0])
            assert_gradients(
                run(model, compiled), wanted, "the model's own checkpointing" if how is own else "checkpointed blocks"
            )
    finally:
        if compiled:
            torch.compiler.reset()


def _grads_of_bare(model: nn.Module, batch: Any, compiled: bool) -> None:
    model.train().requires_grad_(True)
    loss(call(torch.compile(model, backend="aot_eager") if compiled else model, batch)).backward()  # type: ignore[no-untyped-call]


def _checkpointed(cls: type[nn.Module]) -> Any:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return checkpoint(cls.__call__, self, *args, use_reentrant=False, **kwargs)

    return __call__


@check(expensive=True)
def check_compile(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` follows every switch, and adapting after compiling is seen."""
    try:
        case.bare(lambda model, batch: outputs(torch.compile(model, fullgraph=True, backend="eager"), batch), "compile")
        torch.compiler.reset()
        model, batch = case.backbone()
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(outputs(compiled, batch), outputs(model, batch), "the plain model compiled")
        case.adapt(model, "first", seed=1)
        assert_close(outputs(compiled, batch), outputs(model, batch), "compiled before adapting")
        case.adapt(model, "second", seed=2)
        for names in (("first",), ("second",), (), ("first",)):
            ps.activate(model, *names)
            assert_close(outputs(compiled, batch), outputs(model, batch), f"compiled, after activate{names}")
        with ps.disabled(model):
            assert_close(outputs(compiled, batch), outputs(model, batch), "compiled, disabled")
        if not case.capabilities.forward_only:
            ps.trainable(model, "first")
            loss(call(model, batch)).backward()  # type: ignore[no-untyped-call]
            wanted = gradients(model)
            model.zero_grad()
            loss(call(compiled, batch)).backward()  # type: ignore[no-untyped-call]
            assert_gradients(gradients(model), wanted, "compiled")
        ps.remove(model)
        assert_close(outputs(compiled, batch), outputs(model, batch), "compiled, after remove()")
    finally:
        torch.compiler.reset()


@check(expensive=True)
def check_export(case: Case) -> None:
    """``torch.export`` of the adapted and of the merged model computes what they compute."""

    def export(model: nn.Module, batch: Any) -> nn.Module:
        args, kwargs = arguments(batch)
        return torch.export.export(model, args, kwargs).module()

    case.bare(export, "export")
    model, batch = case.adapted()
    before = snapshot(model)
    assert_close(outputs(export(model, batch), batch), outputs(model, batch), "the exported adapted model")
    assert_unchanged(model, before, "export")
    if case.capabilities.mergeable:
        plain = [n.target for n in _graph(export(case.backbone()[0], batch)) if n.op == "call_function"]
        ps.merge(model)
        program = export(model, batch)
        assert_close(outputs(program, batch), outputs(model, batch), "the exported merged model")
        if set(model.state_dict()) == set(case.backbone()[0].state_dict()):
            merged = [n.target for n in _graph(program) if n.op == "call_function"]
            assert merged == plain, "the merged model runs another graph than the plain one"


def _graph(program: nn.Module) -> Any:
    graph: Any = program.graph
    return graph.nodes


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
