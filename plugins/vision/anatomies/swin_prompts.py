"""Swin with extra tokens: what its blocks and patch merging compute when prompts stand beside the map.

Between described modules prompts travel packed behind the patches, ``[B, 1, H*W + P, C]``; the parts at the place
"prompts" unpack: ``part(x) -> (map [B, H, W, C], prompts [B, P, C])``. Every window of an image attends to all prompts
of that image, without position bias; what the windows make of a prompt is averaged. The rule is that of VPT's code (Jia
et al., ECCV 2022) except for its mix-up of windows and images: there, prompts were laid out window by window beside
windows laid out image by image, so that images of a batch saw each other's prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor
from torch.nn import functional as F

from peft_suite.edits import Beside


def prompted_block(block: Any, beside: Beside, x: Tensor) -> Tensor:
    """``x``: a map ``[B, H, W, C]`` in the first block, packed afterwards; returns packed."""
    patches, prompts = beside.through("prompts", x)
    h, w = patches.shape[1:3]
    x = torch.cat((patches.flatten(1, 2), prompts), dim=1)  # [B, H*W + P, C]
    n = block.norm1(x)
    x = beside.attn(x, x + block.drop_path1(_attention(block, n, h, w)), n)
    n = block.norm2(x)
    return beside.mlp(x, x + block.drop_path2(block.mlp(n)), n)[:, None]


def prompted_merging(merging: Any, beside: Beside, x: Tensor) -> Tensor:
    """2x2 patches become one; each prompt is repeated four times along its channels. Packed in, packed out."""
    if not beside.has("prompts"):
        return type(merging).forward(merging, x)  # type: ignore[no-any-return]
    patches, prompts = beside.through("prompts", x)
    h, w = patches.shape[1:3]
    patches = F.pad(patches, (0, 0, 0, w % 2, 0, h % 2))
    patches = patches.reshape(len(x), (h + 1) // 2, 2, (w + 1) // 2, 2, -1)
    patches = patches.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # [B, H*W/4, 4C]
    x = torch.cat((patches, prompts.repeat(1, 1, 4)), dim=1)
    return merging.reduction(merging.norm(x))[:, None]  # type: ignore[no-any-return]


def _attention(block: Any, x: Tensor, h: int, w: int) -> Tensor:
    """Windowed attention on ``[B, H*W + P, C]``."""
    attn, (high, wide), (down, right) = block.attn, block.window_size, block.shift_size
    patches, prompts = x[:, : h * w].reshape(len(x), h, w, -1), x[:, h * w :]
    b, count, area = len(x), prompts.shape[1], high * wide
    if down or right:
        patches = patches.roll((-down, -right), dims=(1, 2))
    patches = F.pad(patches, (0, 0, 0, -w % wide, 0, -h % high))
    padded_h, padded_w = patches.shape[1:3]
    mask = block.get_attn_mask(patches) if getattr(block, "dynamic_mask", False) else block.attn_mask
    windows = window_partition(patches, (high, wide)).flatten(1, 2)  # [B*n, area, C], the windows of an image together
    n = len(windows) // b
    each = prompts[:, None].expand(-1, n, -1, -1).flatten(0, 1)  # [B*n, P, C]
    tokens = torch.cat((each, windows), dim=1)
    qkv = attn.qkv(tokens).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # [B*n, heads, P + area, head width]
    bias = attn._get_rel_pos_bias()  # [1, heads, area, area]
    bias = bias if mask is None else bias + mask[:, None]
    scores = (q * attn.scale) @ k.transpose(-2, -1)
    scores = scores.unflatten(0, (b, n)) + F.pad(bias, (count, 0, count, 0))
    weights = attn.attn_drop(attn.softmax(scores.flatten(0, 1)))
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = attn.proj_drop(attn.proj(out))
    prompts = out[:, :count].unflatten(0, (b, n)).mean(1)
    patches = window_reverse(out[:, count:].reshape(-1, high, wide, out.shape[2]), (high, wide), padded_h, padded_w)
    patches = patches[:, :h, :w]
    if down or right:
        patches = patches.roll((down, right), dims=(1, 2))
    assert patches.shape[1] * patches.shape[2] == h * w and area == windows.shape[1]
    return torch.cat((patches.flatten(1, 2), prompts), dim=1)
