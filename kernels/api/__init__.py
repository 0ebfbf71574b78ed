"""The public functions, one module a family."""

from peft_suite.kernels.api import fused, packing, points, selection, sparse, spectral

__all__ = ["fused", "packing", "points", "selection", "sparse", "spectral"]
