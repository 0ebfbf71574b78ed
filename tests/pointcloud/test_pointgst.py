"""PointGST: bases, invariances, one basis for all blocks, counts, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import peft_suite as ps
from peft_suite import kernels
from peft_suite.errors import ConfigError, MergeError, UnsupportedError
from peft_suite.pointcloud.anatomies.point_transformer import clouds, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.methods.pointgst import PointGSTConfig, SpectralAdapter, Spectrum, official_laplacian

METHOD = "pointgst(rank=6, local=4)"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for p in model.adapters["default"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def part(model: Any, kind: type, index: int = 0) -> Any:
    return [e.part for e in model.adapters["default"].edits if isinstance(e.part, kind)][index]


def transforms(method: str, points: Tensor) -> Tensor:
    model: Any = ps.adapt(tiny(), method)
    made: Tensor = part(model, Spectrum)(model.group_divider(points)).extra["pointgst"]
    return made


@pytest.mark.parametrize(("name", "c15", "c40"), [("point-mae", 622_831, 629_256), ("pointgpt-l", 2_429_647, None)])
def test_counts(name: str, c15: int, c40: int | None) -> None:
    for classes, wanted in ((15, c15), (40, c40)):
        with torch.device("meta"):
            model = backbones.build(name, classes, pretrained=False, checkpoint="", options={})
        if wanted is not None:
            assert ps.plan(model, "pointgst").trainable == wanted


@pytest.mark.parametrize("method", [METHOD, "pointgst(rank=6, local=4, official=True)"])
def test_transforms_are_orthogonal(method: str) -> None:
    made = transforms(method, torch.randn(3, 40, 3))
    eye = torch.eye(8).expand(3, -1, -1)
    for t in made.chunk(2, dim=1):
        assert torch.allclose(t.mT @ t, eye, atol=1e-5)


def test_runs_follow_the_z_curve() -> None:
    """The second half is what sorting, transforming run by run and sorting back computes."""
    points = torch.randn(3, 40, 3)
    model: Any = ps.adapt(tiny(), METHOD)
    geometry = model.group_divider(points)
    spectrum = part(model, Spectrum)
    local = spectrum(geometry).extra["pointgst"][:, 8:]
    order = kernels.morton_order(geometry.centers)
    runs = kernels.gather_points(geometry.centers, order.order).view(6, 4, 3)
    basis = kernels.graph_fourier_basis(runs)
    t = torch.randn(3, 8, 5)
    q = kernels.gather_points(t, order.order).view(6, 4, 5)
    assert torch.allclose(local @ t, basis.forward(q).view(3, 8, 5), atol=1e-6)
    s = torch.randn(3, 8, 5)
    back = kernels.gather_points(basis.inverse(s.view(6, 4, 5)).view(3, 8, 5), order.inverse)
    assert torch.allclose(local.mT @ s, back, atol=1e-6)


def test_the_first_row_is_the_smallest_frequency() -> None:
    """The normalised Laplacian's kernel is the square root of the degrees: all of one sign."""
    first = transforms(METHOD, torch.randn(3, 40, 3))[:, 0]
    assert bool((first > 0).all())


def test_a_cloud_does_not_depend_on_its_batch_unless_official() -> None:
    x = torch.randn(3, 40, 3) * torch.tensor([1.0, 0.3, 3.0])[:, None, None]
    for method, alone in ((METHOD, True), ("pointgst(rank=6, local=4, official=True)", False)):
        model = shaken(ps.adapt(tiny(), method))
        together, apart = model(x), torch.cat([model(x[i : i + 1]) for i in range(3)])
        assert torch.allclose(together, apart, atol=1e-5) == alone


def test_official_laplacian_agrees_where_its_distances_are_exact() -> None:
    few, many = torch.randn(2, 20, 3), torch.randn(2, 64, 3)
    assert torch.allclose(official_laplacian(few), kernels.graph_laplacian(few, delta="batch"), atol=1e-5)
    assert not torch.allclose(official_laplacian(many), kernels.graph_laplacian(many, delta="batch"), atol=1e-2)


def test_identity_at_init_and_prefix_rows_stay_out_of_the_spectrum() -> None:
    model: Any = tiny()
    x = clouds()
    base = model(x)
    shaken_later = ps.adapt(model, METHOD)
    assert torch.equal(shaken_later(x), base)
    adapter: Any = part(shaken(model), SpectralAdapter)
    geometry = part(model, Spectrum)(model.group_divider(x))
    tokens = torch.randn(3, 9, 24)
    row = adapter.up(torch.nn.functional.silu(adapter.down(tokens[:, :1])))
    assert torch.allclose(adapter(tokens, geometry)[:, :1], row, atol=1e-6)


def test_without_mixing_transforms_cancel() -> None:
    """W_a = 0 and b_a = 0: t comes back from both spectra as it went in."""
    model: Any = ps.adapt(tiny(), METHOD)
    adapter: Any = part(shaken(model), SpectralAdapter)
    with torch.no_grad():
        adapter.mix.weight.zero_()
        adapter.mix.bias.zero_()
    geometry = part(model, Spectrum)(model.group_divider(torch.randn(3, 40, 3)))
    tokens = torch.randn(3, 9, 24)
    t = adapter.down(tokens)[:, 1:]
    wanted = adapter.up(torch.nn.functional.silu(t) + 2 * t)
    assert torch.allclose(adapter(tokens, geometry)[:, 1:], wanted, atol=1e-5)


def test_permuting_centres_with_tokens_permutes_the_output() -> None:
    """Of the global branch; runs depend on the z-curve alone, so theirs too."""
    model: Any = ps.adapt(tiny(), METHOD)
    adapter, spectrum = part(shaken(model), SpectralAdapter), part(model, Spectrum)
    geometry = model.group_divider(torch.randn(2, 40, 3))
    order = torch.randperm(8)
    moved = geometry._replace(centers=geometry.centers[:, order])
    tokens = torch.randn(2, 9, 24)
    permuted = torch.cat((tokens[:, :1], tokens[:, 1:][:, order]), dim=1)
    a, b = adapter(tokens, spectrum(geometry)), adapter(permuted, spectrum(moved))
    assert torch.allclose(a[:, 1:][:, order], b[:, 1:], atol=1e-4)


def test_rotations_leave_the_global_spectrum() -> None:
    points = torch.randn(2, 40, 3)
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    a, b = (transforms("pointgst(rank=6, local=8)", p)[:, :8] for p in (points, points @ turn))
    assert torch.allclose(a, b, atol=1e-4)


def test_one_basis_per_forward_serves_all_blocks_also_under_checkpointing(monkeypatch: Any) -> None:
    model: Any = ps.adapt(tiny(depth=3), METHOD).train()
    model.set_grad_checkpointing(True)
    calls: list[int] = []
    solve = kernels.graph_fourier_basis
    monkeypatch.setattr(kernels, "graph_fourier_basis", lambda c: (calls.append(1), solve(c))[1])
    sum(model(x).square().mean() for x in (clouds(), clouds())).backward()
    assert len(calls) == 4  # cloud and runs, two forwards


def test_refusals() -> None:
    model = ps.adapt(tiny(), METHOD)
    with pytest.raises(MergeError):
        ps.merge(model)
    with pytest.raises(UnsupportedError, match=r"local=32.*8 patches.*2, 4, 8"):
        ps.adapt(tiny(), "pointgst")
    with pytest.raises(UnsupportedError, match="point clouds"):
        ps.plan(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1), "pointgst")
    with pytest.raises(ConfigError, match="local"):
        PointGSTConfig(local=1)
