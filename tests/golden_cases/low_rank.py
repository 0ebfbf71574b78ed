"""LoRA and bottleneck adapters."""

from __future__ import annotations

import torch

from golden_cases import Case, Config, NotCoveredError, Place, Tensors, blocks, group, head, vit


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


CASES = {"vision-lora-qv": lora_qv, "vision-adaptformer": adaptformer, "vision-adaptformer-nobias": adaptformer_nobias}
