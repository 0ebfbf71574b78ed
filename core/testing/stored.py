"""Checks of adapter files."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import peft_suite as ps
from peft_suite.edits import Trained
from peft_suite.errors import BackboneError, BackboneMismatchError
from peft_suite.files import CARD, CONFIG, TENSORS
from peft_suite.method import make_method
from peft_suite.testing.case import (
    Case,
    adapter,
    assert_equal,
    assert_unchanged,
    outputs,
    seeded,
    snapshot,
    state,
)
from peft_suite.testing.registry import check


@check(essential=True)
def check_save_and_load(case: Case) -> None:
    """A reloaded adapter computes the same under another seed, without a warning, from exactly three files."""
    model, batch = case.adapted()
    wanted, own = outputs(model, batch), state(adapter(model))
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder, metadata={"note": ["kept"]})
        names = {f.name for f in Path(folder).iterdir()}
        assert names == {CONFIG, TENSORS, CARD}, f"other files: {sorted(names)}"
        assert ps.read_config(folder)["metadata"] == {"note": ["kept"]}
        card = (Path(folder) / CARD).read_text(encoding="utf-8")
        assert make_method(case.method).name in card, "the model card does not name the method"
        fresh, _ = case.backbone()
        with seeded(99), warnings.catch_warnings():
            warnings.simplefilter("error")
            ps.load(fresh, folder)
    assert_equal(outputs(fresh, batch), wanted, "the reloaded adapter computes something else")
    found = state(adapter(fresh))
    assert found.keys() == own.keys(), f"other keys: {sorted(found.keys() ^ own.keys())[:4]}"
    again, first = adapter(fresh).stored(), adapter(model).stored()
    assert again.keys() == first.keys(), f"saved again: other keys: {sorted(again.keys() ^ first.keys())[:4]}"
    assert all(torch.equal(again[k], v) for k, v in first.items()), "saved again: other values"
    assert set(fresh.state_dict()) == set(model.state_dict())


@check()
def check_head_travels(case: Case) -> None:
    """The head is in the file: with another head on the same frozen weights the reloaded outputs are the same.

    A final norm counts as part of it but for what the method leaves frozen (bitfit its scale).
    """
    model, batch = case.adapted()
    wanted = outputs(model, batch)
    norm, edits = case.anatomy().norm, adapter(model).edits
    trained = {f"{e.path}.{name}" for e in edits if isinstance(e.part, Trained) for name in e.part._parameters}
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        fresh, _ = case.backbone()
        with torch.no_grad():
            for name in case.anatomy().fresh:
                if norm is None or not name.startswith(f"{norm.path}.") or name in trained:
                    fresh.get_parameter(name).add_(1.0)
        ps.load(fresh, folder)
    assert_equal(outputs(fresh, batch), wanted, "the head of the file is not the head in use")


@check()
def check_adapter_names(case: Case) -> None:
    """Names that are parts of module paths, or of one another, keep the adapters apart."""
    model, batch = case.backbone()
    inside = next((n for n, _ in model.named_children() if not hasattr(ps.Adapters, n) and n.isidentifier()), "w")
    names = (inside, "a", "ab")
    wanted, keys = {}, set()
    for i, name in enumerate(names):
        case.adapt(model, name, seed=20 + i)
        wanted[name] = outputs(model, batch)
        keys = set(adapter(model, name).stored())
    for name in names:
        ps.activate(model, name)
        assert_equal(outputs(model, batch), wanted[name], f"adapter {name!r} among {names}")
        with tempfile.TemporaryDirectory() as folder:
            ps.save(model, folder, name)
            with safe_open(Path(folder) / TENSORS, framework="pt") as opened:
                assert set(opened.keys()) == keys, f"the file of {name!r} has other keys"
            fresh, _ = case.backbone()
            ps.load(fresh, folder)
            assert list(fresh.adapters) == [name]  # type: ignore[arg-type]
            ps.load(fresh, folder, "second")
        assert_equal(outputs(fresh, batch), wanted[name], f"reloaded {name!r} under another name")


@check()
def check_lean_load(case: Case) -> None:
    """Loading draws no random numbers, leaves nothing on the meta device and puts tensors beside the backbone's."""
    model, _ = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        fresh, _ = case.backbone()
        before = torch.get_rng_state()
        ps.load(fresh, folder)
        assert torch.equal(before, torch.get_rng_state()), (
            "load() drew random numbers: it initialised what it then overwrote"
        )
    device = next(p for n, p in fresh.named_parameters() if not n.startswith("adapters.")).device
    entries = [*adapter(fresh).named_parameters(), *adapter(fresh).named_buffers()]
    wrong = [n for n, t in entries if t.device != device]
    assert not wrong, f"not on {device}: {wrong[:4]}"
    inner = [
        type(m).__name__
        for m in adapter(fresh).modules()
        for v in vars(m).values()
        if isinstance(v, torch.Tensor) and v.is_meta
    ]
    assert not inner, (
        f"plain tensor attributes stayed on the meta device in {sorted(set(inner))}: register them as buffers"
    )


@check()
def check_newer_file(case: Case) -> None:
    """A field that a later version added is reported and ignored."""
    model, batch = case.adapted()
    wanted = outputs(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        _rewrite(Path(folder), lambda header: header["method_config"].update(from_the_future=1))
        fresh, _ = case.backbone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ps.load(fresh, folder)
    assert any("from_the_future" in str(w.message) for w in caught), "no warning names the unknown field"
    assert_equal(outputs(fresh, batch), wanted, "loaded from a newer file")


@check()
def check_wrong_backbone(case: Case) -> None:
    """Other weights, other shapes and other families are typed errors that name both sides and change nothing."""
    model, _ = case.adapted()
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        other, _ = case.backbone(seed=1)
        _refuses(other, folder, "other frozen weights", model)
        other, _ = case.backbone()
        _reshape(other, case)
        _refuses(other, folder, "other shapes", model)
        from peft_suite.testing.runner import examples

        for family, example in examples():
            if example != case.example:
                other, _ = Case(case.method, family, example).backbone()
                _refuses(other, folder, f"the backbone {family} ({example})", model)
        stranger = _Stranger()
        before = snapshot(stranger)
        try:
            ps.load(stranger, folder)
        except BackboneError:
            assert_unchanged(stranger, before, "load() on an unknown model")
        else:
            raise AssertionError("a model that no anatomy describes was accepted")


class _Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def _refuses(model: nn.Module, folder: str, what: str, origin: nn.Module) -> None:
    before = snapshot(model)
    try:
        ps.load(model, folder)
    except BackboneMismatchError as error:
        message = str(error)
    else:
        raise AssertionError(f"an adapter was accepted by {what}")
    assert type(model).__qualname__ in message and type(origin).__qualname__ in message, f"{what}: {message}"
    assert_unchanged(model, before, f"load() refused {what}")


def _reshape(model: nn.Module, case: Case) -> None:
    """One more entry in the last frozen vector of the model."""
    fresh = set(case.anatomy().fresh)
    name = [n for n, p in model.named_parameters() if n not in fresh and p.ndim == 1][-1]
    path, _, last = name.rpartition(".")
    module, old = model.get_submodule(path), model.get_parameter(name)
    module.register_parameter(last, nn.Parameter(torch.cat((old.detach(), old.detach()[:1]))))


def _rewrite(folder: Path, change: Any) -> None:
    with safe_open(folder / TENSORS, framework="pt") as opened:
        header = json.loads(opened.metadata()["peft_suite"])
        values = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    change(header)
    save_file(values, folder / TENSORS, metadata={"peft_suite": json.dumps(header)})
