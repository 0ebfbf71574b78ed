"""``KNN`` as KNN_CUDA 0.2 has it: reference first, query second, Euclidean distances, no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_suite.kernels import checks
from peft_suite.kernels.api.points import knn as _knn

__all__ = ["KNN", "knn"]


class KNN(nn.Module):
    """``KNN(k, transpose_mode)(ref, query) -> (dist, idx)``.

    ``transpose_mode=True``: (B, N, D), (B, Q, D) -> (B, Q, k); False: (B, D, N), (B, D, Q) -> (B, k, Q). Distances are
    roots, float32; equal distances by lower index; indices int64. A k above N, which reads out of bounds in the
    original, is a KernelArgumentError.
    """

    def __init__(self, k: int, transpose_mode: bool = False) -> None:
        super().__init__()
        self.k, self._t = k, transpose_mode

    @torch.no_grad()
    def forward(self, ref: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest reference points of every query."""
        if not self._t:
            ref, query = ref.mT, query.mT
        if isinstance(ref, Tensor) and ref.dim() == 3 and self.k > ref.shape[1]:
            raise checks.fail("k", f"is {self.k}", f"at most the {ref.shape[1]} reference points")
        dists, idx = _knn(query.float(), ref.float(), self.k)
        assert dists is not None
        dists = dists.sqrt()
        return (dists, idx) if self._t else (dists.mT.contiguous(), idx.mT.contiguous())


def knn(ref: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One cloud: (D, N), (D, Q) -> distances and 0-based indices, both (k, Q)."""
    dists, idx = KNN(k)(ref[None], query[None])
    return dists[0], idx[0]
