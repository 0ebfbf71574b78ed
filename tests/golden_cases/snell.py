"""SNELL and SNELLA: outputs, gradients, kernel and masked matrices, the allocator's history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from golden_cases import Case, Config, NotCoveredError, Place, Tensors, blocks, group, head, vit

SLOTS = {"q": ("attn.qkv", 0), "k": ("attn.qkv", 1), "v": ("attn.qkv", 2), "proj": ("attn.proj", 0)}
SLOTS |= {"fc1": ("mlp.fc1", 0), "fc2": ("mlp.fc2", 0)}


def snell(config: Config, tensors: Tensors) -> Case:
    if config["norm_p"] != 2 or config["scale"] != 0.1:
        raise NotCoveredError(f"the {config['norm_p']}-norm with scale {config['scale']}; ours is the 2-norm with 0.1")
    kinds = {"klora": "snell", "snell": "snell", "snella": "snella"}
    if config["tuning_model"] not in kinds:
        raise NotCoveredError(f"the tuning model {config['tuning_model']!r}")
    name = kinds[config["tuning_model"]]
    method: dict[str, Any] = {
        "name": name,
        "rank": config["low_rank_dim"],
        "heads": config["num_Hs"],
        "sparsity": 0.0 if config["tuning_model"] == "klora" else float(config["init_thres"]),
        "mode": "official",
    }
    allocator = config["spec"].get("allocator")
    if allocator:
        method |= {
            "target": allocator["target_ratio"],
            "rounds": allocator["total_step"],
            "warmup": allocator["init_warmup"],
            "settle": allocator["final_warmup"],
            "every": allocator["mask_interval"],
            "beta1": allocator["beta1"],
            "beta2": allocator["beta2"],
        }
    places = {**head(), "cls_token": [Place("direct.cls_token")]}
    matrices: dict[str, tuple[str, int]] = {}
    for i in blocks(config):
        for slot, (module, at) in SLOTS.items():
            reference = f"blocks.{i}.{'mlp' if slot.startswith('fc') else 'attn'}.additional_{slot}.learnable"
            key = f"blocks.{i}.{module}.{name}"
            matrices[reference] = key, at
            rows = slice(at * config["embed_dim"], (at + 1) * config["embed_dim"]) if slot in "qkv" else slice(None)
            places[f"{reference}.In_Qs"] = [Place(f"{key}.inner", at)]
            places[f"{reference}.Out_Qs"] = [Place(f"{key}.outer", (slice(None), rows))]
            if name == "snella":
                for k, tail in enumerate(("alpha", "gamma", "beta")):
                    places[f"{reference}.{tail}"] = [Place(f"{key}.tail", slice(3 * at + k, 3 * at + k + 1))]
    state = fused(config, group(tensors, "state."))
    return Case(vit(config, state), method, places, mergeable=True, more=_compare(config, tensors, matrices))


def fused(config: Config, state: Tensors) -> Tensors:
    """q, k and v are separate in the reference."""
    for i in blocks(config):
        for n in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attn.{r}.{n}") for r in "qkv" if f"blocks.{i}.attn.{r}.{n}" in state]
            if parts:
                state[f"blocks.{i}.attn.qkv.{n}"] = torch.cat(parts)
    return state


def _compare(config: Config, tensors: Tensors, matrices: dict[str, tuple[str, int]]) -> Callable[[nn.Module], None]:
    def compare(model: nn.Module) -> None:
        adapter = model.adapters["default"]
        parts = dict(adapter.parts())
        for reference, (key, at) in matrices.items():
            if (wanted := tensors.get(f"delta.{reference}")) is not None:
                found = parts[key].deltas()[at].detach().t()
                assert torch.equal(found == 0, wanted == 0), f"other entries of {reference} are zero"
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
        if config["spec"].get("allocator"):
            _allocate(config["spec"]["allocator"], model, tensors, matrices)

    return compare


def _allocate(spec: Config, model: nn.Module, tensors: Tensors, matrices: dict[str, tuple[str, int]]) -> None:
    adapter = model.adapters["default"]
    parts, method = dict(adapter.parts()), adapter.method
    before = {key: parts[key].sparsity.clone() for key, _ in matrices.values()}
    last = spec["history"][-1]["epoch"]
    for known in spec["history"]:
        epoch = known["epoch"]
        volume = method.allocate(adapter, epoch)
        if known["ratios"] is not None:
            assert volume == known["volume"], f"epoch {epoch}: volume {volume}, wanted {known['volume']}"
            for reference, wanted in known["ratios"].items():
                key, at = matrices[reference]
                torch.testing.assert_close(float(parts[key].sparsity[at]), wanted, atol=1e-7, rtol=1e-6)
        for it in range(sum(k.startswith(f"alloc.x.{epoch}.") for k in tensors) if epoch < last else 0):
            x = tensors[f"alloc.x.{epoch}.{it}"]
            logits = model(x)
            model.zero_grad()
            nn.functional.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]).backward()
            for part in parts.values():
                if hasattr(part, "observe"):
                    part.observe(spec["beta1"], spec["beta2"])
    for reference, (key, at) in matrices.items():
        for side, ours in (("In_Qs", "inner"), ("Out_Qs", "outer")):
            rows = [stop - start for start, stop in parts[key].slices]
            for kind, name in (("ipt", "importance"), ("unc", "deviation")):
                if (wanted := tensors.get(f"alloc.exp_avg_{kind}.{reference}.{side}")) is not None:
                    found = parts[key].get_buffer(f"{name}_{ours}")
                    found = found[at] if ours == "inner" else found.split(rows, dim=1)[at]
                    assert float((found - wanted).norm() / wanted.norm()) < 1e-4, f"{kind} of {reference}.{side}"
    for key, value in before.items():
        parts[key].sparsity.copy_(value)


CASES = {"vision-snell": snell, "vision-snell-dense": snell, "vision-snella": snell}
