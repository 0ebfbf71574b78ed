"""DAPT on the plain point transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import peft_suite as ps
from golden_cases import Config, Tensors
from golden_cases.pointcloud import close, compare, loss_of, point_transformer, reference_state, tap
from golden_cases.pointcloud_idpt import compare_gradients, give, head_keys, narrowed

SITES = {  # of a block: reference -> ours
    "tfts_{}_1": "norm1.dapt_scale",
    "attn.tfts_{}_1": "attn.qkv.dapt_scale",
    "attn.tfts_{}_2": "attn.proj.dapt_scale",
    "tfts_{}_2": "norm2.dapt_scale",
    "mlp.tfts_{}_1": "mlp.fc1.dapt_scale",
    "mlp.tfts_{}_2": "mlp.fc2.dapt_scale",
    "tfts_{}_3": "dapt_prompt",
}
LAYERS = {"adapter_layer_norm_before": "norm", "scale": "gate", "down_proj": "down", "up_proj": "up"}


def pooling(name: str) -> str | None:
    return None if name == "None" else name


def dapt(config: Config, tensors: Tensors) -> None:
    state = reference_state(config, tensors)
    model = point_transformer(config, narrowed(config, state))
    seen = tap(model, {f"block{i}": f"blocks.blocks.{i}" for i in range(config["depth"])})
    method = {
        "name": "dapt",
        "rank": config["rank"],
        "dropout": config.get("drop_adapter_rate", 0.0),
        "class_token": config["class_token"] != "None",
        "prompt_token": pooling(config["prompt_token"]),
        "patch_token": pooling(config["patch_token"]),
    }
    ps.adapt(model, method)
    wide = state["cls_head_finetune.0.weight"].shape[1] != 2 * config["trans_dim"]
    keys = {
        "cls_token": "direct.cls_token",
        "cls_pos": "direct.cls_pos",
        **head_keys(state, "dapt_head" if wide else "trained"),
    }
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for greek, name in {"gamma": "scale", "beta": "shift"}.items():
        keys[f"tfts_{greek}_1"] = f"embed.dapt_scale.{name}"
        keys[f"tfts_{greek}_2"] = f"norm.dapt_scale.{name}"
    for i in range(config["depth"]):
        block = f"blocks.blocks.{i}"
        for greek, name in {"gamma": "scale", "beta": "shift"}.items():
            keys.update({f"{block}.{k.format(greek)}": f"{block}.{v}.{name}" for k, v in SITES.items()})
        for theirs, ours in LAYERS.items():
            for name in ("weight", "bias"):
                keys[f"{block}.Adapter_MLP.{theirs}.{name}"] = f"{block}.dapt.{ours}.{name}"
        part = adapter.get_submodule(f"{block}.dapt")
        part.register_forward_hook(
            lambda module, args, output, i=i: made.__setitem__(i, (args[1], module.delta(args[1])))
        )
    if config["prompt_token"] == "None":  # nothing reads the last block's prompt: we have none
        last = f"blocks.blocks.{config['depth'] - 1}.tfts"
        keys = {k: v for k, v in keys.items() if not (k.startswith(last) and k.endswith("_3"))}
    give(model, state, keys)
    loss_of(model(tensors["in.points"]), tensors).backward()
    if config["prompt_token"] == "None":
        seen.pop(f"block{config['depth'] - 1}")
    compare(seen, tensors)
    for i, (read, delta) in made.items():
        if f"in.adapter{i}" in tensors:
            close(read, tensors[f"in.adapter{i}"], f"in.adapter{i}")
            close(delta, tensors[f"out.adapter{i}"], f"out.adapter{i}")
    compare_gradients(model, tensors, keys)


CHECKS = {"dapt-classifier": dapt}
