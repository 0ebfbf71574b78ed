"""Old model files run after one changed import: names, argument orders, layouts, dtypes, gradients."""

from __future__ import annotations

import pytest
import torch
from clouds import cloud
from torch import nn

from peft_suite import kernels
from peft_suite.errors import KernelArgumentError
from peft_suite.kernels.compat import KNN, pointnet2_utils, pytorch3d_ops


def test_a_set_abstraction_layer_of_an_old_model_file() -> None:
    """Sampling, grouping, a small network and a maximum, as PointNet++ files write it; gradients reach the features."""
    xyz, features = cloud("normal", 2, 256), torch.randn(2, 8, 256, requires_grad=True)
    mlp = nn.Sequential(nn.Conv2d(3 + 8, 16, 1), nn.ReLU())
    flipped = xyz.transpose(1, 2).contiguous()
    new_xyz = (
        pointnet2_utils.gather_operation(flipped, pointnet2_utils.furthest_point_sample(xyz, 32))
        .transpose(1, 2)
        .contiguous()
    )
    grouped = pointnet2_utils.QueryAndGroup(0.6, 16)(xyz, new_xyz, features)
    assert grouped.shape == (2, 11, 32, 16)
    out = mlp(grouped).amax(-1)
    out.sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0

    idx = kernels.ball_query(new_xyz, xyz, 0.6, 16)
    assert isinstance(idx, torch.Tensor)
    torch.testing.assert_close(grouped[:, :3].permute(0, 2, 3, 1), kernels.group_relative(xyz, new_xyz, idx))
    torch.testing.assert_close(grouped[:, 3:].permute(0, 2, 3, 1), kernels.group_points(features.mT, idx))
    plain = pointnet2_utils.QueryAndGroup(0.6, 16, use_xyz=False)(xyz, new_xyz, features)
    assert torch.equal(plain, grouped[:, 3:])
    assert pointnet2_utils.QueryAndGroup(0.6, 16)(xyz, new_xyz).shape == (2, 3, 32, 16)
    with pytest.raises(KernelArgumentError, match="use_xyz"):
        pointnet2_utils.QueryAndGroup(0.6, 16, use_xyz=False)(xyz, new_xyz)


def test_group_all() -> None:
    xyz, features = cloud("normal", 2, 20), torch.randn(2, 8, 20)
    whole = pointnet2_utils.GroupAll()(xyz, None, features)
    assert whole.shape == (2, 11, 1, 20)
    assert torch.equal(whole[:, :3, 0], xyz.mT) and torch.equal(whole[:, 3:, 0], features)
    assert pointnet2_utils.GroupAll()(xyz).shape == (2, 3, 1, 20)
    assert torch.equal(pointnet2_utils.GroupAll(use_xyz=False)(xyz, None, features)[:, :, 0], features)


def test_index_dtypes_are_the_originals() -> None:
    xyz = cloud("normal", 2, 50)
    assert pointnet2_utils.furthest_point_sample(xyz, 5).dtype == torch.int32
    assert pointnet2_utils.ball_query(0.5, 4, xyz, xyz[:, :7]).dtype == torch.int32
    assert pointnet2_utils.three_nn(xyz, xyz[:, :7])[1].dtype == torch.int32
    assert KNN(3, transpose_mode=True)(xyz, xyz)[1].dtype == torch.int64
    assert pytorch3d_ops.knn_points(xyz, xyz, K=3).idx.dtype == torch.int64


def test_interpolation_gives_no_gradient_to_weights() -> None:
    features = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    idx, weight = torch.randint(0, 9, (2, 6, 3)), torch.rand(2, 6, 3, dtype=torch.float64, requires_grad=True)
    out = pointnet2_utils.three_interpolate(features, idx, weight)
    out.sum().backward()
    assert weight.grad is None and features.grad is not None
    direct = torch.stack([(features[b][:, idx[b]] * weight[b]).sum(-1) for b in range(2)])
    torch.testing.assert_close(out, direct)


def test_knn_cuda() -> None:
    ref, query = cloud("grid", 2, 60), cloud("grid", 2, 7, seed=1)
    dist, idx = KNN(k=4, transpose_mode=True)(ref, query)
    whole = (query[:, :, None] - ref[:, None]).square().sum(-1).sort(dim=-1, stable=True)
    assert torch.equal(idx, whole.indices[..., :4])
    torch.testing.assert_close(dist, whole.values[..., :4].sqrt())
    flat = KNN(k=4)(ref.mT.contiguous(), query.mT.contiguous())
    assert flat[0].shape == (2, 4, 7) and torch.equal(flat[1], idx.mT)
    assert not KNN(k=4, transpose_mode=True)(ref.requires_grad_(), query)[0].requires_grad
    with pytest.raises(KernelArgumentError, match="'k': is 61; expected at most the 60 reference points"):
        KNN(k=61, transpose_mode=True)(ref, query)


def test_pytorch3d() -> None:
    p1, p2 = cloud("normal", 2, 8).requires_grad_(), cloud("normal", 2, 5, seed=1).requires_grad_()
    lengths1, lengths2 = torch.tensor([8, 3]), torch.tensor([2, 5])
    dists, idx, near = pytorch3d_ops.knn_points(p1, p2, lengths1, lengths2, K=4, return_nn=True)
    assert (dists[0, :, 2:] == 0).all() and (idx[0, :, 2:] == 0).all() and (idx[1, 3:] == 0).all()
    assert near is not None and near.shape == (2, 8, 4, 3) and (near[0, :, 2:] == 0).all()
    dists.sum().backward()
    assert p1.grad is not None and p2.grad is not None and (p1.grad[1, 3:] == 0).all()

    found = pytorch3d_ops.ball_query(p1, p2, lengths1, lengths2, K=3, radius=1.0)
    assert ((found.dists == 0) | (found.idx >= 0)).all() and found.knn is not None

    sampled, at = pytorch3d_ops.sample_farthest_points(p2, lengths2, K=[1, 4])
    assert sampled.shape == (2, 4, 3) and at.tolist()[0] == [0, -1, -1, -1] and (sampled[0, 1:] == 0).all()
    assert pytorch3d_ops.sample_farthest_points(p2, K=3, random_start_point=True)[1].shape == (2, 3)
