"""The border with Hugging Face peft: LoRA directories out and in. Neither direction imports peft."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from peft_suite.adapter import adapters_of
from peft_suite.anatomy import Anatomy
from peft_suite.edits import Edit, Part, Trained
from peft_suite.errors import FileFormatError, UnsupportedError
from peft_suite.files import CONFIG, TENSORS, only_name
from peft_suite.lifecycle import install, prepare
from peft_suite.method import make_method
from peft_suite.methods.lora import LoRAConfig
from peft_suite.methods.lora_parts import LowRank
from peft_suite.storage import write_bytes, write_text

__all__ = ["PeftExport", "export_peft", "import_peft"]

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<path>.+?)\.(?P<what>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")


@dataclass(frozen=True)
class PeftExport:
    """Where the directory is, and by how much each approximated matrix deviates: ``|delta - B A| / |delta|``."""

    path: Path
    errors: dict[str, float]

    def __str__(self) -> str:
        if not self.errors:
            return f"{self.path}: exact"
        worst = max(self.errors, key=lambda k: self.errors[k])
        error = f"largest relative error {self.errors[worst]:.2e} ({worst})"
        return f"{self.path}: {len(self.errors)} matrices by truncated SVD, {error}"


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    rank: int = 0,
    base_model_name: str = "",
) -> PeftExport:
    """Write an adapter as a LoRA directory that stock Hugging Face peft loads.

    Slices of a fused matrix become one LoRA whose B is zero outside the slices (rank and alpha grow by the number of
    slices); it is exact. Trained heads and whole trained modules go to ``modules_to_save``. Any other update of a
    weight that folds (DoRA, ...) is written by singular value decomposition: exact when its rank is at most ``rank``,
    else truncated, with the error in the result.

    Args:
        model: the adapted model.
        path: directory to write.
        name: which adapter; may be omitted when exactly one is active.
        rank: rank of the decomposition; 0 refuses to approximate.
        base_model_name: written into the file for peft's information.

    Raises:
        UnsupportedError: something has no place in a LoRA directory; it is named and nothing is written.
    """
    adapters = adapters_of(model)
    adapter = adapters[only_name(adapters, name)]
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    saved: list[str] = []
    errors: dict[str, float] = {}
    for edit in adapter.edits:
        module, part = modules[edit.path], edit.part
        if part.neutral:
            continue
        if isinstance(part, Trained):
            _save_module(edit, module, tensors)
            saved.append(edit.path)
            continue
        if isinstance(part, LowRank) and getattr(part, "magnitude", None) is None:
            down, up, scale = part.lora_A.detach(), part.up().detach(), part.scale
        else:
            down, up, scale = _decompose(edit, module, part, rank, errors)
        if isinstance(module, nn.Conv2d):
            down, up = down.view(-1, *module.weight.shape[1:]), up[:, :, None, None]
        tensors[f"{_PREFIX}{edit.path}.lora_A.weight"] = down.detach().contiguous()
        tensors[f"{_PREFIX}{edit.path}.lora_B.weight"] = up.detach().contiguous()
        ranks[edit.path] = down.shape[0]
        alphas[edit.path] = scale * down.shape[0]
    if not ranks:
        raise UnsupportedError(f"{adapter.method.name} updates no Linear or Conv2d: there is no LoRA to export.")
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": common,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != common},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
    }
    folder = Path(path)
    write_bytes(folder / TENSORS, to_bytes(tensors, metadata={"format": "pt"}))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return PeftExport(folder, errors)


def import_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    anatomy: Anatomy | None = None,
) -> nn.Module:
    """Attach a LoRA directory that Hugging Face peft (or :func:`export_peft`) wrote.

    Where modules differ in rank, smaller ones are padded with zeros. DoRA and rsLoRA carry over.

    Args:
        model: the backbone it was trained on.
        path: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: name on this model.
        trainable: let it train on; other adapters keep their flags.
        anatomy: description of the model, where no plugin has one.

    Raises:
        FileFormatError: no readable LoRA directory.
        UnsupportedError: it uses something that has no counterpart here; the model is unchanged.
    """
    config, tensors = _read_peft(Path(path))
    paths = sorted({m["path"] for m in map(_TENSOR.match, tensors) if m})
    if not paths:
        raise FileFormatError(f"{path} holds no LoRA tensors.")
    for key in ("fan_in_fan_out", "use_qalora", "lora_bias"):
        if config.get(key):
            raise UnsupportedError(f"{path}: peft's option {key}={config[key]!r} has no counterpart here.")
    rank = max(tensors[f"{_PREFIX}{p}.lora_A.weight"].shape[0] for p in paths)
    dora = bool(config.get("use_dora"))
    rslora = bool(config.get("use_rslora"))
    settings = LoRAConfig(rank=rank, targets=tuple(paths), dora=dora, rslora=rslora)
    adapter = prepare(model, make_method(settings), name, anatomy, None)
    extra = [k for k in tensors if not _TENSOR.match(k)]
    owned = {
        f"{e.path}.{n}": p for e in adapter.edits if isinstance(e.part, Trained) for n, p in e.part.named_parameters()
    }
    lost = [k for k in extra if k.removeprefix(_PREFIX) not in owned]
    if lost:
        raise UnsupportedError(
            f"{path} trains {lost[:4]}, which are not the head of this backbone; merge it with peft first."
        )
    with torch.no_grad():
        for edit in adapter.edits:
            if isinstance(edit.part, LowRank):
                _fill(edit, edit.part, tensors, config, rank)
        for key in extra:
            owned[key.removeprefix(_PREFIX)].copy_(tensors[key])
    install(model, adapter, anatomy)
    adapter.requires_grad_(trainable)
    return model


def _fill(edit: Edit, part: LowRank, tensors: dict[str, Tensor], config: dict[str, Any], rank: int) -> None:
    down = tensors[f"{_PREFIX}{edit.path}.lora_A.weight"].flatten(1)
    up = tensors[f"{_PREFIX}{edit.path}.lora_B.weight"].flatten(1)
    own = down.shape[0]
    alpha = _pattern(config.get("alpha_pattern") or {}, edit.path, config["lora_alpha"])
    scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
    part.lora_A.zero_()[:own] = down
    part.lora_B.zero_()[:, :own] = up * (scale / part.scale)
    magnitude = tensors.get(
        f"{_PREFIX}{edit.path}.lora_magnitude_vector", tensors.get(f"{_PREFIX}{edit.path}.lora_magnitude_vector.weight")
    )
    if magnitude is not None and isinstance(getattr(part, "magnitude", None), Tensor):
        cast(Tensor, part.magnitude).copy_(magnitude.flatten())


def _pattern(patterns: dict[str, Any], path: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(default)


def _save_module(edit: Edit, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """peft replaces whole modules: what the part does not train is taken from the base."""
    own = dict(edit.part.named_parameters())
    for key, base in module.named_parameters(recurse=False):
        value = own.get(key, base).detach()
        tensors[f"{_PREFIX}{edit.path}.{key}"] = value.clone().contiguous()


def _decompose(
    edit: Edit, module: nn.Module, part: Part, rank: int, errors: dict[str, float]
) -> tuple[Tensor, Tensor, float]:
    weight = getattr(module, "weight", None)
    if not part.foldable or not isinstance(module, nn.Linear | nn.Conv2d) or not isinstance(weight, Tensor):
        raise UnsupportedError(
            f"{edit.key} is no update of a Linear or Conv2d weight: a LoRA directory cannot hold it."
        )
    base = weight.detach().float()
    bias = None if module.bias is None else module.bias.detach().float()
    with torch.no_grad():
        new, new_bias = part.fold(module, base, bias)
    moved = new_bias is not None and not torch.equal(new_bias, torch.zeros_like(new_bias) if bias is None else bias)
    if moved:
        raise UnsupportedError(f"{edit.key} also changes the bias of {edit.path}: a LoRA directory cannot hold it.")
    u, s, v = torch.linalg.svd((new - base).flatten(1), full_matrices=False)
    exact = int((s > s[0] * 1e-6).sum()) if s.numel() and s[0] > 0 else 1
    keep = min(rank, exact) if rank else 0
    if not keep:
        raise UnsupportedError(
            f"{edit.key} is not stored as a low-rank product (its update of {edit.path} has rank {exact}). "
            "Give rank=... to export it by singular value decomposition."
        )
    if keep < exact:
        errors[edit.path] = float(s[keep:].norm() / s.norm())
    root = s[:keep].sqrt()
    return root[:, None] * v[:keep], u[:, :keep] * root, 1.0


def _read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, framework="pt") as opened:
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{folder} is no readable adapter directory ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise FileFormatError(f"{folder} has peft_type {kind!r}; only LORA directories can be imported.")
    return config, tensors
