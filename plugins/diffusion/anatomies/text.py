"""The text encoders of diffusion pipelines: transformers' CLIP text models and T5's encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.describing import checkpoints_reentrantly, matrices, norms, recomputing, separate_block, sites
from peft_suite.diffusion.anatomies.common import ready
from peft_suite.edits import Beside

_NO_PROMPTS = "the image model reads its output token by token"


def describe_clip(model: CLIPTextModel | CLIPTextModelWithProjection) -> Anatomy:
    """The anatomy of a CLIP text encoder, with or without its projection.

    A pipeline that reads an inner layer (SDXL, clip_skip) leaves what stands behind it without a gradient.

    Raises:
        BackboneError: it carries an adapter of peft.
    """
    ready(model)
    base = "text_model." if hasattr(model, "text_model") else ""
    layers: Any = model.get_submodule(f"{base}encoder").layers
    dim = int(model.config.hidden_size)
    return Anatomy(
        family="clip-text",
        dim=dim,
        blocks=tuple(
            separate_block(
                model,
                f"{base}encoder.layers.{i}",
                dim,
                attn="self_attn",
                out="out_proj",
                norm1="layer_norm1",
                norm2="layer_norm2",
                argument="hidden_states",
            )
            for i in range(len(layers))
        ),
        embed=Point(f"{base}embeddings", dim),
        norm=Point(f"{base}final_layer_norm", dim),
        tail=sites(model, (f"{base}final_layer_norm", "text_projection")),
        norms=norms(model),
        block_forwards={type(layers[0]).forward: _clip_forward},
        no_prompts=_NO_PROMPTS,
        causal=True,
        reentrant=checkpoints_reentrantly(layers),
    )


def describe_t5(model: T5EncoderModel) -> Anatomy:
    """The anatomy of T5's encoder: norms without a shift, no biases, relative positions in the first block.

    Raises:
        BackboneError: it carries an adapter of peft.
    """
    ready(model)
    dim = int(model.config.d_model)
    layers: Any = model.encoder.block
    table, norm = "encoder.embed_tokens.weight", type(model.encoder.final_layer_norm)
    shared = model.shared.weight is model.get_parameter(table)
    return Anatomy(
        family="t5-encoder",
        dim=dim,
        blocks=tuple(_t5_block(model, f"encoder.block.{i}", dim) for i in range(len(layers))),
        embed=Point("encoder.embed_tokens", dim),
        norm=Point("encoder.final_layer_norm", dim),
        tail=sites(model, ("encoder.final_layer_norm",)),
        norms=norms(model),
        functionals={norm.forward: _t5_norm},
        tied={"shared.weight": table} if shared else {},
        no_prompts=_NO_PROMPTS,
        reentrant=checkpoints_reentrantly(layers),
    )


def _t5_block(model: nn.Module, path: str, dim: int) -> Block:
    """A T5Block; its attention and feed-forward layers hold their norms and dropouts."""
    attn, mlp = f"{path}.layer.0.SelfAttention", f"{path}.layer.1.DenseReluDense"
    points = {
        "norm1": Point(f"{path}.layer.0.layer_norm", dim),
        "attn": Point(attn, dim, output=0),
        "attn_out": Point(f"{attn}.o", dim),
        "drop1": Point(f"{path}.layer.0.dropout", dim),
        "norm2": Point(f"{path}.layer.1.layer_norm", dim),
        "mlp": Point(mlp, dim),
        "drop2": Point(f"{path}.layer.1.dropout", dim),
    }
    gate = hasattr(model.get_submodule(mlp), "wi_0")
    inner = {"gate": "wi_0", "fc1": "wi_1", "fc2": "wo"} if gate else {"fc1": "wi", "fc2": "wo"}
    weights = {role: Weight(f"{attn}.{role}") for role in "qkvo"}
    weights |= {role: Weight(f"{mlp}.{name}") for role, name in inner.items()}
    order = (points["norm1"].path, *matrices(model, attn), points["norm2"].path, *matrices(model, mlp))
    return Block(Point(path, dim, output=0), points, weights, sites(model, order))


def _t5_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Root mean square over the last axis, in float32, and a scale."""
    assert weight is not None
    x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    half, frozen = (torch.float16, torch.bfloat16), module.weight.dtype
    y = weight * (x.to(weight.dtype) if weight.dtype in half else x)
    return y.to(frozen) if frozen in half else y  # also with a trained float32 scale under autocast


@recomputing
def _clip_forward(block: Any, beside: Beside, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """The described forward of CLIPEncoderLayer."""
    u = block.layer_norm1(x)
    y, _ = block.self_attn(hidden_states=u, attention_mask=attention_mask, **kwargs)
    x = beside.attn(x, x + y, u)
    u = block.layer_norm2(x)
    return beside.mlp(x, x + block.mlp(u), u)


WIDTH: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS: dict[str, Any] = {
    "vocab_size": 10,
    "max_position_embeddings": 6,
    "bos_token_id": 8,
    "eos_token_id": 9,
    "pad_token_id": 9,
}


def example_clip() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random CLIP text encoder and two texts."""
    model: nn.Module = CLIPTextModel(CLIPTextConfig(**WIDTH, **WORDS))
    return model.eval(), {"input_ids": texts()}


def example_clip_projection() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same with the projection that SDXL and SD3 read."""
    model: nn.Module = CLIPTextModelWithProjection(CLIPTextConfig(**WIDTH, **WORDS, projection_dim=10))
    return model.eval(), {"input_ids": texts()}


def example_t5() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random T5 encoder with a gated feed-forward, as SD3's and FLUX's, and two texts."""
    config = T5Config(
        vocab_size=10,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model: nn.Module = T5EncoderModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(4.0)  # so that attention tells tokens apart
    return model.eval(), {"input_ids": texts()}


def texts() -> Tensor:
    """Two sequences of six tokens, with begin and end, in which every token occurs."""
    return torch.tensor([[8, 0, 1, 2, 3, 9], [8, 4, 5, 6, 7, 9]])
