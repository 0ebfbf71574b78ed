"""Functions with the names, argument orders, layouts and dtypes of pointnet2_ops, KNN_CUDA and PyTorch3D.

Change one import and an old model file runs, on CPU too::

    from pointnet2_ops import pointnet2_utils   ->  from peft_suite.kernels.compat import pointnet2_utils
    from knn_cuda import KNN                    ->  from peft_suite.kernels.compat import KNN
    from pytorch3d.ops import knn_points        ->  from peft_suite.kernels.compat.pytorch3d_ops import knn_points
"""

from peft_suite.kernels.compat import knn_cuda, pointnet2_utils, pytorch3d_ops
from peft_suite.kernels.compat.knn_cuda import KNN
from peft_suite.kernels.compat.pointnet2_utils import (
    GroupAll,
    QueryAndGroup,
    ball_query,
    furthest_point_sample,
    gather_operation,
    grouping_operation,
    three_interpolate,
    three_nn,
)
from peft_suite.kernels.compat.pytorch3d_ops import knn_gather, knn_points, sample_farthest_points

__all__ = [
    "KNN",
    "GroupAll",
    "QueryAndGroup",
    "ball_query",
    "furthest_point_sample",
    "gather_operation",
    "grouping_operation",
    "knn_cuda",
    "knn_gather",
    "knn_points",
    "pointnet2_utils",
    "pytorch3d_ops",
    "sample_farthest_points",
    "three_interpolate",
    "three_nn",
]
