"""Registers, for this process, SPT, SNELL and the low-bit adapters, unless the vision plugin lists them."""

from __future__ import annotations

import peft_suite as ps
from peft_suite.plugins import methods

_AT = "peft_suite.vision.methods"
_TABLE = {
    "spt-lora": (
        "spt:SPTLoRA",
        "LoRA and single entries where the task is sensitive, at a budget.",
        "He et al., ICCV 2023",
    ),
    "spt-adapter": (
        "spt:SPTAdapter",
        "Adapters and single entries where the task is sensitive, at a budget.",
        "He et al., ICCV 2023",
    ),
    "snell": ("snell:SNELL", "Sparse updates from a distance kernel of thin matrices.", "Shen et al., NeurIPS 2024"),
    "snella": ("snell:SNELLA", "SNELL with a wider kernel that moves sparsity between matrices.", "Shen et al., 2025"),
    "bi-adaptformer": ("binary:BiAdaptFormer", "AdaptFormer with weights of one bit.", "Jie et al., ICCV 2023"),
    "bi-lora": ("binary:BiLoRA", "LoRA on q and v with weights of one bit.", "Jie et al., ICCV 2023"),
}


def register() -> None:
    """Add what is missing."""
    missing = [ps.MethodEntry(n, f"{_AT}.{t}", *rest) for n, (t, *rest) in _TABLE.items() if n not in methods()]
    if missing:
        ps.register(ps.Plugin(name="vision-sparse", methods=tuple(missing)))
