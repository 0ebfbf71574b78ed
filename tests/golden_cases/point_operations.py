"""Point operations of pointnet2_ops and KNN_CUDA."""

from __future__ import annotations

import torch

from golden_cases import Config, Tensors
from peft_suite import kernels
from peft_suite.kernels import compat
from peft_suite.kernels.dispatch import unavailable


def pointops(config: Config, tensors: Tensors) -> None:
    """pointnet2_ops and KNN_CUDA by their own names, on every back end that runs here."""
    backends = [b for b in ("auto", "torch", "numba", "reference") if b == "auto" or unavailable(b) is None]
    clouds = sorted({name.partition(".")[0] for name in tensors})
    assert clouds
    for cloud in clouds:
        for backend in backends:
            with kernels.use_backend(backend):
                _pointops(config, {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{cloud}.")})


def _pointops(config: Config, t: Tensors) -> None:
    points, centers = t["points"], t["centers"]
    assert points.shape == (config["batch"], config["n"], 3)
    picks = compat.furthest_point_sample(points, config["npoint"])
    assert picks.dtype == torch.int32 and torch.equal(picks.long(), t["fps_idx"].long())
    gathered = compat.gather_operation(points.mT.contiguous(), picks).mT
    assert torch.equal(gathered, centers)

    dist, idx = compat.KNN(config["k"], transpose_mode=True)(points, centers)
    assert torch.equal(idx, t["knn_idx"])
    torch.testing.assert_close(dist, t["knn_dist"], rtol=1e-6, atol=1e-7)
    dist, idx = compat.KNN(config["k"])(points.mT, centers.mT)
    assert torch.equal(idx.mT, t["knn_idx"])

    hits = compat.ball_query(config["radius"], config["nsample"], points, t["ball_queries"])
    assert torch.equal(hits, t["ball_idx"])

    dist, idx = compat.three_nn(points, centers)
    assert idx.dtype == torch.int32 and torch.equal(idx.long(), t["three_nn_idx"].long())
    torch.testing.assert_close(dist, t["three_nn_dist"], rtol=1e-6, atol=1e-7)
    weight = 1 / (dist + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(weight, t["weight"], rtol=1e-5, atol=1e-6)
    carried = compat.three_interpolate(t["features"], idx, t["weight"])
    torch.testing.assert_close(carried, t["interpolated"], rtol=1e-5, atol=1e-6)
    ours = kernels.interpolate(points, centers, t["features"].mT)
    torch.testing.assert_close(ours.mT, t["interpolated"], rtol=1e-5, atol=1e-5)


CHECKS = {"pointops": pointops}
