"""Point-BERT's part-segmentation head: its formula written out, sizes, keys, gradients, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.anatomy import anatomy_of
from peft_suite.errors import ConfigError, DataError
from peft_suite.pointcloud.anatomies.point_transformer import clouds
from peft_suite.pointcloud.anatomies.segmenter import example_bert
from peft_suite.pointcloud.backbones import part_backbones
from peft_suite.pointcloud.models.bert_parts import BertPartSegmenter, EdgeLayer

SHAPES = {  # of the full-size head
    "propagation_2.mlp_convs.0.weight": (1536, 387, 1),
    "propagation_1.mlp_convs.1.weight": (384, 1536, 1),
    "propagation_0.mlp_convs.0.weight": (1536, 403, 1),
    "propagation_0.mlp_bns.1.running_mean": (384,),
    "dgcnn_pro_2.layer1.0.weight": (512, 768, 1, 1),
    "dgcnn_pro_2.layer1.1.weight": (512,),
    "dgcnn_pro_1.layer2.0.weight": (384, 1024, 1, 1),
    "dgcnn_pro_1.layer2.1.bias": (384,),
    "conv1.weight": (128, 384, 1),
    "bn1.running_var": (128,),
    "conv2.weight": (50, 128, 1),
    "reduce_dim.weight": (384, 256),
    "encoder.second_conv.3.weight": (256, 512, 1),
}


def awake(**options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model whose norms do something, and a batch."""
    torch.manual_seed(0)
    model, batch = example_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight)  # of both signs
            torch.nn.init.normal_(module.bias)
    return model, batch


def test_sizes_of_the_full_network() -> None:
    with torch.device("meta"):
        model = part_backbones.build("point-bert", 50, pretrained=False, checkpoint="", options={})
    state = model.state_dict()
    assert {k: tuple(state[k].shape) for k in SHAPES} == SHAPES
    assert model.taps == (3, 7, 11) and model.levels == (512, 256) and model.categories == 16
    assert not any(k.endswith(("layer1.0.bias", "layer2.0.bias")) for k in state)


def nearest(queries: torch.Tensor, among: torch.Tensor, k: int) -> torch.Tensor:
    gaps = (queries[:, :, None].double() - among[:, None].double()).square().sum(-1)
    return gaps.sort(dim=2, stable=True).indices[..., :k]


def lifted(stage: Any, x: torch.Tensor, to: torch.Tensor, at: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    """The propagation as three nearest centres, concatenation and convolutions."""
    idx = nearest(to, at, 3)
    rows = torch.arange(len(x))[:, None, None]
    weight = 1 / ((to[:, :, None] - at[rows, idx]).square().sum(-1) + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    f = torch.cat((*more, to, (x[rows, idx] * weight[..., None]).sum(2)), dim=2).transpose(1, 2)
    for conv, norm in zip(stage.mlp_convs, stage.mlp_bns, strict=True):
        f = F.relu(norm(F.conv1d(f, conv.weight, conv.bias)))
    return f.transpose(1, 2)


def edge_layer(layer: Any, v: torch.Tensor, u: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The layer on all edges, as a convolution with kernel 1 and a norm over them."""
    near = v[torch.arange(len(v))[:, None, None], idx]  # [B, N, k, C]
    mine = u[:, :, None].expand_as(near)
    e = torch.cat((near - mine, mine), dim=3).permute(0, 3, 1, 2)
    e = F.leaky_relu(layer[1](F.conv2d(e, layer[0].weight)), 0.2)
    return e.amax(3).transpose(1, 2)


def upsampled(stage: Any, at: torch.Tensor, v: torch.Tensor, to: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    u = edge_layer(stage.layer1, v, u, nearest(to, at, 4))
    return edge_layer(stage.layer2, u, u, nearest(to, to, 4))


def test_head_equals_the_plain_formula() -> None:
    model, batch = awake()
    points, category = batch["points"], batch["category"]
    g = model.group_divider(points)
    early, middle, late = model.forward_taps(g)
    fine, coarse = model._level(points, 20), model._level(points, 12)
    assert torch.equal(fine[:, :12], coarse)  # farthest points of the whole cloud, both from point 0
    f2 = lifted(model.propagation_2, middle, coarse, g.centers)
    f1 = lifted(model.propagation_1, early, fine, g.centers)
    f2 = upsampled(model.dgcnn_pro_2, g.centers, late, coarse, f2)
    f1 = upsampled(model.dgcnn_pro_1, coarse, f2, fine, f1)
    known = F.one_hot(category, 3).float()[:, None].expand(-1, 40, -1)
    f0 = lifted(model.propagation_0, f1, points, fine, known).transpose(1, 2)
    h = F.relu(model.bn1(F.conv1d(f0, model.conv1.weight, model.conv1.bias)))
    wanted = F.conv1d(h, model.conv2.weight, model.conv2.bias).transpose(1, 2)
    torch.testing.assert_close(model(**batch), wanted, atol=2e-4, rtol=2e-4)


def test_an_edge_layer_equals_its_definition() -> None:
    torch.manual_seed(1)
    layer = EdgeLayer(6, 8)
    torch.nn.init.normal_(layer[1].weight)  # type: ignore[arg-type]
    v, u = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 7, 6, requires_grad=True)
    idx = torch.randint(5, (2, 7, 3))
    found, wanted = layer(v, u, idx), edge_layer(layer, v, u, idx)
    torch.testing.assert_close(found, wanted)
    seeds = torch.randn_like(found)
    mine = torch.autograd.grad((found * seeds).sum(), (v, u, layer[0].weight))
    theirs = torch.autograd.grad((wanted * seeds).sum(), (v, u, layer[0].weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_every_weight_gets_a_gradient_and_only_the_head_is_fresh() -> None:
    model, batch = awake()
    model.train()
    model(**batch).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    fresh = set(anatomy_of(model).fresh)
    names = {n for n, _ in model.named_parameters()}
    backbone = ("encoder.", "reduce_dim.", "cls_", "pos_embed.", "blocks.", "norm.")
    assert fresh == {n for n in names if not n.startswith(backbone)}
    trained = ps.adapt(example_bert()[0], "linear")
    assert {n.partition(".")[0] for n in fresh} == {
        *("propagation_0", "propagation_1", "propagation_2", "dgcnn_pro_1", "dgcnn_pro_2", "conv1", "bn1", "conv2")
    }
    assert trained is not None


def test_category_changes_the_answer_and_may_be_left_out() -> None:
    model, batch = awake()
    assert model(**batch).shape == (3, 40, 6)
    other = model(batch["points"], torch.tensor([1, 2, 1]))
    assert not torch.allclose(other[0], model(**batch)[0]) and torch.allclose(other[1:], model(**batch)[1:])
    with pytest.raises(DataError, match="category has shape"):
        model(batch["points"], torch.zeros(2, dtype=torch.int64))
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "groups": 8, "group_size": 6}
    alone = BertPartSegmenter(4, categories=0, levels=(20, 12), **sizes).eval()
    assert alone(clouds()).shape == (3, 40, 4)
    with pytest.raises(DataError, match="no level of 20"):
        alone(clouds()[:, :18])
    with pytest.raises(ConfigError, match="multiple of 4"):
        BertPartSegmenter(4, **{**sizes, "embed_dim": 18})
    with pytest.raises(ConfigError, match="the larger first"):
        BertPartSegmenter(4, levels=(12, 20), **sizes)


def test_checkpointing_computes_the_same() -> None:
    torch.manual_seed(0)
    model, batch = awake()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) or hasattr(module, "drop_prob"):
            module.eval()
    model(**batch).square().mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(**batch).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_a_point_bert_checkpoint_fills_all_but_the_head(tmp_path: Path) -> None:
    from peft_suite.pointcloud.checkpoints import load

    torch.manual_seed(3)
    model, _ = example_bert()
    with_head = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    head = set(anatomy_of(model).fresh)
    roots = {n.partition(".")[0] for n in head}
    state = {f"transformer_q.{k}": v for k, v in with_head.items() if k.partition(".")[0] not in roots}
    state |= {"transformer_k.norm.weight": torch.zeros(24), "transformer_q.lm_head.weight": torch.zeros(8, 24)}
    torch.save({"base_model": state}, tmp_path / "bert.pth")
    report = load(model, str(tmp_path / "bert.pth"))
    assert {k.partition(".")[0] for k in report.missing} == roots and report.layout == "Point-BERT"
    for key, value in model.state_dict().items():
        if key.partition(".")[0] not in roots:
            assert torch.equal(value, with_head[key]), key


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "bitfit",
        "ssf",
        "vpt",
        "vpt(deep=True, num_tokens=3)",
        "pointgst(rank=6, local=4)",
        "point-peft(num_prompts=4)",
    ],
)
def test_methods_act_below_the_head(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = example_bert()
    plain, _ = example_bert()
    plain.load_state_dict(model.state_dict())
    ps.adapt(model, method)
    if method.startswith("point-peft"):
        ps.events(model).calibrate([batch], lambda b: model(**b).square().mean())
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    model(**batch).square().mean().backward()
    assert not [n for n, p in adapter.named_parameters() if p.grad is None]
    assert not [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("adapters.")]
    model.eval()
    wanted = model(**batch)
    assert wanted.shape == (3, 40, 6) and not torch.allclose(wanted, plain(**batch))
    ps.save(model, tmp_path)
    ps.load(plain, tmp_path)
    torch.testing.assert_close(plain(**batch), wanted)
