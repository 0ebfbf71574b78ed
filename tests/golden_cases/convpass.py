"""Convpass."""

from __future__ import annotations

from golden_cases import Case, Config, NotCoveredError, Place, Tensors, blocks, group, head, vit


def convpass(config: Config, tensors: Tensors) -> Case:
    kind = config["method"]
    if kind not in ("convpass", "convpass_attn"):
        raise NotCoveredError(f"no such placement of Convpass: {kind!r}")
    method = {
        "name": "convpass",
        "bottleneck": config["bottleneck"],
        "position": "attn" if kind == "convpass_attn" else "both",
        "scale": config["scale"],
        "xavier": bool(config.get("xavier_init", False)),
        "dropout": config["dropout"],
    }
    places, taps = head(), {}
    for i in blocks(config):
        for branch in ("attn", "mlp") if kind == "convpass" else ("attn",):
            here, key = f"blocks.{i}.adapter_{branch}", f"blocks.{i}.convpass_{branch}"
            for layer in ("conv", "down", "up"):
                for n in ("weight", "bias"):
                    places[f"{here}.adapter_{layer}.{n}"] = [Place(f"{key}.{layer}.{n}")]
            if f"inter.{here}.in" in tensors:
                taps[here] = key
    # the reference scales outside the module that it taps
    tapped = lambda given, made: made / config["scale"]  # noqa: E731
    return Case(vit(config, group(tensors, "state.")), method, places, taps=taps, tapped=tapped)


CASES = {"vision-convpass": convpass, "vision-convpass-attn": convpass}
