"""Point-cloud, spectral, sparse and fused operations: one public function each, fast on GPU and CPU, no compiler.

>>> from peft_suite import kernels
>>> centres = kernels.farthest_point_sampling(points, 64)            # (B, N, 3) -> (B, 64)
>>> dists, idx = kernels.knn(kernels.gather_points(points, centres), points, 32)
>>> print(kernels.backends())                                        # what runs here, and why the rest does not

Every operation is registered with torch (``torch.compile(fullgraph=True)`` and autograd work), has a definition in
:mod:`peft_suite.kernels.reference`, a CPU form and, where it pays, a Triton form. ``PEFT_SUITE_KERNELS`` asks for a
back end by name. Old model files import :mod:`peft_suite.kernels.compat`.
"""

from peft_suite.kernels.api.fused import (
    bottleneck_adapter,
    fold_ssf,
    ssf,
)
from peft_suite.kernels.api.packing import (
    dequant,
    pack_bits,
    pack_sparse,
    unpack_bits,
    unpack_sparse,
)
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
from peft_suite.kernels.api.selection import (
    SelectionThreshold,
    kth_value,
    quantile,
    select_below,
    select_mask,
    select_topk,
)
from peft_suite.kernels.api.sparse import (
    check_index,
    rounded_away,
    sddmm,
    sparse_delta,
    sparse_delta_conv,
    sparse_delta_conv1d,
    sparse_delta_conv2d,
    sparse_delta_conv3d,
    sparse_delta_linear,
)
from peft_suite.kernels.api.spectral import (
    FourierBasis,
    MortonOrder,
    eigh_small,
    graph_fourier_basis,
    graph_laplacian,
    morton_order,
)
from peft_suite.kernels.dispatch import backends, current_backend, set_backend, set_debug, use_backend, warmup

__all__ = [
    "KNN",
    "FourierBasis",
    "MortonOrder",
    "SelectionThreshold",
    "backends",
    "ball_query",
    "bottleneck_adapter",
    "check_index",
    "current_backend",
    "dequant",
    "eigh_small",
    "farthest_point_sampling",
    "fold_ssf",
    "gather_points",
    "graph_fourier_basis",
    "graph_laplacian",
    "group_points",
    "group_relative",
    "interpolate",
    "knn",
    "knn_gather",
    "kth_value",
    "morton_order",
    "pack",
    "pack_bits",
    "pack_sparse",
    "quantile",
    "rounded_away",
    "sddmm",
    "select_below",
    "select_mask",
    "select_topk",
    "set_backend",
    "set_debug",
    "sparse_delta",
    "sparse_delta_conv",
    "sparse_delta_conv1d",
    "sparse_delta_conv2d",
    "sparse_delta_conv3d",
    "sparse_delta_linear",
    "ssf",
    "three_interpolate",
    "three_nn",
    "unpack",
    "unpack_bits",
    "unpack_sparse",
    "use_backend",
    "warmup",
]
