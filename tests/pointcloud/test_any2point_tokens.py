"""Any2Point's tokenizer and borrowed positions, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_suite import kernels
from peft_suite.pointcloud.anatomies.any2point import tiny_audio, tiny_language, tiny_vision
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.models.any2point_positions import PLANE, Projection, views
from peft_suite.pointcloud.models.any2point_tokenizer import STAGES, PointTokenizer, Pyramid, waves
from peft_suite.testing.case import settle

MODELS = {"vision": tiny_vision, "language": tiny_language, "audio": tiny_audio}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_stages_sample_what_sampling_again_would() -> None:
    pyramid, points = Pyramid(8, 6), torch.randn(2, 60, 3)
    geometry = pyramid(points)
    picks, *stages = geometry.extra[STAGES]
    level = kernels.gather_points(points, picks)
    for n in (16, 8):
        level = kernels.gather_points(level, kernels.farthest_point_sampling(level, n))
    assert torch.equal(level, geometry.centers)
    assert torch.equal(geometry.centers, kernels.gather_points(points, geometry.picks))
    assert [list(s.shape) for s in stages] == [[2, 32, 6], [2, 16, 6], [2, 8, 6]]
    near = kernels.group_points(points, geometry.neighbors) - geometry.centers.unsqueeze(2)
    assert torch.equal(near, geometry.groups)


@pytest.mark.parametrize("dim", [24, 32])
def test_tokenizer_follows_the_formula(dim: int) -> None:
    """Cloud by cloud and point by point. A width of 32 leaves channels without waves."""
    points = torch.randn(2, 50, 3)
    points[0, :, 2] = 0.25  # flat neighbourhoods divide by nothing
    net, geometry = PointTokenizer(dim, last_width=4), Pyramid(8, 6)(points)
    settle(net)
    net.eval()
    found = net(points, geometry)
    picks, *stages = geometry.extra[STAGES]
    for b in range(2):
        x, place = F.relu(net.norm(points[b] @ net.embed.weight.T)), points[b]
        for stage, near in zip(net.stages, stages, strict=True):
            middle = picks[b] if len(place) == 50 else torch.arange(near.shape[1])
            rows = []
            for i, center in enumerate(middle.tolist()):
                offset = place[near[b, i]] - place[center]
                largest = offset.abs().max(0).values
                offset = torch.where(largest > 0, offset / largest, 0.0)
                f = torch.cat((x[near[b, i]], x[center].expand(6, -1)), dim=1)
                n = f.shape[1] // 6
                for axis in range(3):
                    for k in range(n):
                        angle = 100 * offset[:, axis] / 1000 ** (k / n)
                        f[:, 2 * n * axis + k] += angle.sin()
                        f[:, 2 * n * axis + n + k] += angle.cos()
                rows.append(stage(f).max(0).values)
            x, place = torch.stack(rows), place[middle]
        torch.testing.assert_close(found[b], x, atol=1e-4, rtol=1e-4)


def test_waves_fill_up_with_zeros() -> None:
    assert waves(torch.ones(2, 3), 32, 1000.0, 100.0).shape == (2, 32)
    assert not waves(torch.ones(2, 3), 32, 1000.0, 100.0)[:, 30:].any()


@pytest.mark.parametrize("modality", MODELS)
def test_order_of_the_points_does_not_matter(modality: str) -> None:
    model = MODELS[modality]()
    settle(model)
    points = torch.randn(3, 60, 3) * 0.4
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(59)))  # sampling starts at the first
    torch.testing.assert_close(model(points[:, order]), model(points), atol=1e-5, rtol=1e-4)


def test_views_are_six_turns() -> None:
    turns = views()
    assert torch.equal(turns @ turns.mT, torch.eye(3).expand(6, 3, 3))
    assert torch.equal(torch.linalg.det(turns).round(), torch.ones(6))
    looks = {tuple(row.tolist()) for row in turns[:, 2]}
    assert looks == {(0, 0, 1), (0, 0, -1), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)}  # both poles of y, four sides


def projection(grid: tuple[int, ...], **options: Any) -> Projection:
    modality = "vision" if len(grid) == 2 else "language"
    return Projection(torch.randn(math.prod(grid), 5), grid, modality, tuple(14 * n for n in grid), **options)  # type: ignore[arg-type]


def test_a_token_on_a_node_gets_that_position() -> None:
    net = projection((3, 5))
    rows, columns = torch.meshgrid(torch.arange(3) / 2, torch.arange(5) / 4, indexing="ij")
    plane = torch.stack((rows, columns), -1).view(1, 1, 15, 2)
    idx, weight = net.corners(plane)
    table: Any = net.table
    assert torch.equal((table[idx] * weight.unsqueeze(-1)).sum(3)[0, 0], table)
    line = projection((7,))
    idx, weight = line.corners((torch.arange(7) / 6).view(1, 1, 7, 1))
    table = line.table
    torch.testing.assert_close((table[idx] * weight.unsqueeze(-1)).sum(3)[0, 0], table)


def test_positions_are_the_mean_of_bilinear_samples() -> None:
    model: Any = tiny_vision()
    geometry = model.geometry(torch.randn(2, 50, 3) * 0.3)
    plane = geometry.extra[PLANE]  # [B, V, G, (row, column)]
    image = model.project.table.T.view(1, 24, 4, 4)
    grid = (2 * plane.flip(-1) - 1).view(1, 1, -1, 2)
    wanted = F.grid_sample(image, grid, align_corners=True).view(24, 2, 6, 8).mean(2).permute(1, 2, 0)
    torch.testing.assert_close(model.project.positions(geometry), wanted)


def test_projection_follows_the_formula() -> None:
    net, centers = projection((4, 4), distance=1.8), torch.tensor([[[0.3, 0.5, -0.2], [0.0, 0.0, 0.0]]])
    plane = net.plane(centers)
    assert torch.equal(plane[0, :, 1], torch.full((6, 2), 0.5))  # the origin is the middle of every image
    x, y, z = (float(c) for c in centers[0, 0])
    first = torch.tensor(((x / (z + 1.8) + 1) / 2, (-y / (z + 1.8) + 1) / 2))  # row, column of the front view
    torch.testing.assert_close(plane[0, 0, 0], first)
    top = {tuple(round(2 * v - 1, 4) for v in plane[0, i, 0].tolist()) for i in (4, 5)}
    assert top == {
        (round(x / (y + 1.8), 4), round(z / (y + 1.8), 4)),
        (round(x / (1.8 - y), 4), round(-z / (1.8 - y), 4)),
    }


@pytest.mark.parametrize("modality", MODELS)
def test_every_token_stays_on_the_table(modality: str) -> None:
    """Also clouds around the cameras, and clouds of one place."""
    for points in (torch.randn(2, 40, 3) * 3, torch.ones(2, 40, 3), torch.zeros(2, 40, 3)):
        model: Any = MODELS[modality]()
        geometry = model.geometry(points)
        plane = geometry.extra[PLANE]
        assert bool(((plane >= 0) & (plane <= 1)).all())
        positions = model.project.positions(geometry)
        assert positions.abs().max() <= model.project.table.abs().max() * 1.001
        assert bool(model(points).isfinite().all())


def test_text_is_spread_from_its_first_to_its_last_position() -> None:
    model: Any = tiny_language()
    plane = model.geometry(torch.randn(3, 50, 3)).extra[PLANE]
    assert torch.equal(plane.amin(2), torch.zeros(3, 6, 1)) and torch.equal(plane.amax(2), torch.ones(3, 6, 1))


def test_official_projections() -> None:
    """Wrapped around at the edges; text on a position gets none; sound is stretched."""
    points = torch.randn(2, 50, 3)
    line = projection((9,), official=True)
    plane = line.plane(points)
    ours = projection((9,)).plane(points)
    assert torch.equal(plane, torch.where(ours == 1, 0.0, ours))  # the last token goes to the first position
    idx, weight = line.corners(plane)
    at = plane[..., 0] * 9 * 8 / (9 * (plane.max() - plane.min()))
    table: Any = line.table
    found = (table[idx] * weight.unsqueeze(-1)).sum(3)
    assert not found[plane[..., 0] == 0].any()
    left, right = at.floor().long(), at.ceil().long().clamp(max=8)
    wanted = table[left] * (right - at).unsqueeze(-1) + table[right] * (at - left).unsqueeze(-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    image = projection((4, 4), official=True)
    close = points * 0.2
    pixels = 56 * image.plane(close)
    assert torch.equal(image.plane(close), projection((4, 4)).plane(close))  # inside, the same place
    idx, weight = image.corners(image.plane(close))
    table = image.table
    grid = (2 * pixels.flip(-1) / 55 - 1).view(1, 1, -1, 2)
    wanted = F.grid_sample(table.T.view(1, 5, 4, 4), grid, align_corners=True).view(5, -1).T
    torch.testing.assert_close((table[idx] * weight.unsqueeze(-1)).sum(3).view(-1, 5), wanted, atol=1e-5, rtol=1e-4)
    sound: Any = tiny_audio(official=True)
    plain: Any = tiny_audio()
    a, b = sound.project.plane(close), plain.project.plane(close)
    torch.testing.assert_close(a[..., 0], (((2 * b[..., 0] - 1) * 16 / 24) + 1) / 2)


def test_official_adds_positions_as_the_published_code() -> None:
    for modality, build in MODELS.items():
        model: Any = build(official=True)
        seen: list[Tensor] = []
        model.blocks.register_forward_pre_hook(lambda m, args, to=seen: to.append(args[0]))
        for block in model.blocks.blocks:
            block.register_forward_hook(lambda m, args, out, to=seen: to.append(args[1]))
        points = clouds() / 4
        model(points)
        entered, *given = seen
        geometry = model.geometry(points)
        pos = torch.cat((model.cls_pos.expand(3, -1, -1), model.project.positions(geometry)), dim=1)
        bare = torch.cat((model.cls_token.expand(3, -1, -1), model.encoder(points, geometry)), dim=1)
        torch.testing.assert_close(entered, bare if modality == "vision" else bare + pos)
        for p in given:
            torch.testing.assert_close(p, torch.zeros_like(pos) if modality == "audio" else pos)
