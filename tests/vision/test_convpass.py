"""Convpass: the grid under any prefix and size, prefix tokens as 1x1 maps, drop path, counts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import peft_suite as ps
from peft_suite.errors import UnsupportedError
from peft_suite.vision.methods.convpass import ConvpassConfig, ConvpassPart
from peft_suite.vision.methods.grids import Grid

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY | options).eval()


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.adapters["default"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(("method", "branches"), [("convpass", 2), ("convpass-attn", 1)])
def test_counts_on_vit_b(method: str, branches: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    r, d = 8, 768
    want = 12 * branches * (2 * d * r + r + d + 9 * r * r + r)
    assert want == {2: 327_552, 1: 163_776}[branches]
    assert ps.plan(model, method).trainable == want + 100 * d + 100


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}, {"init_values": 0.5}, {"img_size": (16, 48)}],
)
def test_any_prefix_and_grid(options: dict[str, Any]) -> None:
    model = vit(**options)
    x = torch.randn(2, 3, *options.get("img_size", (32, 32)))
    base = model(x)
    ps.adapt(model, "convpass(bottleneck=4)")
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-6)
    assert (randomised(model)(x) - base).abs().max() > 1e-3


def test_dynamic_image_size() -> None:
    model = vit(dynamic_img_size=True)
    randomised(ps.adapt(model, "convpass(bottleneck=4)"))
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    with pytest.raises(UnsupportedError, match="24 patch tokens form no grid of the aspect ratio 1:1"):
        model(torch.randn(2, 3, 32, 48))


def test_grids() -> None:
    assert Grid((14, 14), 1).of(196) == (14, 14)
    assert Grid((14, 14), 1).of(256) == (16, 16)
    assert Grid((2, 6), 1).of(48) == (4, 12)
    with pytest.raises(UnsupportedError):
        Grid((2, 6), 1).of(36)


def test_prefix_tokens_are_one_by_one_maps() -> None:
    torch.manual_seed(0)
    part = ConvpassPart(6, ConvpassConfig(bottleneck=4, scale=0.5, xavier=True), Grid((2, 3), 2), 0.0).eval()
    nn.init.normal_(part.up.weight)
    nn.init.normal_(part.conv.bias)
    x = torch.randn(2, 2 + 6, 6)

    def literal(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
        gelu = lambda t: t * torch.sigmoid(1.702 * t)  # noqa: E731
        m = gelu(part.down(tokens)).reshape(2, h, w, 4).permute(0, 3, 1, 2)
        m = part.conv(m).permute(0, 2, 3, 1).reshape(2, h * w, 4)
        return 0.5 * part.up(gelu(m))

    wanted = torch.cat([literal(x[:, :1], 1, 1), literal(x[:, 1:2], 1, 1), literal(x[:, 2:], 2, 3)], dim=1)
    torch.testing.assert_close(part(x), wanted)
    torch.testing.assert_close(part(x[:, 2:].unflatten(1, (2, 3))).flatten(1, 2), wanted[:, 2:])  # Swin's form


def test_initialisation() -> None:
    identity = torch.zeros(4, 4, 3, 3)
    identity[:, :, 1, 1] = torch.eye(4)
    part = ConvpassPart(6, ConvpassConfig(bottleneck=4), Grid((2, 2), 1), 0.0)
    assert torch.equal(part.conv.weight, identity) and not part.up.weight.any() and not part.down.bias.any()
    bound = (6 / 10) ** 0.5
    assert 0.5 * bound < float(part.down.weight.detach().abs().max()) <= bound
    assert ConvpassPart(6, ConvpassConfig(bottleneck=4, xavier=True), Grid((2, 2), 1), 0.0).conv.weight.all()


def test_drop_path_is_that_of_the_block_and_independent() -> None:
    model = vit(drop_path_rate=0.6)
    ps.adapt(model, "convpass(bottleneck=4, dropout=0)")
    rates = [p.drop_path for _, p in model.adapters["default"].parts() if isinstance(p, ConvpassPart)]
    assert rates == pytest.approx([0, 0, 0.6, 0.6])
    part = next(p for _, p in model.adapters["default"].parts() if isinstance(p, ConvpassPart) and p.drop_path)
    nn.init.normal_(part.up.weight)
    x = torch.randn(400, 17, 24)
    whole, dropped = part.eval()(x), part.train()(x)
    kept = dropped.flatten(1).any(1)
    assert 0.3 < float(kept.float().mean()) < 0.5
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.4)


def test_swin_and_what_it_refuses() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2)
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    base = swin(x)
    ps.adapt(swin, "convpass(bottleneck=4)")
    torch.testing.assert_close(swin(x), base, rtol=0, atol=1e-6)
    for name in ("convnext_atto", "mixer_s32_224", "resnet18"):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(UnsupportedError, match="convpass convolves the token grid"):
            ps.plan(model, "convpass")
