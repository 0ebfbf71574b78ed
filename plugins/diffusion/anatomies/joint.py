"""diffusers' Stable Diffusion 3 and FLUX transformers: image and text tokens side by side, in joint attention.

A double block has two residual streams, the image's and the text's; points and branches are the image's, as are the
roles without a prefix. FLUX's single blocks run both streams as one sequence through attention and feed-forward in
parallel, which one matrix (``out``) sums up.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch import Tensor, nn

from peft_suite.anatomy import Anatomy, Block, Point, Weight
from peft_suite.describing import affine, found, norms, sites, under
from peft_suite.diffusion.anatomies.common import (
    FUNCTIONALS,
    attention_weights,
    chunked,
    feed_forward_weights,
    gated,
    linears,
    ready,
    reentrant,
    settle,
)
from peft_suite.edits import Beside

_IMAGE = "hidden_states"
_NO_PROMPTS = "it lays out all of its tokens as the predicted image"


def describe_sd3(model: Any) -> Anatomy:
    """The anatomy of SD3 and SD3.5. The text stream ends in the last block, whose text queries reach no output.

    Raises:
        BackboneError: its projections are fused, or it carries an adapter of peft.
    """
    ready(model)
    dim, patch = int(model.inner_dim), int(model.config.patch_size)
    blocks = model.transformer_blocks
    ends = [f"transformer_blocks.{i}.attn" for i, block in enumerate(blocks) if block.context_pre_only]
    idle = [prefix for path in ends for prefix in (f"{path}.add_q_proj.", f"{path}.norm_added_q.")]
    return Anatomy(
        family="diffusers-sd3",
        dim=dim,
        blocks=tuple(_double(model, f"transformer_blocks.{i}", dim) for i in range(len(blocks))),
        embed=Point("pos_embed", dim),
        stem=sites(model, linears(model, "pos_embed", "time_text_embed", "context_embedder")),
        norm=Point("norm_out", dim),
        tail=sites(model, linears(model, "norm_out", "proj_out")),
        norms=norms(model),
        patch_values=patch * patch * int(model.config.in_channels),
        functionals=FUNCTIONALS,
        block_forwards={JointTransformerBlock.forward: _joint_forward},
        idle=under(model, *idle) if idle else (),
        no_prompts=_NO_PROMPTS,
        reentrant=reentrant(model),
    )


def describe_flux(model: Any) -> Anatomy:
    """The anatomy of FLUX: double blocks, then single ones.

    Raises:
        BackboneError: its projections are fused, or it carries an adapter of peft.
    """
    ready(model)
    dim = int(model.inner_dim)
    blocks = [_double(model, f"transformer_blocks.{i}", dim) for i in range(len(model.transformer_blocks))]
    blocks += [
        _single(model, f"single_transformer_blocks.{i}", dim) for i in range(len(model.single_transformer_blocks))
    ]
    return Anatomy(
        family="diffusers-flux",
        dim=dim,
        blocks=tuple(blocks),
        embed=Point("x_embedder", dim),
        stem=sites(model, linears(model, "x_embedder", "time_text_embed", "context_embedder")),
        norm=Point("norm_out", dim),
        tail=sites(model, linears(model, "norm_out", "proj_out")),
        norms=norms(model),
        patch_values=int(model.config.in_channels),
        functionals=FUNCTIONALS,
        block_forwards={FluxTransformerBlock.forward: _flux_forward},
        no_prompts=_NO_PROMPTS,
        reentrant=reentrant(model),
    )


def _double(model: nn.Module, path: str, dim: int) -> Block:
    """A JointTransformerBlock or a FluxTransformerBlock."""
    block: Any = model.get_submodule(path)
    attn, second = f"{path}.attn", getattr(block, "attn2", None) is not None
    points = {
        "attn": Point(attn, dim, argument=_IMAGE, output=0),
        "attn_out": Point(f"{attn}.to_out.0", dim),
        "mlp": Point(f"{path}.ff", dim),
    }
    weights = attention_weights(model, attn) | feed_forward_weights(model, f"{path}.ff")
    weights |= feed_forward_weights(model, f"{path}.ff_context", ("cfc1", "cfc2"))
    skip: tuple[str, ...] = ()
    if getattr(block, "context_pre_only", False):  # the text's queries have nothing to answer any more
        skip = (f"{attn}.add_q_proj", f"{attn}.norm_added_q")
        weights.pop("add_q", None)
    elif affine(block.attn.to_add_out):
        points |= {"cattn_out": Point(f"{attn}.to_add_out", dim), "cmlp": Point(f"{path}.ff_context", dim)}
    if second:
        weights |= attention_weights(model, f"{path}.attn2", ("q2", "k2", "v2", "o2"))
    order = [*linears(model, f"{path}.norm1", f"{path}.norm1_context"), *_affine(model, attn)]
    order += [*_affine(model, f"{path}.attn2"), *linears(model, f"{path}.ff", f"{path}.ff_context")]
    return Block(Point(path, dim, argument=_IMAGE, output=1), points, weights,
                 sites(model, (n for n in order if n not in skip)), ("attn", "mlp"))  # fmt: skip


def _single(model: nn.Module, path: str, dim: int) -> Block:
    """A FluxSingleTransformerBlock."""
    attn = f"{path}.attn"
    points = {"attn": Point(attn, dim, argument=_IMAGE)}
    weights = attention_weights(model, attn)
    weights |= {"fc1": Weight(f"{path}.proj_mlp"), "out": Weight(f"{path}.proj_out")}
    order = [*linears(model, f"{path}.norm", f"{path}.proj_mlp"), *_affine(model, attn), f"{path}.proj_out"]
    return Block(Point(path, dim, argument=_IMAGE, output=1), points, weights, sites(model, order))


def _affine(model: nn.Module, path: str) -> list[str]:
    """Linear layers and norms with weights below an attention, inputs before outputs."""
    top = found(model, path)
    names = [] if top is None else [n for n, m in top.named_modules() if n and affine(m)]
    return [f"{path}.{name}" for name in sorted(names, key=_rank)]


def _rank(name: str) -> int:
    """Projections, then the norms of queries and keys, then outputs."""
    return 2 if name.startswith(("to_out", "to_add_out")) else int(name.startswith("norm"))


def _joint_forward(
    block: Any,
    beside: Beside,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The described forward of JointTransformerBlock; parts act on the image's stream."""
    x, text, more = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    z = gate2 = None
    if block.use_dual_attention:
        u, gate, shift, scale, mlp_gate, z, gate2 = block.norm1(x, emb=temb)
    else:
        u, gate, shift, scale, mlp_gate = block.norm1(x, emb=temb)
    gates: tuple[Tensor, ...] = ()
    if block.context_pre_only:
        c = block.norm1_context(text, temb)
    else:
        c, *gates = block.norm1_context(text, emb=temb)
    y, of_text = block.attn(hidden_states=u, encoder_hidden_states=c, **more)
    x = beside.attn(x, x + gated(y, gate), u)
    if z is not None:
        x = x + gated(block.attn2(hidden_states=z, **more), gate2)
    u = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
    x = beside.mlp(x, x + gated(chunked(block, block.ff, u), mlp_gate), u)
    return (None if block.context_pre_only else _text(block, text, of_text, *gates)), x


def _flux_forward(
    block: Any,
    beside: Beside,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The described forward of FluxTransformerBlock; parts act on the image's stream."""
    x, text = hidden_states, encoder_hidden_states
    u, gate, shift, scale, mlp_gate = block.norm1(x, emb=temb)
    c, *gates = block.norm1_context(text, emb=temb)
    more = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    y, of_text, *of_picture = block.attn(hidden_states=u, encoder_hidden_states=c, **more)
    x = beside.attn(x, x + gated(y, gate), u)
    u = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
    x = beside.mlp(x, x + gated(block.ff(u), mlp_gate), u)
    x = x + of_picture[0] if of_picture else x  # an IP adapter's part
    text = _text(block, text, of_text, *gates)
    return (text.clip(-65504, 65504) if text.dtype == torch.float16 else text), x


def _text(block: Any, text: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor) -> Tensor:
    """The text's residual stream behind attention (whose output is y) and feed-forward."""
    text = text + gated(y, gate)
    u = block.norm2_context(text) * (1 + scale[:, None]) + shift[:, None]
    inner = chunked(block, block.ff_context, u) if hasattr(block, "_chunk_size") else block.ff_context(u)
    return text + gated(inner, mlp_gate)


SIZE: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2}


def example_sd3(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random SD3 on 4x4 latents with two blocks, and a batch."""
    more = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "pos_embed_max_size": 4}
    batch = {
        "hidden_states": torch.randn(2, 2, 4, 4),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 4, 12),
        "pooled_projections": torch.randn(2, 10),
    }
    build: Any = SD3Transformer2DModel
    return settle(build(**SIZE, **sizes, **more, **options)), batch


def example_sd35() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same as in SD3.5: a second self attention in the first block, norms on queries and keys."""
    return example_sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def example_flux() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny random FLUX, one double and one single block, with guidance, and a batch of packed 2x2 latents."""
    more = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)}
    size = {**SIZE, "num_layers": 1, "num_single_layers": 1, "in_channels": 4}
    places = torch.tensor([[0.0, i, j] for i in range(2) for j in range(2)])
    batch = {
        "hidden_states": torch.randn(2, 4, 4),
        "timestep": torch.tensor([0.003, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "encoder_hidden_states": torch.randn(2, 4, 12),
        "pooled_projections": torch.randn(2, 10),
        "txt_ids": torch.zeros(4, 3),
        "img_ids": places,
    }
    build: Any = FluxTransformer2DModel
    return settle(build(**size, **more, guidance_embeds=True)), batch
