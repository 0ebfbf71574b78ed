"""HST: counts, taps that are read once and never copied, buffers, the pyramid, the head of its own."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import peft_suite as ps
from peft_suite.errors import AdapterError, UnsupportedError
from peft_suite.vision.methods.hst import HSTConfig, SideHead, SideNetwork, Tap, pyramid

METHOD = "hst(dims=[8, 12], heads=[2, 3])"


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | options).eval()


def adapted(method: str = METHOD, **options: Any) -> Any:
    torch.manual_seed(1)
    return ps.adapt(vit(**options), method)


@pytest.mark.parametrize("classes", [100, 7])
def test_count_on_vit_b(classes: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=classes)
    d, dims = 768, (32, 48, 64, 72)
    norms = 24 * 2 * d
    blocks = sum(3 * (12 * m * m + 13 * m) for m in dims)
    stem = 27 * 32 + 64 + 4 * 32 * 32 + 32 + 64
    downs = sum(9 * a * b + b + 2 * b for a, b in itertools.pairwise(dims))
    bridges = sum(d * m + m for m in dims)
    layer_norms = sum(3 * 2 * m + 2 * m for m in dims)
    assert (norms, blocks, stem + downs, bridges, layer_norms) == (36_864, 462_312, 88_616, 166_104, 1_728)
    want = norms + blocks + stem + downs + bridges + layer_norms + 12 * d
    assert want == 764_840
    assert ps.plan(model, "hst").trainable == want + 72 * classes + classes


def test_taps_are_read_once_and_left_behind_by_copies() -> None:
    model, x = adapted(), torch.randn(2, 3, 32, 32)
    taps = next(p.taps for _, p in model.adapters["default"].parts() if isinstance(p, Tap))
    wanted = model(x)
    assert not taps.found and taps.image is None
    model.forward_features(x)  # never reaches the head
    assert taps.found
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = {id(p.taps) for _, p in twin.adapters["default"].parts() if hasattr(p, "taps")}
        assert len(other) == 1 and id(taps) not in other
        assert torch.equal(twin(x), wanted)
    assert torch.equal(model(x), wanted)


def test_a_forward_without_the_blocks_says_so() -> None:
    model = adapted()
    with pytest.raises(AdapterError, match="0 of 2 blocks"):
        model.head(torch.randn(1, 24))


def test_the_backbones_class_token_and_head_do_not_matter() -> None:
    model, x = adapted(), torch.randn(2, 3, 32, 32)
    wanted = model(x)
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.norm.weight.add_(1.0)
    assert torch.equal(model(x), wanted)
    names = {n for n, _ in model.adapters["default"].named_parameters()}
    assert not any(n.startswith("head.trained") for n in names)
    assert {f"blocks.{i}.norm{j}.trained.{n}" for i in (0, 1) for j in (1, 2) for n in ("weight", "bias")} <= names


def test_buffers_move_and_are_saved(tmp_path: Path) -> None:
    model, x = adapted().train(), torch.randn(4, 3, 32, 32)
    before = {k: v.clone() for k, v in model.adapters["default"].state_dict().items() if "running" in k}
    assert len(before) == 4  # stem and head
    model(x)
    after = model.adapters["default"].state_dict()
    assert all(not torch.equal(v, after[k]) for k, v in before.items())
    model.eval()
    ps.save(model, tmp_path)
    fresh = vit()
    ps.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert not [k for k, _ in vit().named_buffers() if "running" in k]


def test_a_second_adapter_may_train_statistics_of_the_backbone_only() -> None:
    model = adapted()
    ps.adapt(model, METHOD, name="second", batchnorm="train")
    assert not [k for k, _ in model.adapters["second"].parts() if k.startswith("adapters.")]


def test_side_network_is_what_the_card_says() -> None:
    torch.manual_seed(0)
    config = HSTConfig(dims=(8, 12), heads=(2, 3))
    net = SideNetwork(6, 4, config).eval()
    image = torch.randn(2, 3, 32, 32)
    taps = [(torch.randn(2, 1, 6), torch.randn(2, 6, 4, 4)) for _ in range(4)]
    maps = net(image, taps)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 12, 4, 4)]
    x = net.down_norms[0](net.stem(image).flatten(2).transpose(1, 2))
    for i in (0, 1):  # literally: resize the wide map, then bridge
        g, f = taps[i]
        v = net.bridges[0](F.interpolate(f, (8, 8), mode="bilinear").flatten(2).transpose(1, 2))
        g = net.meta_norms[i](net.bridges[0](g))
        block: Any = net.blocks[i]
        memory = torch.cat([g, v.mean(1, keepdim=True)], 1)
        h = block.norm1(x)
        heads = []
        for q, k, w in zip(*(t.chunk(2, 2) for t in (block.q(h), block.k(memory), block.v(memory))), strict=True):
            heads.append((q @ k.transpose(1, 2) / 2.0).softmax(-1) @ w)
        x = x + block.proj(torch.cat(heads, 2))
        x = x + v
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), net.norms[0](x), atol=1e-5, rtol=1e-4)
    assert net.meta_norms[0].eps == 1e-5 and net.norms[0].eps == 1e-6


def test_pyramid() -> None:
    model, x = adapted(), torch.randn(2, 3, 32, 32)
    maps = pyramid(model, x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 8, 8), (2, 12, 4, 4)]
    side = next(p for _, p in model.adapters["default"].parts() if isinstance(p, SideHead))
    torch.testing.assert_close(side.head(side.norm(maps[-1].mean((2, 3)))), model(x))
    with pytest.raises(AdapterError, match="HST"):
        pyramid(ps.adapt(vit(), "linear"), x)


def test_drop_path_rises() -> None:
    net = SideNetwork(6, 4, HSTConfig(dims=(8, 12), heads=(2, 3), drop_path=0.3))
    assert [round(b.drop_path, 6) for b in net.blocks] == [0.0, 0.1, 0.2, 0.3]  # type: ignore[union-attr, arg-type]


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="4 stages"):
        ps.plan(vit(), "hst")
    with pytest.raises(UnsupportedError, match="none or several"):
        ps.plan(vit(num_classes=0), METHOD)
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UnsupportedError, match="plain vision transformers"):
        ps.plan(swin, "hst")
