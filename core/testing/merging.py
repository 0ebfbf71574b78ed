"""Checks of ``merge``: final, in place, exact, refused before anything is changed."""

from __future__ import annotations

import copy
import warnings

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

import peft_suite as ps
from peft_suite.edits import BatchStatistics
from peft_suite.errors import MergeError
from peft_suite.testing.case import (
    Case,
    LeftOut,
    adapter,
    assert_close,
    assert_differs,
    assert_equal,
    assert_unchanged,
    outputs,
    randomise,
    snapshot,
)
from peft_suite.testing.registry import check

FOLDS = {"mergeable": "it does not fold into weights"}


@check(needs=FOLDS, essential=True)
def check_merge(case: Case) -> None:
    """The merged model is a plain model that computes what the adapted one computed."""
    model, batch = case.backbone()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    base, keys = outputs(model, batch), set(model.state_dict())
    plain = snapshot(model)
    case.adapt(model)
    wanted = outputs(model, batch)
    assert ps.merge(model) is model, "merge() works in place and returns the same model"
    found = outputs(model, batch)
    assert_close(found, wanted, "merged and adapted differ")
    assert_differs(found, base, "merged and base agree")
    created = set(model.state_dict()) - keys
    assert keys <= set(model.state_dict()) and all(k.endswith("bias") for k in created), (
        f"other keys: {sorted(created)[:4]}"
    )
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags, (
        "requires_grad flags changed"
    )
    after = snapshot(model)
    for aspect in ("module object", "class", "instance attributes", "hooks"):
        assert after[aspect] == plain[aspect], f"merge() left something behind: {aspect}"


@check(needs=FOLDS)
def check_merged_weights_travel(case: Case) -> None:
    """The merged state dict is stored by safetensors and loads into a plain backbone."""
    case.bare(lambda model, batch: to_bytes(model.state_dict()), "safetensors")
    model, batch = case.backbone()
    keys = set(model.state_dict())
    ps.merge(case.adapt(model))
    wanted = outputs(model, batch)
    stored = from_bytes(to_bytes(model.state_dict()))
    fresh = case.backbone()[0] if set(stored) == keys else copy.deepcopy(model)
    randomise(fresh)
    fresh.load_state_dict(stored)
    assert_equal(outputs(fresh, batch), wanted, "the stored merged weights compute something else")


@check(needs=FOLDS)
def check_merge_refuses_nan(case: Case) -> None:
    """A value that is not finite stops ``merge`` before anything is changed."""
    for bad in (float("nan"), float("inf")):
        for place in (0, -1):
            model, _ = case.adapted()
            with torch.no_grad():
                list(adapter(model).parameters())[place].view(-1)[0] = bad
            before = snapshot(model)
            _refused(model, f"a merge with {bad} in it")
            _same(model, before, "merge() refused")


@check(needs=FOLDS)
def check_merge_twice(case: Case) -> None:
    """A second merge warns and changes nothing."""
    model, _ = case.adapted()
    ps.merge(model)
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ps.merge(model)
    assert caught, "the second merge() did not warn"
    assert_unchanged(model, before, "a second merge()")


@check(needs=FOLDS)
def check_merge_half(case: Case) -> None:
    """Merging into float16 and bfloat16 weights keeps their dtype and is right to their precision."""
    for dtype in (torch.bfloat16, torch.float16):
        case.bare(lambda model, batch, dtype=dtype: outputs(model.to(dtype), _to(batch, dtype)), f"half {dtype}")  # type: ignore[misc]
        model, batch = case.backbone()
        model.to(dtype)
        kinds = {k: v.dtype for k, v in model.state_dict().items()}
        case.adapt(model)
        half = _to(batch, dtype)
        wanted = outputs(model, half)
        ps.merge(model)
        # one rounding per merged weight and one per intermediate result on either side: some 16 units in the last place
        assert_close(outputs(model, half), wanted, f"merged into {dtype}", 16 * torch.finfo(dtype).eps)
        changed = [k for k, v in model.state_dict().items() if v.dtype != kinds.get(k, dtype)]
        assert not changed, f"other dtypes after merging into {dtype}: {changed[:4]}"


@check()
def check_merge_of_two(case: Case) -> None:
    """Two active adapters merge into what both computed together; merging one after the other gives the same."""
    if case.capabilities.changes_sequence:
        raise LeftOut("changes_sequence=True: two of its adapters cannot be active at once")
    if not case.capabilities.mergeable:
        raise LeftOut("mergeable=False: it does not fold into weights")
    model, batch = case.backbone()
    case.adapt(model, "first", seed=1)
    single = outputs(model, batch)
    case.adapt(model, "second", seed=2)
    before = snapshot(model)
    _refused(model, "a merge that leaves an inactive adapter behind")
    assert_unchanged(model, before, "merge() refused")
    ps.activate(model, "first", "second")
    wanted, second = outputs(model, batch), adapter(model, "second")
    chosen = case.capabilities.needs_calibration or case.capabilities.trains_base_entries
    both = copy.deepcopy(model) if chosen else None
    ps.merge(model)
    assert_close(outputs(model, batch), wanted, "two merged adapters")
    assert_differs(outputs(model, batch), single, "merging two and one of them")
    model, _ = case.backbone()
    ps.merge(case.adapt(model, "first", seed=1))
    assert_close(outputs(model, batch), single, "the first merged alone")
    case.adapt(model, "second", seed=2)
    if both is None:
        adapter(model, "second").load_state_dict(second.state_dict())
    else:
        case.copy_adapter(both, "second", model)
    ps.merge(model)
    assert_close(outputs(model, batch), wanted, "one merge after the other")


@check()
def check_partial_merge(case: Case) -> None:
    """What does not fold is refused by name, nothing is changed; ``partial=True`` folds the rest, outputs stay."""
    if case.capabilities.mergeable:
        raise LeftOut("mergeable=True: everything folds")
    model, batch = case.adapted()
    before, wanted = snapshot(model), outputs(model, batch)
    message = _refused(model, "a merge of what does not fold")
    assert any(key in message for key, part in adapter(model).parts() if not part.foldable), message
    assert_unchanged(model, before, "merge() refused")
    ps.merge(model, partial=True)
    assert_close(outputs(model, batch), wanted, "partially merged")
    assert "default" in model.adapters, "what does not fold must stay attached"  # type: ignore[operator]
    left = [k for k, part in adapter(model).parts() if part.foldable and not isinstance(part, BatchStatistics)]
    folding = [r.point for r in ps.plan(case.backbone()[0], case.method).rows if r.mergeable]
    assert len(left) < max(1, len(folding)), f"nothing was folded of {folding[:4]}"


def _refused(model: torch.nn.Module, what: str) -> str:
    try:
        ps.merge(model)
    except MergeError as error:
        return str(error)
    raise AssertionError(f"{what} was not refused")


def _same(model: torch.nn.Module, before: dict[str, dict[str, object]], what: str) -> None:
    after = snapshot(model)
    for key, old in before["value"].items():
        new = after["value"][key]
        assert isinstance(old, torch.Tensor)
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0)), f"{what}: {key} changed"
    rest = {k: v for k, v in before.items() if k != "value"}
    assert all(after[k] == v for k, v in rest.items()), (
        f"{what}: {[k for k, v in rest.items() if after[k] != v]} changed"
    )


def _to(batch: object, dtype: torch.dtype) -> object:
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
