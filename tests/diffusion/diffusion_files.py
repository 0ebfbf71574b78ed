"""Checkpoints in the layout of their authors: what diffusers' converters read, written from diffusers' own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {  # of two levels with one layer each, attention in the lower one
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {  # of two levels
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "down_blocks.0.downsamplers.0": "down.0.downsample",
    "down_blocks.0.resnets": "down.0.block",
    "down_blocks.1.resnets": "down.1.block",
    "up_blocks.0.upsamplers.0": "up.1.upsample",
    "up_blocks.0.resnets": "up.1.block",
    "up_blocks.1.resnets": "up.0.block",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def stable_diffusion_1(unet: State, vae: State, text: State) -> dict[str, Tensor]:
    """One file with everything; of the pipeline of ``tiny_pipeline``."""
    file: dict[str, Tensor] = {}
    for key, value in unet.items():
        place = next(p for p in _UNET if key.startswith(f"{p}."))
        rest = key.removeprefix(place)
        if ".resnets." in place:
            part = rest.split(".")[1]
            rest = rest.replace(part, _RESNET[part], 1)
        file[f"model.diffusion_model.{_UNET[place]}{rest}"] = value
    for key, value in vae.items():
        name = key
        for ours, theirs in _VAE.items():
            name = name.replace(ours, theirs)
        if ".attn_1." in name:
            for ours, theirs in _ATTENTION.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        file[f"first_stage_model.{name}"] = value
    for key, value in text.items():
        file[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.clone().contiguous() for key, value in file.items()}


def stable_diffusion_3(transformer: State, layers: int) -> dict[str, Tensor]:
    """The transformer alone."""
    state, file = dict(transformer), {}

    def take(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            file[f"{theirs}.{kind}"] = state.pop(f"{ours}.{kind}")

    def swapped(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            scale, shift = state.pop(f"{ours}.{kind}").chunk(2)
            file[f"{theirs}.{kind}"] = torch.cat((shift, scale))

    file["pos_embed"] = state.pop("pos_embed.pos_embed")
    take("pos_embed.proj", "x_embedder.proj")
    take("context_embedder", "context_embedder")
    for i in (1, 2):
        take(f"time_text_embed.timestep_embedder.linear_{i}", f"t_embedder.mlp.{2 * i - 2}")
        take(f"time_text_embed.text_embedder.linear_{i}", f"y_embedder.mlp.{2 * i - 2}")
    for i in range(layers):
        ours, theirs, last = f"transformer_blocks.{i}", f"joint_blocks.{i}", i == layers - 1
        for part, names in (("x", ("to_q", "to_k", "to_v")), ("context", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            for kind in ("weight", "bias"):
                joined = torch.cat([state.pop(f"{ours}.attn.{name}.{kind}") for name in names])
                file[f"{theirs}.{part}_block.attn.qkv.{kind}"] = joined
        take(f"{ours}.attn.to_out.0", f"{theirs}.x_block.attn.proj")
        take(f"{ours}.norm1.linear", f"{theirs}.x_block.adaLN_modulation.1")
        take(f"{ours}.ff.net.0.proj", f"{theirs}.x_block.mlp.fc1")
        take(f"{ours}.ff.net.2", f"{theirs}.x_block.mlp.fc2")
        (swapped if last else take)(f"{ours}.norm1_context.linear", f"{theirs}.context_block.adaLN_modulation.1")
        if not last:
            take(f"{ours}.attn.to_add_out", f"{theirs}.context_block.attn.proj")
            take(f"{ours}.ff_context.net.0.proj", f"{theirs}.context_block.mlp.fc1")
            take(f"{ours}.ff_context.net.2", f"{theirs}.context_block.mlp.fc2")
    take("proj_out", "final_layer.linear")
    swapped("norm_out.linear", "final_layer.adaLN_modulation.1")
    assert not state, sorted(state)
    return {f"model.diffusion_model.{key}": value.clone().contiguous() for key, value in file.items()}
