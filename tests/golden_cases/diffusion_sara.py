"""SaRA against both published optimizers: the dense one and the published one, as it is and without its abs()."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Tensors, group
from peft_suite.diffusion.methods.sara import FEWEST, SaRA
from peft_suite.diffusion.methods.sparse_values import Entries, entries_of

METHODS: dict[str, Config] = {
    "dense": {},
    "dense_rank": {},
    "ub_noabs": {"reset_state": True, "skip_step": True},
    "ub": {"official": True},
}
TOLERANCE = {"dense_rank": 1e-5}
LARGEST_LEFT_OUT = 64  # matrices with min(shape) above it have a nuclear norm


class Net(nn.Module):
    """The golden's network; keys are those of the reference behind ``net.``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        flat = config["cout"] * config["hw"] ** 2
        self.net = nn.Sequential(
            nn.Conv2d(config["cin"], config["cout"], 3, padding=1),
            nn.Flatten(),
            nn.Linear(flat, config["hid"]),
            nn.GELU(),
            nn.Linear(config["hid"], config["hid2"]),
            nn.LayerNorm(config["hid2"]),
            nn.Linear(config["hid2"], config["out"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x: [B, cin, hw, hw]``."""
        out: Tensor = self.net(x)
        return out


def network(config: Config, tensors: Tensors) -> Net:
    model = Net(config)
    model.net.load_state_dict(group(tensors, "init."))
    return model


def adapted(config: Config, tensors: Tensors, mode: str) -> tuple[Net, ps.Adapter]:
    model = network(config, tensors)
    rank = config["lambda_rank"] if mode in ("dense_rank", "ub") else 0.0
    method = {
        "name": "sara",
        "threshold": config["threshold"],
        "rank_weight": rank,
        "rank_min": LARGEST_LEFT_OUT,
        "progressive": config["progressive_iter"] if 0 < config["progressive_iter"] < config["steps"] else None,
        "weight_decay": config["weight_decay"],
        **METHODS[mode],
    }
    ps.adapt(model, method, anatomy=ps.Anatomy(family="golden", dim=config["hid"], blocks=()))
    adapter = model.adapters["default"]  # type: ignore[operator, index, union-attr]
    assert isinstance(adapter, ps.Adapter)
    return model, adapter


def masks(model: Net, adapter: ps.Adapter, *, training: bool) -> Tensors:
    """Name in the reference -> 1 where an entry is chosen (and still trains)."""
    found = {n: torch.zeros(p.shape, dtype=torch.uint8) for n, p in network_parameters(model).items()}
    for e in entries_of(adapter):
        settled = e.part.settled(e.tensor)
        keep = torch.ones(e.values.shape, dtype=torch.bool) if settled is None or not training else ~settled
        found[e.name.removeprefix("net.")].view(-1)[e.part.positions(e.tensor).long()] = keep.to(torch.uint8)
    return found


def network_parameters(model: Net) -> Tensors:
    return dict(model.net.named_parameters())


def weights(model: Net) -> Tensors:
    """What the adapted network computes with, by the names of the reference."""
    merged = ps.merge(copy.deepcopy(model))
    return {n: p.detach() for n, p in merged.net.named_parameters()}  # type: ignore[union-attr]


def replay(method: SaRA, drawn: list[str], mode: str) -> None:
    """Draw the matrices that the reference drew, step by step, instead of our own."""

    def draw(step: int, matrices: list[Entries]) -> Entries | None:
        named = {e.name.removeprefix("net."): e for e in matrices}
        return named.get(drawn[step]) if step < len(drawn) else None

    if mode == "dense_rank":
        method.draw = draw  # type: ignore[method-assign]


def sara(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    unknown = sorted(set(spec["losses"]) - set(METHODS))
    if unknown:
        raise NotCoveredError(f"an optimizer {unknown[0]!r}")
    for threshold, rate in spec["auto_lr"].items():
        assert abs(SaRA.learning_rate(float(threshold)) - rate) <= 1e-12
    selection(config, tensors)
    for mode in spec["losses"]:
        run(config, tensors, mode)


def selection(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    model, adapter = adapted(config, tensors, "dense")
    for name, mask in masks(model, adapter, training=False).items():
        assert torch.equal(mask, tensors[f"mask0.{name}"]), f"other entries of {name} are chosen"
    method: Any = adapter.method
    eligible = [e for e in entries_of(adapter) if method.eligible(e)]
    assert {e.name.removeprefix("net.") for e in eligible} <= set(spec["rank_eligible"])
    for e in eligible:
        name = e.name.removeprefix("net.")
        if e.values.numel() >= FEWEST and f"nuclear_grad.{name}" in tensors:
            wanted = tensors[f"nuclear_grad.{name}"].flatten()[e.part.positions().long()]
            torch.testing.assert_close(method.rank_gradient(e.part), wanted, atol=1e-5, rtol=0)


def run(config: Config, tensors: Tensors, mode: str) -> None:
    spec, tolerance = config["spec"], TOLERANCE.get(mode, 1e-6)
    model, adapter = adapted(config, tensors, mode)
    replay(adapter.method, spec["rank_choice"][mode], mode)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"], weight_decay=0.0
    )
    events = ps.events(model)
    for step in range(config["steps"]):
        loss = F.mse_loss(model(tensors["x"][step]), tensors["y"][step])
        close(loss, torch.tensor(spec["losses"][mode][step]), 10 * tolerance, f"{mode}: loss before step {step}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        events.before_step(step, optimizer)
        optimizer.step()
        events.after_step(step, optimizer)
        if step == 0:
            compare(weights(model), group(tensors, f"{mode}.step1."), tolerance, f"{mode} after one step")
    first, second = spec["mask_count"][mode]
    found = masks(model, adapter, training=False)
    assert sum(int(m.sum()) for m in found.values()) == first
    if adapter.method.config.progressive is not None:  # type: ignore[attr-defined]
        left = masks(model, adapter, training=True)
        assert sum(int(m.sum()) for m in left.values()) == second
        for name, mask in group(tensors, f"{mode}.mask1.").items():
            assert torch.equal(left[name], mask), f"{mode}: other entries of {name} train on"
    compare(weights(model), group(tensors, f"{mode}.final."), tolerance, f"{mode} at the end")
    if mode == "dense_rank":
        for e in entries_of(adapter):
            close(e.part.learned(e.tensor), tensors[f"saved.{e.name.removeprefix('net.')}"], tolerance, e.name)


def compare(found: Tensors, wanted: Tensors, tolerance: float, what: str) -> None:
    for name, value in wanted.items():
        close(found[name], value, tolerance, f"{what}: {name}")


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    error = float((found.detach() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= tolerance, f"{what}: {error:.2e}"


CHECKS = {"sara-optimizer": sara}
