"""Point-cloud, spectral, sparse and fused operations: one public function each, fast on GPU and CPU, no compiler needed.

>>> from peft_suite import kernels
>>> centres = kernels.farthest_point_sampling(points, 64)            # (B, N, 3) -> (B, 64)
>>> dists, idx = kernels.knn(kernels.gather_points(points, centres), points, 32)
>>> print(kernels.backends())                                        # what runs here, and why the rest does not

Every operation is registered with torch (``torch.compile(fullgraph=True)`` and autograd work), has a plain definition in
:mod:`peft_suite.kernels.reference`, a CPU form and, where it pays, a Triton form. ``PEFT_SUITE_KERNELS`` asks for a back
end by name. Old model files import :mod:`peft_suite.kernels.compat`.
"""

from peft_suite.kernels.api.points import (
    KNN,
    ball_query,
    farthest_point_sampling,
    gather_points,
    group_points,
    group_relative,
    interpolate,
    knn,
    knn_gather,
    pack,
    three_interpolate,
    three_nn,
    unpack,
)
from peft_suite.kernels.dispatch import backends, current_backend, set_backend, set_debug, use_backend, warmup

__all__ = [
    "KNN",
    "backends",
    "ball_query",
    "current_backend",
    "farthest_point_sampling",
    "gather_points",
    "group_points",
    "group_relative",
    "interpolate",
    "knn",
    "knn_gather",
    "pack",
    "set_backend",
    "set_debug",
    "three_interpolate",
    "three_nn",
    "unpack",
    "use_backend",
    "warmup",
]
