"""What the descriptions share: sizes, and timm's norm layers, which bring their own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers.fast_norm import fast_group_norm, fast_layer_norm, fast_rms_norm
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32, RmsNorm
from torch import Tensor
from torch.nn import functional as F

from peft_suite.anatomy import Functional
from peft_suite.describing import affine, classifier, matrices, norms, site, sites, under

__all__ = [
    "FUNCTIONALS",
    "affine",
    "classifier",
    "grid",
    "image_size",
    "matrices",
    "norms",
    "site",
    "sites",
    "under",
]


def grid(embed: Any) -> tuple[int, int] | None:
    """(rows, columns) of a timm patch embedding; None where its image size was left open."""
    size = getattr(embed, "grid_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def image_size(embed: Any) -> tuple[int, int] | None:
    """(height, width) that a timm patch embedding insists on; None where any size will do."""
    size = getattr(embed, "img_size", None)
    return (int(size[0]), int(size[1])) if size is not None and getattr(embed, "strict_img_size", True) else None


def _layer_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = fast_layer_norm if module._fast_norm else F.layer_norm
    return norm(x, module.normalized_shape, weight, bias, module.eps)


def _layer_norm_fp32(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps).to(x.dtype)


def _layer_norm_2d(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _layer_norm(module, x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _layer_norm_2d_fp32(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _layer_norm_fp32(module, x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _rms_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = fast_rms_norm if module._fast_norm else F.rms_norm
    return norm(x, module.normalized_shape, weight, module.eps)


def _group_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    norm = fast_group_norm if module._fast_norm else F.group_norm
    return norm(x, module.num_groups, weight, bias, module.eps)


def _response_norm(module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None and bias is not None
    size = x.norm(p=2, dim=module.spatial_dim, keepdim=True)
    relative = size / (size.mean(dim=module.channel_dim, keepdim=True) + module.eps)
    shape = module.wb_shape
    return (x + torch.addcmul(bias.view(shape), weight.view(shape), x * relative)).to(x.dtype)


FUNCTIONALS: Mapping[Callable[..., Any], Functional] = {
    LayerNorm.forward: _layer_norm,
    LayerNormFp32.forward: _layer_norm_fp32,
    LayerNorm2d.forward: _layer_norm_2d,
    LayerNorm2dFp32.forward: _layer_norm_2d_fp32,
    RmsNorm.forward: _rms_norm,
    GroupNorm.forward: _group_norm,
    GroupNorm1.forward: _group_norm,
    GlobalResponseNorm.forward: _response_norm,
}
