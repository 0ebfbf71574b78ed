"""SSF."""

from __future__ import annotations

from golden_cases import Case, Config, Place, Tensors, blocks, group, head, vit


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


CASES = {"vision-ssf-vit": ssf_vit}
