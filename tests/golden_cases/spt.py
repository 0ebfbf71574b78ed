"""SPT-LoRA and SPT-Adapter: sensitivities, allocations of every budget, and the tuned model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peft_suite as ps
from golden_cases import Config, NotCoveredError, Tensors, blocks, group, vit
from golden_cases.snell import fused
from peft_suite.lifecycle import rebuild
from peft_suite.method import make_method
from peft_suite.vision.methods.allocation import Allocation, Site
from peft_suite.vision.methods.spt import SPTPlan

ROLES = {"q": "q", "k": "k", "v": "v", "proj": "o", "fc1": "fc1", "fc2": "fc2"}


def spt(config: Config, tensors: Tensors) -> None:
    spec = config["spec"]
    wanted_block = {"lora": "BlockSPTParallel", "adapter": "BlockSPTSeq"}[config["structured_type"]]
    if config["block"] != wanted_block:
        raise NotCoveredError(f"{config['structured_type']} in a {config['block']}")
    if config["drop_path"]:
        raise NotCoveredError("sensitivities under drop path, whose random draws are not in the golden")
    model = ps.adapt(vit(config, fused(config, group(tensors, "state."))), method(config, config["budgets_M"][0]))
    sensitivities(config, tensors, model.train())
    adapter = model.adapters["default"]
    # Biases of k have no gradient but rounding: who of them is chosen only the reference's own scores can say.
    scores = reference_scores(config, tensors)
    for budget in config["budgets_M"]:
        built = make_method(method(config, budget))
        built.certain = adapter.method.certain
        made = built.allocation(adapter.method.found, scores)
        expected = spec["allocation"][str(budget)]
        allocation(config, expected, tensors[f"alloc.{budget}.unstructured_indexes"], adapter.method.found, made)
        if str(budget) == spec["stage2_budget"]:
            rebuild(model, "default", built.planned(adapter.method.found, made))
            tuned(config, tensors, model.eval())
            model = ps.adapt(vit(config, fused(config, group(tensors, "state."))), method(config, budget))
            adapter = model.adapters["default"]


def reference_scores(config: Config, tensors: Tensors) -> Tensors:
    return fused(config, group(tensors, "sens."))


def method(config: Config, budget: float) -> Config:
    return {
        "name": f"spt-{config['structured_type']}",
        "budget": f"{budget}M",
        "rank": config["low_rank_dim"],
        "alpha": config["alpha"],
        "beta": config["beta"],
        "structured_vector": config["structured_vector"],
        "structured_only": config["structured_only"],
        "batches": config["num_batches"],
        "official": True,
        "sweep_step": round(config["sweep_step_M"] * 1e6),
        "sweep_count": config["sweep_count"],
    }


def ours(reference: str) -> str:
    """Name of a reference parameter among our sites."""
    for role in "qkv":
        for n in ("weight", "bias"):
            if reference.endswith(f".attn.{role}.{n}"):
                return f"{reference.removesuffix(f'{role}.{n}')}qkv.{n}[{role}]"
    return reference


def sensitivities(config: Config, tensors: Tensors, model: nn.Module) -> Tensors:
    adapter = model.adapters["default"]
    stream = [(tensors[f"input.x.{i}"], tensors[f"input.y.{i}"]) for i in range(config["num_batches"])]
    scores: Tensors = adapter.method.measure(
        adapter, stream, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    )
    sites = {site.name: site for site in adapter.method.found}
    known = {ours(k): v for k, v in group(tensors, "sens.").items()}
    for name, site in sites.items():
        found = scores[f"{site.path}.{site.tensor}"].view(-1)[site.start : site.stop]
        close(found, known[name].flatten(), 2e-4, f"sensitivity of {name}", 1e-10)
    left_out = ("head", "cls_token", "patch_embed", "pos_embed")
    assert {n for n in known if not any(part in n for part in left_out)} == set(sites), "other parameters are ranked"
    return scores


def allocation(config: Config, wanted: Config, indexes: Tensor, sites: list[Site], made: Allocation) -> None:
    matrices = {
        ours(f"blocks.{i}.{'mlp' if slot.startswith('fc') else 'attn'}.{slot}.weight")
        for i in blocks(config)
        for slot, on in zip(ROLES, wanted["tuned_matrices"][i], strict=True)
        if on
    }
    assert set(made.matrices) == matrices
    assert list(made.vectors) == [ours(n) for n in wanted["tuned_vectors"]]
    assert made.structured == wanted["structured_params"]
    assert made.unstructured == wanted["unstructured_params"]
    assert abs(made.total / 1e6 - wanted["params_M"]) < 1e-9 * max(1.0, made.total)
    single = [site for site in sites if site.name not in {*made.matrices, *made.vectors}]
    assert [site.name for site in single] == [ours(n) for n in wanted["unstructured_order"]]
    start, flat = 0, [indexes.new_zeros(0)]
    for site in single:
        flat.append(made.entries.get(site.name, indexes.new_zeros(0)) + start)
        start += site.size
    assert torch.equal(torch.cat(flat), indexes), "other entries are chosen"


def tuned(config: Config, tensors: Tensors, model: nn.Module) -> None:
    """Give the adapter the reference's values and compare outputs, gradients and the merged model."""
    adapter = model.adapters["default"]
    state, trainable = group(tensors, "state."), set(config["spec"]["trainable"])
    values, covered = dict(adapter.named_parameters()), set()
    parts = dict(adapter.parts())
    plan = adapter.method.config.plan
    assert isinstance(plan, SPTPlan)
    places: dict[str, tuple[str, object]] = {"cls_token": ("direct.cls_token", ...)}
    for n in ("weight", "bias"):
        places[f"head.{n}"] = (f"head.trained.{n}", ...)
    width = config["embed_dim"]
    for name in trainable:
        stem, _, last = name.rpartition(".")
        if ".structured_" in name:
            places[name] = _structured(name, plan, config)
        elif last.startswith("sparse_"):
            tensor = last.removeprefix("sparse_")
            places[name] = _entries(
                parts, ours(f"{stem}.{tensor}"), tensor, tensors[f"sparse_index.{stem}.{tensor}"], width
            )
        elif name not in places:
            key = f"{stem}.trained.{last}"
            rows = ours(name)
            places[name] = (key, ...) if key in values and rows == name else _whole(parts, rows, last, width)
    with torch.no_grad():
        for name, (key, at) in places.items():
            if key.endswith("_values") and ".sparse_" not in name:  # the backbone has the tuned vector already
                values[key][at] = 0.0
            else:
                values[key][at] = state[name].reshape(values[key][at].shape)
            covered.add(key)
    assert set(places) == trainable, "the reference trains other tensors"
    assert covered == set(values), f"trained by us alone: {sorted(set(values) - covered)[:4]}"
    assert sum(values[k][at].numel() for k, at in places.values()) == sum(p.numel() for p in values.values())
    x = tensors["input.x.0"]
    logits = model(x)
    torch.testing.assert_close(logits, tensors["output.logits"], atol=1e-5, rtol=0)
    (logits * tensors["loss.R"]).sum().backward()
    for name, (key, at) in places.items():
        grad = values[key].grad
        assert grad is not None
        wanted = tensors[f"grad.{name}"]
        close(grad[at].flatten(), wanted.flatten(), 1e-4, f"grad.{name}", 1e-5)
    if config["structured_type"] == "lora":
        ps.merge(model)
        torch.testing.assert_close(model(x), tensors["output.logits"], atol=1e-5, rtol=0)


def _structured(name: str, plan: SPTPlan, config: Config) -> tuple[str, object]:
    stem, _, rest = name.partition(".structured_")
    slot, _, tail = rest.partition(".")
    number, kind = tail.removeprefix("learnable.").split(".")
    path = f"{stem}.qkv" if slot in "qkv" else f"{stem}.{slot}"
    roles = [r for r in "qkv" if f"{path}.weight[{r}]" in plan.matrices] if slot in "qkv" else [slot]
    i, r, d = roles.index(slot), config["low_rank_dim"], config["embed_dim"]
    down = number == "0"
    if config["structured_type"] == "adapter":
        return f"{path}.adapter.{'down' if down else 'up'}.{i}.{kind}", ...
    if slot not in "qkv":
        return f"{path}.lora.lora_{'A' if down else 'B'}", ...
    step = r if down else d
    return f"{path}.lora.lora_{'A' if down else 'B'}", slice(i * step, (i + 1) * step)


def _rows(name: str, width: int) -> int:
    """First row of a slice of a fused parameter."""
    return "qkv".index(name[-2]) * width if name.endswith("]") else 0


def _entries(parts: dict[str, ps.Part], name: str, tensor: str, index: Tensor, width: int) -> tuple[str, object]:
    path = name.partition(f".{tensor}")[0]
    part = parts[f"{path}.sparse"]
    first = _rows(name, width)
    columns = index[1] if tensor == "weight" else 0
    fan_in = width if path.endswith(("qkv", "proj", "fc1")) else None
    stride = 1 if tensor == "bias" else (fan_in or part.sizes["weight"] // width)
    flat = (index[0] + first) * stride + columns
    at = torch.searchsorted(part.positions(tensor).long(), flat)
    assert torch.equal(part.positions(tensor).long()[at], flat), f"other entries of {name}"
    return f"{path}.sparse.{tensor}_values", at


def _whole(parts: dict[str, ps.Part], name: str, tensor: str, width: int) -> tuple[str, object]:
    path = name.partition(f".{tensor}")[0]
    positions = parts[f"{path}.sparse"].positions(tensor).long()
    first = _rows(name, width)
    last = first + width if name.endswith("]") else parts[f"{path}.sparse"].sizes[tensor]
    return f"{path}.sparse.{tensor}_values", torch.arange(
        int(torch.searchsorted(positions, first)), int(torch.searchsorted(positions, last))
    )


def close(found: Tensor, wanted: Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    error = float((found - wanted).norm())
    assert error <= tolerance * float(wanted.norm()) + floor, f"{what}: differs by {error:.2e}"


CHECKS = {"vision-spt-lora": spt, "vision-spt-adapter": spt}
