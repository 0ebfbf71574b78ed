"""IDPT: the generator against its definition, what trains, where the prompt stands, what the classifier reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import ConfigError, UnsupportedError
from peft_suite.pointcloud.anatomies import pointgpt, recon, segmenter
from peft_suite.pointcloud.anatomies.point_transformer import clouds, example, example_bert, tiny
from peft_suite.pointcloud.backbones import backbones
from peft_suite.pointcloud.methods.idpt import EdgeConv, GraphGenerator, nearest

FAMILIES = {"plain": example, "bert": example_bert, "recon": recon.example, "pointgpt": pointgpt.example}
GENERATORS = ("dgcnn", "dgcnn_light2", "dgcnn_light", "mlp", "transformer")
CLS_TYPES = ("all", "promptcls", "pointcls", "promptonly")
NEVER_CALLED = 2 * 384  # parameters of a batch norm that two official generators count and never call


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def adapted(method: str, **options: object) -> tuple[Any, Any]:
    model: Any = ps.adapt(tiny(**options), method)
    return model, model.adapters["default"]


@pytest.mark.parametrize(
    ("generator", "published", "unused"),
    [
        ("dgcnn", 1_696_783, 0),
        ("dgcnn_light2", 1_253_647, 0),
        ("dgcnn_light", 811_279, NEVER_CALLED),
        ("mlp", 515_599, NEVER_CALLED),
    ],
)
def test_counts_on_point_mae(generator: str, published: int, unused: int) -> None:
    for classes, more in ((15, 0), (40, 6_425)):
        with torch.device("meta"):
            model = backbones.build("point-mae", classes, pretrained=False, checkpoint="", options={})
        assert ps.plan(model, {"name": "idpt", "generator": generator}).trainable == published + more - unused


def definition(layer: EdgeConv, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Every edge is made: [x_j - x_i ; x_i]."""
    idx = nearest(x, layer.neighbors)
    near = torch.stack([cloud[rows] for cloud, rows in zip(x, idx, strict=True)])  # [B, G, k, D]
    own = x.unsqueeze(2).expand_as(near)
    edges = torch.cat((near - own, own), dim=3) @ layer.conv.weight.T
    out: Tensor = F.leaky_relu(norm(edges.permute(0, 3, 1, 2)), 0.2).amax(3)
    return out.transpose(1, 2)


def random_layer(dim: int, neighbors: int) -> tuple[EdgeConv, nn.BatchNorm2d]:
    layer, norm = EdgeConv(dim, neighbors), nn.BatchNorm2d(dim)
    with torch.no_grad():
        layer.norm.weight.normal_()  # of both signs
        layer.norm.bias.normal_()
        layer.norm.running_mean.normal_()  # type: ignore[union-attr]
        layer.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    norm.load_state_dict(layer.norm.state_dict())
    return layer, norm


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_edge_layer_equals_its_definition(training: bool, offset: float) -> None:
    """Outputs, gradients and moving statistics; also where nodes lie far from the origin and close together."""
    layer, norm = (m.double().train(training) for m in random_layer(12, 5))
    x = (torch.randn(3, 17, 12).double() + offset).requires_grad_()
    again = x.detach().clone().requires_grad_()
    found, wanted = layer(x), definition(layer, again, norm)
    torch.testing.assert_close(found, wanted)
    goal = torch.randn_like(found)
    weight = layer.conv.weight
    mine = torch.autograd.grad((found * goal).sum(), [x, weight, layer.norm.weight, layer.norm.bias])
    theirs = torch.autograd.grad((wanted * goal).sum(), [again, weight, norm.weight, norm.bias])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(layer.norm.state_dict()[key], value)


def test_edge_layer_in_single_precision() -> None:
    layer, norm = (m.train() for m in random_layer(48, 8))
    x = torch.randn(2, 24, 48) + 3
    torch.testing.assert_close(layer(x), definition(layer, x, norm), atol=1e-5, rtol=1e-5)


def test_edge_layer_keeps_no_edges() -> None:
    """For backward: a few tensors of the nodes' size; the edges alone would be 20."""
    layer, _ = random_layer(32, 20)
    x = torch.randn(2, 40, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer.train()(x)
    weights = 4 * 2 * 32 * 32 * 2  # and the split copy
    assert sum(kept.values()) - weights < 14 * x.numel() * x.element_size()


def test_order_of_patches_does_not_matter() -> None:
    generator = GraphGenerator(24, 3, 5).eval()
    x = torch.randn(2, 16, 24)
    order = torch.randperm(16)
    torch.testing.assert_close(generator(x, x), generator(x[:, order], x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("generator", GENERATORS)
def test_every_generator_trains_on_every_family(family: str, generator: str) -> None:
    model, batch = FAMILIES[family]()
    base = model(batch)
    ps.adapt(model, {"name": "idpt", "generator": generator, "neighbors": 3, "prompt_layer": 0})
    ps.verify(model, batch)
    frozen = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("adapters.")]
    assert not frozen
    ps.remove(model)
    assert torch.equal(model(batch), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls_type", CLS_TYPES)
def test_what_the_classifier_reads(family: str, cls_type: str) -> None:
    model: Any = FAMILIES[family]()[0]
    batch = clouds()
    ps.adapt(model, {"name": "idpt", "cls_type": cls_type, "neighbors": 3})
    seen: dict[str, Tensor] = {}
    owner = model.blocks if family == "pointgpt" else model
    owner.cls_head_finetune.register_forward_hook(lambda m, args, out: seen.update(feature=args[0]))
    tokens = model.forward_features(batch)
    model(batch)
    causal, prefix = family == "pointgpt", {"plain": 1, "bert": 1, "recon": 3, "pointgpt": 2}[family]
    at = 0 if causal else prefix
    rest = torch.cat((tokens[:, :at], tokens[:, at + 1 :]), dim=1)
    assert tokens.shape[1] == prefix + 1 + 8
    pieces = {
        "class": rest[:, 1 if causal else 0 : prefix].flatten(1),
        "prompt": tokens[:, at],
        "patches": rest[:, prefix:].amax(1),
    }
    read = {
        "all": ("class", "prompt", "patches"),
        "promptcls": ("class", "prompt"),
        "pointcls": ("class", "patches"),
        "promptonly": ("prompt",),
    }[cls_type]
    torch.testing.assert_close(seen["feature"], torch.cat([pieces[name] for name in read], dim=1))


def test_nothing_changes_before_the_prompt_enters() -> None:
    model: Any = tiny(depth=4)
    batch, outputs = clouds(), []
    for block in model.blocks.blocks:
        block.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(batch)
    ps.adapt(model, "idpt(neighbors=3, prompt_layer=2)")
    model(batch)
    plain, prompted = outputs[:4], outputs[4:]
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], prompted[:2], strict=True))
    assert [out.shape[1] for out in prompted] == [9, 9, 10, 10]


def test_prompt_and_its_position_follow_the_formula() -> None:
    model, adapter = adapted("idpt(neighbors=3, prompt_layer=1)", depth=3)
    batch = clouds()
    tokens = model.forward_features(batch)
    part = adapter.get_submodule("blocks.blocks.1.idpt")
    with ps.disabled(model):
        geometry = model.group_divider(batch)
        x = torch.cat((model.cls_token.expand(3, -1, -1), model.encoder(geometry.groups)), dim=1)
        pos = torch.cat((model.cls_pos.expand(3, -1, -1), model.pos_embed(geometry.centers)), dim=1)
        x = model.blocks.blocks[0](x, pos, geometry)
        x = torch.cat((x[:, :1], part.generator(x[:, 1:], pos[:, 1:]), x[:, 1:]), dim=1)
        pos = torch.cat((pos[:, :1], part.position.expand(3, -1, -1), pos[:, 1:]), dim=1)
        for block in model.blocks.blocks[1:]:
            x = block(x, pos, geometry)
        wanted = model.norm(x)
    torch.testing.assert_close(tokens, wanted)


def test_position_is_fixed_unless_asked_for_and_travels(tmp_path: Path) -> None:
    _, adapter = adapted("idpt(neighbors=3, train_position=True)")
    assert "blocks.blocks.1.idpt.position" in dict(adapter.named_parameters())
    model, adapter = adapted("idpt(neighbors=3)")
    batch, plain = clouds(), tiny()
    assert "blocks.blocks.1.idpt.position" not in dict(adapter.named_parameters())
    plain.load_state_dict({k: v.clone() for k, v in model.state_dict().items() if not k.startswith("adapters.")})
    model.train()
    model(batch).square().sum().backward()
    model.eval()
    assert adapter.get_submodule("blocks.blocks.1.idpt.generator.norm").num_batches_tracked == 1
    wanted = model(batch)
    ps.save(model, tmp_path)
    ps.load(plain, tmp_path)
    assert torch.equal(plain(batch), wanted)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="classifier of whole clouds"):
        ps.adapt(segmenter.example_bert()[0], "idpt")
    with pytest.raises(UnsupportedError, match="choose -2 to 1"):
        ps.adapt(tiny(), "idpt(prompt_layer=2)")
    with pytest.raises(ConfigError, match="neighbors"):
        ps.adapt(tiny(), "idpt(neighbors=0)")
    with pytest.raises(ps.errors.MergeError):
        ps.merge(adapted("idpt(neighbors=3)")[0])
