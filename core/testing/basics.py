"""Checks of one adapter by itself: starting point, training, counting, configuration, text."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import peft_suite as ps
from peft_suite.edits import BatchStatistics
from peft_suite.files import TENSORS
from peft_suite.method import make_method
from peft_suite.testing.case import (
    Case,
    LeftOut,
    adapter,
    assert_close,
    assert_differs,
    assert_equal,
    assert_unchanged,
    call,
    loss,
    outputs,
    seeded,
    snapshot,
    state,
    train,
)
from peft_suite.testing.registry import check

NO_BACKWARD = {"forward_only": "it is trained without backward"}


@check(needs={"identity_at_init": "its fresh adapter changes the output by design"})
def check_identity_at_init(case: Case) -> None:
    """A fresh adapter leaves the output as it is."""
    model, batch = case.backbone()
    base = outputs(model, batch)
    case.adapt(model, fresh=True)
    assert_close(outputs(model, batch), base, "a fresh adapter changes the output")


@check()
def check_random_values_act(case: Case) -> None:
    """With random values in it, the adapter changes the output, and the output is finite."""
    model, batch = case.backbone()
    base = outputs(model, batch)
    case.adapt(model)
    found = outputs(model, batch)
    assert all(bool(t.isfinite().all()) for t in found), "the output is not finite"
    assert_differs(found, base, "an adapter with random values does nothing")


@check(unless=NO_BACKWARD, place=True)
def check_only_the_adapter_moves(case: Case) -> None:
    """Training with weight decay moves every tensor of the adapter and no bit of the backbone."""
    model, batch = case.backbone()
    base = state(model)
    case.adapt(model, fresh=True)
    keys, start = set(model.state_dict()), {n: p.detach().clone() for n, p in adapter(model).named_parameters()}
    assert {k for k in keys if not k.startswith("adapters.")} == set(base), "adapt changed the keys of the backbone"
    model.train()
    with seeded(5):
        seen = train(model, batch)
    after = state(model)
    assert set(after) == keys, "training changed the keys"
    moved = [k for k, v in base.items() if not torch.equal(v, after[k])]
    assert not moved, f"training moved frozen tensors: {moved[:4]}"
    names = dict(adapter(model).named_parameters())
    dead = [n for n in names if f"adapters.default.{n}" not in seen]
    assert not dead, f"never a gradient other than zero: {dead[:4]}"
    still = [n for n, p in names.items() if torch.equal(p, start[n])]
    assert not still, f"training did not move {still[:4]}"


@check(unless=NO_BACKWARD)
def check_training_helps(case: Case) -> None:
    """A few steps lower the loss."""
    model, batch = case.adapted(fresh=True)
    with torch.no_grad():
        before = float(loss(call(model, batch)))
    train(model, batch, steps=6)
    with torch.no_grad():
        after = float(loss(call(model, batch)))
    assert after < before, f"six steps took the loss from {before:.6f} to {after:.6f}"


@check(unless=NO_BACKWARD, place=True)
def check_verify(case: Case) -> None:
    """``verify`` finds that every edit fires and every trainable parameter gets a gradient, and changes nothing."""
    model, batch = case.adapted()
    before = snapshot(model)
    found = ps.verify(model, batch)
    assert found["parameters"] == sum(p.requires_grad for p in model.parameters())
    assert_unchanged(model, before, "verify() changed the model")


@check()
def check_counts(case: Case) -> None:
    """Plan, summary, counted parameters and file agree, and planning changes nothing."""
    model, _ = case.backbone()
    before = snapshot(model)
    ps.plan(model, case.method)
    assert_unchanged(model, before, "plan() changed the model")
    case.adapt(model, fresh=True)
    planned = ps.plan(model, adapter(model).method.config)  # with what calibration has added
    summary = ps.summary(model)
    counted = sum(p.numel() for p in adapter(model).parameters())
    assert planned.trainable == summary.trainable == counted, (planned.trainable, summary.trainable, counted)
    assert planned.total == summary.total, (planned.total, summary.total)
    size = sum(t.numel() * t.element_size() for t in adapter(model).stored().values())
    assert planned.adapter_bytes == summary.adapter_bytes == size, (planned.adapter_bytes, summary.adapter_bytes, size)
    assert planned.mergeable == case.capabilities.mergeable
    if planned.mergeable:
        assert all(row.mergeable for row in planned.rows), "declared mergeable, and yet an edit does not fold"
    assert planned.to_dict()["trainable"] == planned.trainable and str(counted) in str(planned).replace(",", "")
    assert summary.to_dict()["trainable"] == counted and str(counted) in str(summary).replace(",", "")
    with tempfile.TemporaryDirectory() as folder:
        ps.save(model, folder)
        header = max(16384, 4096 + sum(len(name) + 112 for name in adapter(model).stored()))
        assert (Path(folder) / TENSORS).stat().st_size <= size + header, (
            "the file is larger than its tensors and a header"
        )


@check()
def check_configuration(case: Case) -> None:
    """The configuration survives JSON, a dictionary and its own text."""
    method = make_method(case.method)
    config = method.config
    assert type(config).from_json(config.to_json()) == config, "JSON round trip"
    assert make_method({"name": method.name, **config.to_dict()}).config == config, "dictionary round trip"
    assert make_method(str(config)).config == config, f"the text {config} reads as something else"
    assert hash(config) == hash(type(config).from_json(config.to_json())), "equal configurations must hash alike"


@check()
def check_repr(case: Case) -> None:
    """``repr`` names the method before its parts, and the rest of the model prints as before."""
    model, _ = case.backbone()
    before = repr(model)
    case.adapt(model, fresh=True)
    name = make_method(case.method).name
    text = repr(adapter(model))
    assert name in text.splitlines()[1 if len(text.splitlines()) > 1 else 0], (
        f"{name!r} is not in the first lines of {text[:200]}"
    )
    assert before.rpartition("\n")[0] in repr(model), "adapting changed how the backbone prints"


@check(unless=NO_BACKWARD)
def check_determinism(case: Case) -> None:
    """Two runs with one seed write the same bytes."""
    files = []
    for _ in range(2):
        model, batch = case.backbone()
        with tempfile.TemporaryDirectory() as folder:
            with seeded(3):
                case.adapt(model, fresh=True)
                model.train()
                train(model, batch, steps=3)
            ps.save(model, folder)
            files.append((Path(folder) / TENSORS).read_bytes())
    assert files[0] == files[1], "two runs with one seed wrote different files"


@check()
def check_decay_names(case: Case) -> None:
    """``no_decay`` names parameters of the adapter, all vectors among them."""
    model, _ = case.adapted(fresh=True)
    names = dict(adapter(model).named_parameters())
    spared = adapter(model).no_decay()
    assert spared <= set(names), f"no such parameters: {sorted(spared - set(names))[:4]}"
    vectors = {n for n, p in names.items() if p.ndim < 2}
    assert vectors <= spared, f"decayed vectors: {sorted(vectors - spared)[:4]}"


@check(unless=NO_BACKWARD)
def check_batch_statistics(case: Case) -> None:
    """Frozen batch-norm statistics stay while training; with ``batchnorm="train"`` they move and are saved."""
    model, batch = case.backbone()
    new = set(case.anatomy().fresh)
    norms = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        raise LeftOut("the backbone has no batch norm")
    # backbone_eval=True: the statistics do not move even when they may; those of fresh layers always move
    never = case.capabilities.backbone_eval or all(f"{name}.weight" in new for name in norms)
    for mode in ("frozen",) if never else ("frozen", "train"):
        model, batch = case.backbone()
        base = state(model)
        with seeded(1):
            ps.adapt(model, case.method, batchnorm=mode)  # type: ignore[arg-type]
            model.train()
            train(model, batch)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items()), "frozen tensors or statistics moved"
        model.eval()
        found = outputs(model, batch)
        parts = [(k, p) for k, p in adapter(model).parts() if isinstance(p, BatchStatistics)]
        own = [f"{k}.running_mean" for k, p in parts if not p.fresh]
        assert bool(own) == (mode == "train"), f"batchnorm={mode!r} and statistics in the adapter: {own[:2]}"
        with tempfile.TemporaryDirectory() as folder:
            ps.save(model, folder)
            fresh, _ = case.backbone()
            ps.load(fresh, folder)
        assert_equal(outputs(fresh, batch), found, f"reloaded with batchnorm={mode!r}")
        if mode == "train":
            moved = adapter(model).state_dict()[own[0]]
            assert not any(moved.shape == b.shape and torch.equal(moved, b) for b in base.values()), (
                "statistics did not move"
            )
