"""Checks on two gloo processes: DistributedDataParallel and FSDP2 on CPU."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import peft_suite as ps
from peft_suite.errors import AdapterError
from peft_suite.testing.basics import NO_BACKWARD
from peft_suite.testing.case import (
    TOLERANCE,
    Case,
    adapter,
    assert_close,
    assert_equal,
    assert_gradients,
    call,
    gradients,
    loss,
    outputs,
)
from peft_suite.testing.ranks import on_two_ranks
from peft_suite.testing.registry import check

_NO_SHADOW = {"shadow": "FSDP2 replaces the parameter objects that a shadow hides (verify reports it)"}


@check(unless=NO_BACKWARD, expensive=True)
def check_ddp(case: Case) -> None:
    """Two DDP processes, with an inactive adapter present, give the gradients of one process on the global batch."""
    on_two_ranks("peft_suite.testing.parallel:_ddp", case)


@check(unless=NO_BACKWARD, not_kinds=_NO_SHADOW, expensive=True)
def check_fsdp(case: Case) -> None:
    """FSDP2 over blocks: outputs, gradients, switching and the saved file are those of one process."""
    on_two_ranks("peft_suite.testing.parallel:_fsdp", case)


@check(expensive=True)
def check_adapt_after_sharding(case: Case) -> None:
    """Adapting or loading after ``fully_shard`` is refused: gradients would silently stay unsynchronised."""
    on_two_ranks("peft_suite.testing.parallel:_late", case)


def _reference(case: Case) -> tuple[dict[str, Tensor], list[list[Tensor]], list[Any]]:
    """One process: mean gradient and outputs of the two halves of the global batch."""
    model, batch = _twice(case)
    halves = [batch, case.other_batch()]
    found = [outputs(model, half) for half in halves]
    torch.stack([loss(call(model, half)) for half in halves]).mean().backward()  # type: ignore[no-untyped-call]
    return gradients(model), found, halves


def _twice(case: Case) -> tuple[nn.Module, Any]:
    model, batch = case.backbone()
    case.adapt(model, "idle", seed=2)
    case.adapt(model, "default", seed=1)
    return model, batch


def _ddp(case: Case, rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    wanted, _, halves = _reference(case)
    model, _ = _twice(case)
    wrapped = DistributedDataParallel(model)
    loss(call(wrapped, halves[rank])).backward()  # type: ignore[no-untyped-call]
    assert_gradients(gradients(model), wanted, "under DDP")


def _fsdp(case: Case, rank: int) -> None:
    case.bare(lambda model, batch: outputs(_shard(model, case), batch))
    wanted, found, halves = _reference(case)
    model, _ = _twice(case)
    other = outputs(ps.activate(model, "idle"), halves[rank])
    ps.activate(model, "default")
    plain = outputs(model, halves[rank])
    _shard(model, case)
    assert_close(outputs(model, halves[rank]), found[rank], "outputs under FSDP2")
    loss(call(model, halves[rank])).backward()  # type: ignore[no-untyped-call]
    whole: dict[str, Tensor] = {n: _whole(g) for n, g in gradients(model).items()}
    assert_gradients(whole, wanted, "under FSDP2", 2 * TOLERANCE)
    ps.activate(model, "idle")
    assert_close(outputs(model, halves[rank]), other, "outputs under FSDP2 after a switch")
    ps.activate(model, "default")
    with tempfile.TemporaryDirectory() as folder:
        single, _ = _twice(case)
        values = {k: _whole(v) for k, v in adapter(model).state_dict().items()}
        same = adapter(single).state_dict()
        assert values.keys() == same.keys() and all(torch.equal(values[k], v) for k, v in same.items()), (
            "gathered values"
        )
        ps.save(model, folder)
        fresh, _ = case.backbone()
        ps.load(fresh, folder)
        assert_equal(outputs(fresh, halves[rank]), plain, "saved under FSDP2, loaded in one process")


def _late(case: Case, rank: int) -> None:
    case.bare(lambda model, batch: _shard(model, case))
    with tempfile.TemporaryDirectory() as folder:
        ps.save(case.adapted()[0], folder)
        model, _ = case.backbone()
        _shard(model, case)
        for verb, argument in ((ps.adapt, case.method), (ps.load, folder)):
            try:
                verb(model, argument)
            except AdapterError as error:
                message = str(error)
            else:
                raise AssertionError(f"{verb.__name__}() on a sharded model was accepted")
            assert "adapters" not in model._modules and "shard" in message, message


def _shard(model: nn.Module, case: Case) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in case.anatomy().blocks:
        fully_shard(model.get_submodule(block.point.path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach()
