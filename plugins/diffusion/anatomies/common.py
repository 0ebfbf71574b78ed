"""What the descriptions of diffusers models share: attention and feed-forward by roles, and described block forwards.

Roles of weights, beside ``q k v o fc1 fc2`` of self attention and feed-forward:

==========================  =============================================================================
``xq xk xv xo``             the second attention of a block, which reads the text
``add_q add_k add_v add_o``  SD3's and FLUX's projections of the text inside the joint attention
``q2 k2 v2 o2``             SD3.5's second self attention
``cfc1 cfc2``               SD3's and FLUX's feed-forward of the text
``conv1 conv2 temb``        a residual convolution block: its convolutions and the projection of the time embedding
``out``                     FLUX's single blocks: one matrix for the outputs of attention and feed-forward
==========================  =============================================================================

A gated feed-forward (GEGLU) keeps value and gate in one matrix; it is ``fc1`` as a whole, as diffusers' LoRA files
have it. Roles of points, beside those of every plugin: ``normx xattn xattn_out xdrop`` around the attention to the
text, ``cattn_out cmlp`` for what the text gets out of a joint block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from diffusers.models.attention import BasicTransformerBlock, _chunked_feed_forward
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Block, Functional, Point, Weight
from peft_suite.describing import affine, found, sites
from peft_suite.edits import Beside
from peft_suite.errors import BackboneError

__all__ = [
    "FUNCTIONALS",
    "attention_weights",
    "basic_forward",
    "chunked",
    "feed_forward_weights",
    "forwards",
    "linears",
    "ready",
    "reentrant",
    "settle",
    "transformer_block",
]


def ready(model: nn.Module) -> nn.Module:
    """The model, unless something has changed its layers so that the description would be wrong.

    Raises:
        BackboneError: fused projections, or an adapter of peft.
    """
    fused = [n for n, _ in model.named_modules() if n.endswith((".to_qkv", ".to_kv", ".to_added_qkv"))]
    if fused:
        raise BackboneError(
            f"This {type(model).__name__} has fused projections ({fused[0]} and {len(fused) - 1} more): it no longer "
            "calls the layers that an adapter sits on. Load it again, and call fuse_qkv_projections() after merge()."
        )
    foreign = next((n for n, m in model.named_modules() if hasattr(m, "base_layer")), None)
    if foreign is not None:
        raise BackboneError(
            f"This {type(model).__name__} carries an adapter of peft already (at {foreign}). "
            "Take it off first: pipe.unload_lora_weights() or model.unload_lora(); after pipe.fuse_lora() it stays."
        )
    return model


def reentrant(model: nn.Module) -> bool:
    """Whether gradient checkpointing was switched on with a reentrant function; diffusers' own is not reentrant."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            plain = function is torch.utils.checkpoint.checkpoint
            return plain or bool(getattr(function, "keywords", {}).get("use_reentrant", False))
    return False


def settle(model: Any) -> nn.Module:
    """The model in eval mode, without the dropout of class labels that guidance is trained with."""
    for module in model.modules():
        if isinstance(getattr(module, "dropout_prob", None), float):
            module.dropout_prob = 0.0
    evaluated: nn.Module = model.eval()
    return evaluated


def linears(model: nn.Module, *roots: str) -> Iterator[str]:
    """Linear layers and convolutions at and below the given paths, in order; paths that do not exist give nothing."""
    for root in roots:
        top = found(model, root)
        for name, module in () if top is None else top.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{root}.{name}" if name else root


def attention_weights(model: nn.Module, path: str, names: Iterable[str] = "qkvo") -> dict[str, Weight]:
    """Projections of a diffusers attention that exist, by the given role names for (q, k, v, o) and the added ones."""
    attn: Any = model.get_submodule(path)
    own = zip(names, ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    added = {"add_q": "add_q_proj", "add_k": "add_k_proj", "add_v": "add_v_proj", "add_o": "to_add_out"}
    here = dict(attn.named_modules())
    return {role: Weight(f"{path}.{name}") for role, name in [*own, *added.items()] if name in here}


def feed_forward_weights(model: nn.Module, path: str, names: tuple[str, str] = ("fc1", "fc2")) -> dict[str, Weight]:
    """The two matrices of a diffusers FeedForward."""
    both = zip(names, (f"{path}.net.0.proj", f"{path}.net.2"), strict=True)
    return {role: Weight(name) for role, name in both if isinstance(found(model, name), nn.Linear)}


def transformer_block(model: nn.Module, path: str, before: Iterable[str] = (), after: Iterable[str] = ()) -> Block:
    """A BasicTransformerBlock: self attention, attention to the text where there is one, feed-forward.

    Args:
        before, after: affine operations around the block that belong to its stack.
    """
    block: Any = model.get_submodule(path)
    dim, plain = int(block.dim), block.norm_type == "layer_norm"
    crossed = block.attn2 is not None
    points = {
        "attn": Point(f"{path}.attn1", dim),
        "attn_out": Point(f"{path}.attn1.to_out.0", dim),
        "mlp": Point(f"{path}.ff", dim),
    }
    if crossed:
        points |= {"xattn": Point(f"{path}.attn2", dim), "xattn_out": Point(f"{path}.attn2.to_out.0", dim)}
    if plain:  # elsewhere gates stand between a sub-layer and its residual sum, and norms have no weights
        points |= {"drop1": Point(f"{path}.attn1.to_out.1", dim), "drop2": points["mlp"]}
        norms = {"norm1": "norm1", "norm2": "norm3"} | ({"normx": "norm2"} if crossed else {})
        points |= {r: Point(f"{path}.{n}", dim) for r, n in norms.items() if affine(getattr(block, n, None))}
        if crossed:
            points["xdrop"] = Point(f"{path}.attn2.to_out.1", dim)
    weights = attention_weights(model, f"{path}.attn1") | feed_forward_weights(model, f"{path}.ff")
    if crossed:
        weights |= attention_weights(model, f"{path}.attn2", ("xq", "xk", "xv", "xo"))
    order = [*before, f"{path}.norm1", *linears(model, f"{path}.norm1"), *linears(model, f"{path}.attn1")]
    order += [f"{path}.norm2", *linears(model, f"{path}.attn2"), f"{path}.norm3", *linears(model, f"{path}.ff"), *after]
    known = block.norm_type in ("layer_norm", "ada_norm_zero")
    return Block(Point(path, dim), points, weights, sites(model, order), ("attn", "mlp") if known else ())


def basic_forward(
    block: Any,
    beside: Beside,
    x: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The described forward of BasicTransformerBlock, for plain and for gated (adaLN-Zero) norms."""
    zero, gate, mlp_gate = block.norm_type == "ada_norm_zero", None, None
    more = dict(cross_attention_kwargs or {})
    more.pop("scale", None)
    boxes = more.pop("gligen", None)
    shift = scale = None
    if zero:
        u, gate, shift, scale, mlp_gate = block.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
    else:
        u = block.norm1(x)
    u = u if block.pos_embed is None else block.pos_embed(u)
    own = encoder_hidden_states if block.only_cross_attention else None
    y = block.attn1(u, encoder_hidden_states=own, attention_mask=attention_mask, **more)
    x = beside.attn(x, gated(y, gate) + x, u)
    if boxes is not None:
        x = block.fuser(x, boxes["objs"])
    if block.attn2 is not None:
        u = block.norm2(x)
        u = u if block.pos_embed is None else block.pos_embed(u)
        text = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        x = block.attn2(u, **text, **more) + x
    z = block.norm3(x)
    z = z if scale is None or shift is None else z * (1 + scale[:, None]) + shift[:, None]
    return beside.mlp(x, gated(chunked(block, block.ff, z), mlp_gate) + x, z)


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """``gate * y`` for a gate ``[B, C]`` and ``y: [B, N, C]``."""
    return y if gate is None else gate.unsqueeze(1) * y


def chunked(block: Any, inner: nn.Module, z: Tensor) -> Tensor:
    """The feed-forward of ``z``, in chunks where the block was told so."""
    if block._chunk_size is not None:
        pieces: Tensor = _chunked_feed_forward(inner, z, block._chunk_dim, block._chunk_size)
        return pieces
    out: Tensor = inner(z)
    return out


def forwards() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Block forwards for models of BasicTransformerBlocks."""
    return {BasicTransformerBlock.forward: basic_forward}


def _rms_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """diffusers' RMSNorm: statistics in float32."""
    dtype = x.dtype
    x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + module.eps)
    if weight is None:
        return x.to(dtype)
    half, frozen = (torch.float16, torch.bfloat16), module.weight.dtype
    x = (x.to(weight.dtype) if weight.dtype in half else x) * weight
    x = x if bias is None else x + bias
    return x.to(frozen) if frozen in half else x  # also with a trained float32 scale under autocast


def _torch_rms_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.rms_norm(x, module.normalized_shape, weight, module.eps)


def _layer_norm_fp32(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps).to(x.dtype)


FUNCTIONALS: Mapping[Callable[..., Any], Functional] = {
    RMSNorm.forward: _rms_norm,
    nn.RMSNorm.forward: _torch_rms_norm,
    FP32LayerNorm.forward: _layer_norm_fp32,
}
