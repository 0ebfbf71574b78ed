"""What the descriptions of transformers' audio encoders share: block forwards with their places, attention, pooling.

Places inside a block, with ``u`` and ``z`` what attention and MLP read:

=============  ==============================  =========================================================
place          part                            where
=============  ==============================  =========================================================
``attn_in``    ``(u,) -> (u,)``                what the attention reads, behind its norm
``attn_out``   ``(y, u) -> (y, u)``            the attention's output, before dropout and residual sum
``mlp_in``     ``(z,) -> (z,)``                what the MLP reads
``mlp_out``    ``(y, z) -> (y, z)``            the MLP's output
``end``        ``(x,) -> (x,)``                the stream that leaves the block
=============  ==============================  =========================================================

Parts with ``needs_context`` get one more argument, a dictionary that lives as long as one call of the block: what one
part leaves there, later parts of the same call find.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.edits import Beside
from peft_suite.errors import MissingExtraError, UnsupportedError

__all__ = ["BLOCK_PLACES", "attend", "forward_of", "library", "post_norm_block", "pre_norm_block"]

BLOCK_PLACES = ("attn_in", "attn_out", "mlp_in", "mlp_out", "end")


def library() -> Any:
    """transformers, or an error that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Audio backbones need transformers, which is not installed. Run: pip install 'peft-suite[audio]'"
        ) from error
    return transformers


def forward_of(model: nn.Module, name: str) -> Any:
    """The forward of the first module whose class has that name; None where there is none."""
    return next((type(m).forward for m in model.modules() if type(m).__name__ == name), None)


def pre_norm_block(
    block: Any, beside: Beside, names: tuple[str, str, str], x: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """A block with its norms before the sub-layers; ``names`` of (norm1, norm2, mlp)."""
    first, second, inner = names
    notes: dict[str, Any] = {}
    (u,) = beside.through("attn_in", getattr(block, first)(x), context=notes)
    y, _ = block.attention(u, attention_mask=mask, **kwargs)
    y, u = beside.through("attn_out", y, u, context=notes)
    x = beside.attn(x, block.dropout(y) + x, u, notes)
    (z,) = beside.through("mlp_in", getattr(block, second)(x), context=notes)
    y, z = beside.through("mlp_out", getattr(block, inner)(z), z, context=notes)
    x = beside.mlp(x, _dropped(block, inner, y) + x, z, notes)
    return beside.through("end", x, context=notes)[0]


def post_norm_block(
    block: Any, beside: Beside, names: tuple[str, str, str], x: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """The same for norms that follow the residual sums, as wav2vec 2.0's base model has them."""
    first, second, inner = names
    notes: dict[str, Any] = {}
    (u,) = beside.through("attn_in", x, context=notes)
    y, _ = block.attention(u, attention_mask=mask, **kwargs)
    y, u = beside.through("attn_out", y, u, context=notes)
    x = getattr(block, first)(beside.attn(x, x + block.dropout(y), u, notes))
    (z,) = beside.through("mlp_in", x, context=notes)
    y, z = beside.through("mlp_out", getattr(block, inner)(z), z, context=notes)
    x = getattr(block, second)(beside.mlp(x, x + _dropped(block, inner, y), z, notes))
    return beside.through("end", x, context=notes)[0]


def _dropped(block: Any, inner: str, y: Tensor) -> Tensor:
    """wav2vec 2.0 drops out inside its MLP, AST after it."""
    out: Tensor = block.dropout(y) if inner == "mlp" else y
    return out


def attend(
    attn: Any, beside: Beside, out: str, x: Tensor, mask: Any, dropout: float, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``x: [B, N, D]`` with separate projections, the last one named ``out``.

    At "prefix", parts get and give keys and values ``[B, heads, N, head width]``; every query sees what they put in
    front.
    """
    shape = (*x.shape[:-1], -1, attn.head_dim)
    q, k, v = (getattr(attn, f"{role}_proj")(x).view(shape).transpose(1, 2) for role in "qkv")
    k, v = beside.through("prefix", k, v)
    more = k.shape[2] - q.shape[2]
    if mask is not None and more:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise UnsupportedError(
                "More keys and values cannot be added to this attention mask. Load the model with "
                "attn_implementation='sdpa'."
            )
        mask = F.pad(mask, (more, 0), value=True if mask.dtype == torch.bool else 0.0)
    dropout = dropout if attn.training else 0.0
    mixed, weights = _function(attn)(attn, q, k, v, mask, dropout=dropout, scaling=attn.scaling, **kwargs)
    return getattr(attn, out)(mixed.reshape(*x.shape[:-1], -1).contiguous()), weights


def _function(attn: Any) -> Any:
    """The attention function that the model's configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = sys.modules[type(attn).__module__]
    return ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager.eager_attention_forward)
