"""Point-PEFT: the batch, coupled as in the official code, and every sample alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import peft_suite as ps
from golden_cases import Config, Tensors, group
from golden_cases.pointcloud import close, compare, loss_of, point_transformer, reference_state, tap
from peft_suite.pointcloud.methods.point_peft import PointPEFTConfig
from peft_suite.pointcloud.methods.point_peft_parts import Bank

_IN_BLOCK = {"adapter": "drop_path2.of_mlp.adapter", "adapter1": "geometry.adapter"}
_LAYERS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
_BIASES = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")


def pointpeft(config: Config, tensors: Tensors) -> None:
    state = reference_state(config, tensors)
    model = point_transformer(config, state)
    blocks = {f"block{i}": f"blocks.blocks.{i}" for i in range(config["depth"])}
    seen = tap(model, blocks)
    prompted = int(str(config["prompted_layers"]).rpartition("..")[2]) + 1
    method = PointPEFTConfig(
        num_prompts=config["num_prompts"],
        prompted_blocks=prompted,
        bottleneck=config["adapter_dim"],
        prompt_bottleneck=config["cp_adapter_dim"],
        attention=config["inner_attn_dim"],
        official=True,
    )
    ps.adapt(model, method)
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    ours = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
    keys = names(config, prompted)
    left = {n for n, _ in adapter.named_parameters() if not n.startswith("cls_head_finetune.")} - set(keys.values())
    assert not left, f"no counterpart in the reference: {sorted(left)[:4]}"
    with torch.no_grad():
        for theirs, mine in keys.items():
            ours[mine].copy_(state[theirs].reshape(ours[mine].shape))
    bank = next(e.part for e in adapter.edits if isinstance(e.part, Bank))
    bank.memory, bank.length = tensors["in.memory_bank"].T.contiguous(), torch.ones(tensors["in.memory_bank"].shape[1])
    caches: list[Tensor] = []
    inside = listen(adapter, caches)

    bank.feature = lambda *_: tensors["in.cp_feat"]
    loss_of(model(tensors["in.points"]), tensors).backward()
    compare(seen, tensors)
    close(caches[0], tensors["in.block0.cache_prompt"], "cache")
    check_places(inside["once"], tensors, prompted, config)
    for name, made in inside.items():
        if f"out.{name}" in tensors:
            wanted = tensors[f"out.{name}"]
            close(made.view(len(wanted), -1, made.shape[-1]).mT if name.endswith("pooled") else made, wanted, name)
    for key, wanted in group(tensors, "grad.").items():
        gradient = ours[keys[key]].grad
        assert gradient is not None, key
        close(gradient.flatten(), wanted.flatten(), f"grad.{key}")
    for i in range(len(tensors["in.points"])):
        bank.feature = lambda *_, i=i: tensors["in.cp_feat"][i : i + 1]
        close(model(tensors["in.points"][i : i + 1]), tensors[f"out.single{i}.logits"], f"sample {i} alone")


def names(config: Config, prompted: int) -> dict[str, str]:
    """Reference key -> ours, parameters and statistics that the method brings."""
    keys = {"cls_token": "direct.cls_token", "cls_pos": "direct.cls_pos"}
    keys |= {"prompt_cor": "group_divider.point_peft.coordinates"}
    first = "blocks.blocks.0.geometry.mixing"
    keys |= {f"blocks.attn1.{n}": f"{first}.{n}" for n in ("qkv.weight", "proj.weight", "proj.bias")}
    keys |= {f"blocks.norm3.{n}": f"{first}.norm3.{n}" for n in ("weight", "bias")}
    keys |= {f"norm.{n}": f"norm.trained.{n}" for n in ("weight", "bias")}
    for i in range(config["depth"]):
        block = f"blocks.blocks.{i}"
        own = f"{block}.point_prompt" if i < prompted else f"{block}.drop_path2.idle"
        for theirs, mine in _IN_BLOCK.items():
            keys |= {f"{block}.{theirs}.{n}": f"{block}.{mine}.{n}" for n in _LAYERS}
        keys |= {f"{block}.cp_adapter.{n}": f"{own}.adapter.{n}" for n in _LAYERS}
        keys[f"{block}.prompt_embeddings"] = f"{own}.prompt"
        keys[f"{block}.ad_gate"] = f"{block}.drop_path2.idle.gate"
        for n in ("weight", "bias", "running_mean", "running_var"):
            keys[f"{block}.out_transform.0.{n}"] = f"{block}.geometry.norm.{n}"
        keys |= {f"{block}.{n}.bias": f"{block}.{n}.trained.bias" for n in _BIASES}
    return keys


def listen(adapter: Any, caches: list[Tensor]) -> dict[str, Any]:
    """What the parts see and make, under the golden's names."""
    seen: dict[str, Any] = {}
    for edit in adapter.edits:
        block, _, kind = edit.key.rpartition(".")
        i = block.removesuffix(".drop_path2").rpartition(".")[2]
        if kind == "of_mlp":
            scale = edit.part.scale
            edit.part.register_forward_hook(
                lambda m, args, out, i=i, scale=scale: seen.update(
                    {f"block{i}.mlp_adapter_in": args[0], f"block{i}.mlp_adapter": (out - args[0]) / scale}
                )
            )
        elif kind == "point_prompt":
            edit.part.adapter.register_forward_pre_hook(lambda m, args: caches.append(args[0]))
            edit.part.adapter.register_forward_hook(
                lambda m, args, out, i=i: seen.update({f"block{i}.cp_adapter": args[0] + out})
            )
        elif kind == "geometry":
            normed = edit.part.normed

            def watch(v: Tensor, once: Any, i: str = i, normed: Any = normed) -> Tensor:
                out: Tensor = normed(v, once)
                seen[f"block{i}.pooled"] = torch.nn.functional.gelu(out).detach()
                return out

            edit.part.normed = watch
            edit.part.register_forward_pre_hook(lambda m, args: seen.update(once=args[1].extra["point_peft_places"]))
    return seen


def check_places(once: Any, tensors: Tensors, prompted: int, config: Config) -> None:
    """Neighbourhoods and weights of a prompted and, where there is one, of a later block."""
    b, g = tensors["in.block0.center1"].shape[:2]
    for block, around in ((0, once.early), (prompted, once.late)):
        if f"in.block{block}.idx" not in tensors:
            continue
        near, middle = around.near.flatten(), around.middle.flatten()
        if around is once.late:
            first = torch.arange(b) * g
            near = (around.near + first[:, None, None]).flatten()
            middle = (around.middle + first[:, None]).flatten()
        theirs, shape = tensors[f"in.block{block}.idx"], (middle.numel(), -1)
        assert torch.equal(near.view(shape).sort(1).values, theirs.view(shape).sort(1).values), f"neighbours, {block}"
        assert torch.equal(middle, tensors[f"in.block{block}.center_idx"]), f"middles, {block}"
        gaps = torch.cdist(tensors[f"in.block{block}.center1"].double(), tensors[f"in.block{block}.center2"].double())
        weights = 1 / (gaps.square() + 1e-8)
        close(around.weights, (weights / weights.sum(2, keepdim=True)).float(), f"weights, {block}")


CHECKS = {"pointpeft-classifier": pointpeft}
