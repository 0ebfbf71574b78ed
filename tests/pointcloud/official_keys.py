"""Key lists of the published checkpoints, typed from their description, with shapes for a small width."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> Shapes:
    return {
        **norm(name, width),
        f"{name}.running_mean": (width,),
        f"{name}.running_var": (width,),
        f"{name}.num_batches_tracked": (),
    }


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, 1), f"{name}.bias": (outputs,)}


def encoder(width: int) -> Shapes:
    return {
        **conv("encoder.first_conv.0", 3, 128),
        **batch_norm("encoder.first_conv.1", 128),
        **conv("encoder.first_conv.3", 128, 256),
        **conv("encoder.second_conv.0", 512, 512),
        **batch_norm("encoder.second_conv.1", 512),
        **conv("encoder.second_conv.3", 512, width),
    }


def large_encoder(width: int) -> Shapes:
    return {
        **conv("encoder.first_conv.0", 3, 256),
        **batch_norm("encoder.first_conv.1", 256),
        **conv("encoder.first_conv.3", 256, 512),
        **batch_norm("encoder.first_conv.4", 512),
        **conv("encoder.first_conv.6", 512, 1024),
        **conv("encoder.second_conv.0", 2048, 2048),
        **batch_norm("encoder.second_conv.1", 2048),
        **conv("encoder.second_conv.3", 2048, width),
    }


def position(dim: int, name: str = "pos_embed") -> Shapes:
    return {**linear(f"{name}.0", 3, 128), **linear(f"{name}.2", 128, dim)}


def block(name: str, dim: int) -> Shapes:
    return {
        **norm(f"{name}.norm1", dim),
        **norm(f"{name}.norm2", dim),
        f"{name}.attn.qkv.weight": (3 * dim, dim),
        **linear(f"{name}.attn.proj", dim, dim),
        **linear(f"{name}.mlp.fc1", dim, 4 * dim),
        **linear(f"{name}.mlp.fc2", 4 * dim, dim),
    }


def contrast(name: str, dim: int) -> Shapes:
    return {
        **norm(f"{name}.norm1_contrast", dim),
        **norm(f"{name}.norm2_contrast", dim),
        **linear(f"{name}.mlp_contrast.fc1", dim, 4 * dim),
        **linear(f"{name}.mlp_contrast.fc2", 4 * dim, dim),
        f"{name}.attn_contrast.q.weight": (dim, dim),
        f"{name}.attn_contrast.kv.weight": (2 * dim, dim),
        **linear(f"{name}.attn_contrast.proj", dim, dim),
    }


def body(dim: int, depth: int, tokenizer: int | None = None) -> Shapes:
    """What every plain encoder has, without tokens."""
    found = {**encoder(tokenizer or dim), **position(dim), **norm("norm", dim)}
    for i in range(depth):
        found |= block(f"blocks.blocks.{i}", dim)
    return found


def tokens(dim: int, *names: str) -> Shapes:
    return dict.fromkeys(names, (1, 1, dim))


def head(inputs: int, classes: int) -> Shapes:
    return {
        **linear("cls_head_finetune.0", inputs, 256),
        **batch_norm("cls_head_finetune.1", 256),
        **linear("cls_head_finetune.4", 256, 256),
        **batch_norm("cls_head_finetune.5", 256),
        **linear("cls_head_finetune.8", 256, classes),
    }


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}{key}": shape for key, shape in shapes.items()}


def decoder(dim: int) -> Shapes:
    return {
        **tokens(dim, "mask_token"),
        **position(dim, "decoder_pos_embed"),
        **block("MAE_decoder.blocks.0", dim),
        **norm("MAE_decoder.norm", dim),
        **conv("increase_dim.0", dim, 96),
    }


def point_mae(dim: int, depth: int) -> Shapes:
    return {**under("MAE_encoder.", body(dim, depth)), **decoder(dim)}


def point_bert(dim: int, depth: int, tokenizer: int) -> Shapes:
    network = {
        **body(dim, depth, tokenizer),
        **linear("reduce_dim", tokenizer, dim),
        **tokens(dim, "cls_token", "cls_pos", "mask_token"),
        **linear("lm_head", dim, 64),
        **linear("cls_head.0", dim, 32),
        **linear("cls_head.2", 32, 32),
    }
    return {
        **under("module.transformer_q.", network),
        **under("module.transformer_k.", network),
        **conv("module.dvae.decoder.0", 8, 8),
        "module.queue": (32, 16),
        "module.queue_ptr": (1,),
    }


def act(dim: int, depth: int) -> Shapes:
    network = {**body(dim, depth), **linear("lm_head", dim, 64)}
    return {
        **under("ACT_encoder.", network),
        **tokens(dim, "mask_token"),
        **position(dim, "decoder_pos_embed"),
        **block("ACT_decoder.blocks.0", dim),
    }


def recon(dim: int, depth: int) -> Shapes:
    network = {
        **body(dim, depth),
        **tokens(dim, "cls_token", "img_token", "text_token", "cls_pos", "img_pos", "text_pos"),
    }
    for i in range(depth):
        network |= contrast(f"blocks.blocks.{i}", dim)
    others = {**linear("img_proj", dim, 32), **linear("text_proj", dim, 32), "text_encoder.positional": (7, 8)}
    return {**under("MAE_encoder.", network), **decoder(dim), **others, **conv("img_encoder.patch", 3, 8)}


def gpt_block(name: str, dim: int) -> Shapes:
    return {
        **norm(f"{name}.ln_1", dim),
        **norm(f"{name}.ln_2", dim),
        f"{name}.attn.in_proj_weight": (3 * dim, dim),
        f"{name}.attn.in_proj_bias": (3 * dim,),
        **linear(f"{name}.attn.out_proj", dim, dim),
        **linear(f"{name}.mlp.0", dim, 4 * dim),
        **linear(f"{name}.mlp.2", 4 * dim, dim),
    }


def pointgpt_network(dim: int, depth: int, large: bool) -> Shapes:
    found = {
        **(large_encoder(dim) if large else encoder(dim)),
        "sos_pos": (1, 1, dim),
        "blocks.sos": (dim,),
        **norm("blocks.ln_f", dim),
        **conv("blocks.increase_dim.0", dim, 96),
        "generator_blocks.sos": (dim,),
        **gpt_block("generator_blocks.layers.0", dim),
        **norm("generator_blocks.ln_f", dim),
        **conv("generator_blocks.increase_dim.0", dim, 96),
        **norm("norm", dim),
    }
    for i in range(depth):
        found |= gpt_block(f"blocks.layers.{i}", dim)
    return found


def pointgpt(dim: int, depth: int, large: bool) -> Shapes:
    return under("GPT_Transformer.", pointgpt_network(dim, depth, large))


def fine_tuned(dim: int, depth: int, classes: int) -> Shapes:
    network = {**body(dim, depth), **tokens(dim, "cls_token", "cls_pos"), **head(2 * dim, classes)}
    return under("module.", network)


def filled(shapes: Shapes) -> dict[str, Tensor]:
    """Random tensors of these shapes."""
    whole = {k: torch.zeros((), dtype=torch.int64) for k in shapes if k.endswith("num_batches_tracked")}
    return {k: whole[k] if k in whole else torch.rand(shape) for k, shape in shapes.items()}
