"""Optimizers with the constants of published audio recipes, for ``recipe.optimizer="module:Class"``."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["OriginalAdam", "StudyAdamW"]


class StudyAdamW(torch.optim.AdamW):
    """AdamW with betas (0.9, 0.98) and eps 1e-6 (Cappellazzo et al., MLSP 2024)."""

    def __init__(self, params: Any, lr: float = 5e-3) -> None:
        super().__init__(params, lr=lr, betas=(0.9, 0.98), eps=1e-6)


class OriginalAdam(torch.optim.Adam):
    """Adam with betas (0.95, 0.999), its weight decay part of the gradient (Gong et al., Interspeech 2021)."""

    def __init__(self, params: Any, lr: float = 1e-5) -> None:
        super().__init__(params, lr=lr, betas=(0.95, 0.999))
