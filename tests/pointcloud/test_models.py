"""Point transformers: geometry, exact rewritings, formulas against plain torch, invariances, wrong inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_suite.errors import ConfigError, DataError, UnknownNameError, UnsupportedError
from peft_suite.pointcloud.anatomies.point_transformer import clouds, tiny
from peft_suite.pointcloud.backbones import backbones, part_backbones
from peft_suite.pointcloud.models.geometry import Geometry, Grouping, nearest_walk
from peft_suite.pointcloud.models.layers import DropPath
from peft_suite.pointcloud.models.pointgpt import GPTBlock, PointGPT, SinePosition
from peft_suite.pointcloud.models.recon import ReCon, ReConBlock
from peft_suite.pointcloud.models.segmentation import PartSegmenter
from peft_suite.pointcloud.models.tokenizer import MiniPointNet

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "groups": 8, "group_size": 6}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def awake(model: nn.Module) -> nn.Module:
    """Batch-norm statistics other than 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_geometry_is_consistent() -> None:
    points = torch.randn(2, 50, 3)
    g = Grouping(7, 5)(points)
    assert torch.equal(g.centers, torch.stack([p[i] for p, i in zip(points, g.picks, strict=True)]))
    near = torch.stack([p[i] for p, i in zip(points, g.neighbors, strict=True)])
    assert torch.equal(g.groups, near - g.centers[:, :, None])
    assert bool((g.groups[:, :, 0] == 0).all()), "the centre itself comes first"
    assert bool((g.groups.norm(dim=-1).diff(dim=-1) >= 0).all()), "nearest first"
    assert g.adding(basis=1).extra == {"basis": 1} and g.extra == {}


def test_geometry_carries_further_channels() -> None:
    points = torch.randn(2, 50, 6)
    g = Grouping(7, 5)(points)
    assert g.groups.shape == (2, 7, 5, 6)
    assert torch.equal(g.groups[0, 3, 2, 3:], points[0, g.neighbors[0, 3, 2], 3:])
    assert torch.equal(g.groups[..., :3], Grouping(7, 5)(points[..., :3]).groups)


def test_half_precision_points_are_compared_in_float32() -> None:
    points = clouds()
    wanted = Grouping(8, 6)(points)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(Grouping(8, 6)(points.to(dtype)).neighbors, wanted.neighbors)


def test_nearest_walk() -> None:
    centers = torch.tensor([[[0.0, 0, 0], [5, 0, 0], [1, 0, 0], [3, 0, 0]]])
    assert nearest_walk(centers).tolist() == [[0, 2, 3, 1]]
    ordered = Grouping(8, 6, order="walk")(clouds())
    plain = Grouping(8, 6)(clouds())
    assert ordered.picks.shape == plain.picks.shape and bool((ordered.picks[:, 0] == 0).all())


@pytest.mark.parametrize(
    ("shape", "told"), [((2, 5, 3), "5 points cannot fill a group of 6"), ((50, 3), "batch"), ((2, 50, 2), "3 or more")]
)
def test_clouds_that_cannot_be_grouped(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        tiny()(torch.randn(shape))


def test_degenerate_clouds_stay_finite() -> None:
    model = awake(tiny())
    for points in (torch.zeros(2, 40, 3), torch.ones(2, 6, 3), torch.full((2, 40, 3), 0.01)):
        assert bool(model(points).isfinite().all())


@pytest.mark.parametrize("large", [False, True])
def test_tokenizer_equals_the_plain_convolutions(large: bool) -> None:
    net = awake(MiniPointNet(20, large=large))
    groups = torch.randn(2, 4, 9, 3)
    groups[0, 0, 3:] = groups[0, 0, 2]  # duplicates: the maximum is tied

    def convolve(x: Tensor, layers: Any) -> Tensor:
        for layer in layers:
            x = (
                F.conv1d(x, layer.weight, layer.bias)
                if hasattr(layer, "weight") and x.ndim == 3 and layer.weight.ndim == 3
                else layer(x)
            )
        return x

    flat = groups.flatten(0, 1).transpose(1, 2)  # [B * G, 3, S]
    f = convolve(flat, net.first_conv)
    wide = torch.cat((f.amax(2, keepdim=True).expand_as(f), f), dim=1)
    wanted = convolve(wide, net.second_conv).amax(2).view(2, 4, 20)
    torch.testing.assert_close(net(groups), wanted, atol=1e-5, rtol=1e-5)


def test_tokenizer_in_train_mode_normalises_over_all_points() -> None:
    net = MiniPointNet(20).train()
    groups = torch.randn(2, 4, 9, 3)
    net(groups)
    first = F.conv1d(groups.flatten(0, 1).transpose(1, 2), net.first_conv[0].weight, net.first_conv[0].bias)
    mean = net.first_conv[1].running_mean
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(mean, 0.1 * first.mean((0, 2)))


def parts(block: nn.Module, *names: str) -> list[Any]:
    return [block.get_submodule(n) for n in names]


def geometry() -> Geometry:
    return Grouping(8, 6)(clouds())


def test_recon_block_formula() -> None:
    block = ReConBlock(24, 2).eval()
    x, pos = torch.randn(3, 11, 24), torch.randn(3, 11, 24)
    n1, n1c, n2, n2c, attn, cross, mlp, mlpc = parts(
        block, "norm1", "norm1_contrast", "norm2", "norm2_contrast", "attn", "attn_contrast", "mlp", "mlp_contrast"
    )
    z = x + pos
    q, v = n1c(z[:, :3]), n1(z[:, 3:])
    q, v = q + cross(q, v), v + attn(v)
    q, v = n2c(q), n2(v)
    torch.testing.assert_close(block(x, pos, geometry()), torch.cat((q + mlpc(q), v + mlp(v)), dim=1))


def test_recon_cross_attention_formula() -> None:
    cross: Any = ReConBlock(24, 2).attn_contrast
    q, v = torch.randn(3, 3, 24), torch.randn(3, 8, 24)
    k, values = cross.kv(v).chunk(2, dim=2)
    heads = []
    for h in (slice(0, 12), slice(12, 24)):
        weight = (cross.q(q)[..., h] @ k[..., h].mT / math.sqrt(12)).softmax(-1)
        heads.append(weight @ values[..., h])
    torch.testing.assert_close(cross(q, v), cross.proj(torch.cat(heads, dim=2)))


def test_recon_patches_never_see_the_queries() -> None:
    model: Any = awake(ReCon(5, **SMALL))
    points = clouds()
    before = model.forward_features(points)
    with torch.no_grad():
        model.img_token.normal_()
    after = model.forward_features(points)
    assert torch.equal(before[:, 3:], after[:, 3:]) and not torch.equal(before[:, 1], after[:, 1])


def test_pointgpt_block_equals_torch_attention() -> None:
    block: Any = GPTBlock(24, 2).eval()
    theirs = nn.MultiheadAttention(24, 2, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.attn.qkv.weight)
        theirs.in_proj_bias.copy_(block.attn.qkv.bias.normal_())
        theirs.out_proj.weight.copy_(block.attn.proj.weight)
        theirs.out_proj.bias.copy_(block.attn.proj.bias.normal_())
    x, pos = torch.randn(3, 10, 24), torch.randn(3, 10, 24)
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    h = block.ln_1(x + pos)
    h = h + theirs(h, h, h, attn_mask=mask, need_weights=False)[0]
    h = h + block.mlp(block.ln_2(h))
    torch.testing.assert_close(block(x, pos, geometry()), h, atol=1e-5, rtol=1e-5)


def test_pointgpt_is_causal() -> None:
    model: Any = awake(PointGPT(5, **SMALL))
    seen: dict[str, Tensor] = {}
    model.blocks.layers[-1].register_forward_hook(lambda m, a, out: seen.__setitem__("x", out))
    g = model.group_divider(clouds())
    x, pos = model._sequence(g)
    model.blocks(x, pos, g)
    before = seen["x"]
    x[:, 6] += 1  # the token at place 7, behind the start
    model.blocks(x, pos, g)
    assert torch.equal(before[:, :7], seen["x"][:, :7]) and not torch.equal(before[:, 7:], seen["x"][:, 7:])


@pytest.mark.parametrize("temperature", [1.0, 10_000.0])
def test_sine_positions(temperature: float) -> None:
    xyz = torch.randn(2, 5, 3)
    found = SinePosition(32, temperature)(xyz)
    assert found.shape == (2, 5, 32) and bool((found[..., 30:] == 0).all())
    for axis in range(3):
        for i in range(10):
            angle = xyz[..., axis] * 2 * math.pi / temperature ** (2 * (i // 2) / 10)
            wave = angle.sin() if i % 2 == 0 else angle.cos()
            torch.testing.assert_close(found[..., 10 * axis + i], wave, atol=1e-5, rtol=1e-5)


def test_pointgpt_positions_swap() -> None:
    official, matched = PointGPT(5, **SMALL), PointGPT(5, **SMALL, swapped_positions=False)
    matched.load_state_dict(official.state_dict())
    g = official.group_divider(clouds())
    torch.testing.assert_close(official._sequence(g)[1][:, [1, 0]], matched._sequence(g)[1][:, :2])


def test_segmenter_equals_the_plain_formula() -> None:
    model: Any = awake(PartSegmenter(6, categories=3, **SMALL))
    points, category = clouds(), torch.tensor([0, 2, 1])
    g = model.group_divider(points)
    x = torch.cat(model.forward_taps(g), dim=2)  # [B, G, 3D]
    gaps = (points[:, :, None] - g.centers[:, None]).square().sum(-1)
    near = gaps.topk(3, largest=False)
    weight = 1 / (near.values + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    carried = torch.stack([(x[b][near.indices[b]] * weight[b][..., None]).sum(1) for b in range(len(x))])  # [B, N, 3D]
    f = torch.cat((points, carried), dim=2)
    head = model.propagation_0
    for conv, bn in zip(head.mlp_convs, head.mlp_bns, strict=True):
        f = F.relu(bn(F.conv1d(f.transpose(1, 2), conv.weight, conv.bias))).transpose(1, 2)
    label = model.label_conv[2](
        model.label_conv[1](F.one_hot(category, 3).float() @ model.label_conv[0].weight[..., 0].T)
    )
    cloud = torch.cat((x.amax(1), x.mean(1), label), dim=1)
    f = torch.cat((f, cloud[:, None].expand(-1, f.shape[1], -1)), dim=2).transpose(1, 2)
    f = F.relu(model.bns1(F.conv1d(f, model.convs1.weight, model.convs1.bias)))
    f = F.relu(model.bns2(F.conv1d(f, model.convs2.weight, model.convs2.bias)))
    wanted = F.conv1d(f, model.convs3.weight, model.convs3.bias).transpose(1, 2)
    torch.testing.assert_close(model(points, category), wanted, atol=1e-4, rtol=1e-4)


def test_segmenter_takes_the_ends_of_three_thirds() -> None:
    with torch.device("meta"):
        assert PartSegmenter(50).taps == (3, 7, 11)
        assert PartSegmenter(50, **SMALL).taps == (0, 1, 2)
        with pytest.raises(ConfigError, match="taps"):
            PartSegmenter(50, **SMALL, taps=(0, 1, 5))


def test_segmenter_without_a_category() -> None:
    model = awake(PartSegmenter(6, categories=3, **SMALL))
    assert model(clouds()).shape == (3, 40, 6)
    with pytest.raises(DataError, match="category"):
        model(clouds(), torch.zeros(2, dtype=torch.int64))
    assert awake(PartSegmenter(6, categories=0, **SMALL))(clouds()).shape == (3, 40, 6)


@pytest.mark.parametrize("make", [tiny, lambda: ReCon(5, **SMALL), lambda: PointGPT(5, **SMALL)])
def test_point_order_behind_the_first_does_not_matter(make: Any) -> None:
    """Sampling starts at point 0; all else is a set (on clouds without ties)."""
    model = awake(make())
    points = torch.randn(3, 40, 3)
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39)))
    torch.testing.assert_close(model(points[:, order]), model(points), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny, lambda: ReCon(5, **SMALL), lambda: PointGPT(5, **SMALL)])
def test_own_checkpointing_gives_the_same_gradients(make: Any) -> None:
    model, points = make().train(), clouds()
    for module in model.modules():
        if isinstance(module, DropPath | nn.Dropout):
            module.p = module.drop_prob = 0.0
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(points).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_drop_path() -> None:
    drop, x = DropPath(0.5).train(), torch.ones(1000, 2, 3)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, 2.0} and abs(float(y.mean()) - 1) < 0.2
    assert bool((y.flatten(1).std(1) == 0).all()), "whole samples drop"
    assert torch.equal(drop.eval()(x), x)


def test_lists_and_unknown_names() -> None:
    names = [info.name for info in backbones.list()]
    assert {"point-bert", "point-mae", "act", "recon", "recon-plain", "pointgpt-s", "pointgpt-b", "pointgpt-l"} <= set(
        names
    )
    assert [info.name for info in backbones.list("pointgpt-*")] == ["pointgpt-s", "pointgpt-b", "pointgpt-l"]
    with pytest.raises(UnknownNameError, match="Did you mean 'point-mae'"):
        backbones.build("point-maee", 5, pretrained=False, checkpoint="", options={})
    with pytest.raises(UnsupportedError, match="checkpoint=PATH"):
        backbones.build("point-mae", 5, pretrained=True, checkpoint="", options={})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"widht": 3}, "widht"),
        ({"num_heads": 5}, "no multiple of num_heads = 5"),
        ({"depth": 0}, "depth = 0"),
        ({"channels": 2}, "channels = 2"),
        ({"drop_path": 1.0}, "drop_path = 1.0"),
        ({"head": "deep"}, "head = 'deep'"),
    ],
)
def test_options_that_no_model_has(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        backbones.build("point-mae", 5, pretrained=False, checkpoint="", options=options)


def test_options_reach_the_model() -> None:
    model: Any = backbones.build("point-mae", 5, pretrained=False, checkpoint="", options={**SMALL, "channels": 6})
    assert model(torch.randn(2, 40, 6)).shape == (2, 5)
    facts = backbones.preprocessing("point-mae", model)
    assert facts["group_size"] == 6 and facts["groups"] == 8 and facts["num_points"] == 1024
    seg: Any = part_backbones.build("point-mae", 7, pretrained=False, checkpoint="", options={**SMALL, "categories": 2})
    assert seg(torch.randn(2, 40, 3), torch.tensor([0, 1])).shape == (2, 40, 7)


def test_from_scratch_initialisation() -> None:
    model: Any = backbones.build("point-mae", 5, pretrained=False, checkpoint="", options=SMALL)
    assert float(model.blocks.blocks[0].attn.proj.bias.detach().abs().max()) == 0
    assert abs(float(model.blocks.blocks[0].mlp.fc1.weight.detach().std()) - 0.02) < 0.002
