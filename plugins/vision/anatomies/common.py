"""What the descriptions share: sites, norms, and timm's norm layers, which bring their own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers.fast_norm import fast_group_norm, fast_layer_norm, fast_rms_norm
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d, LayerNorm2dFp32, LayerNormFp32, RmsNorm
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.anatomy import Functional, Point


def affine(module: nn.Module | None) -> bool:
    """Whether a module has a weight of its own."""
    return isinstance(getattr(module, "weight", None), Tensor)


def site(model: nn.Module, path: str) -> Point:
    """The output of an affine operation: its width and where its channels are."""
    module: Any = model.get_submodule(path)
    first = isinstance(module, nn.Conv2d | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    first = first or "2d" in type(module).__name__
    width = module.out_features if isinstance(module, nn.Linear) else int(module.weight.shape[0])
    return Point(path, width, "first" if first else "last")


def sites(model: nn.Module, paths: Iterable[str]) -> tuple[Point, ...]:
    """Those of ``paths`` that exist and have a weight."""
    modules = dict(model.named_modules())
    return tuple(site(model, path) for path in paths if affine(modules.get(path)))


def norms(model: nn.Module) -> tuple[str, ...]:
    """All normalisation layers with a weight."""
    found = ((n, m) for n, m in model.named_modules() if not n.startswith("adapters."))
    return tuple(n for n, m in found if "Norm" in type(m).__name__ and affine(m))


def under(model: nn.Module, *prefixes: str) -> tuple[str, ...]:
    """Full names of the parameters below ``prefixes``."""
    return tuple(n for n, _ in model.named_parameters() if n.startswith(prefixes))


def grid(embed: Any) -> tuple[int, int] | None:
    """(rows, columns) of a timm patch embedding; None where its image size was left open."""
    size = getattr(embed, "grid_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def image_size(embed: Any) -> tuple[int, int] | None:
    """(height, width) that a timm patch embedding insists on; None where any size will do."""
    size = getattr(embed, "img_size", None)
    return (int(size[0]), int(size[1])) if size is not None and getattr(embed, "strict_img_size", True) else None


def classifier(model: nn.Module, path: str) -> Point | None:
    """The linear layer or 1x1 convolution that gives the model's output; None where it was left away."""
    module: Any = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        return Point(path, module.out_features)
    return Point(path, module.out_channels, "first") if isinstance(module, nn.Conv2d) else None


def matrices(model: nn.Module, path: str) -> tuple[str, ...]:
    """Linear layers and convolutions below ``path``, in order."""
    root = model.get_submodule(path)
    return tuple(f"{path}.{n}" for n, m in root.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))


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
