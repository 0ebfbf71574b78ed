"""SSF, in the official mode: its sites and what it trains, family by family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from vision import asmlp

from golden_cases import Case, Config, NotCoveredError, Place, Tensors, blocks, group, head, vit

Sites = dict[str, str]  # the reference's prefix and number -> path of our module


def case(model: nn.Module, sites: Sites, ours: dict[str, list[Place]], official: bool = True, **more: bool) -> Case:
    places = dict(ours)
    for reference, path in sites.items():
        prefix, number = reference[:-1], reference[-1]
        for name in ("scale", "shift"):
            places[f"{prefix}ssf_{name}_{number}"] = [Place(f"{path}.ssf.{name}")]
    return Case(model, {"name": "ssf", "official": official}, places, **more)


def numbered(prefix: str, path: str, *names: str) -> Sites:
    return {f"{prefix}{i + 1}": f"{path}{name}" for i, name in enumerate(names)}


def transformer_block(here: str, path: str) -> Sites:
    return (
        numbered(f"{here}.", f"{path}.", "norm1", "norm2")
        | numbered(f"{here}.attn.", f"{path}.attn.", "qkv", "proj")
        | numbered(f"{here}.mlp.", f"{path}.mlp.", "fc1", "fc2")
    )


def staged(config: Config) -> Iterator[str]:
    for i, depth in enumerate(config["depths"]):
        for j in range(depth):
            yield f"{i}.blocks.{j}"


def load(model: nn.Module, state: Tensors, config: Config, eps: float | None = None) -> nn.Module:
    """Strictly; ``ssf_*`` and tables that the model computes are the reference's own."""
    eps = config.get("layer_norm_eps", eps)  # None: as timm builds it
    if eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    wanted = model.state_dict()
    own = ("relative_position_index", "attn_mask")
    extra = {k for k in state.keys() - wanted.keys() if "ssf_" not in k and not k.endswith(own)}
    assert not extra, f"the reference has weights without a place: {sorted(extra)[:4]}"
    model.load_state_dict({k: state[k] for k in wanted if k in state}, strict=True)
    return model.eval()


def classifier(path: str, *names: str) -> dict[str, list[Place]]:
    """``head.weight`` in the reference is ``path.weight`` in ours."""
    return {f"{name}.{n}": [Place(f"{path or name}.trained.{n}")] for name in names for n in ("weight", "bias")}


def ssf_vit(config: Config, tensors: Tensors) -> Case:
    state = group(tensors, "state.")
    sites = {"1": "norm", "patch_embed.1": "patch_embed.proj"}
    for i in blocks(config):
        sites |= transformer_block(f"blocks.{i}", f"blocks.{i}")
    return case(vit(config, state), sites, head(), mergeable=True)


def ssf_swin(config: Config, tensors: Tensors) -> Case:
    state = {}
    for key, value in group(tensors, "state.").items():  # merging ends a stage in the reference and begins one in ours
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1)
        key = ".".join(parts)
        state[key.replace("head.", "head.fc.") if key.startswith("head.") else key] = value
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        window_size=config["window"],
        embed_dim=config["embed_dim"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["num_heads"]),
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        qkv_bias=config.get("qkv_bias", "layers.0.blocks.0.attn.qkv.bias" in state),
    )
    sites = {"1": "norm", **numbered("patch_embed.", "patch_embed.", "proj")}
    if "patch_embed.norm.weight" in state:
        sites["patch_embed.2"] = "patch_embed.norm"
    else:
        model.patch_embed.norm = nn.Identity()
    for block in staged(config):
        sites |= transformer_block(f"layers.{block}", f"layers.{block}")
    return case(load(model, state, config), sites, classifier("head.fc", "head"), mergeable=True)


class OldLayerNorm2d(LayerNorm2d):
    """timm 0.6.5's, which divides by C - 1 in the variance of maps that are not contiguous, as blocks make them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return super().forward(x)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def ssf_convnext(config: Config, tensors: Tensors) -> Case:
    names = {"stem.proj": "stem.0", "stem.norm": "stem.1", "downsample.norm": "downsample.0"}
    names["downsample.proj"] = "downsample.1"
    state = {}
    for key, value in group(tensors, "state.").items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = value
    if config.get("conv_mlp") or state["stages.0.blocks.0.mlp.fc1.weight"].ndim != 2:
        raise NotCoveredError("the official code has no site after the norm of blocks with a convolutional MLP")
    options: dict[str, Any] = {} if "stages.0.blocks.0.gamma" in state else {"ls_init_value": None}
    model = ConvNeXt(
        dims=tuple(config["dims"]),
        depths=tuple(config["depths"]),
        patch_size=state["stem.0.weight"].shape[-1],
        num_classes=config["num_classes"],
        **options,
    )
    # the one site that cannot fold: after the last residual sum
    sites = {"1": "norm_pre", **numbered("stem.", "stem.", "0", "1")}
    for block in staged(config):
        sites |= numbered(f"stages.{block}.", f"stages.{block}.", "conv_dw", "norm")
        sites |= numbered(f"stages.{block}.mlp.", f"stages.{block}.mlp.", "fc1", "fc2")
    load(model, state, config, eps=1e-6)
    for stage in model.stages:
        if isinstance(stage.downsample, nn.Sequential):
            stage.downsample[0].__class__ = OldLayerNorm2d
    return case(model, sites, classifier("", "head.norm", "head.fc"))


def ssf_asmlp(config: Config, tensors: Tensors) -> Case:
    asmlp.register()
    state = group(tensors, "state.")
    model = asmlp.ASMLP(
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        shift_size=config["shift_size"],
        patch_size=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
        num_classes=config["num_classes"],
        patch_norm="patch_embed.norm.weight" in state,
    )
    sites = {"1": "norm"}
    for block in staged(config):
        here = f"layers.{block}"
        sites |= numbered(f"{here}.", f"{here}.", "norm1", "norm2")
        shift = ("conv1", "conv2_1", "conv2_2", "conv3")
        sites |= numbered(f"{here}.axial_shift.", f"{here}.axial_shift.", *shift)
        sites |= numbered(f"{here}.mlp.", f"{here}.mlp.", "fc1", "fc2")
    # the official code takes a map's width for its channels where the numbers agree; only then do the modes differ
    widths = [config["img_size"] // config["patch_size"] // 2**i for i in range(len(config["depths"]))]
    dims = [config["embed_dim"] * 2**i for i in range(len(widths))]
    guess = any(w in (d, int(d * config["mlp_ratio"])) for w, d in zip(widths, dims, strict=True))
    return case(load(model, state, config), sites, head(), official=guess, mergeable=not guess)


CASES = {
    "vision-ssf-vit": ssf_vit,
    "vision-ssf-swin": ssf_swin,
    "vision-ssf-convnext": ssf_convnext,
    "vision-ssf-asmlp": ssf_asmlp,
}
