"""How each golden's configuration and key names translate: one function per reference, built from its JSON alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where (part of) a reference tensor lives in our adapter: ``ours[index] == reference[theirs]``."""

    name: str
    ours: Any = ...
    theirs: Any = ...


@dataclass
class Case:
    """A frozen backbone with the reference's weights, the method that the golden describes, and the key mapping."""

    backbone: nn.Module
    method: dict[str, Any]
    places: dict[str, list[Place]]
    mergeable: bool = False
    taps: dict[str, str] = field(default_factory=dict)  # "inter" name -> key of our part
    tapped: Callable[[Tensor, Tensor], Tensor] = lambda given, made: made  # our part's output as the reference taps it


class NotCoveredError(Exception):
    """The golden asks for something that is not built yet; the message is the reason."""


def vit(config: Config, state: Tensors) -> nn.Module:
    """A timm ViT of the golden's size with the frozen weights loaded strictly."""
    model = timm.create_model(
        "vit_base_patch16_224",
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        global_pool=config.get("pool", "token"),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )
    eps = config.get("layer_norm_eps", config.get("layer_norm_eps_backbone", 1e-6))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    wanted = model.state_dict()
    model.load_state_dict({k: state[k] for k in wanted if k in state}, strict=True)
    return model.eval()


def head() -> dict[str, list[Place]]:
    return {f"head.{n}": [Place(f"head.trained.{n}")] for n in ("weight", "bias")}


def blocks(config: Config) -> range:
    return range(config["depth"])


def ssf_vit(config: Config, tensors: Tensors) -> Case:
    sites = {"": "norm", "patch_embed.": "patch_embed.proj"}
    for i in blocks(config):
        for k, (module, site) in enumerate(
            [
                ("", "norm1"),
                ("", "norm2"),
                ("attn.", "attn.qkv"),
                ("attn.", "attn.proj"),
                ("mlp.", "mlp.fc1"),
                ("mlp.", "mlp.fc2"),
            ]
        ):
            sites[f"blocks.{i}.{module}{k % 2 + 1}"] = f"blocks.{i}.{site}"
    places = head()
    for reference, site in sites.items():
        prefix, number = (reference[:-1], reference[-1]) if reference[-1:].isdigit() else (reference, "1")
        for ours in ("scale", "shift"):
            places[f"{prefix}ssf_{ours}_{number}"] = [Place(f"{site}.ssf.{ours}")]
    return Case(vit(config, group(tensors, "state.")), {"name": "ssf"}, places, mergeable=True)


def vpt(config: Config, tensors: Tensors) -> Case:
    project = None if config["project"] < 0 else config["project"]
    method = {
        "name": "vpt",
        "num_tokens": config["num_tokens"],
        "deep": config["deep"],
        "project": project,
        "dropout": config["prompt_dropout"],
        "position": "after_prefix",
    }
    places = {**head(), "transformer.prompt_embeddings": [Place("norm_pre.vpt.prompt", theirs=0)]}
    if config["deep"]:
        places["transformer.deep_prompt_embeddings"] = [
            Place(f"blocks.{i}.vpt.prompt", theirs=i - 1) for i in blocks(config) if i
        ]
    if project is not None:
        for n in ("weight", "bias"):
            places[f"transformer.prompt_proj.{n}"] = [Place(f"norm_pre.vpt.proj.{n}")]
    return Case(vit(config, group(tensors, "timm.")), method, places)


def lora_qv(config: Config, tensors: Tensors) -> Case:
    refuse_bits(config)
    r, d = config["bottleneck"], config["embed_dim"]
    method = {
        "name": "lora",
        "rank": r,
        "alpha": config["scale"] * r,
        "targets": ["q", "v"],
        "dropout": config["dropout"],
    }
    places = head()
    for i in blocks(config):
        for s, slot in enumerate(("lora_q", "lora_v")):
            here = f"blocks.{i}.attn.{slot}.adapter"
            places[f"{here}_down.weight"] = [Place(f"blocks.{i}.attn.qkv.lora.lora_A", slice(s * r, (s + 1) * r))]
            places[f"{here}_up.weight"] = [Place(f"blocks.{i}.attn.qkv.lora.lora_B", slice(s * d, (s + 1) * d))]
    return Case(vit(config, group(tensors, "state.")), method, places, mergeable=True)


def adaptformer(config: Config, tensors: Tensors) -> Case:
    learned = config["scalar"] == "learnable_scalar"
    parallel = config["option"] == "parallel"
    method = {
        "name": "adapter",
        "bottleneck": config["bottleneck"],
        "position": "mlp",
        "insertion": config["option"],
        "source": "residual" if parallel else "sublayer",
        "outside": not parallel,
        "scale": 1.0 if learned else float(config["scalar"]),
        "learned_scale": learned,
        "layernorm": config["layernorm_option"],
        "dropout": config["dropout"],
    }
    state = group(tensors, "state.")
    for i in blocks(config):  # separate q, k, v and bare fc1, fc2 in the reference
        for n in ("weight", "bias"):
            parts = [
                state.pop(f"blocks.{i}.attn.{role}_proj.{n}")
                for role in "qkv"
                if f"blocks.{i}.attn.{role}_proj.{n}" in state
            ]
            width = config["embed_dim"]
            if len(parts) == 2:  # q and v carry a bias, k does not
                parts.insert(1, torch.zeros(width))
            state[f"blocks.{i}.attn.qkv.{n}"] = torch.cat(parts)
            for fc in ("fc1", "fc2"):
                state[f"blocks.{i}.mlp.{fc}.{n}"] = state.pop(f"blocks.{i}.{fc}.{n}")
    places, taps = head(), {}
    for i in blocks(config):
        key = f"blocks.{i}.adapter_mlp" if parallel else f"blocks.{i}.drop_path2.adapter_mlp"
        here = f"blocks.{i}.adaptmlp"
        for proj in ("down", "up"):
            for n in ("weight", "bias"):
                places[f"{here}.{proj}_proj.{n}"] = [Place(f"{key}.{proj}.{n}")]
        if learned:
            places[f"{here}.scale"] = [Place(f"{key}.learned")]
        if config["layernorm_option"] in ("in", "out"):
            for n in ("weight", "bias"):
                places[f"{here}.adapter_layer_norm_before.{n}"] = [
                    Place(f"{key}.norm_{config['layernorm_option']}.{n}")
                ]
        taps[here] = key
    # the reference taps the adapter before the residual is added
    tapped = (lambda given, made: made) if parallel else (lambda given, made: made - given)
    return Case(vit(config, state), method, places, taps=taps, tapped=tapped)


def adaptformer_nobias(config: Config, tensors: Tensors) -> Case:
    refuse_bits(config)
    method = {
        "name": "adapter",
        "bottleneck": config["bottleneck"],
        "position": "mlp",
        "insertion": "parallel",
        "source": "residual",
        "scale": config["scale"],
        "bias": False,
        "dropout": config["dropout"],
    }
    places, taps = head(), {}
    for i in blocks(config):
        for proj in ("down", "up"):
            places[f"blocks.{i}.adapter_mlp.adapter_{proj}.weight"] = [Place(f"blocks.{i}.adapter_mlp.{proj}.weight")]
        taps[f"blocks.{i}.adapter_mlp"] = f"blocks.{i}.adapter_mlp"
    # the reference scales outside the module that it taps
    tapped = lambda given, made: made / config["scale"]  # noqa: E731
    return Case(vit(config, group(tensors, "state.")), method, places, taps=taps, tapped=tapped)


def refuse_bits(config: Config) -> None:
    if config["bits"] != 32 or config["bi_head"]:
        raise NotCoveredError(
            f"quantised adapters ({config['bits']} bit, bi_head={config['bi_head']}) are not built yet"
        )


def group(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


_CASES: dict[str, Callable[[Config, Tensors], Case]] = {
    "vision-ssf-vit": ssf_vit,
    "vision-vpt-shallow": vpt,
    "vision-vpt-deep": vpt,
    "vision-lora-qv": lora_qv,
    "vision-adaptformer": adaptformer,
    "vision-adaptformer-nobias": adaptformer_nobias,
}


def case_of(name: str, config: Config, tensors: Tensors) -> Case:
    """The case behind a golden's name; a trailing ``-a``, ``-b``, ... numbers its configurations.

    Raises:
        NotCoveredError: the golden's method is not built yet.
    """
    family = re.sub(r"-[a-z0-9]$", "", name)
    if family not in _CASES:
        raise NotCoveredError(f"no method for {family!r} yet")
    return _CASES[family](config, tensors)
